"""BAPO's search for clip bounds, on the device: every grid point at once, no loop over probes."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .. import _checks
from .._checks import check_tensor
from .parallel import as_groups, total
from .selection import element

BLOCK = 1 << 16  # rows per pass; the table of a block is (grid points, BLOCK) in float64
MAX_STEPS = 1000
EPS = 1e-8  # the released code's guard of pos / neg

Range = tuple[float, float, float]


class Search(NamedTuple):
    """Grids (start, max, step) of both bounds and the value at which the search stops."""

    low: Range
    high: Range
    target: float


PUBLISHED = {
    "paper": Search((0.6, 0.9, 0.02), (1.2, 3.0, 0.05), 0.4),
    "code": Search((0.6, 0.8, 0.05), (1.2, 2.0, 0.05), 1.0),
}


def bapo_bounds(
    ratio: Tensor,
    advantage: Tensor,
    mask: Tensor,
    *,
    variant: str = "paper",
    rollout_logprob: Tensor | None = None,
    low: Range | None = None,
    high: Range | None = None,
    target: float | None = None,
    data_group: Any = None,
) -> tuple[Tensor, Tensor]:
    """Clip bounds that balance the positive and the negative side of a batch (BAPO, 2510.18927).

    Both bounds rise on their grids until the balance reaches the target or both are at their end:

    * ``variant="paper"``: the upper bound first, then the lower one, while
      ``sum_{A>0} p |min(rA, clip(r, 0, hi) A)| / sum p |min(rA, clip(r, lo, hi) A)| < target``
      with p the probability of the token under the policy that sampled it.
      Defaults: low (0.6, 0.9, 0.02), high (1.2, 3.0, 0.05), target 0.4 (0.5 in the
      README of the released code).
    * ``variant="code"``, the released code: the lower bound first, no p, and pos / (neg + 1e-8)
      instead of the share, infinite when neg is 0. Defaults: low (0.6, 0.8, 0.05),
      high (1.2, 2.0, 0.05), target 1.

    A batch without any contribution keeps the starting bounds. Raising the lower bound can only
    increase the negative side of either quantity, so once the search moves it, it runs to its end;
    what the rise does achieve is that negative tokens of low ratio stop contributing gradient.

    The bounds are those of the probe-by-probe loop ``lo = min(lo + step, max)``, but all grid
    points are evaluated in one pass (float64) without a synchronisation, and ranks add their sums
    in rank order after one all-gather.

    Args:
        ratio: pi / pi_old per token, any shape.
        advantage: per token, of that shape (it may broadcast to it).
        mask: bool or 0/1, of that shape: the tokens that are trained.
        variant: ``paper`` or ``code``.
        rollout_logprob: log p of each token under the policy that sampled it, for ``paper``; None
            for ``code``.
        low: (start, max, step) of the lower bound. None = the variant's.
        high: (start, max, step) of the upper bound. None = the variant's.
        target: value at which the search stops. None = the variant's.
        data_group: process group over whose ranks the sums are added. None = this process alone.

    Returns:
        (ratio_min, ratio_max), 0-dim float64 tensors that `Objective` takes as they are.

    Raises:
        ValueError: wrong shape, variant or grid, missing ``rollout_logprob``; on CPU also
            nonfinite values in trained tokens.

    Example:
        >>> import torch, reasonkern as rk
        >>> ratio, advantage = torch.tensor([1.5, 1.0]), torch.tensor([1.0, -1.3])
        >>> bounds = rk.bapo_bounds(ratio, advantage, torch.ones(2), variant="code")
        >>> [round(x.item(), 2) for x in bounds]
        [0.8, 1.3]
    """
    groups = as_groups(data_group)
    _checks.check_choice("variant", variant, PUBLISHED)
    published = PUBLISHED[variant]
    if variant == "paper" and rollout_logprob is None:
        expected = "a tensor for variant paper (the old policy's, if that one sampled)"
        _checks.fail("rollout_logprob", expected, None)
    if variant == "code" and rollout_logprob is not None:
        _checks.fail("rollout_logprob", "None for variant code", "a tensor")
    target = published.target if target is None else target
    _checks.check_number("target", target)
    grids = grid("low", low or published.low), grid("high", high or published.high)
    check_tensor("ratio", ratio)
    advantage = _checks.expanded("advantage", advantage, ratio, "ratio")
    trained = _checks.expanded("mask", mask, ratio, "ratio") != 0
    _checks.check_mask("mask", mask)
    rollout = rollout_logprob
    if rollout is not None:
        rollout = _checks.expanded("rollout_logprob", rollout, ratio, "ratio")
    for name, x in (("ratio", ratio), ("advantage", advantage), ("rollout_logprob", rollout)):
        if x is not None:
            _checks.check_finite(name, x, trained)
    with torch.no_grad():
        return search(ratio, advantage, trained, rollout, variant, grids, target, groups)


def grid(name: str, given: Range) -> tuple[float, ...]:
    """Grid points by the loop's own additions, which round: they are no exact multiples."""
    if not (isinstance(given, (tuple, list)) and len(given) == 3):
        _checks.fail(name, "(start, max, step)", repr(given))
    start, stop, step = given
    for value in given:
        _checks.check_number(name, value, 0)
    if stop < start or (stop > start and (stop - start) > MAX_STEPS * step):
        _checks.fail(name, f"start <= max within {MAX_STEPS} steps", repr(given))
    points = [float(start)]
    while points[-1] < stop:
        points.append(min(points[-1] + step, float(stop)))
    return tuple(points)


def search(
    ratio: Tensor,
    advantage: Tensor,
    trained: Tensor,
    rollout_logprob: Tensor | None,
    variant: str,
    grids: tuple[tuple[float, ...], tuple[float, ...]],
    target: float,
    groups: Sequence[Any],
) -> tuple[Tensor, Tensor]:
    """`bapo_bounds` on checked inputs; rows outside ``trained`` may hold anything."""
    lows, highs = (_constant(points, ratio.device) for points in grids)
    amount = advantage.double()
    if rollout_logprob is not None:
        amount = amount * rollout_logprob.double().exp()
    amount = torch.where(trained, amount, 0.0).reshape(-1)
    ratio = torch.where(trained, ratio.double(), 0.0).reshape(-1)
    sums = _side_sums(ratio, amount, lows, highs)
    if groups:
        sums = total(sums, *groups)
    pos, neg = sums.split((len(highs), len(lows)))
    low_last, high_last = len(lows) - 1, len(highs) - 1
    if variant == "paper":  # (low, high) of every probe, in the order of the loop
        pos = torch.cat((pos, pos[-1:].expand(low_last)))
        neg = torch.cat((neg[:1].expand(high_last), neg))
        low_probes = torch.cat((lows[:1].expand(high_last), lows))
        high_probes = torch.cat((highs, highs[-1:].expand(low_last)))
        balance = pos / (pos + neg)
    else:
        pos = torch.cat((pos[:1].expand(low_last), pos))
        neg = torch.cat((neg, neg[-1:].expand(high_last)))
        low_probes = torch.cat((lows, lows[-1:].expand(high_last)))
        high_probes = torch.cat((highs[:1].expand(low_last), highs))
        balance = torch.where(neg <= 0, math.inf, pos / (neg + EPS))
    stops = ~(balance < target)  # 0 / 0 stops at once
    stops[-1] = True
    first = stops.to(torch.int8).argmax()
    return element(low_probes, first), element(high_probes, first)


def _side_sums(ratio: Tensor, amount: Tensor, lows: Tensor, highs: Tensor) -> Tensor:
    """For A > 0 the bounded ratio is min(r, hi), for A < 0 it is max(r, lo), in both variants."""
    sums = ratio.new_zeros(len(highs) + len(lows))
    for r, a in zip(ratio.split(BLOCK), amount.split(BLOCK), strict=True):
        pos = (torch.minimum(r, highs.unsqueeze(1)) * a.clamp_min(0)).sum(1)
        neg = (torch.maximum(r, lows.unsqueeze(1)) * (-a).clamp_min(0)).sum(1)
        sums += torch.cat((pos, neg))
    return sums


def _constant(values: tuple[float, ...], device: torch.device) -> Tensor:
    """From pinned memory, because a copy from pageable memory waits for the stream."""
    host = torch.tensor(values, dtype=torch.float64, device="cpu")
    if device.type == "cuda":
        host = host.pin_memory()
    return host.to(device, non_blocking=True)
