"""The two ways through the logits, and their in-place forms.

* fused: token-local objectives; the operator reads the row once and writes its gradient.
* two-phase: everything else; statistics, an O(N) map in torch, gradient in the backward.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .. import _checks, _load
from . import op, parallel_rows
from .adaptive import adapt
from .inputs import RowContext, Scaling
from .objective import Objective
from .objective_fields import KL, KL_KINDS, Importance
from .parallel import VocabShard
from .reference_objective import (
    Hyper,
    RowLoss,
    kl_term,
    objective_rows,
    unpack_hyper,
)
from .sequence import KINDS, importance_weights, opsm_keeps, sequence_rows


class _InplaceLoss(torch.autograd.Function):
    """Sum of the fused rows whose gradient replaced the logits (mutating operators: no formula)."""

    @staticmethod
    def forward(ctx: Any, logits: Tensor, row_loss: Tensor, loss_scale: Tensor | None) -> Tensor:
        # Not before: autograd finds another way to a view that has changed, through a new buffer.
        torch.autograd.graph.increment_version(logits)
        ctx.save_for_backward(logits, loss_scale)
        ctx.set_materialize_grads(False)
        return row_loss.sum()

    @staticmethod
    def backward(ctx: Any, grad: Tensor | None) -> tuple[Tensor | None, ...]:
        if grad is None:
            return None, None, None
        op.claim_backward(ctx)
        logits, loss_scale = ctx.saved_tensors
        return op.scale_saved_gradient(logits.detach(), grad, loss_scale), None, None


class _InplaceTokenStats(torch.autograd.Function):
    """`token_stats` whose backward writes the gradient over the logits."""

    @staticmethod
    def forward(ctx: Any, logits: Tensor, *args: Any) -> tuple[Tensor, Tensor]:
        out = torch.ops.reasonkern.token_stats(logits.detach(), *args)
        logprob, entropy, _, collision, _, max_prob, _, row_max = out
        ctx.save_for_backward(
            logits, args[0], args[2], logprob, entropy, collision, max_prob, row_max
        )
        ctx.scaling = args[3:]
        ctx.set_materialize_grads(False)
        return logprob, entropy

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        if all(g is None for g in grads):
            return (None,) * 6
        op.claim_backward(ctx)
        logits, targets, row_temperature, *stats = ctx.saved_tensors
        gradient = logits.detach()
        torch.ops.reasonkern.token_stats_backward_(
            gradient, targets, row_temperature, *ctx.scaling, *stats,
            *op.stats_grads(*grads, None, None),
        )  # fmt: skip
        torch.autograd.graph.increment_version(logits)
        return (op.once_differentiable(gradient), *(None,) * 5)


class _FiniteGradient(torch.autograd.Function):
    """Identity with gradient 0 where the incoming one is not finite.

    A user-defined loss that is nonfinite in a row is left out, yet 0 * inf in its backward is NaN.
    """

    generate_vmap_rule = True

    @staticmethod
    def forward(x: Tensor) -> Tensor:
        return x.view_as(x)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor], output: Tensor) -> None:
        """Nothing is saved; torch.vmap wants it apart from the forward."""

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        return torch.where(torch.isfinite(grad), grad, 0.0)


class PathOutput(NamedTuple):
    """What both paths return, (B, T) each but for ``loss``, which alone has autograd."""

    loss: Tensor
    token_loss: Tensor
    logprob: Tensor
    entropy: Tensor
    finite: Tensor | None  # False where the row was left out; None: where a value is not finite
    factor: Tensor | None  # of the policy term: importance weight, selections
    objective: Objective  # with what its rule chose for this batch
    values: list[float]  # its numbers, as the operators take them
    hyper: Tensor | None
    log_ratio: Tensor | None = None  # what was clipped, where it is not the token's


def needs_grad(logits: Tensor) -> bool:
    return torch.is_grad_enabled() and logits.requires_grad


def _is_inplace(inplace: bool, logits: Tensor) -> bool:
    """Whether a gradient replaces the logits; what the operators refuse is left to them."""
    return inplace and needs_grad(logits) and not _load.is_transformed(logits)


def is_fused(
    o: Objective,
    dtype: torch.dtype,
    needs_gradient: bool,
    context: RowContext,
    loss_scale: Tensor | None,
) -> bool:
    """Token-local, and no rule or term that needs this pass's statistics of other tokens.

    A float16 gradient formed before GradScaler's factor arrives would underflow, so float16 is
    two-phase unless ``loss_scale`` is folded in.
    """
    half = dtype == torch.float16 and loss_scale is None and needs_gradient
    own_importance = o.importance is not None and context.old_logprob is None
    return o.passes == 1 and not own_importance and not half


def fused(
    o: Objective,
    logits: Tensor,
    targets: Tensor,
    context: RowContext,
    scaling: Scaling,
    loss_scale: Tensor | None,
    inplace: bool,
) -> PathOutput:
    """One operator reads the row and writes its gradient."""
    args = fused_args(o, targets, context, scaling, loss_scale)
    if _is_inplace(inplace, logits):
        out = torch.ops.reasonkern.policy_loss_(logits.detach(), *args)
        row_loss, token_loss, logprob, entropy = out
        loss = _InplaceLoss.apply(logits, row_loss, loss_scale)  # type: ignore[no-untyped-call]
    else:
        row_loss, token_loss, logprob, entropy, _ = torch.ops.reasonkern.policy_loss(
            logits, *args, needs_grad(logits)
        )
        loss = row_loss.sum()
    return PathOutput(loss, token_loss, logprob, entropy, None, *fused_choices(o, args))


def fused_choices(
    o: Objective, args: tuple[Any, ...]
) -> tuple[Tensor | None, Objective, list[float], Tensor | None]:
    """The last four of `PathOutput`, from `fused_args`."""
    return args[op.IMPORTANCE], o, args[op.VALUES], args[op.HYPER]


def fused_args(
    o: Objective, targets: Tensor, context: RowContext, scaling: Scaling, loss_scale: Tensor | None
) -> tuple[Any, ...]:
    """What the operator `policy_loss` takes after the logits."""
    values, hyper = o.pack(context.weight)
    importance = None
    if _has_factor(o, context):
        h = unpack_hyper(values, hyper, targets.shape)
        importance = _factor(o, context.old_logprob, context.weight, context, h)
    return (
        targets, context.old_logprob, context.advantage, context.weight, context.entropy_weight,
        importance, context.ref_logprob,
        scaling.row_temperature, loss_scale, hyper, values, scaling.temperature, scaling.softcap,
        o.kind, *_kl(o),
    )  # fmt: skip


def two_phase(
    o: Objective,
    logits: Tensor,
    targets: Tensor,
    context: RowContext,
    scaling: Scaling,
    inplace: bool,
    shard: VocabShard | None = None,
) -> PathOutput:
    """As `fused`, through the statistics and an O(N) map; `shard`: logits are a rank's columns."""
    rows = (logits, targets, context.active, scaling)
    if shard is None:
        logprob, entropy = statistics(*rows, inplace)
    else:
        args = (scaling.row_temperature, scaling.temperature, scaling.softcap)
        logprob, entropy = parallel_rows.token_stats(
            *rows[:3], *args, shard, _is_inplace(inplace, logits)
        )[:2]
    return loss_of_statistics(o, logprob, entropy, context)


def statistics(
    logits: Tensor, targets: Tensor, active: Tensor, scaling: Scaling, inplace: bool
) -> tuple[Tensor, Tensor]:
    """Log-probability and entropy; ``inplace``: the gradient will be written over the logits."""
    args = (targets, active, scaling.row_temperature, scaling.temperature, scaling.softcap)
    if _is_inplace(inplace, logits):
        return _InplaceTokenStats.apply(logits, *args)  # type: ignore[no-untyped-call,no-any-return]
    logprob, entropy = torch.ops.reasonkern.token_stats(logits, *args)[:2]
    return logprob, entropy


def loss_of_statistics(
    o: Objective, logprob: Tensor, entropy: Tensor, context: RowContext
) -> PathOutput:
    """The O(N) map of the two-phase path, differentiable through the statistics; as `fused`."""
    values, hyper = o.pack(context.weight)
    if _has_operator(o, context) and not _has_factor(o, context):
        return _operator_rows(o, logprob, entropy, context, None, values, hyper)
    # Nonfinite rows take no part: their derivative is cut off here, their loss in the map.
    finite = torch.isfinite(logprob) & torch.isfinite(entropy)
    lp = torch.where(finite, logprob, 0.0)
    ent = torch.where(finite, entropy, 0.0)
    h = unpack_hyper(values, hyper, logprob.shape)
    if o.rule is not None:
        o, context = adapt(o, lp, ent, finite, context, h)
        values, hyper = o.pack(context.weight)
        h = unpack_hyper(values, hyper, logprob.shape)
    if _has_operator(o, context):
        with torch.no_grad():
            old = lp.detach() if context.old_logprob is None else context.old_logprob
            weight = torch.where(finite, context.weight, 0.0)
            factor = _selection(o, lp.detach(), old, weight, context, h)
        return _operator_rows(o, logprob, entropy, context, factor, values, hyper)
    log_ratio = None
    if o.level == "custom":
        row_loss, token_loss, finite, factor = _custom_rows(o, lp, ent, finite, context, h)
    else:
        with torch.no_grad():
            rows, factor, log_ratio = _mapped_rows(o, lp, ent, finite, context, h)
        # Value from the map, gradient by its analytic derivatives.
        slope = rows.dlogp * (lp - lp.detach()) + rows.dentropy * (ent - ent.detach())
        row_loss, token_loss, finite = rows.row_loss + slope, rows.token_loss, finite & rows.finite
    rest = token_loss.detach(), logprob.detach(), entropy.detach()
    return PathOutput(row_loss.sum(), *rest, finite, factor, o, values, hyper, log_ratio)


def _has_operator(o: Objective, context: RowContext) -> bool:
    """Whether one operator maps the statistics; it cannot add up pieces on other ranks."""
    if o.level == "sequence":
        return not context.segments.is_pieces
    return o.level == "token" and not o.is_penalised


def _has_factor(o: Objective, context: RowContext) -> bool:
    """Whether there is something to work out from other rows or to multiply in."""
    extras = (o.rule, o.opsm, o.importance, o.selection, context.importance)
    return any(x is not None for x in extras)


def _operator_rows(
    o: Objective,
    logprob: Tensor,
    entropy: Tensor,
    context: RowContext,
    factor: Tensor | None,
    values: list[float],
    hyper: Tensor | None,
) -> PathOutput:
    """Objectives of given statistics, by one operator."""
    rows = (
        logprob, entropy, context.old_logprob, context.advantage, context.weight,
        context.entropy_weight, factor, context.ref_logprob,
    )  # fmt: skip
    log_ratio = None
    if o.level == "token":
        row_loss, token_loss, _, _, finite = torch.ops.reasonkern.objective_map(
            *rows, hyper, values, o.kind, *_kl(o)
        )
    else:
        numbers, of_rows = values, hyper
        if o.vespo_shape is not None:
            numbers, of_rows = o.pack_sequence(context.weight)
        row_loss, token_loss, _, _, finite, log_ratio = torch.ops.reasonkern.sequence_map(
            *rows, context.segments.offsets, of_rows, numbers, KINDS[o.name], *_kl(o)
        )
    rest = logprob.detach(), entropy.detach(), finite, factor, o, values, hyper
    return PathOutput(row_loss.sum(), token_loss, *rest, log_ratio if o.name == "gspo" else None)


def _mapped_rows(
    o: Objective, lp: Tensor, ent: Tensor, finite: Tensor, context: RowContext, h: Hyper
) -> tuple[RowLoss, Tensor | None, Tensor | None]:
    """What no operator maps: the map's rows, and factor and log-ratio of `PathOutput`."""
    weight, entropy_weight = _finite_weights(finite, context)
    old = lp if context.old_logprob is None else context.old_logprob
    factor = _selection(o, lp, old, weight, context, h)
    rows: tuple[Any, ...] = (
        lp, ent, context.old_logprob, context.advantage, weight, entropy_weight, factor,
        context.ref_logprob,
    )  # fmt: skip
    args: tuple[Any, ...]
    if o.level == "token":  # with a penalty
        args = (o.kind, *_kl(o), *rows, h, o.log_ratio_penalty)
        return objective_rows(*args), factor, None
    h = unpack_hyper(*o.pack_sequence(context.weight), lp.shape)
    args = (KINDS[o.name], *_kl(o), *rows, context.segments, h)
    mapped, log_ratio = sequence_rows(*args)
    return mapped, factor, log_ratio if o.name == "gspo" else None


def _finite_weights(finite: Tensor, context: RowContext) -> tuple[Tensor, Tensor | None]:
    """Weight and entropy weight, 0 in rows that are not finite: they are in no sequence."""
    weight, entropy_weight = context.weight, context.entropy_weight
    if entropy_weight is not None:
        entropy_weight = torch.where(finite, entropy_weight, 0.0)
    return torch.where(finite, weight, 0.0), entropy_weight


def _custom_rows(
    o: Objective, lp: Tensor, ent: Tensor, finite: Tensor, context: RowContext, h: Hyper
) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    assert o.function is not None
    lp, ent = _FiniteGradient.apply(lp), _FiniteGradient.apply(ent)  # type: ignore[no-untyped-call]
    weight, entropy_weight = _finite_weights(finite, context)
    token_loss = o.function(lp, ent, replace(context, weight=weight, entropy_weight=entropy_weight))
    if not isinstance(token_loss, Tensor) or token_loss.shape != lp.shape:
        shaped = isinstance(token_loss, Tensor)
        got = tuple(token_loss.shape) if shaped else type(token_loss).__name__
        _checks.fail("objective", f"a token_loss of shape {tuple(lp.shape)}", got)
    if lp.requires_grad and not token_loss.requires_grad:
        expected = "a token_loss with a gradient to logprob or entropy (0 * logprob has a zero one)"
        _checks.fail("objective", expected, "one without, which would train nothing")
    old = lp if context.old_logprob is None else context.old_logprob
    factor = _selection(o, lp.detach(), old.detach(), weight, context, h)
    if factor is not None:
        token_loss = factor * token_loss
    if isinstance(o.kl, KL) and context.ref_logprob is not None:
        kl_kind, unbiased = _kl(o)
        k = kl_term(kl_kind, unbiased, lp.detach(), context.ref_logprob, old.detach(), h)
        token_loss = token_loss + h.kl_coef * (k.value + k.dlogp * (lp - lp.detach()))
    entropy_weight = context.weight if context.entropy_weight is None else context.entropy_weight
    row_loss = context.weight * token_loss - h.entropy_coef * entropy_weight * ent
    kept = finite & context.active & torch.isfinite(row_loss)
    row_loss, token_loss = (torch.where(kept, x, 0.0) for x in (row_loss, token_loss))
    return row_loss.to(lp.dtype), token_loss.to(lp.dtype), kept, factor


def _kl(o: Objective) -> tuple[int, bool]:
    return (KL_KINDS[o.kl.estimator], o.kl.unbiased) if isinstance(o.kl, KL) else (0, False)


def _selection(
    o: Objective, lp: Tensor, old: Tensor, weight: Tensor, context: RowContext, h: Hyper
) -> Tensor | None:
    """Detached factor of the policy term, with OPSM's selection."""
    factor = _factor(o, old, weight, context, h)
    if o.opsm is None:
        return factor
    assert context.rollout_logprob is not None
    keeps = opsm_keeps(
        o.opsm, lp, context.rollout_logprob, context.advantage, weight != 0, context.segments
    )
    return keeps if factor is None else factor * keeps


def _factor(
    o: Objective, old: Tensor | None, weight: Tensor, context: RowContext, h: Hyper
) -> Tensor | None:
    """Importance weight times the objective's selection."""
    importance, selection = _importance(o, old, weight, context, h), o.selection_rows(weight)
    if importance is None or selection is None:
        return selection if importance is None else importance
    return importance * selection


def _importance(
    o: Objective, old: Tensor | None, weight: Tensor, context: RowContext, h: Hyper
) -> Tensor | None:
    if not isinstance(o.importance, Importance):
        return context.importance
    assert old is not None and context.rollout_logprob is not None
    if context.old_logprob is not None:
        weight = context.weight  # rows that are not finite included: one pass does not know them
    return importance_weights(
        o.importance, old.detach(), context.rollout_logprob, weight, context.segments,
        h.log_ratio_clamp,
    ).detach()  # fmt: skip
