"""Operators of the family: schema, fake, autograd and registrations, on one screen each.

``reference`` serves every device; C++ implements the CPU key; the CUDA key picks CUDA C++
(``reasonkern_cuda::*``) or Triton by evidence (see ``reasonkern.info()``).
"""

from __future__ import annotations

from collections.abc import Callable
from functools import wraps
from typing import Any

import torch
from torch import Tensor

from .. import _load
from . import conflict, metrics, reference, reference_objective, sequence

Backward = Callable[..., tuple[Tensor | None, ...]]

LOGITS_ARGS = "Tensor targets, Tensor? mask, Tensor? row_temperature"
GRAD_ARGS = (
    "Tensor targets, Tensor? row_temperature, float temperature, float softcap, Tensor logprob, "
    "Tensor entropy, Tensor collision, Tensor max_prob, Tensor row_max, Tensor? grad_logprob, "
    "Tensor? grad_entropy, Tensor? grad_lse, Tensor? grad_collision"
)
LOSS_ARGS = (
    "Tensor targets, Tensor? old_logprob, Tensor advantage, Tensor weight, Tensor? entropy_weight, "
    "Tensor? importance, Tensor? ref_logprob, Tensor? row_temperature, Tensor? loss_scale, "
    "Tensor? hyper, float[] values, float temperature, float softcap, int kind, int kl_kind, "
    "bool kl_unbiased"
)
# Places in LOSS_ARGS; what comes before the scale has one element per row.
IMPORTANCE, LOSS_SCALE, HYPER, VALUES = 5, 8, 9, 10
SCHEMAS = {
    "token_stats": f"(Tensor logits, {LOGITS_ARGS}, float temperature, float softcap) -> (Tensor "
    "logprob, Tensor entropy, Tensor lse, Tensor collision, Tensor varentropy, Tensor max_prob, "
    "Tensor is_top1, Tensor row_max)",
    # row_max is the largest logit after the soft-cap and before the temperature.
    "token_stats_backward": f"(Tensor logits, {GRAD_ARGS}) -> Tensor",
    "token_stats_backward_": f"(Tensor(a!) logits, {GRAD_ARGS}) -> ()",
    "policy_loss": f"(Tensor logits, {LOSS_ARGS}, bool needs_grad) -> (Tensor row_loss, "
    "Tensor token_loss, Tensor logprob, Tensor entropy, Tensor grad_logits)",
    "policy_loss_": f"(Tensor(a!) logits, {LOSS_ARGS}) -> (Tensor row_loss, Tensor token_loss, "
    "Tensor logprob, Tensor entropy)",
    "scale_rows_": "(Tensor(a!) x, Tensor scale) -> ()",
    "objective_map": "(Tensor logprob, Tensor entropy, Tensor? old_logprob, Tensor advantage, "
    "Tensor weight, Tensor? entropy_weight, Tensor? importance, Tensor? ref_logprob, "
    "Tensor? hyper, float[] values, int kind, int kl_kind, bool kl_unbiased) -> (Tensor row_loss, "
    "Tensor token_loss, Tensor dlogp, Tensor dentropy, Tensor finite)",
    "sequence_map": "(Tensor logprob, Tensor entropy, Tensor? old_logprob, Tensor advantage, "
    "Tensor weight, Tensor? entropy_weight, Tensor? importance, Tensor? ref_logprob, "
    "Tensor? cu_seqlens, Tensor? hyper, float[] values, int kind, int kl_kind, bool kl_unbiased) "
    "-> (Tensor row_loss, Tensor token_loss, Tensor dlogp, Tensor dentropy, Tensor finite, "
    "Tensor log_ratio)",
    "policy_metrics": "(Tensor logprob, Tensor entropy, Tensor? old_logprob, Tensor advantage, "
    "Tensor weight, Tensor? entropy_weight, Tensor? importance, Tensor? ref_logprob, "
    "Tensor? log_ratio, Tensor? finite, Tensor? hyper, float[] values, int kind, bool clips, "
    "bool needs_ref) -> Tensor",
    "conflict_runs": "(Tensor tokens, Tensor mask, Tensor sign, Tensor members, Tensor spans) "
    "-> Tensor",
}


# ---- reference: the in-place operators are their functional twins plus a copy


def _token_stats_backward_(logits: Tensor, *args: Any) -> None:
    logits.copy_(reference.token_stats_backward(logits, *args))


def _policy_loss_(logits: Tensor, *args: Any) -> tuple[Tensor, ...]:
    out = reference.policy_loss(*(logits, *args, True))
    logits.copy_(out[4])
    return out[:4]


def _objective_map(logprob: Tensor, entropy: Tensor, *args: Any) -> tuple[Tensor, ...]:
    *rows, hyper, values, kind, kl_kind, kl_unbiased = args
    h = reference_objective.unpack_hyper(values, hyper, logprob.shape)
    inputs: tuple[Any, ...] = (kind, kl_kind, kl_unbiased, logprob, entropy, *rows, h)
    return tuple(reference_objective.objective_rows(*inputs))


def _sequence_map(logprob: Tensor, entropy: Tensor, *args: Any) -> tuple[Tensor, ...]:
    *rows, cu_seqlens, hyper, values, kind, kl_kind, kl_unbiased = args
    h = reference_objective.unpack_hyper(values, hyper, logprob.shape)
    segments = sequence.Segments.of(logprob, cu_seqlens)
    inputs: tuple[Any, ...] = (kind, kl_kind, kl_unbiased, logprob, entropy, *rows, segments, h)
    mapped, log_ratio = sequence.sequence_rows(*inputs)
    return (*mapped, log_ratio)


REFERENCE: dict[str, Callable[..., Any]] = {
    "token_stats": reference.token_stats,
    "token_stats_backward": reference.token_stats_backward,
    "token_stats_backward_": _token_stats_backward_,
    "policy_loss": reference.policy_loss,
    "policy_loss_": _policy_loss_,
    "scale_rows_": reference.scale_rows_,
    "objective_map": _objective_map,
    "sequence_map": _sequence_map,
    "policy_metrics": metrics.metric_rows,
    "conflict_runs": conflict.conflict_runs,
}


# ---- fake: shapes and dtypes only


def _like_rows(logits: Tensor, targets: Tensor) -> Tensor:
    return targets.new_empty(targets.shape, dtype=reference.accumulator_dtype(logits.dtype))


def _fake_token_stats(logits: Tensor, targets: Tensor, *args: Any) -> tuple[Tensor, ...]:
    out = [_like_rows(logits, targets) for _ in range(8)]
    out[6] = targets.new_empty(targets.shape, dtype=torch.bool)
    return tuple(out)


def _fake_policy_loss(logits: Tensor, targets: Tensor, *args: Any) -> tuple[Tensor, ...]:
    rows = (_like_rows(logits, targets) for _ in range(4))
    return (*rows, logits.new_empty(logits.shape if args[-1] else (0,)))


def _fake_policy_loss_(logits: Tensor, targets: Tensor, *args: Any) -> tuple[Tensor, ...]:
    return tuple(_like_rows(logits, targets) for _ in range(4))


def _fake_objective_map(logprob: Tensor, *args: Any) -> tuple[Tensor, ...]:
    rows = (logprob.new_empty(logprob.shape) for _ in range(4))
    return (*rows, logprob.new_empty(logprob.shape, dtype=torch.bool))


FAKE: dict[str, Callable[..., Any]] = {
    "token_stats": _fake_token_stats,
    "token_stats_backward": lambda logits, *args: logits.new_empty(logits.shape),
    "token_stats_backward_": lambda logits, *args: None,
    "policy_loss": _fake_policy_loss,
    "policy_loss_": _fake_policy_loss_,
    "scale_rows_": lambda x, scale: None,
    "objective_map": _fake_objective_map,
    "sequence_map": lambda logprob, *args: (
        *_fake_objective_map(logprob),
        logprob.new_empty(logprob.shape),
    ),
    "policy_metrics": lambda logprob, *args: logprob.new_empty(
        len(metrics.SUMS) + 2 + 4 * len(metrics.PAIRS), dtype=torch.float64
    ),
    "conflict_runs": lambda tokens, *args: tokens.new_empty((tokens.shape[0], 2)),
}


# ---- autograd: functional schemas only; `paths` wraps the in-place forms in autograd.Function


class _OnceDifferentiable(torch.autograd.Function):
    """A gradient without a derivative of its own: asking for one raises, nothing else does."""

    @staticmethod
    def forward(ctx: Any, gradient: Tensor) -> Tensor:
        return gradient.view_as(gradient)

    @staticmethod
    def backward(ctx: Any, *_: Tensor) -> Tensor:
        raise RuntimeError(
            "reasonkern: losses and token statistics have no second derivatives; their gradient "
            "was differentiated (create_graph=True and a backward through the result)"
        )


def once_differentiable(gradient: Tensor) -> Tensor:
    """Marks a gradient formed under ``create_graph=True``; otherwise it is returned as it is."""
    if not torch.is_grad_enabled():
        return gradient
    marked: Tensor = _OnceDifferentiable.apply(gradient.detach().requires_grad_())  # type: ignore[no-untyped-call]
    return marked


def marks_gradients(backward: Backward) -> Backward:
    """Decorates the backward of an autograd.Function with `once_differentiable`.

    That of torch does not mark what comes of incoming gradients that are constants.
    """

    @wraps(backward)
    def marked(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        with torch.no_grad():
            out = backward(ctx, *grads)
        return tuple(None if g is None else once_differentiable(g) for g in out)

    return marked


def claim_backward(ctx: Any) -> None:
    """The first backward consumes what the forward left, so a second one raises."""
    if getattr(ctx, "consumed", False):
        raise RuntimeError(
            "reasonkern: this loss was differentiated before, and its first backward consumed the "
            "gradient formed in the forward; call policy_loss again instead of retain_graph=True"
        )
    ctx.consumed = True


def save_stats(ctx: Any, output: tuple[Tensor, ...], *inputs: Tensor | None) -> None:
    """For the backward of `token_stats`: some inputs, then the statistics that GRAD_ARGS has."""
    logprob, entropy, _, collision, varentropy, max_prob, is_top1, row_max = output
    ctx.save_for_backward(*inputs, logprob, entropy, collision, max_prob, row_max)
    ctx.mark_non_differentiable(varentropy, max_prob, is_top1, row_max)
    ctx.set_materialize_grads(False)


def _save_stats(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    logits, targets, _, row_temperature, ctx.temperature, ctx.softcap = inputs
    save_stats(ctx, output, logits, targets, row_temperature)


def stats_grads(*grads: Tensor | None) -> list[Tensor | None]:
    """(logprob, entropy, lse, collision) gradients; they arrive with any strides, 0 included."""
    return [None if g is None else g.contiguous() for g in grads[:4]]


def _token_stats_vjp(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
    logits, targets, row_temperature, *saved = ctx.saved_tensors
    if all(g is None for g in grads[:4]):
        return (None,) * 6
    scaling = row_temperature, ctx.temperature, ctx.softcap
    grad = torch.ops.reasonkern.token_stats_backward(
        logits, targets, *scaling, *saved, *stats_grads(*grads)
    )
    return once_differentiable(grad), None, None, None, None, None


def _save_grad(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    _, token_loss, logprob, entropy, grad_logits = output
    ctx.save_for_backward(grad_logits, inputs[1 + LOSS_SCALE])
    ctx.mark_non_differentiable(token_loss, logprob, entropy, grad_logits)
    ctx.set_materialize_grads(False)


def _policy_loss_vjp(ctx: Any, grad: Tensor | None, *_: Any) -> tuple[Tensor | None, ...]:
    if grad is None:
        return (None,) * 18
    claim_backward(ctx)
    grad_logits, loss_scale = ctx.saved_tensors
    if grad_logits.numel() == 0 and grad.numel() > 0:
        raise RuntimeError("reasonkern::policy_loss: backward needs needs_grad=True in the forward")
    return (scale_saved_gradient(grad_logits, grad, loss_scale), *(None,) * 17)


def scale_saved_gradient(grad_logits: Tensor, grad: Tensor, loss_scale: Tensor | None) -> Tensor:
    """Multiplies the forward's gradient in place by the incoming one, of each row or of all.

    The version is bumped so that autograd raises in any other op that has saved the logits.
    """
    factor = grad if loss_scale is None else grad / loss_scale
    rows = factor.expand(*grad_logits.shape[:2]).contiguous()
    torch.ops.reasonkern.scale_rows_(grad_logits, rows)
    if not torch.compiler.is_compiling():
        torch.autograd.graph.increment_version(grad_logits)
    return once_differentiable(grad_logits)


def _save_slopes(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    ctx.save_for_backward(*output[2:4])
    ctx.others = (None,) * (len(inputs) - 2)
    ctx.mark_non_differentiable(*output[1:])
    ctx.set_materialize_grads(False)


def _map_vjp(ctx: Any, grad: Tensor | None, *_: Any) -> tuple[Tensor | None, ...]:
    dlogp, dentropy = ctx.saved_tensors
    if grad is None:
        return (None, None, *ctx.others)
    return (grad * dlogp, grad * dentropy, *ctx.others)


AUTOGRAD = {
    "token_stats": _load.Autograd(_token_stats_vjp, _save_stats),
    "policy_loss": _load.Autograd(_policy_loss_vjp, _save_grad),
    "objective_map": _load.Autograd(_map_vjp, _save_slopes),
    "sequence_map": _load.Autograd(_map_vjp, _save_slopes),
}


# ---- registrations

TRITON = {name: _load.lazy(f"{__package__}.triton_kernels", name) for name in SCHEMAS}
# float64 sums over O(N) rows; a build with nvcc has kernels.
for _name in ("policy_metrics", "sequence_map"):
    TRITON[_name] = REFERENCE[_name]

for _name, _schema in SCHEMAS.items():
    _load.define_op(
        _name,
        _schema,
        reference=REFERENCE[_name],
        fake=FAKE[_name],
        cuda=_name != "conflict_runs",
        triton=TRITON[_name],
        triton_serves=_load.below_float64,
        autograd=AUTOGRAD.get(_name),
    )
