"""Reductions over groups given by an id per sequence; sorted once, deterministic, no sync."""

from __future__ import annotations

import torch
from torch import Tensor

from .. import _checks
from .._checks import check_tensor


def check_vector(name: str, x: object, like: Tensor | None = None, like_name: str = "") -> Tensor:
    """One value per sequence, (N,), beside `like` where that is given."""
    x = check_tensor(name, x)
    if x.ndim != 1:
        _checks.fail(name, "shape (N,), one value per sequence", tuple(x.shape))
    if like is not None:
        _checks.check_shape(name, x, like.shape, f"{like_name}.shape")
        _checks.check_device(name, x, like, like_name)
    return x


def check_length(length: object, like: Tensor | None = None, like_name: str = "") -> Tensor:
    """The number of tokens of each sequence."""
    length = check_vector("length", length, like, like_name)
    if _checks.reads_values(length):
        right = (length >= 0) & length.isfinite()
        _checks.check_all("length", length, right, "finite numbers >= 0")
    return length


def check_flags(name: str, x: object, like: Tensor | None = None, like_name: str = "") -> Tensor:
    """One bool per sequence."""
    x = check_vector(name, x, like, like_name)
    _checks.check_dtype(name, x, torch.bool)
    return x


def wide(x: Tensor) -> Tensor:
    """float64: rewards, lengths and counts are few, and sums of them should be exact.

    Without a gradient: what is made of it is a constant of the loss.
    """
    return x.detach().double()


def narrow(x: Tensor, like: Tensor) -> Tensor:
    """float32, or float64 if `like` is."""
    return x.to(torch.float64 if like.dtype == torch.float64 else torch.float32)


class Groups:
    """Sequences by group: all but `reduce` and `exists` return one value per sequence.

    A reduction adds the members of a group in the order of the batch, so its result does not
    depend on the other groups, and nothing of another group can leak into it.
    """

    def __init__(self, group: Tensor, like: Tensor, like_name: str) -> None:
        _checks.check_dtype("group", group, torch.int64)
        _checks.check_shape("group", group, like.shape[:1], f"{like_name}.shape[:1]")
        _checks.check_device("group", group, like, like_name)
        ids, self.order = group.sort(stable=True)
        first = torch.ones_like(ids, dtype=torch.bool)
        first[1:] = ids[1:] != ids[:-1]
        dense = first.cumsum(0) - 1
        count = torch.arange(len(ids) + 1, device=ids.device)
        # Groups are numbered by ascending id; numbers beyond the last group are empty groups.
        self.offsets = torch.searchsorted(dense, count)
        self.index = torch.empty_like(dense).scatter_(0, self.order, dense)

    def batch(self) -> Groups:
        """All sequences as one group."""
        return Groups(torch.zeros_like(self.index), self.index, "group")

    def reduce(self, x: Tensor, how: str) -> Tensor:
        """(N,) float64: entry g is `how` (sum, max, min) of group g; 0, -inf or inf if empty."""
        ordered = wide(x)[self.order]
        if not len(ordered):
            return ordered
        return torch.segment_reduce(ordered, how, offsets=self.offsets, axis=0, unsafe=True)

    def spread(self, per_group: Tensor) -> Tensor:
        """The value of its group for each sequence."""
        return per_group[self.index]

    def sum(self, x: Tensor) -> Tensor:
        """Sum over the group of each sequence, float64."""
        return self.spread(self.reduce(x, "sum"))

    def max(self, x: Tensor) -> Tensor:
        """Maximum over the group of each sequence, float64."""
        return self.spread(self.reduce(x, "max"))

    def min(self, x: Tensor) -> Tensor:
        """Minimum over the group of each sequence, float64."""
        return self.spread(self.reduce(x, "min"))

    def size(self) -> Tensor:
        """Number of sequences in the group of each sequence."""
        return self.spread(self.offsets[1:] - self.offsets[:-1])

    def exists(self) -> Tensor:
        """(N,) bool: whether the g-th group exists."""
        return self.offsets[1:] > self.offsets[:-1]

    def mean(self, x: Tensor, weight: Tensor | None = None) -> Tensor:
        """(Weighted) mean over the group; exact when all values are equal. 0 for weight 0."""
        anchor = self.max(x if weight is None else torch.where(weight > 0, wide(x), -torch.inf))
        anchor = torch.where(anchor.isinf(), 0.0, anchor)
        shifted = wide(x) - anchor
        if weight is None:
            return anchor + self.sum(shifted) / self.size()
        weighted = self.sum(torch.where(weight > 0, shifted * weight, 0.0))
        return anchor + weighted / self.sum(weight).clamp_min(1e-300)

    def std(self, x: Tensor, weight: Tensor | None = None) -> Tensor:
        """Bessel-corrected standard deviation over the group (where weight is 1); 0 for one."""
        counted = torch.ones_like(wide(x)) if weight is None else wide(weight)
        deviation = wide(x) - self.mean(x, counted)
        total = self.sum(torch.where(counted > 0, deviation.square() * counted, 0.0))
        return (total / (self.sum(counted) - 1).clamp_min(1)).sqrt()

    def count_before(self, x: Tensor) -> Tensor:
        """For a bool x: the number of True before each sequence in its group, in batch order."""
        ordered = x[self.order].long()
        before = ordered.cumsum(0) - ordered
        counts = torch.empty_like(before).scatter_(0, self.order, before)
        return counts - before[self.offsets[self.index]]
