"""`Parallel`: a vocabulary, sequences or a batch spread over the ranks of process groups.

Each rank holds some columns of the logits. It computes the statistics of its part of every row
with the operator `token_stats`; one all-gather later every rank merges the same numbers in rank
order, so all get the same bits. The merge takes the parts as outcomes of a first draw, of the rank,
with probability ``share``: entropy, collision and varentropy then are sums of terms >= 0, and
nothing cancels that a single pass over the row would not cancel.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import reduce
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from .. import _checks
from .op import claim_backward

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup


@dataclass(frozen=True, eq=False)
class Parallel:
    """Which ranks hold the other columns, the other sequences and the other pieces of these ones.

    The three groups are three axes of the mesh of ranks: ranks of one ``vocab_group`` hold the same
    rows and different columns, ranks of one ``segment_group`` pieces of the same sequences, ranks
    of one ``data_group`` different sequences. Make one object per sharding and keep it: the first
    use exchanges the number of columns of each rank, once. Every rank of a group
    must make the same calls with the same rows; an error on one rank leaves the others waiting.

    Args:
        vocab_group: ranks with the columns of the vocabulary, in rank order; shards may differ in
            size. Targets, weights and all other row tensors are the same on each of them.
        data_group: ranks with other sequences: ``out.metrics.all_reduce()`` and the defaults of
            `token_weights` run over it.
        segment_group: ranks with the other pieces of each sequence (context parallelism): rows b of
            padded tokens, or segments i of packed ones, are pieces of one sequence; a piece may be
            empty. Sequence-level objectives, sequence importance and OPSM sum over it.
        vocab_size: columns that exist; those after them are padding: they count as -inf and get
            gradient 0. None = the columns of all ranks.
        reduce_dhidden: `linear_policy_loss` and `linear_token_stats` add up the gradient of
            ``hidden`` over ``vocab_group``; False = the caller does (sequence parallelism reduces
            and scatters in one step).

    Raises:
        ValueError: a group that is not a process group of this rank, torch.distributed not
            initialised, ``vocab_size`` not an integer >= 1.

    Example:
        >>> import reasonkern as rk
        >>> rk.Parallel(vocab_size=151936).vocab_size
        151936
    """

    vocab_group: ProcessGroup | None = None
    data_group: ProcessGroup | None = None
    segment_group: ProcessGroup | None = None
    vocab_size: int | None = None
    reduce_dhidden: bool = True
    _columns: list[int] = field(default_factory=list, init=False, repr=False)

    def __post_init__(self) -> None:
        """Checks every field."""
        for name in ("vocab_group", "data_group", "segment_group"):
            check_group(name, getattr(self, name))
        size = self.vocab_size
        if size is not None and (isinstance(size, bool) or not isinstance(size, int) or size < 1):
            _checks.fail("vocab_size", "an integer >= 1 or None", repr(size))
        if not isinstance(self.reduce_dhidden, bool):
            _checks.fail("reduce_dhidden", "True or False", repr(self.reduce_dhidden))


def check_group(name: str, group: Any) -> None:
    """The group is one of this rank's, or None."""
    if group is None:
        return
    import torch.distributed as dist

    if not dist.is_available() or not dist.is_initialized():
        _checks.fail(name, "torch.distributed.init_process_group before", "none")
    if not isinstance(group, dist.ProcessGroup):
        expected = "a ProcessGroup that this rank is in (mesh.get_group(dim)), or None"
        _checks.fail(name, expected, type(group).__name__)


def check_parallel(parallel: Any) -> None:
    """The argument is a `Parallel`, or None."""
    if parallel is not None and not isinstance(parallel, Parallel):
        _checks.fail("parallel", "a Parallel or None", type(parallel).__name__)


# ---- collectives, in rank order


def gather(x: Tensor, group: ProcessGroup) -> Tensor:
    """(ranks, *x.shape): x of every rank."""
    import torch.distributed as dist

    parts = x.new_empty((dist.get_world_size(group), *x.shape))
    dist.all_gather(list(parts.unbind(0)), x.contiguous(), group=group)
    return parts


def in_rank_order(parts: Tensor) -> Tensor:
    """Sum over the first dimension, one rank after the other."""
    return reduce(torch.add, parts.unbind(0))


def total(x: Tensor, *groups: ProcessGroup | None) -> Tensor:
    """Sum over the ranks of each group, the same bits on all of them; None = this rank alone."""
    for group in groups:
        if group is not None:
            x = in_rank_order(gather(x, group))
    return x


class _GroupTotal(torch.autograd.Function):
    """`total` over one group whose ranks' losses are added: their derivatives are, too."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, group: ProcessGroup) -> Tensor:
        ctx.group = group
        return total(x, group)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return total(grad, ctx.group), None


def group_total(x: Tensor, group: ProcessGroup | None) -> Tensor:
    """Differentiable `total` over the pieces of sequences."""
    if group is None:
        return x
    if torch.is_grad_enabled() and x.requires_grad:
        return _GroupTotal.apply(x, group)  # type: ignore[no-any-return, no-untyped-call]
    return total(x, group)


def batch_groups(parallel: Parallel | None) -> tuple[ProcessGroup, ...]:
    """Groups over which a statistic of the whole batch adds up: pieces first, then sequences."""
    if parallel is None:
        return ()
    groups = (parallel.segment_group, parallel.data_group)
    return tuple(group for group in groups if group is not None)


# ---- the shard of a rank


@dataclass(frozen=True, eq=False)
class VocabShard:
    """Columns [bounds[rank], bounds[rank + 1]) of a vocabulary of bounds[-1]; more are padding."""

    group: ProcessGroup
    rank: int
    bounds: tuple[int, ...]

    @property
    def vocab(self) -> int:
        """Columns of all ranks that exist."""
        return self.bounds[-1]

    @property
    def columns(self) -> int:
        """Columns of this rank that exist."""
        return self.bounds[self.rank + 1] - self.bounds[self.rank]

    def owner(self, targets: Tensor) -> Tensor:
        """The rank that has each target; of a target outside the vocabulary the nearest one."""
        owner = torch.zeros_like(targets)
        for end in self.bounds[1:-1]:
            owner += targets >= end
        return owner

    def local(self, targets: Tensor, owner: Tensor) -> Tensor:
        """Column of each target on this rank, 0 where another rank has it."""
        return torch.where(owner == self.rank, targets - self.bounds[self.rank], 0)


def vocab_shard(logits: Tensor, parallel: Parallel | None) -> tuple[Tensor, VocabShard | None]:
    """This rank's logits as a plain tensor, and where they belong; None = a whole vocabulary."""
    check_parallel(parallel)
    if hasattr(logits, "to_local"):
        return _shard_of_dtensor(logits, parallel)
    if parallel is None or parallel.vocab_group is None:
        if parallel is not None and parallel.vocab_size is not None:
            _checks.fail("vocab_size", "None without a vocab_group", parallel.vocab_size)
        return logits, None
    if not isinstance(logits, Tensor) or not logits.ndim:
        return logits, None  # refused by the checks of the logits
    return logits, shard_of_columns(parallel, logits.shape[-1], logits.device)


def shard_of_columns(parallel: Parallel, columns: int, device: torch.device) -> VocabShard:
    """The shard of a rank that holds `columns`; the first time the ranks tell each other."""
    import torch.distributed as dist

    group = parallel.vocab_group
    assert group is not None
    rank = dist.get_rank(group)
    if not parallel._columns:
        counts = gather(torch.tensor([columns], device=device), group)
        parallel._columns.extend(counts.flatten().tolist())
    if parallel._columns[rank] != columns:
        expected = f"{parallel._columns[rank]} columns as in the first use of this Parallel"
        _checks.fail("logits", expected, columns)
    return _shard(group, rank, parallel._columns, parallel.vocab_size)


def _shard(
    group: ProcessGroup, rank: int, columns: Sequence[int], vocab_size: int | None
) -> VocabShard:
    bounds = [0]
    for count in columns:
        bounds.append(bounds[-1] + count)
    size = bounds[-1] if vocab_size is None else vocab_size
    if not 1 <= size <= bounds[-1]:
        _checks.fail("vocab_size", f"at most the {bounds[-1]} columns of all ranks", size)
    return VocabShard(group, rank, tuple(min(b, size) for b in bounds))


def _shard_of_dtensor(logits: Any, parallel: Parallel | None) -> tuple[Tensor, VocabShard]:
    """A DTensor sharded on its last dimension; torch.chunk's rule says who holds which columns."""
    from torch.distributed.tensor import Replicate, Shard

    mesh, last = logits.device_mesh, logits.ndim - 1
    placements = [p for p in logits.placements if p != Replicate()]
    if placements not in ([Shard(last)], [Shard(-1)]):
        expected = f"a DTensor with one Shard({last}), otherwise Replicate"
        _checks.fail("logits", expected, tuple(logits.placements))
    dim = [p == Replicate() for p in logits.placements].index(False)
    group = mesh.get_group(dim)
    if parallel is not None and parallel.vocab_group not in (None, group):
        _checks.fail("vocab_group", "None or the group of the DTensor's mesh", "another group")
    ranks = mesh.size(dim)
    step = -(-logits.shape[-1] // ranks)
    ends = [min(step * r, logits.shape[-1]) for r in range(ranks + 1)]
    columns = [b - a for a, b in zip(ends, ends[1:], strict=False)]
    size = None if parallel is None else parallel.vocab_size
    return logits.to_local(), _shard(group, mesh.get_local_rank(dim), columns, size)


# ---- statistics of rows spread over ranks

# The order of the operator's outputs, which are what the ranks exchange.
LOGPROB, ENTROPY, LSE, COLLISION, VARENTROPY, MAX_PROB, IS_TOP1, ROW_MAX = range(8)


def local_statistics(logits: Tensor, targets: Tensor, *args: Any) -> Tensor:
    """(8, B, T): the operator's outputs for the columns of this rank.

    A part of a row that is empty or all -inf has row_max -inf.
    """
    if logits.shape[-1] == 0:
        from .reference import accumulator_dtype

        dtype = accumulator_dtype(logits.dtype)
        return torch.full((8, *targets.shape), -torch.inf, dtype=dtype, device=logits.device)
    out = torch.ops.reasonkern.token_stats(logits, targets, *args)
    return torch.stack([x.to(out[0].dtype) for x in out])


def merge_statistics(
    parts: Tensor, owner: Tensor, mask: Tensor | None, valid: Tensor, temperature: Tensor
) -> tuple[Tensor, ...]:
    """The operator's outputs for whole rows from (ranks, 8, B, T): see the family's README.md.

    ``owner`` is the rank of each row's target, ``valid`` False where no rank has it.
    """
    dtype, parts = parts.dtype, parts.double()
    stats = parts.unbind(1)  # eight of (ranks, B, T)
    row_max = stats[ROW_MAX]
    top = row_max.amax(0)  # NaN wins
    empty = row_max == -torch.inf
    # ln of the sum of exp(z - max z) over the part; the part's own sum is 1 / max_prob >= 1.
    log_mass = torch.where(
        empty, -torch.inf, (row_max - top) / temperature.double() - torch.log(stats[MAX_PROB])
    )
    mass = torch.exp(log_mass)
    heaviest = mass.argmax(0, keepdim=True)
    others = mass.scatter(0, heaviest, 0.0)
    # 1 - share of the heaviest part is what a confident row's log-probability is made of.
    rest = torch.log1p(in_rank_order(others) / mass.gather(0, heaviest)[0])
    log_sum = torch.log(mass.gather(0, heaviest)[0]) + rest
    log_share = (log_mass - log_sum).scatter(0, heaviest, -rest.unsqueeze(0))
    share = torch.exp(log_share)
    mean = torch.where(empty, 0.0, stats[ENTROPY] - log_share)  # of -ln p, within the part
    entropy = in_rank_order(share * mean)
    spread = torch.where(empty, 0.0, stats[VARENTROPY]) + (mean - entropy).square()
    collision = torch.where(empty, 0.0, stats[COLLISION]) * share.square()
    at = owner.unsqueeze(0)
    logprob = (stats[LOGPROB] + log_share).gather(0, at)[0]
    logprob = torch.where(empty.gather(0, at)[0], -torch.inf, logprob)
    first = (row_max == top).int().argmax(0)  # the first rank that has the maximum
    lse = stats[LSE].gather(0, heaviest)[0] + rest
    merged = (
        logprob, entropy, lse, in_rank_order(collision), in_rank_order(share * spread),
        torch.exp(-log_sum), top,
    )  # fmt: skip
    active = torch.ones_like(valid) if mask is None else mask
    good = active & valid & torch.isfinite(top)
    otherwise = torch.where(active, torch.nan, 0.0)
    *rest_of, merged_max = (torch.where(good, x, otherwise).to(dtype) for x in merged)
    merged_max = torch.where(active & valid & (top == -torch.inf), -torch.inf, merged_max)
    is_top1 = good & (first == owner) & (stats[IS_TOP1].gather(0, at)[0] != 0)
    return (*rest_of, is_top1, merged_max)


class _ShardedStats(torch.autograd.Function):
    """`token_stats` of rows spread over ranks; the backward needs no communication."""

    @staticmethod
    def forward(
        ctx: Any, logits: Tensor, targets: Tensor, mask: Tensor | None,
        row_temperature: Tensor | None, temperature: float, softcap: float, shard: VocabShard,
        inplace: bool,
    ) -> tuple[Tensor, ...]:  # fmt: skip
        owner = shard.owner(targets)
        out = sharded_statistics(
            logits.detach(), targets, owner, mask, row_temperature, temperature, softcap, shard
        )
        logprob, entropy, _, collision, varentropy, max_prob, is_top1, row_max = out
        saved = (logprob, entropy, collision, max_prob, row_max)
        ctx.save_for_backward(logits, targets, owner, row_temperature, *saved)
        ctx.given = temperature, softcap, shard, inplace
        ctx.mark_non_differentiable(varentropy, max_prob, is_top1, row_max)
        ctx.set_materialize_grads(False)
        return out

    @staticmethod
    @once_differentiable
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


def sharded_statistics(
    logits: Tensor, targets: Tensor, owner: Tensor, mask: Tensor | None,
    row_temperature: Tensor | None, temperature: float, softcap: float, shard: VocabShard,
) -> tuple[Tensor, ...]:  # fmt: skip
    """The eight outputs of the operator `token_stats`; one all-gather of 8 numbers per row."""
    scaling = (row_temperature, temperature, softcap)
    own = logits[..., : shard.columns]
    parts = gather(local_statistics(own, shard.local(targets, owner), mask, *scaling), shard.group)
    valid = (targets >= 0) & (targets < shard.vocab)
    # The operators round the temperature to the accumulator's type.
    t = parts.new_tensor(temperature) if row_temperature is None else row_temperature
    return merge_statistics(parts, owner, mask, valid, t)


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


def token_stats(
    logits: Tensor, targets: Tensor, mask: Tensor | None, row_temperature: Tensor | None,
    temperature: float, softcap: float, shard: VocabShard, inplace: bool = False,
) -> tuple[Tensor, ...]:  # fmt: skip
    """The operator `token_stats` over a vocabulary group, with autograd."""
    return _ShardedStats.apply(  # type: ignore[no-any-return, no-untyped-call]
        logits, targets, mask, row_temperature, temperature, softcap, shard, inplace
    )
