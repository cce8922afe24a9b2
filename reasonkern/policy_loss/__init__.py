"""Clipped policy-gradient losses fused with entropy statistics: see README.md in this folder."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from .. import _checks
from . import parallel_rows, paths
from .bapo import bapo_bounds
from .conflict import conflict_token_weights, entropy_filter
from .inputs import (
    KEPT,
    RowContext,
    canonical_logits,
    canonical_mask,
    canonical_scaling,
    loss_inputs,
    of_caller,
)
from .linear import linear_policy_loss, linear_token_stats
from .metrics import PolicyMetrics, loss_metrics
from .mismatch import MismatchMetrics, rollout_mismatch
from .objective import Objective
from .objective_fields import KL, Importance
from .outputs import PolicyLossOutput, TokenStats
from .parallel import Parallel, vocab_shard
from .selection import covariance_mask, high_entropy_mask
from .weights import token_weights

__all__ = [
    "KL",
    "Importance",
    "MismatchMetrics",
    "Objective",
    "Parallel",
    "PolicyLossOutput",
    "PolicyMetrics",
    "RowContext",
    "TokenStats",
    "bapo_bounds",
    "conflict_token_weights",
    "covariance_mask",
    "entropy_filter",
    "high_entropy_mask",
    "linear_policy_loss",
    "linear_token_stats",
    "policy_loss",
    "rollout_mismatch",
    "token_stats",
    "token_weights",
]

# A checkpoint that holds them loads as torch.load does by default, with weights_only.
torch.serialization.add_safe_globals([MismatchMetrics, PolicyMetrics])


def token_stats(
    logits: Tensor,
    targets: Tensor,
    *,
    temperature: float | Tensor = 1.0,
    softcap: float | None = None,
    mask: Tensor | None = None,
    parallel: Parallel | None = None,
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
        softcap: z = cap * tanh(x / cap) before the temperature, but -inf stays; None = off.
        mask: bool or 0/1 numbers, shaped like ``targets``; rows where it is 0 are not read: their
            statistics and gradient are 0, and any target is allowed. None = all rows.
        parallel: with a ``vocab_group`` the logits are this rank's columns, and the statistics,
            the same on every rank, those of the whole rows, after one all-gather of 32 bytes per
            row; a DTensor sharded on its last dimension needs no `Parallel`. None = whole rows.

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
    logits, shard = vocab_shard(logits, parallel)
    rows, y = canonical_logits(logits, targets, least=1 if shard is None else 0)
    scaling = canonical_scaling(rows, temperature, softcap)
    mask = canonical_mask(mask, y, targets.shape)
    vocab = rows.shape[-1] if shard is None else shard.vocab
    _checks.check_range("targets", y, 0, vocab, mask, KEPT)
    args = (rows, y, mask, scaling.row_temperature, scaling.temperature, scaling.softcap)
    if shard is None:
        out = torch.ops.reasonkern.token_stats(*args)
    else:
        out = parallel_rows.token_stats(*args, shard)
    return TokenStats(*of_caller(out[:7], targets))


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
    parallel: Parallel | None = None,
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
            targets and weight 0 on the last position: a slice's backward would allocate them again,
            also that of ``logits[0]``; packed ones of shape (1, N, V) take ``squeeze(0)``.
        targets: (N,) or (B, T) token ids.
        old_logprob: log-probabilities of the policy that the ratio is against, shaped like
            ``targets``; None = on-policy, r = 1 with gradient.
        advantage: shaped like ``targets``, or one per sequence: (B,) for padded rows, one per
            segment for packed ones.
        weight: shaped like ``targets``, floats: mask x normaliser, from `token_weights`; a mask by
            itself (bool or integers) is refused, and as floats it is the plain sum over all tokens.
            Rows whose weight and entropy weight are 0 are not read; any target is allowed there.
        objective: an `Objective`, or a torch function ``(logprob, entropy, ctx) -> token_loss``.
        ref_logprob: reference policy's log-probabilities, for an objective with ``kl`` and for
            user-defined ones.
        rollout_logprob: inference engine's log-probabilities, for ``importance``, ``opsm``, BAPO as
            in the paper and user-defined objectives; the others do not look at them.
        segments: ``cu_seqlens`` (S + 1,) of packed tokens, for sequence-level terms; padding behind
            the last sequence is one more. Where S = N, N values are read as one per token, except
            the advantages of sequence-level objectives.
        temperature: number > 0, or a tensor of one per row or per sequence. No gradient.
        softcap: z = cap * tanh(x / cap) before the temperature, but -inf stays; None = off.
        entropy_weight: per-row weight of the entropy bonus, floats; None = ``weight``.
        inplace_grad: write the gradient over the logits: no second (N, V) buffer. The logits must
            not be used afterwards; autograd raises where another op saved them.
        loss_scale: 0-dim tensor folded into the gradient before it is rounded to the logits' dtype
            (GradScaler's factor for float16, ``scaler.scale(torch.ones((), device=…))``); scaling
            the loss by the same factor cancels it.
        parallel: `Parallel`. ``vocab_group``: the logits are this rank's columns, the loss is the
            same on every rank, the gradient that of this rank's columns (always the two-pass form,
            one all-gather of 32 bytes per row); a DTensor sharded on its last dimension needs no
            `Parallel`. ``segment_group``: sequence-level terms sum over the pieces of a sequence.
            ``data_group``: where ``metrics.all_reduce()`` merges.

    Returns:
        `PolicyLossOutput`. Rows with NaN or +inf logits, a target at -inf or a nonfinite loss give
        loss 0 and gradient 0 and are counted in ``rows_nonfinite``.

    Raises:
        ValueError: wrong shape, dtype or device, a missing input of the objective, a per-token
            advantage for a sequence-level objective, a function without gradient; on CPU also
            targets out of range, nonfinite weights or advantages in active rows (on CUDA such rows
            are counted instead).

    Example:
        >>> import torch, reasonkern as rk
        >>> logits, mask = torch.zeros(1, 2, 4, requires_grad=True), torch.tensor([[1, 0]])
        >>> out = rk.policy_loss(
        ...     logits, torch.tensor([[3, 0]]), advantage=torch.ones(1),
        ...     weight=rk.token_weights(mask), objective=rk.Objective.dapo(),
        ... )
        >>> out.loss.backward()
        >>> logits.grad  # p - 1[v = target], 0 for the token of weight 0
        tensor([[[ 0.2500,  0.2500,  0.2500, -0.7500],
                 [ 0.0000,  0.0000,  0.0000,  0.0000]]])
    """
    logits, shard = vocab_shard(logits, parallel)
    rows, y = canonical_logits(logits, targets, least=1 if shard is None else 0)
    vocab = rows.shape[-1] if shard is None else shard.vocab
    o, context, scaling, loss_scale = loss_inputs(
        objective, rows, y, vocab,
        packed=logits.ndim == 2, segments=segments, temperature=temperature, softcap=softcap,
        loss_scale=loss_scale, parallel=parallel, old_logprob=old_logprob, advantage=advantage,
        weight=weight, ref_logprob=ref_logprob, rollout_logprob=rollout_logprob,
        entropy_weight=entropy_weight,
    )  # fmt: skip
    _checks.check_choice("inplace_grad", inplace_grad, (False, True))
    inplace_grad = inplace_grad and y.numel() > 0  # without rows strides may be 0
    if inplace_grad and any(
        n > 1 and not s for n, s in zip(rows.shape, rows.stride(), strict=True)
    ):
        _checks.fail("logits", "rows that do not share memory for inplace_grad", rows.stride())
    if shard is None and paths.is_fused(o, rows.dtype, paths.needs_grad(rows), context, loss_scale):
        out = paths.fused(o, rows, y, context, scaling, loss_scale, inplace_grad)
    else:
        out = paths.two_phase(o, rows, y, context, scaling, inplace_grad, shard)
    metrics = loss_metrics(context, *out[2:])
    token_loss, logprob, entropy = of_caller(out[1:4], targets)
    return PolicyLossOutput(out.loss, token_loss, logprob, entropy, metrics)
