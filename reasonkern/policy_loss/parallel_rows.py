"""`token_stats` with the columns of the logits spread over ranks.

Each rank computes the statistics of its part of every row with the operator `token_stats`; one
all-gather later every rank merges the same numbers in rank order, so all get the same bits. The
merge takes a token as drawn in two steps, first its rank, then the token in that rank's part:
entropy, collision and varentropy are then sums of terms >= 0, and nothing cancels that would not
cancel in a single pass over the row.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .. import _load
from .op import claim_backward, marks_gradients, save_stats
from .parallel import VocabShard, gather, in_rank_order, untraced
from .reference import accumulator_dtype

# The order of the operator's outputs, which are what the ranks exchange.
LOGPROB, ENTROPY, LSE, COLLISION, VARENTROPY, MAX_PROB, IS_TOP1, ROW_MAX = range(8)


def sharded_statistics(
    of_columns: Callable[[Tensor], tuple[Tensor, ...]], targets: Tensor, owner: Tensor,
    mask: Tensor | None, temperature: float | Tensor, dtype: torch.dtype, shard: VocabShard,
) -> tuple[Tensor, ...]:  # fmt: skip
    """The eight outputs of the operator `token_stats`; one all-gather of 8 numbers per row.

    ``of_columns`` gives those of this rank's columns for the column of each target.
    """
    if shard.columns:
        own = torch.stack([x.to(dtype) for x in of_columns(shard.local(targets, owner))])
    else:  # like a part that is all -inf
        own = torch.full((8, *targets.shape), -torch.inf, dtype=dtype, device=targets.device)
    valid = (targets >= 0) & (targets < shard.vocab)
    # The operators round the temperature to the accumulator's type.
    t = temperature if isinstance(temperature, Tensor) else own.new_full((), temperature)
    parts = gather(own, shard.group).double().unbind(1)
    out = merge_statistics(parts, owner, mask, valid, t)
    return tuple(x.bool() if i == IS_TOP1 else x.to(dtype) for i, x in enumerate(out))


class Parts(NamedTuple):
    """How the mass of each row is spread over ranks; tensors (ranks, B, T) or (B, T)."""

    top: Tensor  # largest logit of the row, NaN where any part is bad
    empty: Tensor  # (ranks, B, T): no logit of the part is finite
    heaviest: Tensor  # the rank with the largest share
    log_share: Tensor  # (ranks, B, T) ln of the probability that the token is in the part
    log_sum: Tensor  # ln of the sum of exp(z - max z)


def parts_of_rows(row_max: Tensor, max_prob: Tensor, temperature: Tensor) -> Parts:
    """From the maximum of each part and 1 / (its sum about its own maximum)."""
    top = row_max.amax(0)
    empty = row_max == -torch.inf
    log_mass = (row_max - top) / temperature.double() - torch.log(max_prob)
    log_mass = torch.where(empty, -torch.inf, log_mass)
    mass = torch.exp(log_mass)
    heaviest = mass.argmax(0, keepdim=True)
    most, others = mass.gather(0, heaviest)[0], mass.scatter(0, heaviest, 0.0)
    # 1 - share of the heaviest part is what a confident row's log-probability is made of.
    rest = torch.log1p(in_rank_order(others) / most)
    log_sum = torch.log(most) + rest
    log_share = (log_mass - log_sum).scatter(0, heaviest, -rest.unsqueeze(0))
    return Parts(top, empty, heaviest, log_share, log_sum)


def merge_statistics(
    stats: Sequence[Tensor], owner: Tensor, mask: Tensor | None, valid: Tensor, temperature: Tensor
) -> list[Tensor]:
    """The operator's outputs in float64 for whole rows, from eight of (ranks, B, T).

    ``owner`` is the rank of each row's target, ``valid`` False where no rank has it. The formulas
    are in the family's README.md.
    """
    row_max = stats[ROW_MAX]
    top, empty, heaviest, log_share, log_sum = parts_of_rows(row_max, stats[MAX_PROB], temperature)
    entropies, collisions, variances = (
        torch.where(empty, 0.0, stats[i]) for i in (ENTROPY, COLLISION, VARENTROPY)
    )
    share = torch.exp(log_share)
    mean = torch.where(empty, 0.0, entropies - log_share)  # of -ln p, within the part
    entropy = in_rank_order(share * mean)
    at = owner.unsqueeze(0)
    logprob = (stats[LOGPROB] + log_share).gather(0, at)[0]
    merged = {
        LOGPROB: torch.where(empty.gather(0, at)[0], -torch.inf, logprob),
        ENTROPY: entropy,
        LSE: stats[LSE].gather(0, heaviest)[0] - log_share.gather(0, heaviest)[0],
        COLLISION: in_rank_order(share.square() * collisions),
        VARENTROPY: in_rank_order(share * (variances + (mean - entropy).square())),
        MAX_PROB: torch.exp(-log_sum),
        # The first rank that has the maximum has the first column of it.
        IS_TOP1: stats[IS_TOP1].gather(0, at)[0] * ((row_max == top).int().argmax(0) == owner),
        ROW_MAX: top,
    }
    active = torch.ones_like(valid) if mask is None else mask
    good, otherwise = active & valid & torch.isfinite(top), torch.where(active, torch.nan, 0.0)
    out = [torch.where(good, merged[i], otherwise) for i in range(8)]
    out[ROW_MAX] = torch.where(active & valid & (top == -torch.inf), top, out[ROW_MAX])
    out[IS_TOP1] = torch.where(good, merged[IS_TOP1], 0.0)
    return out


class _ShardedStats(torch.autograd.Function):
    """`token_stats` of rows spread over ranks; the backward needs no communication."""

    @staticmethod
    def forward(
        ctx: Any, logits: Tensor, targets: Tensor, mask: Tensor | None,
        row_temperature: Tensor | None, temperature: float, softcap: float, shard: VocabShard,
        inplace: bool,
    ) -> tuple[Tensor, ...]:  # fmt: skip
        owner, columns = shard.owner(targets), logits.detach()[..., : shard.columns]
        out = sharded_statistics(
            lambda y: torch.ops.reasonkern.token_stats(
                columns, y, mask, row_temperature, temperature, softcap
            ),
            targets, owner, mask, temperature if row_temperature is None else row_temperature,
            accumulator_dtype(logits.dtype), shard,
        )  # fmt: skip
        save_stats(ctx, out, logits, targets, owner, row_temperature)
        ctx.given = temperature, softcap, shard, inplace
        return out

    @staticmethod
    @marks_gradients
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        temperature, softcap, shard, inplace = ctx.given
        if inplace:
            claim_backward(ctx)
        logits, targets, owner, row_temperature, *saved = ctx.saved_tensors
        if all(g is None for g in grads[:4]):
            return (None,) * 8
        args = (
            shard.local(targets, owner), row_temperature, temperature, softcap, *saved,
            *local_grads(owner == shard.rank, *grads[:4]),
        )  # fmt: skip
        gradient = sharded_gradient(logits.detach(), args, shard.columns, inplace)
        if inplace:
            torch.autograd.graph.increment_version(logits)
        return (gradient, *(None,) * 7)


def local_grads(
    owned: Tensor, logprob: Tensor | None, entropy: Tensor | None, lse: Tensor | None,
    collision: Tensor | None,
) -> tuple[Tensor | None, ...]:  # fmt: skip
    """What the operator's backward takes on this rank.

    d logprob / dx_v = 1[v = y] - p_v and d lse / dx_v = p_v: where another rank has the target,
    g of logprob is -g of lse.
    """
    if logprob is not None:
        elsewhere = torch.where(owned, 0.0, -logprob)
        lse = elsewhere if lse is None else lse + elsewhere
        logprob = torch.where(owned, logprob, 0.0)
    grads = (logprob, entropy, lse, collision)
    return tuple(None if g is None else g.contiguous() for g in grads)


def sharded_gradient(logits: Tensor, args: tuple[Any, ...], columns: int, inplace: bool) -> Tensor:
    """Gradient of this rank's logits, 0 in padding columns."""
    if columns == logits.shape[-1] and columns and not inplace:
        return torch.ops.reasonkern.token_stats_backward(logits, *args)  # type: ignore[no-any-return]
    gradient = logits if inplace else logits.clone()
    if columns:
        torch.ops.reasonkern.token_stats_backward_(gradient[..., :columns], *args)
    gradient[..., columns:] = 0
    return gradient


@untraced
def token_stats(
    logits: Tensor, targets: Tensor, mask: Tensor | None, row_temperature: Tensor | None,
    temperature: float, softcap: float, shard: VocabShard, inplace: bool = False,
) -> tuple[Tensor, ...]:  # fmt: skip
    """The operator `token_stats` over a vocabulary group, with autograd."""
    if _load.is_transformed(logits):
        _load.refuse_transforms("token_stats")
    return _ShardedStats.apply(  # type: ignore[no-any-return, no-untyped-call]
        logits, targets, mask, row_temperature, temperature, softcap, shard, inplace
    )
