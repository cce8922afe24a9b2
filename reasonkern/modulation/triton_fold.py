"""What tokens do to requests in Triton, with the results of ``reference_fold.py``.

Everything is over the rows of a program at once: a row is an element of every tensor.
"""

from typing import NamedTuple

import triton
import triton.language as tl

from . import layout as at

PARTS, THINK_START, THINK_END = (tl.constexpr(k) for k in (at.PARTS, at.THINK_START, at.THINK_END))
ADDED_SETS, TRACK_FROM, END_LENGTH, MIN_TOKENS, WAIT_LENGTH = (
    tl.constexpr(k)
    for k in (at.ADDED_SETS, at.TRACK_FROM, at.END_LENGTH, at.MIN_TOKENS, at.WAIT_LENGTH)
)
END, FAILURE, WAIT = (tl.constexpr(k) for k in (at.END, at.FAILURE, at.WAIT))
ACTIVE, TIP, BUDGET, MIN_THINK = (
    tl.constexpr(k) for k in (at.ACTIVE, at.TIP, at.BUDGET, at.MIN_THINK)
)
BEFORE, THINKING, CLOSED = (tl.constexpr(k) for k in (at.BEFORE, at.THINKING, at.CLOSED))
DONE = tl.constexpr(at.DONE)
T, SPENT, SWITCH, PHASE, PHRASE, WAIT_AT, IGNORE, STOPPED = (
    tl.constexpr(k)
    for k in (at.T, at.SPENT, at.SWITCH, at.PHASE, at.PHRASE, at.WAIT_AT, at.IGNORE, at.STOPPED)
)
RECORD_WIDTH, SET_ENTRIES, SET_BITS = (
    tl.constexpr(k) for k in (at.RECORD_WIDTH, at.SET_ENTRIES, at.SET_BITS)
)


class Progress(NamedTuple):
    """Columns of progress."""

    t: tl.tensor
    spent: tl.tensor
    switched: tl.tensor
    phase: tl.tensor
    phrase: tl.tensor
    wait: tl.tensor
    ignore: tl.tensor
    stopped: tl.tensor


@triton.jit
def find_slots(slot, records, slots):
    """(whether the row's slot is in use, its record, that of slot 0 instead of padding)."""
    inside = (slot >= 0) & (slot < slots)
    record = records + tl.where(inside, slot, 0) * RECORD_WIDTH
    return inside & ((tl.load(record + PARTS) & ACTIVE) != 0), record


@triton.jit
def number(column):
    """The double of a column."""
    return tl.load(column).to(tl.float64, bitcast=True)


@triton.jit
def load_progress(row):
    return Progress(
        tl.load(row + T), tl.load(row + SPENT), tl.load(row + SWITCH), tl.load(row + PHASE),
        tl.load(row + PHRASE), tl.load(row + WAIT_AT), tl.load(row + IGNORE),
        tl.load(row + STOPPED),
    )  # fmt: skip


@triton.jit
def store_progress(row, p, mask):
    tl.store(row + T, p.t, mask=mask)
    tl.store(row + SPENT, p.spent, mask=mask)
    tl.store(row + SWITCH, p.switched, mask=mask)
    tl.store(row + PHASE, p.phase, mask=mask)
    tl.store(row + PHRASE, p.phrase, mask=mask)
    tl.store(row + WAIT_AT, p.wait, mask=mask)
    tl.store(row + IGNORE, p.ignore, mask=mask)
    tl.store(row + STOPPED, p.stopped, mask=mask)


@triton.jit
def anywhere(condition):
    return tl.max(condition.to(tl.int32)) > 0


@triton.jit
def entry(record, column, index):
    """Element `index` of the array that begins at a column; 0 where the index is negative."""
    return tl.load(record + column + tl.maximum(index, 0))


@triton.jit
def load_ids(entries, mask):
    """The ids of entries of sets, and the bits of the sets that hold them."""
    entry = tl.load(entries, mask=mask, other=0)
    return entry & 0xFFFFFFFF, entry >> SET_BITS


@triton.jit
def holds(sets, index, token, asked):
    """Whether a set holds a token, where that is asked; elements of one shape."""
    low = tl.load(sets + index, mask=asked, other=0)
    stop = tl.load(sets + index + 1, mask=asked, other=0)
    high = stop
    while anywhere(low < high):
        middle = low + (high - low) // 2
        ids, _ = load_ids(sets + SET_ENTRIES + middle, low < high)
        below = ids < token
        low, high = (
            tl.where((low < high) & below, middle + 1, low),
            tl.where((low < high) & (below == 0), middle, high),
        )
    ids, _ = load_ids(sets + SET_ENTRIES + low, low < stop)
    return (low < stop) & (ids == token)


@triton.jit
def must_think(record, p):
    few = (p.spent < tl.load(record + MIN_TOKENS)) | (p.ignore > 0)
    return ((tl.load(record + PARTS) & MIN_THINK) != 0) & (p.phase == THINKING) & few


# ---- what a token does


@triton.jit
def fold_wait(record, p, token):
    length = tl.load(record + WAIT_LENGTH)
    continues = (p.wait > 0) & (token == entry(record, WAIT, p.wait))
    starts = (continues == 0) & must_think(record, p) & (token == tl.load(record + WAIT))
    following = tl.where(p.wait + 1 == length, 0, p.wait + 1)
    wait = tl.where(continues, following, (starts & (length > 1)).to(tl.int64))
    return wait, p.ignore - (starts & (p.ignore > 0)).to(tl.int64)


@triton.jit
def fold_phrase(record, p, token):
    """A Knuth-Morris-Pratt automaton that runs from that many spent tokens, TRACK_FROM, on."""
    thinking = p.phase == THINKING
    runs = ((tl.load(record + PARTS) & BUDGET) != 0) & (p.phrase != DONE)
    runs = runs & (p.spent >= tl.load(record + TRACK_FROM)) & (thinking | (p.phrase > 0))
    matched = tl.where(runs, p.phrase, 0)
    falls = (matched > 0) & (entry(record, END, matched) != token)
    while anywhere(falls):
        matched = tl.where(falls, entry(record, FAILURE, matched - 1), matched)
        falls = (matched > 0) & (entry(record, END, matched) != token)
    matched += (entry(record, END, matched) == token).to(tl.int64)
    stays_open = thinking & (token != tl.load(record + THINK_END))
    given_up = (stays_open == 0) & (matched != p.phrase + 1)
    done = given_up | (matched == tl.load(record + END_LENGTH))
    return tl.where(runs, tl.where(done, DONE, matched), p.phrase)


@triton.jit
def fold(record, sets, p, token, where):
    """Progress after one more generated token, in the rows of `where`."""
    wait, ignore = fold_wait(record, p, token)
    phrase = fold_phrase(record, p, token)
    thinking = p.phase == THINKING
    closes = thinking & (token == tl.load(record + THINK_END))
    opens = (p.phase == BEFORE) & (token == tl.load(record + THINK_START))
    phase = tl.where(closes, CLOSED, tl.where(opens, THINKING, p.phase))
    spent = tl.where(opens, 0, p.spent + (thinking & (closes == 0)).to(tl.int64))
    t = p.t + 1
    tips = where & ((tl.load(record + PARTS) & TIP) != 0)
    switches = holds(sets, tl.load(record + ADDED_SETS + 1), token, tips)
    return Progress(
        tl.where(where, t, p.t),
        tl.where(where, spent, p.spent),
        tl.where(where & switches, t, p.switched),
        tl.where(where, phase, p.phase),
        tl.where(where, phrase, p.phrase),
        tl.where(where, wait, p.wait),
        tl.where(where, ignore, p.ignore),
        p.stopped,
    )


# ---- along a path of drafts


@triton.jit
def fold_chain(record, sets, p, row, drafts, draft_tokens):
    """Over the tokens of the rows row - drafts + 1 to row, up to the first -1."""
    alive = drafts > 0
    for j in tl.range(0, tl.max(drafts, 0)):
        alive = alive & (j < drafts)
        token = tl.load(draft_tokens + row - drafts + 1 + j, mask=alive, other=-1)
        alive = alive & (token >= 0)
        p = fold(record, sets, p, token, alive)
    return p


@triton.jit
def fold_tree(record, sets, p, node, on, parents, draft_tokens):
    """Over the tokens of a node's ancestors below the root and its own.

    Paths are short, so each ancestor is looked for from below.
    """
    depth = node * 0
    above = tl.where(on, node, 0)
    while anywhere(above > 0):
        depth += (above > 0).to(depth.dtype)
        above = tl.load(parents + above, mask=above > 0, other=0)
    longest = tl.max(depth, 0)
    alive = depth > 0
    for j in tl.range(0, longest):
        at_node = node
        for k in tl.range(0, longest - 1 - j):
            climbs = k < depth - 1 - j
            at_node = tl.where(
                climbs, tl.load(parents + at_node, mask=climbs & on, other=0), at_node
            )
        alive = alive & (j < depth)
        token = tl.load(draft_tokens + at_node, mask=alive, other=-1)
        alive = alive & (token >= 0)
        p = fold(record, sets, p, token, alive)
    return p
