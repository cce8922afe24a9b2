"""`bapo_bounds` against the probe-by-probe loops of the paper and of the released code."""

from __future__ import annotations

import re
from typing import Any

import pytest
import torch
from torch import Tensor

import reasonkern as rk
from reasonkern.policy_loss import bapo

GRIDS = {"paper": ((0.6, 0.9, 0.02), (1.2, 3.0, 0.05), 0.4),
         "code": ((0.6, 0.8, 0.05), (1.2, 2.0, 0.05), 1.0)}  # fmt: skip
VARIANTS = tuple(GRIDS)


def paper_loop(r: Any, a: Any, p: Any, low: Any, high: Any, target: float) -> tuple[float, float]:
    """While the share of the positive side is too small: the upper bound, at its end the lower."""

    def share(lo: float, hi: float) -> float:
        rows = list(zip(r, a, p, strict=True))
        pos = sum(w * abs(min(x * y, min(max(x, 0.0), hi) * y)) for x, y, w in rows if y > 0)
        total = sum(w * abs(min(x * y, min(max(x, lo), hi) * y)) for x, y, w in rows)
        return pos / total if total else float("nan")

    lo, hi = low[0], high[0]
    while share(lo, hi) < target:
        if hi < high[1]:
            hi = min(hi + high[2], high[1])
        elif lo < low[1]:
            lo = min(lo + low[2], low[1])
        else:
            break
    return lo, hi


def code_loop(r: Any, a: Any, p: Any, low: Any, high: Any, target: float) -> tuple[float, float]:
    """While pos / neg is too small: the lower bound to its end, then the upper one."""

    def balance(lo: float, hi: float) -> float:
        effective = [(min(x, hi) if y >= 0 else max(x, lo)) * y for x, y in zip(r, a, strict=True)]
        neg = -sum(min(x, 0.0) for x in effective)
        return sum(max(x, 0.0) for x in effective) / (neg + 1e-8) if neg > 0 else float("inf")

    lo, hi = low[0], high[0]
    while balance(lo, hi) < target and lo < low[1]:
        lo = min(lo + low[2], low[1])
    while balance(lo, hi) < target and hi < high[1]:
        hi = min(hi + high[2], high[1])
    return lo, hi


LOOPS = {"paper": paper_loop, "code": code_loop}


def random_batch(seed: int, size: int = 12) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(ratio, advantage, mask, rollout_logprob); signs, spread and balance differ by seed."""
    g = torch.Generator().manual_seed(seed)
    scale, shift = torch.rand(2, generator=g)
    ratio = torch.exp(1.5 * scale * torch.randn(size, generator=g, dtype=torch.float64))
    advantage = torch.randn(size, generator=g, dtype=torch.float64) + 1.5 * shift - 1.0
    advantage[torch.rand(size, generator=g) < 0.1] = 0
    sign = {0: 1, 1: -1, 2: 0}.get(seed % 25)  # no negative, no positive, nothing at all
    advantage = advantage if sign is None else sign * advantage.abs()
    mask = torch.rand(size, generator=g) < (0 if seed % 25 == 3 else 0.8)
    ratio[~mask] = float("nan")
    return ratio, advantage, mask, -3 * torch.rand(size, generator=g).double()


def expected_bounds(variant: str, batch: Any, *settings: Any) -> tuple[float, float]:
    ratio, advantage, mask, rollout = (x.flatten() for x in batch)
    rows = (x[mask].tolist() for x in (ratio, advantage, rollout.exp()))
    return LOOPS[variant](*rows, *settings)


def found_bounds(variant: str, batch: Any, **options: Any) -> tuple[float, float]:
    ratio, advantage, mask, rollout = batch
    if variant == "paper":
        options["rollout_logprob"] = rollout
    bounds = rk.bapo_bounds(ratio, advantage, mask, variant=variant, **options)
    assert all(b.ndim == 0 and b.dtype == torch.float64 for b in bounds)
    return bounds[0].item(), bounds[1].item()


@pytest.mark.parametrize("variant", VARIANTS)
def test_bounds_equal_the_loop_on_1000_batches(variant: str) -> None:
    low, high, target = GRIDS[variant]
    results = []
    for seed in range(1000):
        batch = random_batch(seed)
        results.append(found_bounds(variant, batch))
        assert results[-1] == expected_bounds(variant, batch, low, high, target), seed
    lows, highs = (set(x) for x in zip(*results, strict=True))
    # Hard enough: stops at the start, on the way and at the end of both grids.
    last_low, last_high = bapo.grid("low", low)[-1], bapo.grid("high", high)[-1]
    assert {low[0], last_low} <= lows and {high[0], last_high} <= highs
    assert len(highs) > 12


@pytest.mark.parametrize("variant", VARIANTS)
def test_bounds_with_other_grids_and_targets(variant: str) -> None:
    """A step that does not divide the range, a grid of one point, a target never reached."""
    for low, high, target in (
        ((0.5, 0.95, 0.1), (1.1, 1.55, 0.2), 0.45),
        ((0.8, 0.8, 0.0), (1.0, 4.0, 0.3), 0.5),
        ((0.2, 0.9, 0.05), (1.5, 1.5, 0.1), 0.6),
        ((0.6, 0.9, 0.02), (1.2, 3.0, 0.05), 99.0),
    ):
        for seed in range(40):
            batch = random_batch(seed)
            found = found_bounds(variant, batch, low=low, high=high, target=target)
            assert found == expected_bounds(variant, batch, low, high, target)


@pytest.mark.parametrize("variant", VARIANTS)
def test_a_default_device_does_not_matter(variant: str) -> None:
    """The grid is made on the CPU, where its memory can be pinned."""
    batch = random_batch(1)
    expected = found_bounds(variant, batch)
    with torch.device("meta"):
        assert found_bounds(variant, batch) == expected


@pytest.mark.parametrize("variant", VARIANTS)
def test_edges(variant: str) -> None:
    low, high, _ = GRIDS[variant]
    start, end = (low[0], high[0]), (low[1], high[1])
    r = torch.tensor([0.5, 1.0, 2.0])
    ones = torch.ones(3)

    def bounds(advantage: Tensor, ratio: Tensor = r, mask: Tensor = ones) -> tuple[float, float]:
        return found_bounds(variant, (ratio, advantage, mask, torch.zeros_like(ratio)))

    assert bounds(ones) == start  # no negative
    assert bounds(-ones) == end  # no positive
    assert bounds(0 * ones) == start  # nothing to balance
    assert bounds(ones, mask=0 * ones) == start
    assert bounds(ones[:0], r[:0], ones[:0]) == start


@pytest.mark.parametrize("variant", VARIANTS)
def test_more_rows_than_a_block_and_any_shape(variant: str, monkeypatch: Any) -> None:
    batch = [torch.stack([x, x.flip(0)]) for x in random_batch(7, 50)]
    settings = GRIDS[variant]
    expected = expected_bounds(variant, batch, *settings)
    assert found_bounds(variant, batch) == expected
    monkeypatch.setattr(bapo, "BLOCK", 16)
    assert found_bounds(variant, batch) == expected


def test_bounds_go_into_the_objective_and_back() -> None:
    bounds = found_bounds("code", random_batch(5))
    o = rk.Objective.ppo(*map(torch.tensor, bounds), dual_clip=3.0)
    assert o.ratio_min is not None and o.ratio_max is not None


R = torch.ones(4)
ERRORS: list[tuple[dict[str, Any], str]] = [
    ({"variant": "both"}, "variant: expected 'paper' or 'code', got 'both'"),
    (
        {"rollout_logprob": None},
        "rollout_logprob: expected a tensor for variant paper (the old policy's, if that one "
        "sampled), got None",
    ),
    ({"variant": "code"}, "rollout_logprob: expected None for variant code, got a tensor"),
    ({"ratio": 1.0}, "ratio: expected a tensor, got float"),
    ({"advantage": R[:3]}, "advantage: expected a shape that broadcasts to (4,), got (3,)"),
    ({"mask": R / 2}, "mask: expected bool or 0/1 values, got 0.5 at (0,)"),
    ({"ratio": R / 0}, "ratio: expected finite values in trained tokens, got inf at (0,)"),
    ({"low": (0.9, 0.6, 0.1)}, "low: expected start <= max within 1000 steps, got (0.9, 0.6, 0.1)"),
    ({"high": (1, 2, 0)}, "high: expected start <= max within 1000 steps, got (1, 2, 0)"),
    ({"high": 1.2}, "high: expected (start, max, step), got 1.2"),
    ({"target": float("nan")}, "target: expected a finite number, got nan"),
]


@pytest.mark.parametrize(("changes", "message"), ERRORS, ids=[m[:40] for _, m in ERRORS])
def test_errors(changes: dict[str, Any], message: str) -> None:
    given = {"ratio": R, "advantage": R, "mask": R, "rollout_logprob": R} | changes
    rows = [given.pop(name) for name in ("ratio", "advantage", "mask")]
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        rk.bapo_bounds(*rows, **given)


def test_a_share_at_the_target_stops_the_search() -> None:
    one, grids = torch.ones(2), {"low": (0.5, 0.9, 0.1), "high": (1.5, 2.0, 0.1)}
    sides = torch.tensor([1.0, -1.0])
    found = rk.bapo_bounds(one, sides, one, rollout_logprob=0 * one, target=0.5, **grids)
    assert [x.item() for x in found] == [0.5, 1.5]
