"""Device functions over one row of logits: its top, the filters' cut, a draw, raw statistics."""

from typing import NamedTuple

import triton
import triton.language as tl

from .triton_noise import exp_of, gumbel, minus_log, words_of_block

INF = tl.constexpr(float("inf"))
MAX_NOISE = tl.constexpr(22.1808)  # above the largest noise
MIN_NOISE = tl.constexpr(-2.8116)  # below the smallest
LAST_ID = tl.constexpr(0x3FFFFF)
TINY = tl.constexpr(2.0**-126)
SEARCHED = tl.constexpr(4)  # logits that a sweep of a filter's search compares with
LANE_BLOCK = tl.constexpr(128)  # of a lane's tokens, read at once


class Row(NamedTuple):
    """Pointers to a row and its bitmask (None: every token), and its length."""

    logits: tl.tensor
    mask: tl.tensor
    vocab: tl.tensor


class Top(NamedTuple):
    """The largest logit of all; the largest finite allowed one and its lowest id; bad logits."""

    raw: tl.tensor
    value: tl.tensor
    id: tl.tensor
    bad: tl.tensor  # NaN or +inf among the allowed
    bad_raw: tl.tensor  # among all


class Request(NamedTuple):
    """The parameters of a request."""

    temperature: tl.tensor
    top_k: tl.tensor
    top_p: tl.tensor
    min_p: tl.tensor
    seed: tl.tensor
    position: tl.tensor


@triton.jit
def load_logits(row, cols):
    return tl.load(row.logits + cols, mask=cols < row.vocab, other=-INF).to(tl.float32)


@triton.jit
def masked(row, cols, x):
    if row.mask is not None:
        word = tl.load(row.mask + cols // 32, mask=cols < row.vocab, other=0)
        x = tl.where(((word >> (cols % 32)) & 1) != 0, x, -INF)
    return x


@triton.jit
def sum_of_thread(x):
    """(BLOCK / 4,) sums of what lies in one thread where it has four elements: no exchange."""
    return tl.sum(tl.reshape(x, (4, x.shape[0] // 4)), 0)


@triton.jit
def find_top(row, BLOCK: tl.constexpr):
    lanes = tl.arange(0, BLOCK)
    raw = tl.full((BLOCK,), -INF, tl.float32)  # of each lane's tokens, as the others
    value, at = raw, tl.full((BLOCK,), -1, tl.int32)
    bad = tl.zeros((BLOCK,), tl.int32)  # 1: among all, 2: among the allowed
    for start in tl.range(0, row.vocab, BLOCK):
        cols = start + lanes
        x = load_logits(row, cols)
        bad |= tl.where(x < INF, 0, 1)  # not NaN either
        raw = tl.maximum(raw, tl.where(x < INF, x, -INF))
        x = masked(row, cols, x)
        bad |= tl.where(x < INF, 0, 2)
        x = tl.where(x < INF, x, -INF)
        at = tl.where(x > value, cols, at)
        value = tl.maximum(value, x)
    top = tl.max(value, 0)
    at = tl.min(tl.where(value == top, at, LAST_ID), 0)
    return Top(tl.max(raw, 0), top, at, tl.max(bad & 2, 0), tl.max(bad & 1, 0))


@triton.jit
def order_of(value, cols):
    """Larger comes first: by value descending, then by id ascending. 54 bits."""
    bits = (value + 0.0).to(tl.int32, bitcast=True)
    key = tl.where(bits < 0, ~bits, bits ^ -2147483648).to(tl.uint32, bitcast=True)
    return (key.to(tl.int64) << 22) | (-cols + LAST_ID).to(tl.int64)


@triton.jit
def value_of(row, cols, temperature):
    return tl.div_rn(masked(row, cols, load_logits(row, cols)), temperature)


@triton.jit
def mass_of(below):
    return (exp_of(below) * 1099511627776.0).to(tl.int64)


@triton.jit
def weigh_above(row, temperature, top, bound, MASS: tl.constexpr, BLOCK: tl.constexpr):
    """Mass, or number, of the tokens whose value is above `bound`."""
    total = tl.zeros((BLOCK // 4,), tl.int64 if MASS else tl.int32)
    for start in tl.range(0, row.vocab, BLOCK):
        value = value_of(row, start + tl.arange(0, BLOCK), temperature)
        weight = value > bound
        if MASS:
            weight = tl.where(weight, mass_of(value - top), 0)
        total += sum_of_thread(weight.to(total.dtype))
    return tl.sum(total, 0)


@triton.jit
def logit_of(key, ZEROS: tl.constexpr):
    """The logit of a key (uint32)."""
    SIGN: tl.constexpr = 0x80000000 >> ZEROS
    bits = tl.where(key < SIGN, key ^ 0xFFFFFFFF, key ^ SIGN) << ZEROS
    return bits.to(tl.float32, bitcast=True)


@triton.jit
def search_value(row, temperature, top, limit, MASS: tl.constexpr, BLOCK: tl.constexpr):
    """The largest value at or above which the tokens weigh `limit` or more."""
    # By keys, ordered as logits are; those of 16-bit logits leave out the zeros at their ends.
    ZEROS: tl.constexpr = 23 - row.logits.dtype.element_ty.fp_mantissa_width
    low = tl.cast(0x007FFFFF >> ZEROS, tl.uint32)  # -inf
    step = tl.cast(0xFF800000 >> ZEROS, tl.uint32) - low  # to inf
    while step > 1:
        step = (step + SEARCHED) // (SEARCHED + 1)
        least = logit_of(low + step * (tl.arange(0, SEARCHED) + 1).to(tl.uint32), ZEROS)
        total = tl.zeros((SEARCHED, BLOCK // 4), tl.int64 if MASS else tl.int32)
        for start in tl.range(0, row.vocab, BLOCK):
            cols = start + tl.arange(0, BLOCK)
            x = masked(row, cols, load_logits(row, cols))
            weight = x[None, :] >= least[:, None]
            if MASS:
                mass = mass_of(tl.div_rn(x, temperature) - top)
                weight = tl.where(weight, mass[None, :], 0)
            total += tl.sum(tl.reshape(weight.to(total.dtype), (SEARCHED, 4, BLOCK // 4)), 1)
        low += step * tl.sum((tl.sum(total, 1).to(tl.float64) >= limit).to(tl.uint32), 0)
    return tl.div_rn(logit_of(low, ZEROS), temperature)


@triton.jit
def ties_below(total, mass, limit):
    """How many tokens of a mass leave the total below the limit."""
    ties, step = tl.cast(0, tl.int32), LAST_ID // 2 + 1
    while step > 0:
        short = (total + (ties + step) * mass).to(tl.float64) < limit
        ties = tl.where(short, ties + step, ties)
        step = step // 2
    return ties


@triton.jit
def find_tie(row, temperature, value, place, BLOCK: tl.constexpr):
    """The id of the token in that place, from 1 on, among those of that value."""
    at = tl.cast(LAST_ID, tl.int32)
    for start in tl.range(0, row.vocab, BLOCK):
        cols = start + tl.arange(0, BLOCK)
        tie = (value_of(row, cols, temperature) == value).to(tl.int32)
        count = tl.sum(tie, 0)
        if (place > 0) & (place <= count):
            at, step = start, BLOCK // 2
            while step > 0:
                before = tl.sum(tl.where(cols < at + step, tie, 0), 0)
                at = tl.where(before < place, at + step, at)
                step = step // 2
        place -= count
    return at


@triton.jit
def tighter(value, place, other, other_place):
    """Of two cuts, each the value and the place among its ties of the last token kept."""
    least = tl.where(value == other, tl.minimum(place, other_place), other_place)
    return tl.maximum(value, other), tl.where(value > other, place, least)


@triton.jit
def filter_cut(row, r, top, BLOCK: tl.constexpr):
    """The order of the last token that top-k, top-p and min-p keep."""
    value, place = tl.cast(-INF, tl.float32), tl.cast(LAST_ID, tl.int32)
    if (r.top_k > 0) & (r.top_k < row.vocab):
        value = search_value(row, r.temperature, top, r.top_k.to(tl.float64), False, BLOCK)
        place = r.top_k.to(tl.int32) - weigh_above(row, r.temperature, top, value, False, BLOCK)
    if (r.top_p >= 1) == 0:
        total = weigh_above(row, r.temperature, top, value, True, BLOCK)
        total += mass_of(value - top) * place
        limit = r.top_p.to(tl.float64) * total.to(tl.float64)
        limit = tl.where(limit >= 1, limit, 1.0)  # below a unit, or NaN: the first token alone
        least = search_value(row, r.temperature, top, limit, True, BLOCK)
        above = weigh_above(row, r.temperature, top, least, True, BLOCK)
        ties = ties_below(above, mass_of(least - top), limit)
        value, place = tighter(value, place, least, ties + 1)
    if r.min_p > 0:
        m = tl.minimum(tl.maximum(r.min_p, TINY), 1.0)
        value, place = tighter(value, place, top - minus_log(m), LAST_ID)
    at = tl.cast(LAST_ID, tl.int32)
    if place < LAST_ID:
        at = find_tie(row, r.temperature, value, place, BLOCK)
    return order_of(value, at)


@triton.jit
def draw(row, r, top, cut, BLOCK: tl.constexpr):
    """The token of the largest kept value plus noise; blocks that cannot hold it are skipped."""
    lanes = tl.arange(0, BLOCK)
    best, at = tl.cast(-INF, tl.float32), tl.cast(-1, tl.int32)
    for start in tl.range(0, row.vocab, BLOCK):
        cols = start + lanes
        value = tl.div_rn(masked(row, cols, load_logits(row, cols)), r.temperature)
        kept = (order_of(value, cols) >= cut) & (cols < row.vocab)
        value = tl.where(kept, value, -INF)
        if tl.max(value, 0) + MAX_NOISE >= tl.maximum(best, top + MIN_NOISE):
            score = value + gumbel(words_of_block(start, r.position, 0, r.seed, BLOCK))
            top_score = tl.max(score, 0)
            if top_score > best:
                best = top_score
                at = tl.min(tl.where(score == top_score, cols, LAST_ID), 0)
    return at


@triton.jit
def choose(row, top, r, BLOCK: tl.constexpr):
    """The row's token, -1 where there is none, and whether the row is bad."""
    greedy = r.temperature == 0
    value = tl.where(greedy, top.value, tl.div_rn(top.value, tl.where(greedy, 1.0, r.temperature)))
    bad = (top.bad != 0) | ((tl.abs(value) < INF) == 0)
    token = top.id
    if (bad == 0) & (greedy == 0):
        token = draw(row, r, value, filter_cut(row, r, value, BLOCK), BLOCK)
    return token, bad


# ---- the first tokens in order: those of a lane, which are BLOCK apart, give one another's place


@triton.jit
def order_at(row, cols):
    """The order of the allowed tokens, -1 of others."""
    x = masked(row, cols, load_logits(row, cols))
    return tl.where(x > -INF, order_of(x, cols), -1)


@triton.jit
def id_of(order):
    return LAST_ID - (order & LAST_ID).to(tl.int32)


@triton.jit
def first_of_lane(row, lane, before, BLOCK: tl.constexpr):
    """The largest order of a lane's tokens below `before`; -1: there is none."""
    first = tl.cast(-1, tl.int64)
    for start in tl.range(lane, row.vocab, BLOCK * LANE_BLOCK):
        order = order_at(row, start + tl.arange(0, LANE_BLOCK) * BLOCK)
        first = tl.maximum(first, tl.max(tl.where(order < before, order, -1), 0))
    return first


@triton.jit
def without(row, firsts, taken, BLOCK: tl.constexpr):
    """The first of each lane, the token of the order `taken` being left out with all before it."""
    lane = id_of(taken) % BLOCK
    return tl.where(tl.arange(0, BLOCK) == lane, first_of_lane(row, lane, taken, BLOCK), firsts)


@triton.jit
def write_statistics(row, top, ids, logits, lse, topk, BLOCK: tl.constexpr):
    """The largest raw logits and the log-sum-exp."""
    own = Row(row.logits, None, row.vocab)
    lanes = tl.arange(0, BLOCK)
    total = tl.zeros((BLOCK,), tl.float64)
    firsts = tl.full((BLOCK,), -1, tl.int64)
    for start in tl.range(0, row.vocab, BLOCK):
        cols = start + lanes
        total += exp_of(load_logits(own, cols) - top).to(tl.float64)
        firsts = tl.maximum(firsts, order_at(own, cols))
    tl.store(lse, (top.to(tl.float64) + tl.log(tl.sum(total, 0))).to(tl.float32))
    for k in tl.range(0, topk):
        best = tl.max(firsts, 0)
        if best >= 0:
            at = id_of(best)
            tl.store(ids + k, at.to(tl.int64))
            tl.store(logits + k, tl.load(row.logits + at).to(tl.float32))
            firsts = without(own, firsts, best, BLOCK)
