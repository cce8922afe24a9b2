"""What a request asks of its row, and what that does to the logits, in Triton.

The definition, with the same names, is ``reference.py``. A row is an element of every tensor.
"""

from typing import NamedTuple

import triton
import triton.language as tl

from . import layout as at
from . import reference
from .triton_fold import (
    ADDED_SETS,
    BUDGET,
    DONE,
    END,
    MIN_THINK,
    PARTS,
    SET_ENTRIES,
    THINK_END,
    THINKING,
    TIP,
    TRACK_FROM,
    WAIT,
    anywhere,
    entry,
    holds,
    load_ids,
    must_think,
    number,
)

INF = tl.constexpr(float("inf"))
FORCED = tl.constexpr(reference.FORCED)
BAN_SET, TIP_SPAN, BUDGET_TOKENS, WINDOWS, POINTS, EOS, WINDOW, POINT = (
    tl.constexpr(k)
    for k in (
        at.BAN_SET, at.TIP_SPAN, at.BUDGET_TOKENS, at.WINDOWS, at.POINTS, at.EOS, at.WINDOW,
        at.POINT,
    )
)  # fmt: skip
AMPLITUDE, PERIOD, SHIFT, ALPHA, BIAS, SOFT_FROM, SOFT_MARGIN = (
    tl.constexpr(k)
    for k in (
        at.AMPLITUDE, at.PERIOD, at.SHIFT, at.ALPHA, at.BIAS, at.SOFT_FROM, at.SOFT_MARGIN,
    )
)  # fmt: skip
CYCLIC, CONSTANT, SCHEDULE, BAN, SOFT, DEEPCONF = (
    tl.constexpr(k) for k in (at.CYCLIC, at.CONSTANT, at.SCHEDULE, at.BAN, at.SOFT, at.DEEPCONF)
)
MAX_WINDOWS, MAX_POINTS = tl.constexpr(at.MAX_WINDOWS), tl.constexpr(at.MAX_POINTS)


class Added(NamedTuple):
    """What the parts add, in double, 0 where a part adds nothing, and the sets they add it to."""

    cyclic: tl.tensor
    tip: tl.tensor
    constant: tl.tensor
    schedule: tl.tensor
    cyclic_set: tl.tensor
    tip_set: tl.tensor
    constant_set: tl.tensor
    schedule_set: tl.tensor


class Control(NamedTuple):
    """An id or set of -1 asks for nothing."""

    force: tl.tensor
    added: Added
    ban: tl.tensor
    end: tl.tensor
    wait: tl.tensor
    soft: tl.tensor
    weight: tl.tensor
    margin: tl.tensor


class Rows(NamedTuple):
    """Pointers to the rows of logits and to the sets, the rows' length and which to modulate."""

    logits: tl.tensor
    sets: tl.tensor
    vocab: tl.tensor
    on: tl.tensor


# ---- what a request asks of its row


@triton.jit
def remainder(x, c):
    """x mod c for x >= 0, exactly; a quotient's product is kept in two parts (Dekker)."""
    while anywhere(x >= c):
        q = tl.maximum(tl.floor(x / c * (1 - 2.0**-52)), 1.0)  # not above the quotient
        big_q, big_c = q * 134217729.0, c * 134217729.0
        high_q, high_c = big_q - (big_q - q), big_c - (big_c - c)
        low_q, low_c = q - high_q, c - high_c
        product = q * c
        rest = high_q * high_c - product + high_q * low_c + low_q * high_c + low_q * low_c
        x = tl.where(x >= c, x - product - rest, x)
    return x


@triton.jit
def wave(amplitude, period, shift, t):
    r = remainder(t.to(tl.float64), period)
    u = remainder(r + shift * period + 0.75 * period, period)
    return amplitude * tl.abs(4 * u / period - 2) - amplitude


@triton.jit
def in_windows(record, t):
    k = tl.arange(0, MAX_WINDOWS)[None, :]
    n = tl.load(record + WINDOWS)
    used = k < n[:, None]
    low = tl.load(record[:, None] + WINDOW + 2 * k, mask=used, other=0)
    high = tl.load(record[:, None] + WINDOW + 2 * k + 1, mask=used, other=0)
    inside = used & (t[:, None] >= low) & (t[:, None] < high)
    return (n == 0) | (tl.max(inside.to(tl.int32), 1) > 0)


@triton.jit
def scheduled(record, t):
    """Linear between the points, constant outside them."""
    k = tl.arange(0, MAX_POINTS)[None, :]
    last = tl.maximum(tl.load(record + POINTS) - 1, 0)
    times = tl.load(record[:, None] + POINT + 2 * k)
    left = tl.sum(((times <= t[:, None]) & (k <= last[:, None])).to(tl.int64), 1) - 1
    low = POINT + 2 * tl.maximum(left, 0)
    high = POINT + 2 * tl.minimum(tl.maximum(left + 1, 0), last)
    t0, t1 = tl.load(record + low), tl.load(record + high)
    v0, v1 = number(record + low + 1), number(record + high + 1)
    share = (t - t0).to(tl.float64) / tl.maximum(t1 - t0, 1).to(tl.float64)
    return tl.where((left < 0) | (low == high), v0, v0 + share * (v1 - v0))


@triton.jit
def forced_id(record, parts, p):
    eos = tl.load(record + EOS)
    stops = ((parts & DEEPCONF) != 0) & (p.stopped != 0) & (eos >= 0)
    spent = ((parts & BUDGET) != 0) & (p.spent >= tl.load(record + BUDGET_TOKENS))
    spent = spent & (p.phrase != DONE) & ((p.phase == THINKING) | (p.phrase > 0))
    waits = ((parts & MIN_THINK) != 0) & (p.wait > 0)
    force = tl.where(waits, entry(record, WAIT, p.wait), -1)
    force = tl.where(spent, entry(record, END, p.phrase), force)
    return tl.where(stops, eos, force)


@triton.jit
def additions(record, parts, p, thinking):
    has = thinking & ((parts & CYCLIC) != 0)
    period = tl.where(has, number(record + PERIOD), 1.0)
    cyclic = wave(number(record + AMPLITUDE), period, number(record + SHIFT), p.t)
    cyclic = tl.where(has & in_windows(record, p.t), cyclic, 0.0)
    near = thinking & ((parts & TIP) != 0) & (p.t < p.switched + tl.load(record + TIP_SPAN))
    tip = tl.where(near, -number(record + ALPHA), 0.0)
    constant = tl.where(thinking & ((parts & CONSTANT) != 0), number(record + BIAS), 0.0)
    has = thinking & ((parts & SCHEDULE) != 0)
    schedule = tl.where(has, scheduled(record, p.t), 0.0)
    return Added(
        cyclic, tip, constant, schedule,
        tl.where(cyclic != 0, tl.load(record + ADDED_SETS), -1),
        tl.where(tip != 0, tl.load(record + ADDED_SETS + 1), -1),
        tl.where(constant != 0, tl.load(record + ADDED_SETS + 2), -1),
        tl.where(schedule != 0, tl.load(record + ADDED_SETS + 3), -1),
    )  # fmt: skip


@triton.jit
def control_of(record, p):
    parts = tl.load(record + PARTS)
    thinking = p.phase == THINKING
    minimum = must_think(record, p)
    tokens = tl.load(record + BUDGET_TOKENS)
    ramps = thinking & ((parts & SOFT) != 0) & (p.phrase != DONE)
    ramps = ramps & (p.spent >= tl.load(record + TRACK_FROM)) & (p.spent < tokens)
    start = number(record + SOFT_FROM)
    span = tl.where(ramps, tokens.to(tl.float64) - start, 1.0)
    return Control(
        forced_id(record, parts, p),
        additions(record, parts, p, thinking),
        tl.where(thinking & ((parts & BAN) != 0), tl.load(record + BAN_SET), -1),
        tl.where(minimum, tl.load(record + THINK_END), -1),
        tl.where(minimum, tl.load(record + WAIT), -1),
        tl.where(ramps, entry(record, END, p.phrase), -1),
        (p.spent.to(tl.float64) - start) / span,
        number(record + SOFT_MARGIN),
    )


# ---- what that does to the logits


@triton.jit
def load_logits(logits, mask):
    """float64 logits are computed in float64, all others in float32."""
    z = tl.load(logits, mask=mask, other=-INF)
    return z.to(tl.float64 if z.dtype == tl.float64 else tl.float32)


@triton.jit
def store_logits(logits, z, mask):
    tl.store(logits, z.to(logits.dtype.element_ty), mask=mask)


@triton.jit
def apply_force(rows, force):
    """Which rows are forced; NaN and -inf are not."""
    asked = rows.on & (force >= 0) & (force < rows.vocab)
    forced = asked & (load_logits(rows.logits + force, asked) > -INF)
    store_logits(rows.logits + force, tl.full(force.shape, FORCED, tl.float32), forced)
    return forced


@triton.jit
def survives_ban(rows, ban, BLOCK: tl.constexpr):
    """Whether something finite is left without the set; mostly the first block answers."""
    undecided = rows.on & (ban >= 0)
    asked = undecided
    start = tl.cast(0, tl.int32)
    while anywhere(undecided) & (start < rows.vocab):
        ids = start + tl.arange(0, BLOCK)[None, :]
        z = load_logits(rows.logits[:, None] + ids, undecided[:, None] & (ids < rows.vocab))
        finite = tl.abs(z) < INF
        held = holds(rows.sets, ban[:, None] + ids * 0, ids, finite)
        left = tl.max((finite & (held == 0)).to(tl.int32), 1) > 0
        undecided = undecided & (left == 0)
        start += BLOCK
    return asked & (undecided == 0)


@triton.jit
def of_set(member, index):
    return (index >= 0)[:, None] & (((member >> tl.maximum(index, 0)[:, None]) & 1) != 0)


@triton.jit
def added_to(c, member):
    """What a row adds to an entry of its sets, whichever of them the entry is met in."""
    total = tl.zeros(member.shape, tl.float64)
    total = tl.where(of_set(member, c.cyclic_set), total + c.cyclic[:, None], total)
    total = tl.where(of_set(member, c.tip_set), total + c.tip[:, None], total)
    total = tl.where(of_set(member, c.constant_set), total + c.constant[:, None], total)
    return tl.where(of_set(member, c.schedule_set), total + c.schedule[:, None], total)


@triton.jit
def write_set(rows, c, index, done, BANS: tl.constexpr, BLOCK: tl.constexpr):
    """Writes a set's entries but those in a set of `done`; returns done and this set. NaN stays."""
    used = rows.on & (index >= 0)
    start = tl.load(rows.sets + index, mask=used, other=0)
    stop = tl.load(rows.sets + index + 1, mask=used, other=0)
    for first in tl.range(0, tl.max(stop - start), BLOCK):
        k = (start + first)[:, None] + tl.arange(0, BLOCK)[None, :]
        inside = k < stop[:, None]
        ids, member = load_ids(rows.sets + SET_ENTRIES + k, inside)
        inside = inside & (ids < rows.vocab) & ((member & done[:, None]) == 0)
        z = load_logits(rows.logits[:, None] + ids, inside)
        if BANS:
            new = tl.full(z.shape, -INF, tl.float32)
        else:
            total = added_to(c, member)
            inside = inside & (total != 0)
            new = z + total.to(z.dtype)
        store_logits(rows.logits[:, None] + ids, new, inside & (z == z))
    return done | tl.where(used, tl.cast(1, tl.int64) << tl.maximum(index, 0), 0)


@triton.jit
def write_sets(rows, c, BLOCK: tl.constexpr):
    ban = tl.where(survives_ban(rows, c.ban, BLOCK), c.ban, -1)
    tl.debug_barrier()  # read before written
    done = write_set(rows, c.added, ban, ban * 0, True, BLOCK)
    done = write_set(rows, c.added, c.added.cyclic_set, done, False, BLOCK)
    done = write_set(rows, c.added, c.added.tip_set, done, False, BLOCK)
    done = write_set(rows, c.added, c.added.constant_set, done, False, BLOCK)
    write_set(rows, c.added, c.added.schedule_set, done, False, BLOCK)


@triton.jit
def log1p(x):
    """Of 0 <= x <= 1: log(1 + x), less what rounding 1 + x has added."""
    u = 1 + x
    return tl.where(u == 1, x, tl.log(u) * (x / tl.where(u == 1, 1.0, u - 1)))


@triton.jit
def move_to_wait(rows, c, temperature):
    """Gives the mass of the end to the wait."""
    asked = rows.on & (c.end >= 0) & (c.end < rows.vocab) & (c.wait < rows.vocab)
    wait = load_logits(rows.logits + c.wait, asked).to(tl.float64)
    asked = asked & (wait != -INF)
    end = load_logits(rows.logits + c.end, asked).to(tl.float64)
    high, low = tl.maximum(wait, end), tl.minimum(wait, end)
    t = temperature.to(tl.float64)
    plain = (t == 0) | (low == -INF) | (high == INF)
    share = tl.where(plain, 0.0, low - high) / tl.where(plain, 1.0, t)
    merged = tl.where(plain, high, high + t * log1p(tl.exp(share)))
    merged = tl.where((wait != wait) | (end != end), wait + end, merged)
    if rows.logits.dtype.element_ty != tl.float64:
        merged = merged.to(tl.float32)
    tl.debug_barrier()
    store_logits(rows.logits + c.wait, merged, asked)
    store_logits(rows.logits + c.end, tl.full(merged.shape, -INF, tl.float32), asked)


@triton.jit
def raise_end(rows, c, BLOCK: tl.constexpr):
    """Raises the budget's next id towards the largest finite logit less the margin."""
    asked = rows.on & (c.soft >= 0) & (c.soft < rows.vocab)
    z = load_logits(rows.logits + c.soft, asked)
    top = tl.full(z.shape, -INF, z.dtype)
    if anywhere(asked):
        for start in tl.range(0, rows.vocab, BLOCK):
            ids = start + tl.arange(0, BLOCK)[None, :]
            x = load_logits(rows.logits[:, None] + ids, asked[:, None] & (ids < rows.vocab))
            top = tl.maximum(top, tl.max(tl.where(tl.abs(x) < INF, x, -INF), 1))
    gap = top.to(tl.float64) - c.margin - z.to(tl.float64)
    new = (z.to(tl.float64) + c.weight * gap).to(z.dtype)
    store_logits(rows.logits + c.soft, new, asked & (tl.abs(z) < INF) & (gap > 0))
