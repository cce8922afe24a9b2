"""Clipped policy-gradient losses fused with entropy statistics: see README.md in this folder."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from .. import _checks
from . import paths
from .inputs import (
    RowContext,
    canonical_logits,
    canonical_scaling,
    canonical_segments,
    check_rows,
    check_tensor,
    row_tensor,
)
from .metrics import PolicyMetrics, measure
from .objective import KL, Importance, Objective
from .sequence import Segments
from .weights import token_weights

__all__ = [
    "KL",
    "Importance",
    "Objective",
    "PolicyLossOutput",
    "PolicyMetrics",
    "RowContext",
    "TokenStats",
    "policy_loss",
    "token_stats",
    "token_weights",
]


class TokenStats(NamedTuple):
    """Statistics of each row of logits, shaped like ``targets``; float32 (float64 for float64)."""

    logprob: Tensor
    """log p[target], nats; -inf where the target's logit is -inf."""
    entropy: Tensor
    """-sum p ln p, nats."""
    lse: Tensor
    """ln sum exp of the scaled logits."""
    collision: Tensor
    """sum p^2."""
    varentropy: Tensor
    """Variance of ln p under p, nats^2."""
    max_prob: Tensor
    """Largest probability."""
    is_top1: Tensor
    """bool: the target is the argmax (the first one among ties)."""


class PolicyLossOutput(NamedTuple):
    """What `policy_loss` returns; everything but ``loss`` is detached."""

    loss: Tensor
    """0-dim, with autograd: the sum over rows of the weighted token losses and added terms."""
    token_loss: Tensor
    """Loss per token before its weight, without the entropy bonus, shaped like ``targets``."""
    logprob: Tensor
    """log p[target] of this pass."""
    entropy: Tensor
    """Entropy of this pass, nats."""
    metrics: PolicyMetrics
    """What the clipping did: ``metrics.compute()``; ``a + b`` merges micro-batches."""


def token_stats(
    logits: Tensor,
    targets: Tensor,
    *,
    temperature: float | Tensor = 1.0,
    softcap: float | None = None,
    mask: Tensor | None = None,
) -> TokenStats:
    """Log-probability, entropy and five more statistics of each row in one read of the logits.

    Differentiable (once) through ``logprob``, ``entropy``, ``lse`` and ``collision``. Equivalent
    to, with z the soft-capped logits over the temperature in float32::

        logp = z.log_softmax(-1)
        logprob = logp.gather(-1, targets[..., None])[..., 0]
        entropy = -(logp.exp() * logp).sum(-1)
        lse, collision, max_prob = z.logsumexp(-1), logp.exp().square().sum(-1), logp.exp().amax(-1)

    Args:
        logits: (N, V) or (B, T, V), float32, bfloat16, float16 or float64, the last dimension
            contiguous (``logits[:, :-1]`` costs no copy). -inf entries are allowed.
        targets: (N,) or (B, T) token ids in [0, V).
        temperature: a number > 0, or a tensor of one per row or one per sequence (B,).
        softcap: z = cap * tanh(x / cap) before the temperature; None = off.
        mask: bool, shaped like ``targets``; rows where it is False are not read: their statistics
            are 0, their gradient is 0, and any target is allowed. None = all rows.

    Returns:
        `TokenStats`. A row with NaN or +inf, or without a finite logit, has NaN statistics and
        gradient 0; a target at -inf has logprob -inf and gradient 0.

    Raises:
        ValueError: wrong shape, dtype or device; a target outside [0, V) in an unmasked row on CPU
            (on CUDA such a row has NaN statistics instead, without a synchronisation).

    Example:
        >>> import torch, reasonkern as rk
        >>> rk.token_stats(torch.zeros(1, 4), torch.tensor([2])).entropy  # ln 4
        tensor([1.3863])
    """
    rows, y = canonical_logits(logits, targets)
    scaling = canonical_scaling(rows, temperature, softcap)
    if mask is not None:
        check_tensor("mask", mask)
        _checks.check_dtype("mask", mask, torch.bool)
        _checks.check_shape("mask", mask, targets.shape, "targets.shape")
        _checks.check_device("mask", mask, logits, "logits")
        mask = mask.reshape(y.shape).contiguous()
    _checks.check_range("targets", y, 0, rows.shape[-1], where=mask)
    out = torch.ops.reasonkern.token_stats(
        rows, y, mask, scaling.row_temperature, scaling.temperature, scaling.softcap
    )
    return TokenStats(*(t.view(targets.shape) for t in out[:7]))


def policy_loss(
    logits: Tensor,
    targets: Tensor,
    *,
    old_logprob: Tensor | None = None,
    advantage: Tensor,
    weight: Tensor,
    objective: Objective | Callable[..., Tensor],
    ref_logprob: Tensor | None = None,
    rollout_logprob: Tensor | None = None,
    segments: Tensor | None = None,
    temperature: float | Tensor = 1.0,
    softcap: float | None = None,
    entropy_weight: Tensor | None = None,
    inplace_grad: bool = False,
    loss_scale: Tensor | None = None,
) -> PolicyLossOutput:
    """Policy-gradient loss, its gradient, entropy and clipping metrics from one read of the logits.

    ``L = sum_t w_t (sel_t is_t l_t + kl_coef kl_t) - entropy_coef sum_t entropy_weight_t H_t`` with
    l of the objective. Equivalent to, for `Objective.dapo` and weights w::

        logp = (logits.float() / temperature).log_softmax(-1)
        logprob = logp.gather(-1, targets[..., None])[..., 0]
        r = (logprob - old_logprob).exp()
        l = -torch.minimum(r * advantage, r.clamp(0.8, 1.28) * advantage)
        loss = (w * l).sum()

    Token-local objectives form the gradient in the forward (one read, one write of the logits);
    sequence-level ones, OPSM, user-defined ones and float16 without ``loss_scale`` read the logits
    once more in the backward. Backward runs once; a second call raises RuntimeError, except in the
    two-pass form without ``inplace_grad``, which keeps what it needs.

    Args:
        logits: (N, V) packed or (B, T, V) padded, float32, bfloat16, float16 or float64, the last
            dimension contiguous. For ``inplace_grad`` pass the model's full logits with shifted
            targets and weight 0 on the last position: a slice's backward would allocate them again.
        targets: (N,) or (B, T) token ids.
        old_logprob: log-probabilities of the policy that the ratio is against, shaped like
            ``targets``; None = on-policy, r = 1 with gradient.
        advantage: shaped like ``targets``, or one per sequence: (B,) for padded rows, one per
            segment for packed ones.
        weight: shaped like ``targets``: mask x normaliser, from `token_weights`. Rows whose weight
            and entropy weight are 0 are not read; any target is allowed there.
        objective: an `Objective`, or a torch function ``(logprob, entropy, ctx) -> token_loss``.
        ref_logprob: reference policy, for ``Objective(kl=…)``.
        rollout_logprob: inference engine's log-probabilities, for ``importance`` and ``opsm``.
        segments: ``cu_seqlens`` (S + 1,) of packed tokens, for sequence-level terms.
        temperature: number > 0, or a tensor of one per row or per sequence. No gradient.
        softcap: z = cap * tanh(x / cap) before the temperature; None = off.
        entropy_weight: per-row weight of the entropy bonus; None = ``weight``.
        inplace_grad: write the gradient over the logits: no second (N, V) buffer. The logits must
            not be used afterwards; autograd raises where another op saved them.
        loss_scale: 0-dim tensor folded into the gradient before it is rounded to the logits' dtype
            (GradScaler's factor for float16); scaling the loss by the same factor cancels it.

    Returns:
        `PolicyLossOutput`. Rows with NaN or +inf logits, a target at -inf or a nonfinite loss give
        loss 0 and gradient 0 and are counted in ``rows_nonfinite``.

    Raises:
        ValueError: wrong shape, dtype or device, a missing input of the objective, a per-token
            advantage for a sequence-level objective; on CPU also targets out of range, nonfinite
            weights or advantages in active rows (on CUDA such rows are counted instead).
    """
    if not isinstance(objective, Objective):
        if not callable(objective):
            _checks.fail("objective", "an Objective or a function", repr(objective))
        objective = Objective.custom(objective)
    rows, y = canonical_logits(logits, targets)
    packed = logits.ndim == 2
    sequences = canonical_segments(segments, y, packed)
    scaling = canonical_scaling(rows, temperature, softcap, sequences)
    context = _context(
        objective, rows, sequences, old_logprob, advantage, weight, ref_logprob, rollout_logprob,
        entropy_weight,
    )  # fmt: skip
    _check_objective(objective, context, packed)
    if inplace_grad and any(
        n > 1 and not s for n, s in zip(rows.shape, rows.stride(), strict=True)
    ):
        _checks.fail("logits", "rows that do not share memory for inplace_grad", rows.stride())
    check_rows(context, y, rows.shape[-1])
    if loss_scale is not None:
        check_tensor("loss_scale", loss_scale)
        if loss_scale.ndim:
            _checks.fail("loss_scale", "a 0-dim tensor", f"shape {tuple(loss_scale.shape)}")
        loss_scale = loss_scale.detach().to(context.weight)
    values, hyper = objective.pack(context.weight)
    if paths.is_fused(objective, rows, context, loss_scale):
        out = paths.fused(
            objective, rows, y, context, scaling, loss_scale, inplace_grad, hyper, values
        )
    else:
        out = paths.two_phase(objective, rows, y, context, scaling, inplace_grad, hyper, values)
    shape = targets.shape
    return PolicyLossOutput(
        out.row_loss.sum(),
        out.token_loss.detach().view(shape),
        out.logprob.detach().view(shape),
        out.entropy.detach().view(shape),
        _metrics(objective, out, context, hyper, values),
    )


def _context(
    o: Objective,
    logits: Tensor,
    segments: Segments,
    old_logprob: Tensor | None,
    advantage: Tensor,
    weight: Tensor,
    ref_logprob: Tensor | None,
    rollout_logprob: Tensor | None,
    entropy_weight: Tensor | None,
) -> RowContext:
    def optional(name: str, x: Tensor | None) -> Tensor | None:
        return None if x is None else row_tensor(name, x, logits)

    spread = row_tensor(
        "advantage", advantage, logits, per_sequence=True, segments=segments,
        sequence_first=o.level == "sequence",
    )  # fmt: skip
    return RowContext(
        old_logprob=optional("old_logprob", old_logprob),
        advantage=spread,
        weight=row_tensor("weight", weight, logits),
        entropy_weight=optional("entropy_weight", entropy_weight),
        ref_logprob=optional("ref_logprob", ref_logprob),
        rollout_logprob=optional("rollout_logprob", rollout_logprob),
        segments=segments,
        advantage_per_sequence=advantage.numel() in (1, segments.count(spread)),
    )


def _check_objective(o: Objective, context: RowContext, packed: bool) -> None:
    if o.kl is not None and context.ref_logprob is None:
        _checks.fail("ref_logprob", f"a tensor for objective {o.name} with kl", None)
    if (o.importance is not None or o.opsm is not None) and context.rollout_logprob is None:
        _checks.fail("rollout_logprob", "a tensor for importance or opsm", None)
    by_sequence = o.level == "sequence" or _sequence_importance(o) or o.opsm is not None
    if by_sequence and packed and context.segments.cu_seqlens is None:
        _checks.fail("segments", f"cu_seqlens for packed tokens with objective {o.name}", None)
    if o.level == "sequence" and not context.advantage_per_sequence:
        shape = tuple(context.advantage.shape)
        _checks.fail("advantage", f"one value per sequence for objective {o.name}", shape)


def _sequence_importance(o: Objective) -> bool:
    return isinstance(o.importance, Importance) and o.importance.level == "sequence"


@torch.no_grad()
def _metrics(
    o: Objective,
    rows: paths.LossRows,
    context: RowContext,
    hyper: Tensor | None,
    values: list[float],
) -> PolicyMetrics:
    log_ratio = None  # of the token
    if o.name == "gspo" and context.old_logprob is not None and rows.finite is not None:
        used = (context.weight != 0) & rows.finite
        total = context.sequence_sum(torch.where(used, rows.logprob - context.old_logprob, 0.0))
        mean = total / context.sequence_sum(used).clamp_min(1)
        log_ratio = mean.to(rows.logprob.dtype).contiguous()
    return measure(
        o, rows.logprob, rows.entropy, context.old_logprob, context.advantage, context.weight,
        context.entropy_weight, rows.importance, context.ref_logprob, log_ratio, rows.finite,
        hyper, values,
    )  # fmt: skip
