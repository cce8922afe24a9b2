"""The definition of the objectives: a row's loss and its slopes by log-probability and entropy.

Written in torch; the same formulas are in ``csrc/policy_loss/objective.h``.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

CLIP, GPPO, CISPO, SAPO, DPPO_TV, DPPO_KL, DRO = range(7)

Number = float | Tensor


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
    fields = hyper.squeeze(1) if hyper.shape[1] == 1 else hyper.reshape(len(hyper), *shape)
    return Hyper(*fields.unbind(0))


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
