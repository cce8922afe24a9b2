"""The definition of the family in plain torch: row statistics, objective map, row gradient.

Works in float32 (bf16, fp16 and fp32 logits) or float64 on any device. Every function takes the
arguments of the operator of the same name (``op.py``); the other backends are tested against these
functions in float64. The formulas of the objective are also in ``csrc/policy_loss/objective.h``.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

CLIP, GPPO, CISPO, SAPO, DPPO_TV, DPPO_KL, DRO = range(7)

Number = float | Tensor


def accumulator_dtype(dtype: torch.dtype) -> torch.dtype:
    """Statistics are float32 whatever the logits, float64 for float64 logits."""
    return torch.float64 if dtype == torch.float64 else torch.float32


# ---- row statistics


class Shifted(NamedTuple):
    """A row of logits after soft-cap and temperature, shifted by its maximum.

    The maximum is subtracted before the division by the temperature: with an offset of 3000 the
    difference of two rounded quotients has lost 1e-4, the quotient of the difference 1e-7.
    """

    d: Tensor  # (B, T, V) z - max z; -inf where the logit is -inf
    row_max: Tensor  # (B, T) before the temperature; -inf where every logit is
    jacobian: Number  # (B, T, V) dz/dx, without the temperature when there is no soft-cap
    active: Tensor  # (B, T) bool
    bad: Tensor  # (B, T) bool: NaN or +inf among the logits, no finite logit, or invalid target


def shift(
    logits: Tensor,
    targets: Tensor,
    mask: Tensor | None,
    row_temperature: Tensor | None,
    temperature: float,
    softcap: float,
    row_max: Tensor | None = None,
) -> Shifted:
    """``row_max``: the maximum to shift by, where the logits are a part of a row's."""
    vocab = logits.shape[-1]
    x = logits.to(accumulator_dtype(logits.dtype))
    active = torch.ones_like(targets, dtype=torch.bool) if mask is None else mask
    top = x.amax(-1)  # NaN and +inf win the maximum; a row of -inf has maximum -inf
    bad = active & (~torch.isfinite(top) | (targets < 0) | (targets >= vocab))
    x = torch.where((active & ~bad).unsqueeze(-1), x, 0.0)
    z = x
    jacobian: Number = 1.0
    if softcap:
        t = torch.tanh(x / softcap)
        z = torch.where(x == -torch.inf, x, softcap * t)
        jacobian = 1 - t * t
    if row_max is None:
        row_max = z.detach().amax(-1)
    d = z - row_max.unsqueeze(-1)
    d = d / (temperature if row_temperature is None else row_temperature.unsqueeze(-1))
    return Shifted(d, torch.where(top == -torch.inf, top, row_max), jacobian, active, bad)


def token_stats(
    logits: Tensor,
    targets: Tensor,
    mask: Tensor | None,
    row_temperature: Tensor | None,
    temperature: float,
    softcap: float,
) -> tuple[Tensor, ...]:
    row = shift(logits, targets, mask, row_temperature, temperature, softcap)
    p = torch.exp(row.d)
    finite_d = torch.where(p > 0, row.d, 0.0)  # 0 * (-inf) is 0 here
    # In float32 a sum of 1 and of many small numbers can lose all of the small ones.
    s, u, q, w = (
        x.sum(-1, dtype=torch.float64) for x in (p, p * finite_d, p * p, p * finite_d * finite_d)
    )
    log_s, mean = torch.log(s), u / s
    y = torch.where(row.active & ~row.bad, targets, 0)
    d_y = row.d.gather(-1, y.unsqueeze(-1)).squeeze(-1)
    stats = (
        d_y - log_s,
        log_s - mean,
        row.row_max / (temperature if row_temperature is None else row_temperature) + log_s,
        q / (s * s),
        w / s - mean * mean,
        1 / s,
    )
    logprob, entropy, lse, collision, varentropy, max_prob = (
        torch.where(row.active, torch.where(row.bad, torch.nan, stat), 0.0).to(row.d.dtype)
        for stat in stats
    )
    empty = (row.row_max == -torch.inf) & (targets >= 0) & (targets < logits.shape[-1])
    row_max = torch.where(row.bad & ~empty, torch.nan, row.row_max)
    row_max = torch.where(row.active, row_max, 0.0)
    is_top1 = row.active & ~row.bad & (row.d.argmax(-1) == targets)
    return logprob, entropy, lse, collision, varentropy, max_prob, is_top1, row_max


# ---- row gradient


def row_gradient(
    row: Shifted,
    targets: Tensor,
    entropy: Tensor,
    collision: Tensor,
    max_prob: Tensor,
    g: Tensor,
    e: Tensor,
    c: Tensor,
    k: Tensor,
) -> Tensor:
    """dL/dx times T for g, e, c, k = dL/d(logp, H, C, lse), each (B, T)."""
    inv_s, g, e, c, k, entropy, collision = (
        t.unsqueeze(-1) for t in (max_prob, g, e, c, k, entropy, collision)
    )
    p = torch.exp(row.d) * inv_s
    finite_d = torch.where(p > 0, row.d, 0.0)
    mean = -torch.log(inv_s) - entropy
    grad = p * (-g - e * (finite_d - mean) + 2 * c * (p - collision) + k)
    grad = grad.scatter_add(-1, targets.unsqueeze(-1), g)
    return grad * row.jacobian


def token_stats_backward(
    logits: Tensor,
    targets: Tensor,
    row_temperature: Tensor | None,
    temperature: float,
    softcap: float,
    logprob: Tensor,
    entropy: Tensor,
    collision: Tensor,
    max_prob: Tensor,
    row_max: Tensor,
    grad_logprob: Tensor | None,
    grad_entropy: Tensor | None,
    grad_lse: Tensor | None,
    grad_collision: Tensor | None,
) -> Tensor:
    live = (max_prob > 0) & torch.isfinite(logprob)
    top = torch.where(live, row_max, 0.0)
    row = shift(logits, targets, live, row_temperature, temperature, softcap, top)
    zero = torch.zeros_like(logprob)
    g, e, k, c = (
        zero if t is None else torch.where(live, t, 0.0)
        for t in (grad_logprob, grad_entropy, grad_lse, grad_collision)
    )
    y = torch.where(live, targets, 0)
    entropy, collision = torch.where(live, entropy, 0.0), torch.where(live, collision, 0.0)
    grad = row_gradient(row, y, entropy, collision, torch.where(live, max_prob, 1.0), g, e, c, k)
    grad = grad / (temperature if row_temperature is None else row_temperature.unsqueeze(-1))
    # A part of a row without a finite logit has no gradient, whatever the rest of the row.
    kept = live & ~row.bad
    return torch.where(kept.unsqueeze(-1), grad, 0.0).to(logits.dtype).contiguous()


# ---- objective map


class Hyper(NamedTuple):
    """The numbers of an objective: floats, or tensors that broadcast to the rows."""

    ratio_min: Number
    ratio_max: Number
    dual_clip: Number
    ratio_cap: Number
    low: Number
    high: Number
    kl_coef: Number
    entropy_coef: Number
    log_ratio_clamp: Number


def unpack_hyper(values: list[float], hyper: Tensor | None, shape: torch.Size) -> Hyper:
    if hyper is None:
        return Hyper(*values)
    return Hyper(*(h.view(shape) if h.numel() > 1 else h.view(()) for h in hyper.unbind(0)))


class Term(NamedTuple):
    value: Tensor
    dlogp: Tensor


def clip_ratio(r: Tensor, h: Hyper) -> Tensor:
    return torch.clamp_max(torch.clamp_min(r, h.ratio_min), h.ratio_max)


def clamped_exp(log_ratio: Tensor, limit: Number) -> tuple[Tensor, Tensor]:
    """The exponential of the clamped log-ratio, and 1 inside the clamp, 0 outside."""
    inside = (log_ratio >= -limit) & (log_ratio <= limit)
    clamped = torch.clamp_max(torch.clamp_min(log_ratio, -limit), limit)
    return torch.exp(clamped), inside.to(log_ratio.dtype)


def dual_clipped(term: Term, r: Tensor, a: Tensor, h: Hyper) -> Term:
    """Negative advantages: the loss stops growing, and its gradient is 0, beyond r = dual_clip."""
    bound = -h.dual_clip * a
    hit = (a < 0) & (r > h.dual_clip) & (bound < term.value)
    return Term(torch.where(hit, bound, term.value), torch.where(hit, 0.0, term.dlogp))


def clip_term(r: Tensor, slope: Tensor, a: Tensor, h: Hyper) -> Term:
    unclipped = -torch.clamp_max(r, h.ratio_cap) * a
    clipped = -clip_ratio(r, h) * a
    taken = unclipped >= clipped  # a tie is unclipped
    dlogp = torch.where(taken & (r <= h.ratio_cap), -slope * r * a, 0.0)
    return dual_clipped(Term(torch.where(taken, unclipped, clipped), dlogp), r, a, h)


def gppo_term(r: Tensor, slope: Tensor, a: Tensor, h: Hyper) -> Term:
    below, above = (a < 0) & (r < h.ratio_min), (a > 0) & (r > h.ratio_max)
    kept = torch.where(below, -h.low * h.ratio_min * a, -h.high * h.ratio_max * a)
    clipped = below | above
    value = torch.where(clipped, kept, -r * a)
    return dual_clipped(Term(value, torch.where(clipped, kept, -slope * r * a)), r, a, h)


def sapo_term(r: Tensor, slope: Tensor, a: Tensor, h: Hyper) -> Term:
    low, high = (t if isinstance(t, Tensor) else a.new_full((), t) for t in (h.low, h.high))
    tau = torch.where(a > 0, low, high)
    gate = torch.sigmoid(tau * (r - 1))
    return Term(-a * (4 / tau) * gate, -a * 4 * gate * (1 - gate) * r * slope)


def dppo_keeps(kind: int, logp: Tensor, old: Tensor, a: Tensor, h: Hyper) -> Tensor:
    """DPPO's trust region on the probability of the sampled token (arXiv 2602.04879)."""
    moved = torch.exp(logp) - torch.exp(old)
    if kind == DPPO_TV:
        return torch.where(a > 0, moved <= h.high, moved >= -h.low)
    old_rest = -torch.expm1(old)
    rest = old_rest * (torch.log(old_rest) - torch.log(-torch.expm1(logp)))
    kl = torch.exp(old) * (old - logp) + torch.where(old_rest > 0, rest, 0.0)
    return torch.where(a > 0, (kl <= h.high) | (moved <= 0), (kl <= h.low) | (moved >= 0))


def token_term(kind: int, logp: Tensor, old: Tensor, a: Tensor, h: Hyper) -> Term:
    r, slope = clamped_exp(logp - old, h.log_ratio_clamp)
    if kind == CLIP:
        return clip_term(r, slope, a, h)
    if kind == GPPO:
        return gppo_term(r, slope, a, h)
    if kind == SAPO:
        return sapo_term(r, slope, a, h)
    if kind == DRO:
        d = logp - old
        return Term(-(logp * a - 0.5 * h.low * d * d), -(a - h.low * d))
    if kind == CISPO:
        factor = clip_ratio(r, h) * a
    else:
        keeps = dppo_keeps(kind, logp, old, a, h)
        factor = torch.where(keeps, torch.clamp_max(r, h.ratio_max) * a, 0.0)
    return Term(-factor * logp, -factor)


def kl_term(kl_kind: int, unbiased: bool, logp: Tensor, ref: Tensor, old: Tensor, h: Hyper) -> Term:
    """Schulman's estimators of KL(policy || ref); unbiased = ratio * k, differentiated through."""
    d = ref - logp
    if kl_kind == 1:
        k = Term(-d, torch.ones_like(d))
    elif kl_kind == 2:
        k = Term(0.5 * d * d, -d)
    else:
        # Not exp(d) - 1 - d, which loses all digits while the policies are close.
        clamped = torch.clamp_max(torch.clamp_min(d, -h.log_ratio_clamp), h.log_ratio_clamp)
        grown = torch.expm1(clamped)
        k = Term(grown - d, torch.where(clamped == d, -grown, 1.0))
    if not unbiased:
        return k
    r, slope = clamped_exp(logp - old, h.log_ratio_clamp)
    return Term(r * k.value, r * (slope * k.value + k.dlogp))


def active_rows(weight: Tensor, entropy_weight: Tensor | None) -> Tensor:
    return weight != 0 if entropy_weight is None else (weight != 0) | (entropy_weight != 0)


class RowLoss(NamedTuple):
    """Per-row loss and its derivatives, each (B, T); all zero where ``finite`` is False."""

    row_loss: Tensor
    token_loss: Tensor
    dlogp: Tensor
    dentropy: Tensor
    finite: Tensor


def combine(
    term: Term,
    logp: Tensor,
    entropy: Tensor,
    weight: Tensor,
    entropy_weight: Tensor | None,
    h: Hyper,
) -> RowLoss:
    """Weighted sum w * token_loss - entropy_coef * entropy_weight * H; 0 for nonfinite rows.

    ``term.dlogp`` is the derivative of the *weighted* loss.
    """
    dentropy = -h.entropy_coef * (weight if entropy_weight is None else entropy_weight)
    row_loss = weight * term.value + dentropy * entropy
    parts = (row_loss, term.value, term.dlogp, dentropy)
    active = active_rows(weight, entropy_weight)
    finite = torch.isfinite(logp)
    for part in parts:
        finite = finite & torch.isfinite(part)
    kept = finite & active
    row_loss, value, dlogp, dentropy = (torch.where(kept, part, 0.0) for part in parts)
    return RowLoss(row_loss, value, dlogp, dentropy, finite | ~active)


def objective_rows(
    kind: int,
    kl_kind: int,
    kl_unbiased: bool,
    logp: Tensor,
    entropy: Tensor,
    old_logprob: Tensor | None,
    advantage: Tensor,
    weight: Tensor,
    entropy_weight: Tensor | None,
    importance: Tensor | None,
    ref_logprob: Tensor | None,
    h: Hyper,
    penalty: Number = 0.0,
) -> RowLoss:
    """The token-local objectives; on-policy rows (no ``old_logprob``) have r = 1 with gradient.

    ``penalty`` is the factor of |log r| that KL-Cov adds to the policy term.
    """
    old = logp if old_logprob is None else old_logprob
    term = token_term(kind, logp, old, advantage, h)
    if kind != DRO:  # its quadratic term does not carry A
        # A = 0 gives 0 whatever the ratio, as long as there is one.
        none = torch.where(old.isnan(), old, 0.0)
        term = Term(*(torch.where(advantage == 0, none, t) for t in term))
    if isinstance(penalty, Tensor) or penalty != 0:
        d = logp - old
        term = Term(term.value + penalty * d.abs(), term.dlogp + penalty * d.sign())
    if importance is not None:
        term = Term(*(importance * t for t in term))
    if kl_kind and ref_logprob is not None:
        kl = kl_term(kl_kind, kl_unbiased, logp, ref_logprob, old, h)
        term = Term(*(t + h.kl_coef * k for t, k in zip(term, kl, strict=True)))
    return combine(Term(term.value, weight * term.dlogp), logp, entropy, weight, entropy_weight, h)


# ---- fused loss


def policy_loss(
    logits: Tensor,
    targets: Tensor,
    old_logprob: Tensor | None,
    advantage: Tensor,
    weight: Tensor,
    entropy_weight: Tensor | None,
    importance: Tensor | None,
    ref_logprob: Tensor | None,
    row_temperature: Tensor | None,
    loss_scale: Tensor | None,
    hyper: Tensor | None,
    values: list[float],
    temperature: float,
    softcap: float,
    kind: int,
    kl_kind: int,
    kl_unbiased: bool,
    needs_grad: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    mask = active_rows(weight, entropy_weight)
    stats = token_stats(logits, targets, mask, row_temperature, temperature, softcap)
    logprob, entropy, _, collision, _, max_prob, _, row_max = stats
    h = unpack_hyper(values, hyper, targets.shape)
    rows = objective_rows(
        kind, kl_kind, kl_unbiased, logprob, entropy, old_logprob, advantage, weight,
        entropy_weight, importance, ref_logprob, h,
    )  # fmt: skip
    if not needs_grad:
        return rows.row_loss, rows.token_loss, logprob, entropy, logits.new_empty(0)
    scale = 1.0 if loss_scale is None else loss_scale
    grad = token_stats_backward(
        logits, targets, row_temperature, temperature, softcap,
        logprob, entropy, collision, max_prob, row_max,
        scale * rows.dlogp, scale * rows.dentropy, None, None,
    )  # fmt: skip
    return rows.row_loss, rows.token_loss, logprob, entropy, grad


def scale_rows_(x: Tensor, scale: Tensor) -> None:
    x.mul_(scale.unsqueeze(-1))
