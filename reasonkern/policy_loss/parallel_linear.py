"""`linear_token_stats` with the head's rows, the columns of the logits, spread over ranks.

Forward and backward are the single-process operators on this rank's columns; between them the
statistics of all rows are merged after one all-gather. The weight's gradient stays on its rank.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .. import _load
from .chunks import Plan
from .inputs import Scaling
from .linear_op import OPS, to_inputs
from .op import marks_gradients, save_stats
from .parallel import (
    Parallel,
    VocabShard,
    check_parallel,
    has_vocab_group,
    shard_of_columns,
    untraced,
)
from .parallel_rows import local_grads, sharded_statistics
from .reference import accumulator_dtype

Operands = tuple[Tensor, Tensor, Tensor | None]  # (N, D), (V, D), (V,)


def head_shard(weight: Tensor, parallel: Parallel | None) -> VocabShard | None:
    """Where this rank's rows of the head belong; None = it has all of them."""
    check_parallel(parallel)
    if parallel is None or not has_vocab_group(parallel):
        return None
    shard = shard_of_columns(parallel, weight.shape[0], weight.device)
    return None if shard.is_whole(weight.shape[0]) else shard


class _ShardedLinearStats(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, weight: Tensor, bias: Tensor | None, targets: Tensor,
        mask: Tensor | None, row_temperature: Tensor | None, temperature: float, softcap: float,
        plan: Plan, shard: VocabShard, reduce_dhidden: bool,
    ) -> tuple[Tensor, ...]:  # fmt: skip
        owner, operands = shard.owner(targets), existing((hidden, weight, bias), shard)
        scaling = (row_temperature, temperature, softcap)
        out = sharded_statistics(
            lambda y: OPS.linear_token_stats(*operands, y, mask, *scaling, *plan),
            targets, owner, mask, temperature if row_temperature is None else row_temperature,
            accumulator_dtype(plan.dtype), shard,
        )  # fmt: skip
        save_stats(ctx, out, hidden, weight, bias, targets, owner, row_temperature)
        ctx.given = temperature, softcap, plan, shard, reduce_dhidden
        return out

    @staticmethod
    @marks_gradients
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        hidden, weight, bias, targets, owner, row_temperature, *saved = ctx.saved_tensors
        temperature, softcap, plan, shard, reduce_dhidden = ctx.given
        if all(g is None for g in grads[:4]):
            return (None,) * 11
        inputs, needs = (hidden, weight, bias), ctx.needs_input_grad[:3]
        if shard.columns:
            out = OPS.linear_token_stats_backward(
                *existing(inputs, shard), shard.local(targets, owner), row_temperature,
                temperature, softcap, *saved, *local_grads(owner == shard.rank, *grads[:4]),
                *plan, *needs,
            )  # fmt: skip
            gradients = to_inputs(out, inputs, needs)
        else:
            gradients = [
                x.new_zeros(x.shape) if n else None for x, n in zip(inputs, needs, strict=True)
            ]
        grad_hidden, *of_columns = gradients
        if grad_hidden is not None and reduce_dhidden:
            torch.distributed.all_reduce(grad_hidden, group=shard.group)
        whole = (with_padding(g, weight.shape[0]) for g in of_columns)
        return (grad_hidden, *whole, *(None,) * 8)


def existing(operands: Operands, shard: VocabShard) -> Operands:
    """The operands without the head's padding rows."""
    hidden, weight, bias = operands
    return hidden, weight[: shard.columns], None if bias is None else bias[: shard.columns]


def with_padding(gradient: Tensor | None, rows: int) -> Tensor | None:
    """Zeros for the head's padding rows."""
    if gradient is None or gradient.shape[0] == rows:
        return gradient
    whole = gradient.new_zeros(rows, *gradient.shape[1:])
    whole[: gradient.shape[0]] = gradient
    return whole


@untraced
def _sharded(*args: Any) -> tuple[Tensor, ...]:
    return _ShardedLinearStats.apply(*args)  # type: ignore[no-any-return, no-untyped-call]


def linear_token_stats(
    operands: Operands, targets: Tensor, mask: Tensor | None, scaling: Scaling, plan: Plan,
    shard: VocabShard | None, parallel: Parallel | None,
) -> tuple[Tensor, ...]:  # fmt: skip
    """The operator `linear_token_stats`, or the same over a vocabulary group."""
    numbers = (scaling.row_temperature, scaling.temperature, scaling.softcap)
    if shard is None or parallel is None:
        return OPS.linear_token_stats(*operands, targets, mask, *numbers, *plan)  # type: ignore[no-any-return]
    if _load.is_transformed(*operands):
        _load.refuse_transforms("linear_token_stats")
    args = (*operands, targets, mask, *numbers, plan, shard, parallel.reduce_dhidden)
    return _sharded(*args)
