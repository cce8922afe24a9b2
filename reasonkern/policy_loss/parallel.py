"""`Parallel`: a vocabulary, sequences or a batch spread over the ranks of process groups."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import reduce
from typing import TYPE_CHECKING, Any, TypeVar, cast

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from .. import _checks

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup


@dataclass(frozen=True, eq=False)
class Parallel:
    """Which ranks hold other columns, other sequences, and other pieces of the same sequences.

    The three groups are three axes of the mesh of ranks: ranks of one ``vocab_group`` hold the same
    rows and different columns, ranks of one ``segment_group`` pieces of the same sequences, ranks
    of one ``data_group`` different sequences. Make one object per sharding and keep it: the first
    use exchanges the number of columns of each rank, once. Every rank of a group must make the same
    calls with the same rows; an error on one rank leaves the others waiting. torch.compile breaks
    the graph at a group's collective.

    Args:
        vocab_group: ranks with the columns of the vocabulary, in rank order; shards may differ in
            size. Targets, weights and all other row tensors are the same on each of them. The loss
            takes the two-pass form, in which ``loss_scale`` is not needed.
        data_group: ranks with other sequences: ``out.metrics.all_reduce()`` and the defaults of
            `token_weights` run over it.
        segment_group: ranks with the other pieces of each sequence (context parallelism): rows b of
            padded tokens, or segments i of packed ones, are pieces of one sequence; a piece may be
            empty. Sequence-level objectives, sequence importance and OPSM sum over it.
        vocab_size: columns that exist; those after them are padding: they count as -inf and get
            gradient 0. None = the columns of all ranks. Give it wherever a head was padded for its
            ranks, as Megatron does: else the padding takes part in every sum over the vocabulary.
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
        if self.vocab_size is not None:
            _checks.check_integer("vocab_size", self.vocab_size, 1, or_none=" or None")
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


def as_groups(data_group: Any) -> tuple[ProcessGroup, ...]:
    """The groups of one optional process group, checked."""
    check_group("data_group", data_group)
    return () if data_group is None else (data_group,)


def check_parallel(parallel: Any) -> None:
    """The argument is a `Parallel`, or None."""
    if parallel is not None and not isinstance(parallel, Parallel):
        _checks.fail("parallel", "a Parallel or None", type(parallel).__name__)


def has_vocab_group(parallel: Parallel) -> bool:
    """Whether the vocabulary is spread over ranks."""
    if parallel.vocab_group is None and parallel.vocab_size is not None:
        _checks.fail("vocab_size", "None without a vocab_group", parallel.vocab_size)
    return parallel.vocab_group is not None


# ---- collectives, in rank order


F = TypeVar("F", bound=Callable[..., Any])


def untraced(function: F) -> F:
    """torch.compile breaks its graph here; ``torch.compiler.disable`` imports the compiler."""
    return cast(F, torch._disable_dynamo(function))  # type: ignore[attr-defined]


def gather(x: Tensor, group: ProcessGroup) -> Tensor:
    """(ranks, *x.shape): x of every rank."""
    import torch.distributed as dist

    parts = x.new_empty((dist.get_world_size(group), *x.shape))
    dist.all_gather(list(parts.unbind(0)), x.contiguous(), group=group)
    return parts


def in_rank_order(parts: Tensor) -> Tensor:
    """Sum over the first dimension, one rank after the other."""
    return reduce(torch.add, parts.unbind(0))


@untraced
def total(x: Tensor, *groups: ProcessGroup | None) -> Tensor:
    """Sum over the ranks of each group, the same bits on all of them; None = this rank alone."""
    for group in groups:
        if group is not None:
            x = in_rank_order(gather(x, group))
    return x


class _GroupTotal(torch.autograd.Function):
    """`total` over one group whose ranks add up their losses, and so their derivatives."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, group: ProcessGroup) -> Tensor:
        ctx.group = group
        return in_rank_order(gather(x, group))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return in_rank_order(gather(grad, ctx.group)), None


def group_total(x: Tensor, group: ProcessGroup | None) -> Tensor:
    """Differentiable `total` over the pieces of sequences."""
    return x if group is None else _differentiable_total(x, group)


@untraced
def _differentiable_total(x: Tensor, group: ProcessGroup) -> Tensor:
    return _GroupTotal.apply(x, group)  # type: ignore[no-any-return, no-untyped-call]


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

    def is_whole(self, columns: int) -> bool:
        """Whether the group is this rank alone and nothing of its columns is padding."""
        return self.bounds == (0, columns)

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
    logits, shard = _find_shard(logits, parallel)
    if shard is not None and shard.is_whole(logits.shape[-1]):
        return logits, None
    return logits, shard


def _find_shard(logits: Tensor, parallel: Parallel | None) -> tuple[Tensor, VocabShard | None]:
    check_parallel(parallel)
    if hasattr(logits, "to_local"):
        return _shard_of_dtensor(logits, parallel)
    if parallel is None or not has_vocab_group(parallel):
        return logits, None
    if not isinstance(logits, Tensor) or not logits.ndim:
        return logits, None  # refused by the checks of the logits
    return logits, shard_of_columns(parallel, logits.shape[-1], logits.device)


@untraced
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
        _checks.fail(
            "vocab_size", f"an integer in [1, {bounds[-1]}], the columns of all ranks", size
        )
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
