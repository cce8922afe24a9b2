"""The definition of the family in plain torch: row statistics, row gradient, fused loss.

Works in float32 (bf16, fp16 and fp32 logits) or float64 on any device. Every function takes the
arguments of the operator of the same name (``op.py``); the other backends are tested against these
functions in float64. The objective between statistics and gradient is ``reference_objective.py``.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from .reference_objective import Number, active_rows, objective_rows, unpack_hyper


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
    is_top1 = row.active & ~row.bad & (logits.argmax(-1) == targets)
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
