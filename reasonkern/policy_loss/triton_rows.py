"""Device functions over one row of logits: its sums, its gradient, zeros, in blocks of BLOCK."""

from typing import NamedTuple

import triton
import triton.language as tl

from .triton_objective import INF, LN_2, LOG2_E, exp_times_power, is_finite

# exp of this is 0 in fp32. d is cut here so that 0 * d stays 0 for a logit of -inf.
MIN_SHIFT = tl.constexpr(-200.0)
TWO_TO_64 = tl.constexpr(2.0**64)
TWO_TO_MINUS_64 = tl.constexpr(2.0**-64)
# Loads in flight ahead of the arithmetic; 3 blocks of 8 KiB per program.
STAGES = tl.constexpr(3)


class Scale(NamedTuple):
    """What maps logits to z: the soft-cap first, then 1 / temperature."""

    inv_temperature: tl.tensor
    softcap: tl.tensor


class Sums(NamedTuple):
    """Sums of a row over d = (x - top) / temperature; s, u, q, w are per lane until reduced.

    The maximum is taken before the temperature because x - top is exact, or nearly, where it
    matters; the difference of two rounded quotients is not once the logits have an offset.
    """

    top: tl.tensor  # max x, after the soft-cap
    first_block: tl.tensor  # start of the block that attained it first
    s: tl.tensor  # sum e^d
    u: tl.tensor  # sum e^d d
    q: tl.tensor  # sum e^2d
    w: tl.tensor  # sum e^d d^2


# ---- rows and logits


@triton.jit
def row_start(x, row, seq, stride_b, stride_t, ALIGNED: tl.constexpr):
    start = x + ((row // seq).to(tl.int64) * stride_b + (row % seq).to(tl.int64) * stride_t)
    # Only this lets the compiler use 16-byte loads: it knows nothing of the strides.
    return tl.multiple_of(start, 16) if ALIGNED else start


@triton.jit
def load_scale(temperature, row_temperature, softcap, row):
    t = tl.cast(temperature, tl.float32)
    if row_temperature is not None:
        t = tl.load(row_temperature + row)
    return Scale(tl.div_rn(1.0, t), tl.cast(softcap, tl.float32))


@triton.jit
def compensated_exp(x):
    """exp(x) to a few ulp: what the rounding of x log2(e) lost comes back as a first-order term."""
    power = x * LOG2_E
    e = tl.exp2(power)
    return tl.fma(e, tl.fma(power, -LN_2, x), e)


@triton.jit
def tanh(x):
    # tl has none. The fit of (tanh(x) - x) / x^3 below 0.6 and the exponential above it are
    # within 2 ulp.
    x2 = x * x
    fit = tl.fma(x2, -0.0062691196799278255, 0.021110959351062775)
    fit = tl.fma(x2, fit, -0.053873948752880096)
    fit = tl.fma(x2, fit, 0.13332915306091309)
    fit = tl.fma(x2, fit, -0.3333333134651184)
    size = tl.abs(x)
    large = 1.0 - tl.div_rn(2.0, tl.exp(2.0 * size) + 1.0)
    return tl.where(size < 0.6, tl.fma(x * x2, fit, x), tl.where(x < 0, -large, large))


@triton.jit
def soften(x, scale):
    """The soft-capped logit before the temperature, and its derivative; infinities stay."""
    t = tanh(tl.div_rn(1.0, scale.softcap) * x)
    return tl.where(tl.abs(x) < INF, scale.softcap * t, x), 1.0 - t * t


@triton.jit
def capped(x, scale, SOFTCAP: tl.constexpr):
    x = x.to(tl.float32)
    if SOFTCAP:
        x, _ = soften(x, scale)
    return x


@triton.jit
def load_capped(x, cols, vocab, scale, SOFTCAP: tl.constexpr):
    return capped(tl.load(x + cols, mask=cols < vocab, other=-INF), scale, SOFTCAP)


@triton.jit
def load_target(x, target, vocab, scale, SOFTCAP: tl.constexpr):
    """The target's capped logit; NaN for a target outside the vocabulary."""
    inside = (target >= 0) & (target < vocab)
    x_y = capped(tl.load(x + target, mask=inside, other=0.0), scale, SOFTCAP)
    return tl.where(inside, x_y, float("nan"))


# ---- row statistics


@triton.jit
def add_block(sums, x, start, inv_temperature, MOMENTS: tl.constexpr):
    """Adds a block of capped logits; a NaN or +inf leaves its lane of s NaN for good."""
    top, first_block, s, u, q, w = sums
    block_top = tl.max(x, 0)
    if block_top > top:
        moved = tl.maximum((top - block_top) * inv_temperature, MIN_SHIFT)
        a = tl.exp(moved)
        if MOMENTS:
            w = a * (w + moved * (2.0 * u + moved * s))
            q = a * a * q
        u = a * (u + moved * s)
        s = a * s
        top = block_top
        first_block = start
    # While every logit so far is -inf: d = MIN_SHIFT, which adds nothing.
    d = (x - tl.where(top == -INF, 0.0, top)) * inv_temperature
    d = tl.maximum(d, MIN_SHIFT, propagate_nan=tl.PropagateNan.ALL)
    e = compensated_exp(d)
    s += e
    u = tl.fma(e, d, u)
    if MOMENTS:
        q = tl.fma(e, e, q)
        w = tl.fma(e * d, d, w)
    return Sums(top, first_block, s, u, q, w)


@triton.jit
def row_sums(x, vocab, scale, SOFTCAP: tl.constexpr, MOMENTS: tl.constexpr, BLOCK: tl.constexpr):
    lanes = tl.arange(0, BLOCK)
    zero = tl.zeros((BLOCK,), tl.float32)
    sums = Sums(tl.cast(-INF, tl.float32), vocab * 0, zero, zero, zero, zero)
    full = vocab // BLOCK * BLOCK
    # The whole blocks are loaded without a mask: a mask of unknown width forbids wide loads.
    for start in tl.range(0, full, BLOCK, num_stages=STAGES):
        block = capped(tl.load(x + start + lanes), scale, SOFTCAP)
        sums = add_block(sums, block, start, scale.inv_temperature, MOMENTS)
    if full < vocab:
        block = load_capped(x, full + lanes, vocab, scale, SOFTCAP)
        sums = add_block(sums, block, full, scale.inv_temperature, MOMENTS)
    top, first_block, s, u, q, w = sums
    s, u = sum_lanes(s), sum_lanes(u)
    if MOMENTS:
        q, w = sum_lanes(q), sum_lanes(w)
    return Sums(top, first_block, s, u, q, w)


@triton.jit
def sum_lanes(x):
    """In float64, where the order of adding, the compiler's choice by alignment, moves no bit."""
    return tl.sum(x.to(tl.float64), 0).to(tl.float32)


@triton.jit
def first_argmax(x, vocab, sums, scale, SOFTCAP: tl.constexpr, BLOCK: tl.constexpr):
    cols = sums.first_block + tl.arange(0, BLOCK)
    block = load_capped(x, cols, vocab, scale, SOFTCAP)
    return tl.min(tl.where(block == sums.top, cols, vocab), 0)


@triton.jit
def logprob_entropy(x_y, sums, inv_temperature):
    """logp, H, and whether the row has statistics; NaN both for bad logits or a bad target."""
    good = is_finite(sums.s) & (sums.s > 0) & (x_y == x_y)
    log_sum = tl.log(sums.s)
    logp = (x_y - sums.top) * inv_temperature - log_sum
    entropy = log_sum - tl.div_rn(sums.u, sums.s)
    return tl.where(good, logp, float("nan")), tl.where(good, entropy, float("nan")), good


# ---- row gradient


@triton.jit
def gradient(x, cols, y, g, scale, SOFTCAP: tl.constexpr, QUADRATIC: tl.constexpr):
    """One block of the row that g (GradRow) describes; its row_max is Sums.top."""
    # 16-bit gradients are rounded coarser than tl.exp errs.
    WIDE: tl.constexpr = x.dtype == tl.float32
    x = x.to(tl.float32)
    if SOFTCAP:
        x, slope = soften(x, scale)
    d = tl.maximum((x - g.row_max) * scale.inv_temperature, MIN_SHIFT)
    if WIDE:  # in units of 2^-64, so that no intermediate is flushed
        p = exp_times_power(d, 64.0) * g.inv_sum
        factor = tl.fma(g.linear, d, g.constant)
        if QUADRATIC:
            factor = tl.fma(g.quadratic, p * TWO_TO_MINUS_64, factor)
        grad = p * factor
        grad = tl.where(cols == y, grad + g.target * TWO_TO_64, grad) * TWO_TO_MINUS_64
    else:
        p = tl.exp(d) * g.inv_sum
        factor = tl.fma(g.linear, d, g.constant)
        if QUADRATIC:
            factor = tl.fma(g.quadratic, p, factor)
        grad = p * factor
        grad = tl.where(cols == y, grad + g.target, grad)
    if SOFTCAP:
        grad *= slope
    return grad * g.scale


@triton.jit
def write_gradient(
    x, out, vocab, y, g, scale,
    SOFTCAP: tl.constexpr, QUADRATIC: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Every lane reads before it writes, so `out` may be `x`. The last block comes first."""
    lanes = tl.arange(0, BLOCK)
    full = vocab // BLOCK * BLOCK
    if full < vocab:
        cols = full + lanes
        tail = tl.load(x + cols, mask=cols < vocab, other=-INF)
        grad = gradient(tail, cols, y, g, scale, SOFTCAP, QUADRATIC)
        tl.store(out + cols, grad.to(out.dtype.element_ty), mask=cols < vocab)
    for done in tl.range(0, full, BLOCK, num_stages=STAGES):
        cols = full - BLOCK - done + lanes
        grad = gradient(tl.load(x + cols), cols, y, g, scale, SOFTCAP, QUADRATIC)
        tl.store(out + cols, grad.to(out.dtype.element_ty))


@triton.jit
def write_zeros(out, vocab, BLOCK: tl.constexpr):
    lanes = tl.arange(0, BLOCK)
    zero = tl.zeros((BLOCK,), out.dtype.element_ty)
    full = vocab // BLOCK * BLOCK
    for start in tl.range(0, full, BLOCK):
        tl.store(out + start + lanes, zero)
    tl.store(out + full + lanes, zero, mask=full + lanes < vocab)
