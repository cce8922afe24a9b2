"""The objective: an O(1) map per row from (logp, H) to the loss and its two derivatives, in Triton.

Mirrors csrc/policy_loss/objective.h: the same names in the same order. Every value is one fp32
scalar per row. `kind` and `kl_kind` are run-time integers, so that changing the objective compiles
nothing; the branch is uniform over the program and its cost is a few instructions per row.
"""

from typing import NamedTuple

import triton
import triton.language as tl

CLIP = tl.constexpr(0)
GPPO = tl.constexpr(1)
CISPO = tl.constexpr(2)
SAPO = tl.constexpr(3)
DPPO_TV = tl.constexpr(4)
DPPO_KL = tl.constexpr(5)
DRO = tl.constexpr(6)

NO_KL = tl.constexpr(0)
K2 = tl.constexpr(2)
K3 = tl.constexpr(3)

INF = tl.constexpr(float("inf"))
LOG2_E = tl.constexpr(1.4426950408889634)
LN_2 = tl.constexpr(0.6931471805599453)


class Hyper(NamedTuple):
    """Field order is the order of HYPER in objective_fields.py."""

    ratio_min: float
    ratio_max: float
    dual_clip: float
    ratio_cap: float
    low: float
    high: float
    kl_coef: float
    entropy_coef: float
    log_ratio_clamp: float


class RowInputs(NamedTuple):
    advantage: tl.tensor
    weight: tl.tensor
    entropy_weight: tl.tensor
    importance: tl.tensor
    old_logprob: tl.tensor  # logp itself on-policy
    ref_logprob: tl.tensor  # not used when kl_kind is 0


class RowLoss(NamedTuple):
    """dlogp and dentropy are derivatives of row_loss; a nonfinite row has zeros everywhere."""

    row_loss: tl.tensor
    token_loss: tl.tensor
    dlogp: tl.tensor
    dentropy: tl.tensor
    finite: tl.tensor


class Term(NamedTuple):
    """A loss value and its derivative with respect to logp."""

    value: tl.tensor
    dlogp: tl.tensor


class Ratio(NamedTuple):
    """exp of a clamped log-ratio; slope is 1 inside the clamp, 0 outside: d value = slope*value."""

    value: tl.tensor
    slope: tl.tensor


class GradRow(NamedTuple):
    """Coefficients of one gradient row, with d = z_v - m and p = exp(d) * inv_sum:

    dL/dx_v = scale * jac_v * (p * (constant + linear * d + quadratic * p) + [v == y] * target)

    where scale = loss_scale / T and jac_v = 1 - tanh^2(x_v / cap) under a soft-cap.
    """

    row_max: tl.tensor
    inv_sum: tl.tensor
    constant: tl.tensor
    linear: tl.tensor
    quadratic: tl.tensor
    target: tl.tensor
    scale: tl.tensor


@triton.jit
def is_finite(x):
    return tl.abs(x) < INF


@triton.jit
def clamp(x, lo, hi):
    return tl.where(x < lo, lo, tl.where(x > hi, hi, x))


@triton.jit
def exp_times_power(x, power):
    """exp(x) 2^power, |x| <= 200, to a few ulp; tl.exp rounds x log2(e), an error of |x| / 2 ulp.

    The hardware flushes results below 2^-126; a power keeps them for what they are multiplied by.
    """
    n = tl.floor(x * LOG2_E + 0.5)
    # ln 2 in two parts; n times the first is exact.
    r = x - n * 0.693359375 + n * 2.1219444e-4
    return tl.exp2(r * LOG2_E) * tl.exp2(n + power)


@triton.jit
def exp_within(x):
    return exp_times_power(x, 0.0)


@triton.jit
def exp(x):
    return exp_within(clamp(x, -200.0, 200.0))


@triton.jit
def expm1(x):
    # tl has none. exp(x) - 1 does not cancel beyond ln 2; ten Taylor terms err by 4e-10 inside.
    series = x * 0.0 + 1.0
    for n in tl.static_range(10, 1, -1):
        series = 1.0 + series * x * (1.0 / n)
    return tl.where(tl.abs(x) < 0.7, x * series, exp(x) - 1.0)


@triton.jit
def clamped_exp(log_ratio, limit):
    inside = (log_ratio >= -limit) & (log_ratio <= limit)
    return Ratio(exp(clamp(log_ratio, -limit, limit)), tl.where(inside, 1.0, 0.0))


@triton.jit
def dual_clipped(term, r, a, h):
    bound = -h.dual_clip * a
    hit = (a < 0) & (r.value > h.dual_clip) & (bound < term.value)
    return Term(tl.where(hit, bound, term.value), tl.where(hit, 0.0, term.dlogp))


@triton.jit
def clip_term(r, a, h):
    """-min(rA, clip(r)A), cap on the unclipped branch, dual clip on negative advantages."""
    unclipped = -tl.where(r.value < h.ratio_cap, r.value, h.ratio_cap) * a
    clipped = -clamp(r.value, h.ratio_min, h.ratio_max) * a
    # A tie is unclipped.
    moves = (unclipped >= clipped) & (r.value <= h.ratio_cap)
    value = tl.where(unclipped >= clipped, unclipped, clipped)
    return dual_clipped(Term(value, tl.where(moves, -r.slope * r.value * a, 0.0)), r, a, h)


@triton.jit
def gppo_term(r, a, h):
    """Clip-higher whose clipped side keeps the bounded gradient beta * bound * A."""
    below = (a < 0) & (r.value < h.ratio_min)
    above = (a > 0) & (r.value > h.ratio_max)
    # Selected before the product: the bound of the other side may be infinite, beta zero.
    beta = tl.where(below, h.low, h.high)
    bound = tl.where(below, h.ratio_min, h.ratio_max)
    kept = -beta * bound * a
    value = tl.where(below | above, kept, -r.value * a)
    dlogp = tl.where(below | above, kept, -r.slope * r.value * a)
    return dual_clipped(Term(value, dlogp), r, a, h)


@triton.jit
def cispo_term(r, logp, a, h):
    factor = clamp(r.value, h.ratio_min, h.ratio_max) * a
    return Term(-factor * logp, -factor)


@triton.jit
def sapo_term(r, a, h):
    tau = tl.where(a > 0, h.low, h.high)
    gate = tl.div_rn(1.0, 1.0 + exp(-tau * (r.value - 1.0)))
    slope = -a * 4.0 * gate * (1.0 - gate) * r.value * r.slope
    return Term(-a * tl.div_rn(4.0, tau) * gate, slope)


@triton.jit
def dro_term(logp, old_logprob, a, h):
    d = logp - old_logprob
    return Term(-(logp * a - 0.5 * h.low * d * d), -(a - h.low * d))


@triton.jit
def bernoulli_kl(old_logprob, logp):
    """Divergence between the laws "this token or not" of the old and the new policy."""
    old_rest = -expm1(old_logprob)
    kl = exp(old_logprob) * (old_logprob - logp)
    rest = old_rest * (tl.log(old_rest) - tl.log(-expm1(logp)))
    return tl.where(old_rest > 0, kl + rest, kl)


@triton.jit
def dppo_keeps(kind, logp, old_logprob, a, h):
    moved = exp(logp) - exp(old_logprob)
    kl = bernoulli_kl(old_logprob, logp)
    tv_keeps = tl.where(a > 0, moved <= h.high, moved >= -h.low)
    kl_keeps = tl.where(a > 0, (kl <= h.high) | (moved <= 0), (kl <= h.low) | (moved >= 0))
    return tl.where(kind == DPPO_TV, tv_keeps, kl_keeps)


@triton.jit
def dppo_term(kind, r, logp, old_logprob, a, h):
    factor = tl.where(r.value < h.ratio_max, r.value, h.ratio_max) * a
    keeps = dppo_keeps(kind, logp, old_logprob, a, h)
    return Term(tl.where(keeps, -factor * logp, 0.0), tl.where(keeps, -factor, 0.0))


@triton.jit
def token_term(kind, logp, old_logprob, a, h):
    r = clamped_exp(logp - old_logprob, h.log_ratio_clamp)
    if kind == CLIP:
        term = clip_term(r, a, h)
    elif kind == GPPO:
        term = gppo_term(r, a, h)
    elif kind == CISPO:
        term = cispo_term(r, logp, a, h)
    elif kind == SAPO:
        term = sapo_term(r, a, h)
    elif kind == DRO:
        term = dro_term(logp, old_logprob, a, h)
    else:
        term = dppo_term(kind, r, logp, old_logprob, a, h)
    return term


@triton.jit
def kl_term(kl_kind, unbiased, logp, ref_logprob, old_logprob, log_ratio_clamp):
    """k1, k2, k3 of d = ref - logp; `unbiased` multiplies by r and differentiates through it."""
    d = ref_logprob - logp
    inside = (d >= -log_ratio_clamp) & (d <= log_ratio_clamp)
    # Not exp(d) - 1 - d, which loses all digits while the policies are close.
    grown = expm1(clamp(d, -log_ratio_clamp, log_ratio_clamp))
    k3 = grown - d
    value = tl.where(kl_kind == K3, k3, tl.where(kl_kind == K2, 0.5 * d * d, -d))
    k3_slope = tl.where(inside, -grown, 1.0)
    slope = tl.where(kl_kind == K3, k3_slope, tl.where(kl_kind == K2, -d, 1.0))
    r = clamped_exp(logp - old_logprob, log_ratio_clamp)
    through = r.value * (r.slope * value + slope)
    return Term(tl.where(unbiased, r.value * value, value), tl.where(unbiased, through, slope))


@triton.jit
def objective_row(kind, kl_kind, kl_unbiased, logp, entropy, row, h):
    # A = 0 gives 0 whatever the ratio, as long as there is one; DRO's quadratic term has no A.
    none = tl.where(row.old_logprob == row.old_logprob, 0.0, row.old_logprob)
    term = token_term(kind, logp, row.old_logprob, row.advantage, h)
    counts = (row.advantage != 0) | (kind == DRO)
    # Also where A = 0: an importance that is not finite leaves its row out.
    value = row.importance * tl.where(counts, term.value, none)
    slope = row.importance * tl.where(counts, term.dlogp, none)
    if kl_kind != NO_KL:
        k = kl_term(kl_kind, kl_unbiased, logp, row.ref_logprob, row.old_logprob, h.log_ratio_clamp)
        value += h.kl_coef * k.value
        slope += h.kl_coef * k.dlogp
    dlogp = row.weight * slope
    dentropy = -h.entropy_coef * row.entropy_weight
    row_loss = row.weight * value + dentropy * entropy
    finite = is_finite(logp) & is_finite(row_loss) & is_finite(value)
    finite = finite & is_finite(dlogp) & is_finite(dentropy)
    return RowLoss(
        tl.where(finite, row_loss, 0.0),
        tl.where(finite, value, 0.0),
        tl.where(finite, dlogp, 0.0),
        tl.where(finite, dentropy, 0.0),
        finite,
    )


@triton.jit
def grad_row(row_max, inv_sum, entropy, collision, g, e, c, k, scale):
    """g, e, c, k: derivatives of the loss with respect to logp, entropy, collision and lse."""
    mean_shifted = -tl.log(inv_sum) - entropy  # u/s
    constant = -g + e * mean_shifted - 2.0 * c * collision + k
    return GradRow(row_max, inv_sum, constant, -e, 2.0 * c, g, scale)
