"""`high_entropy_mask` and `covariance_mask` against sorts, and the radix select behind both."""

from __future__ import annotations

import re
from fractions import Fraction
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import reasonkern as rk
from reasonkern.policy_loss import selection

FLOATS = (torch.float32, torch.float64, torch.bfloat16, torch.float16)


def ceil_share(rho: float, count: int) -> int:
    return -(-count * Fraction(str(rho)) // 1)


def floor_share(fraction: float, count: int) -> int:
    return count * Fraction(str(fraction)) // 1


def sorted_high(entropy: Tensor, mask: Tensor, rho: float) -> Tensor:
    rank = ceil_share(rho, int(mask.sum()))
    if rank == 0:
        return torch.zeros_like(mask)
    ordered = entropy[mask].sort(descending=True).values
    return mask & (entropy >= ordered[rank - 1])


def entropies(seed: int, size: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Ties, zeros of both signs, denormals, negative and huge values; NaN where not trained."""
    g = torch.Generator().manual_seed(seed)
    x = torch.randn(size, generator=g, dtype=torch.float64).exp()
    x[torch.rand(size, generator=g) < 0.3] = 0.5
    special = torch.tensor([0.0, -0.0, 1e-42, -1e-42, -3.0, 6e4, 0.5 + 1e-7])
    x[: len(special)] = special[:size]
    mask = torch.rand(size, generator=g) < 0.8
    x[~mask] = float("nan")
    return x.to(dtype), mask


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("rho", [0.2, 1 / 3, 0.07, 0.999, 1.0, 1e-4, 1e-7, 1e-30])
def test_high_entropy_equals_the_sort(dtype: torch.dtype, rho: float) -> None:
    for seed, size in enumerate((7, 8, 30, 100, 1000)):
        x, mask = entropies(seed, size, dtype)
        found = rk.high_entropy_mask(x, mask, rho)
        expected = sorted_high(x.double(), mask, rho)
        assert torch.equal(found, expected)
        assert found.sum() >= ceil_share(rho, int(mask.sum()))


def test_ties_are_kept_and_the_share_is_of_the_decimal() -> None:
    tied = torch.full((2, 5), 0.7)
    assert rk.high_entropy_mask(tied, torch.ones(2, 5), 0.2).all()
    # 0.07 * 100 is 7.000000000000001 in binary: still seven tokens.
    assert rk.high_entropy_mask(torch.arange(100.0), torch.ones(100), 0.07).sum() == 7
    for fifth in (np.float32(0.2), Fraction(1, 5)):
        assert rk.high_entropy_mask(torch.arange(10.0), torch.ones(10), fifth).sum() == 2
    for shape in ((0,), (3, 0)):
        assert rk.high_entropy_mask(torch.zeros(shape), torch.zeros(shape)).shape == shape
    assert not rk.high_entropy_mask(torch.rand(4), torch.zeros(4)).any()


@settings(max_examples=30, deadline=None)
@given(st.lists(st.floats(width=32, allow_nan=False), min_size=1, max_size=40), st.data())
def test_kth_largest_of_any_floats(values: list[float], data: Any) -> None:
    for dtype, bits in ((torch.float32, 32), (torch.float64, 64)):
        x = torch.tensor(values, dtype=dtype)
        k = data.draw(st.integers(1, len(values)))
        keys = selection.ordered_integers(x)
        used = torch.ones_like(keys, dtype=torch.bool)
        found = selection.kth_largest(keys, used, torch.tensor(k), bits, ())
        expected = x.sort(descending=True).values[k - 1]
        assert found == selection.ordered_integers(expected)


@settings(max_examples=30, deadline=None)
@given(st.lists(st.integers(-(2**63), 2**63 - 1), min_size=1, max_size=40), st.data())
def test_kth_largest_of_any_integers(values: list[int], data: Any) -> None:
    keys = torch.tensor(values)
    k = data.draw(st.integers(1, len(values)))
    used = torch.ones_like(keys, dtype=torch.bool)
    found = selection.kth_largest(keys, used, torch.tensor(k), 64, ())
    assert found == sorted(values, reverse=True)[k - 1]


@pytest.mark.slow
def test_exact_beyond_2_24_elements() -> None:
    """Counts above 2^24 are no float32 integers, and neighbours differ in the last bit."""
    size = 2**24 + 12345
    bits = torch.arange(size, dtype=torch.int32) + 0x3F800000  # consecutive floats from 1.0
    x = bits.view(torch.float32)[torch.randperm(size, generator=torch.Generator().manual_seed(0))]
    with pytest.raises(RuntimeError, match="too large"):
        torch.quantile(x, 0.8)
    mask = torch.ones(size, dtype=torch.bool)
    for rho in (0.2, 1.0):
        rank = ceil_share(rho, size)
        threshold = (bits[0] + size - rank).view(torch.float32)
        found = rk.high_entropy_mask(x, mask, rho)
        assert torch.equal(found, x >= threshold) and found.sum() == rank


# ---- covariance


def rows(seed: int, size: int = 400) -> tuple[Tensor, Tensor, Tensor]:
    """(logprob, advantage, mask) with covariances on both sides of 1 and 5."""
    g = torch.Generator().manual_seed(seed)
    logprob = -4 * torch.rand(size, generator=g)
    advantage = 2 * torch.randn(size, generator=g)
    mask = torch.rand(size, generator=g) < 0.9
    logprob[~mask] = float("nan")
    return logprob, advantage, mask


def literal_covariance(logprob: Tensor, advantage: Tensor, mask: Tensor) -> Tensor:
    lp, a = logprob.double(), advantage.double()
    return (a - a[mask].mean()) * (lp - lp[mask].mean())


@pytest.mark.parametrize("fraction", [2e-4, 0.01, 0.25, 1.0])
def test_kl_cov_equals_the_sort(fraction: float) -> None:
    for seed in range(20):
        lp, a, mask = rows(seed)
        cov = literal_covariance(lp, a, mask)
        k = max(1, floor_share(fraction, int(mask.sum())))
        threshold = cov[mask].sort(descending=True).values[k - 1]
        found = rk.covariance_mask(lp, a, mask, mode="kl", fraction=fraction)
        assert torch.equal(found, mask & (cov >= threshold)) and found.sum() == k


def test_kl_cov_takes_the_first_of_ties() -> None:
    lp, a = torch.tensor([-1.0, -3.0, -1.0, -3.0]), torch.tensor([1.0, -1.0, 1.0, -1.0])
    found = rk.covariance_mask(lp, a, torch.tensor([0, 1, 1, 1]), mode="kl", fraction=0.67)
    assert found.tolist() == [False, True, True, False]


@pytest.mark.parametrize("advantage", [0.0, 0.7])
def test_kl_cov_of_equal_advantages_is_no_larger(advantage: float) -> None:
    """The tokens of one sequence, which a micro-batch can be: all covariances are 0."""
    lp, _, mask = rows(0)
    found = rk.covariance_mask(lp, torch.tensor(advantage), mask, mode="kl", fraction=0.01)
    assert found.sum() == floor_share(0.01, int(mask.sum())) and not (found & ~mask).any()


@pytest.mark.parametrize("fraction", [2e-4, 0.01, 0.05, 0.9])
def test_clip_cov_draws_from_the_candidates(fraction: float) -> None:
    for seed in range(20):
        lp, a, mask = rows(seed)
        cov = literal_covariance(lp, a, mask)
        free = torch.rand(mask.shape, generator=torch.Generator().manual_seed(seed)) < 0.7
        eligible = mask & free & (cov > 1) & (cov < 5)
        assert eligible.sum() > 20
        k = min(max(1, floor_share(fraction, int(mask.sum()))), int(eligible.sum()))
        found = rk.covariance_mask(lp, a, mask, fraction=fraction, candidates=free, seed=seed)
        assert found.sum() == k and not (found & ~eligible).any()
        keys = selection.random_keys(mask.numel(), seed, mask.device, ())
        assert torch.equal(found, eligible & (keys >= keys[eligible].sort().values[-k]))


def test_clip_cov_without_candidates_selects_nothing() -> None:
    lp, a, mask = rows(0)
    assert not rk.covariance_mask(lp, a, mask, low=1e6, high=2e6).any()
    assert not rk.covariance_mask(lp, a, torch.zeros_like(mask)).any()
    assert not rk.covariance_mask(lp, a, torch.zeros_like(mask), mode="kl").any()
    assert rk.covariance_mask(lp[:0], a[:0], mask[:0]).shape == (0,)
    signs, both = torch.tensor([-1.0, 1.0]), torch.ones(2)  # whose covariances are 1
    for low, high, count in ((1.0, 2.0, 0), (0.0, 1.0, 0), (0.5, 1.5, 2)):
        found = rk.covariance_mask(signs, signs, both, fraction=1.0, low=low, high=high)
        assert found.sum() == count


def test_the_draw_is_seeded_and_even() -> None:
    lp, a, mask = rows(1, 2000)
    options = {"fraction": 0.01, "low": 0.0, "high": 100.0}
    first = rk.covariance_mask(lp, a, mask, seed=3, **options)
    assert torch.equal(first, rk.covariance_mask(lp, a, mask, seed=torch.tensor(3), **options))
    draws = torch.stack([rk.covariance_mask(lp, a, mask, seed=s, **options) for s in range(400)])
    assert (draws.sum(1) == draws[0].sum()).all()
    cov = literal_covariance(lp, a, mask)
    eligible = mask & (cov > 0) & (cov < 100)
    counts = draws.sum(0)[eligible].double()
    mean = counts.mean()
    chi_square = ((counts - mean) ** 2 / mean).sum() / (eligible.sum() - 1)
    assert 0.85 < chi_square < 1.15
    # Neighbours in position or seed are not drawn together.
    pairs = (draws[:-1] & draws[1:]).sum() / draws[1:].sum()
    assert pairs < 3 * draws[0].sum() / eligible.sum()


def test_a_seed_that_changes_is_an_argument_of_a_traced_graph() -> None:
    lp, a, mask = rows(1)
    torch._dynamo.reset()
    compiled = torch.compile(rk.covariance_mask, fullgraph=True, backend="eager")
    for seed in (3, 4, -1):
        drawn = rk.covariance_mask(lp, a, mask, seed=seed, fraction=0.1)
        assert torch.equal(compiled(lp, a, mask, seed=seed, fraction=0.1), drawn)


def test_random_keys_are_distinct_and_the_published_hash() -> None:
    """SplitMix64 from seed 0 starts with these words."""
    keys = selection.random_keys(100_000, 0, torch.device("cpu"), ())
    assert keys.unique().numel() == keys.numel()
    state = torch.tensor([1, 2, 3]) * selection.signed(selection.GOLDEN)
    words = [w % 2**64 for w in selection._mix(state).tolist()]
    assert words == [0xE220A8397B1DCDAF, 0x6E789E6AA1B965F4, 0x06C45D188009454F]


ONES = torch.ones(4)
ENTROPY_ERRORS: list[tuple[dict[str, Any], str]] = [
    ({"rho": 0.0}, "rho: expected a number in (0, 1], got 0.0"),
    ({"rho": 1.5}, "rho: expected a number in (0, 1], got 1.5"),
    ({"entropy": [1.0]}, "entropy: expected a tensor, got list"),
    ({"mask": ONES[:3]}, "mask: expected shape entropy.shape = (4,), got (3,)"),
    ({"mask": ONES / 2}, "mask: expected bool or 0/1 values, got 0.5 at (0,)"),
    ({"entropy": ONES / 0}, "entropy: expected finite values in trained tokens, got inf at (0,)"),
]
COVARIANCE_ERRORS: list[tuple[dict[str, Any], str]] = [
    ({"mode": "top"}, "mode: expected 'clip' or 'kl', got 'top'"),
    ({"fraction": 2.0}, "fraction: expected a number in (0, 1], got 2.0"),
    ({"high": 0.5}, "high: expected a finite number >= 1, got 0.5"),
    ({"advantage": ONES[:3]}, "advantage: expected a shape that broadcasts to (4,), got (3,)"),
    ({"candidates": ONES}, "candidates: expected dtype torch.bool, got torch.float32"),
    (
        {"logprob": ONES * float("nan")},
        "logprob: expected finite values in trained tokens, got nan at (0,)",
    ),
]


@pytest.mark.parametrize(("changes", "message"), ENTROPY_ERRORS)
def test_high_entropy_errors(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        rk.high_entropy_mask(**({"entropy": ONES, "mask": ONES} | changes))


@pytest.mark.parametrize(("changes", "message"), COVARIANCE_ERRORS)
def test_covariance_errors(changes: dict[str, Any], message: str) -> None:
    rows = {"logprob": ONES, "advantage": ONES, "mask": ONES}
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        rk.covariance_mask(**(rows | changes))
