"""Operators behind `linear_token_stats` and `linear_policy_loss`: the row operators over chunks.

They are compositions, the same on every device: matrix products of torch between the family's row
operators, which pick their backend. Being operators, they are one node of a traced graph, whatever
the number of chunks.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from .. import _load
from .chunks import HeadChunks, Needs, Plan, Selection
from .op import (
    GRAD_ARGS,
    LOSS_ARGS,
    LOSS_SCALE,
    claim_backward,
    once_differentiable,
    save_stats,
    scale_saved_gradient,
    stats_grads,
)
from .reference import accumulator_dtype
from .reference_objective import active_rows

HEAD_ARGS = "Tensor hidden, Tensor head_weight, Tensor? bias"
PLAN_ARGS = "ScalarType dtype, int chunk_rows, bool compact"
NEEDS_ARGS = "bool need_hidden, bool need_weight, bool need_bias"
STATS = ("logprob", "entropy", "lse", "collision", "varentropy", "max_prob", "is_top1", "row_max")
SCHEMAS = {
    "linear_token_stats": f"({HEAD_ARGS}, Tensor targets, Tensor? mask, Tensor? row_temperature, "
    f"float temperature, float softcap, {PLAN_ARGS}, int num_active) -> ("
    + ", ".join(f"Tensor {name}" for name in STATS)
    + ")",
    "linear_token_stats_backward": f"({HEAD_ARGS}, {GRAD_ARGS}, {PLAN_ARGS}, int num_active, "
    f"{NEEDS_ARGS}) -> (Tensor grad_hidden, Tensor grad_weight, Tensor grad_bias)",
    "linear_policy_loss": f"({HEAD_ARGS}, {LOSS_ARGS}, {PLAN_ARGS}, int num_active, {NEEDS_ARGS}) "
    "-> (Tensor loss, Tensor token_loss, Tensor logprob, Tensor entropy, Tensor grad_hidden, "
    "Tensor grad_weight, Tensor grad_bias)",
}
OPS = torch.ops.reasonkern


# ---- implementations


def _split(args: tuple[Any, ...]) -> tuple[tuple[Any, ...], Plan, Needs]:
    """Arguments of an operator that ends with PLAN_ARGS, num_active and NEEDS_ARGS."""
    return args[:-7], Plan(*args[-7:-3]), Needs(*args[-3:])


def _linear_token_stats(
    hidden: Tensor,
    head_weight: Tensor,
    bias: Tensor | None,
    targets: Tensor,
    mask: Tensor | None,
    row_temperature: Tensor | None,
    temperature: float,
    softcap: float,
    *plan_args: Any,
) -> tuple[Tensor, ...]:
    plan = Plan(*plan_args)
    rows = Selection.of(mask, targets.numel(), plan)
    inputs = [rows.take(x) for x in (targets, mask, row_temperature)]
    wide = accumulator_dtype(plan.dtype)
    out = [hidden.new_empty(1, rows.count, dtype=_stat_dtype(n, wide)) for n in STATS]
    for chunk in HeadChunks(hidden, head_weight, bias, rows, plan):
        cut = _cut(inputs, chunk.span)
        _write(out, chunk.span, OPS.token_stats(chunk.logits, *cut, temperature, softcap))
    missing = [0.0 if name == "is_top1" else torch.nan for name in STATS]
    return tuple(rows.put(x, targets.shape, m) for x, m in zip(out, missing, strict=True))


def _linear_token_stats_backward(
    hidden: Tensor,
    head_weight: Tensor,
    bias: Tensor | None,
    targets: Tensor,
    row_temperature: Tensor | None,
    temperature: float,
    softcap: float,
    *args: Any,
) -> tuple[Tensor, Tensor, Tensor]:
    saved_and_grads, plan, needs = _split(args)
    max_prob = saved_and_grads[3]
    # Rows that were skipped in the forward have max_prob 0, nonfinite ones NaN.
    rows = Selection.of(max_prob != 0, targets.numel(), plan)
    inputs = [rows.take(x) for x in (targets, row_temperature, *saved_and_grads)]
    chunks = HeadChunks(hidden, head_weight, bias, rows, plan, needs)
    for chunk in chunks:
        y, t, logprob, *cut = _cut(inputs, chunk.span)
        OPS.token_stats_backward_(chunk.logits, y, t, temperature, softcap, logprob, *cut)
        chunks.add_gradient(chunk, logprob)
    return chunks.grad_hidden, chunks.grad_weight, chunks.grad_bias


def _linear_policy_loss(
    hidden: Tensor, head_weight: Tensor, bias: Tensor | None, *args: Any
) -> tuple[Tensor, ...]:
    loss_args, plan, needs = _split(args)
    per_token, (loss_scale, hyper, *numbers) = loss_args[:LOSS_SCALE], loss_args[LOSS_SCALE:]
    targets, _, _, weight, entropy_weight, *_ = per_token
    rows = Selection.of(active_rows(weight, entropy_weight), targets.numel(), plan)
    inputs = [rows.take(x) for x in per_token]
    per_row = hyper is not None and hyper.shape[1] > 1
    if per_row and rows.index is not None:
        hyper = hyper[:, rows.index]
    out = [weight.new_empty(1, rows.count) for _ in range(4)]
    chunks = HeadChunks(hidden, head_weight, bias, rows, plan, needs)
    for chunk in chunks:
        cut = _cut(inputs, chunk.span)
        h = hyper[:, chunk.span].contiguous() if per_row else hyper
        if any(needs):
            results = OPS.policy_loss_(chunk.logits, *cut, loss_scale, h, *numbers)
            chunks.add_gradient(chunk, results[2])
        else:
            results = OPS.policy_loss(chunk.logits, *cut, loss_scale, h, *numbers, False)
        _write(out, chunk.span, results)
    missing = (0.0, 0.0, torch.nan, torch.nan)
    row_loss, *rest = (rows.put(x, targets.shape, m) for x, m in zip(out, missing, strict=True))
    return row_loss.sum(), *rest, chunks.grad_hidden, chunks.grad_weight, chunks.grad_bias


def _stat_dtype(name: str, wide: torch.dtype) -> torch.dtype:
    return torch.bool if name == "is_top1" else wide


def _cut(rows: list[Tensor | None], span: slice) -> list[Any]:
    return [None if x is None else x[:, span] for x in rows]


def _write(out: list[Tensor], span: slice, results: tuple[Tensor, ...]) -> None:
    for whole, part in zip(out, results, strict=False):
        whole[:, span] = part


# ---- fake: shapes and dtypes only


def _fake_gradients(
    hidden: Tensor, weight: Tensor, dtype: torch.dtype, needs: Needs
) -> tuple[Tensor, ...]:
    wide = accumulator_dtype(dtype)
    shapes = (hidden.shape, weight.shape, weight.shape[:1])
    return tuple(
        hidden.new_empty(shape if need else (0,), dtype=kind)
        for shape, need, kind in zip(shapes, needs, (dtype, wide, wide), strict=True)
    )


def _fake_linear_token_stats(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, targets: Tensor, *args: Any
) -> tuple[Tensor, ...]:
    wide = accumulator_dtype(Plan(*args[-4:]).dtype)
    return tuple(hidden.new_empty(targets.shape, dtype=_stat_dtype(n, wide)) for n in STATS)


def _fake_backward(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, *args: Any
) -> tuple[Tensor, ...]:
    _, plan, needs = _split(args)
    return _fake_gradients(hidden, weight, plan.dtype, needs)


def _fake_linear_policy_loss(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, targets: Tensor, *args: Any
) -> tuple[Tensor, ...]:
    _, plan, needs = _split(args)
    rows = hidden.new_empty(targets.shape, dtype=accumulator_dtype(plan.dtype))
    gradients = _fake_gradients(hidden, weight, plan.dtype, needs)
    return (rows.new_empty(()), *(torch.empty_like(rows) for _ in range(3)), *gradients)


# ---- autograd


def _save_stats(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    hidden, weight, bias, targets, _, row_temperature, *ctx.numbers = inputs
    save_stats(ctx, output, hidden, weight, bias, targets, row_temperature)


def _stats_vjp(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
    hidden, weight, bias, targets, row_temperature, *stats = ctx.saved_tensors
    if all(g is None for g in grads[:4]):
        return (None,) * 12
    temperature, softcap, *plan = ctx.numbers
    out = OPS.linear_token_stats_backward(
        hidden, weight, bias, targets, row_temperature, temperature, softcap, *stats,
        *stats_grads(*grads), *plan, *ctx.needs_input_grad[:3],
    )  # fmt: skip
    return *to_inputs(out, (hidden, weight, bias), ctx.needs_input_grad), *(None,) * 9


def _save_gradients(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    _, token_loss, logprob, entropy, *gradients = output
    ctx.save_for_backward(*gradients, inputs[3 + LOSS_SCALE])
    ctx.dtypes = [None if x is None else x.dtype for x in inputs[:3]]
    ctx.needs = inputs[-3:]
    ctx.mark_non_differentiable(token_loss, logprob, entropy, *gradients)
    ctx.set_materialize_grads(False)


def _loss_vjp(ctx: Any, grad: Tensor | None, *_: Any) -> tuple[Tensor | None, ...]:
    """The gradients of the forward times the incoming one; rounded to the inputs' dtype here."""
    if grad is None:
        return (None,) * 26
    claim_backward(ctx)
    *gradients, loss_scale = ctx.saved_tensors
    if any(want and not have for want, have in zip(ctx.needs_input_grad, ctx.needs, strict=False)):
        raise RuntimeError("reasonkern::linear_policy_loss: backward needs need_* in the forward")
    out: list[Tensor | None] = [None] * 3
    for i, (x, need) in enumerate(zip(gradients, ctx.needs, strict=True)):
        if need:
            scale_saved_gradient(x.view(1, -1, x.shape[-1]), grad, loss_scale)
            out[i] = once_differentiable(x.to(ctx.dtypes[i]))
    return *out, *(None,) * 23


def to_inputs(
    gradients: tuple[Tensor, ...], inputs: tuple[Tensor | None, ...], needs: Any
) -> list[Tensor | None]:
    """Gradients in the dtype of their inputs, None where unwanted."""
    return [
        once_differentiable(g.to(x.dtype)) if need and x is not None else None
        for g, x, need in zip(gradients, inputs, needs, strict=False)
    ]


AUTOGRAD = {
    "linear_token_stats": _load.Autograd(_stats_vjp, _save_stats),
    "linear_policy_loss": _load.Autograd(_loss_vjp, _save_gradients),
}


# ---- registrations

IMPLEMENTATION: dict[str, Callable[..., Any]] = {
    "linear_token_stats": _linear_token_stats,
    "linear_token_stats_backward": _linear_token_stats_backward,
    "linear_policy_loss": _linear_policy_loss,
}
FAKE: dict[str, Callable[..., Any]] = {
    "linear_token_stats": _fake_linear_token_stats,
    "linear_token_stats_backward": _fake_backward,
    "linear_policy_loss": _fake_linear_policy_loss,
}
for _name, _schema in SCHEMAS.items():
    _load.define_composite(
        _name,
        _schema,
        implementation=IMPLEMENTATION[_name],
        fake=FAKE[_name],
        autograd=AUTOGRAD.get(_name),
    )
