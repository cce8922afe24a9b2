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
def bound_order(bound):
    """The order of the last token whose value is `bound`."""
    return order_of(bound, tl.cast(LAST_ID, tl.int32))


@triton.jit
def weigh(row, temperature, top, least, MASS: tl.constexpr, BLOCK: tl.constexpr):
    """Mass, or number, of the tokens whose order is at least `least`."""
    lanes = tl.arange(0, BLOCK)
    total = tl.zeros((BLOCK // 4,), tl.int64)
    for start in tl.range(0, row.vocab, BLOCK):
        cols = start + lanes
        value = tl.div_rn(masked(row, cols, load_logits(row, cols)), temperature)
        order = order_of(value, cols)
        kept = (order >= least) & (cols < row.vocab)
        if MASS:
            weight = (exp_of(value - top) * 1099511627776.0).to(tl.int64)
        else:
            weight = tl.full((BLOCK,), 1, tl.int64)
        total += sum_of_thread(tl.where(kept, weight, 0))
    return tl.sum(total, 0)


@triton.jit
def search_cut(row, temperature, top, cut, limit, MASS: tl.constexpr, BLOCK: tl.constexpr):
    """The largest order at or above which the kept tokens weigh `limit` or more, bit by bit."""
    low = tl.cast(0, tl.int64)
    for i in tl.range(0, 54):
        least = low + (tl.cast(1, tl.int64) << (53 - i))
        weight = weigh(row, temperature, top, tl.maximum(cut, least), MASS, BLOCK)
        enough = weight.to(tl.float64) >= limit
        low = tl.where(enough, least, low)
    return low


@triton.jit
def filter_cut(row, r, top, BLOCK: tl.constexpr):
    """The order of the last token that top-k, top-p and min-p keep."""
    cut = tl.cast(0, tl.int64)
    if (r.top_k > 0) & (r.top_k < row.vocab):
        cut = search_cut(row, r.temperature, top, cut, r.top_k.to(tl.float64), False, BLOCK)
    if (r.top_p >= 1) == 0:
        total = weigh(row, r.temperature, top, cut, True, BLOCK).to(tl.float64)
        limit = r.top_p.to(tl.float64) * total
        limit = tl.where(limit >= 1, limit, 1.0)  # below a unit, or NaN: the first token alone
        cut = search_cut(row, r.temperature, top, cut, limit, True, BLOCK)
    if r.min_p > 0:
        m = tl.minimum(tl.maximum(r.min_p, TINY), 1.0)
        cut = tl.maximum(cut, bound_order(top - minus_log(m)))
    return cut


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
