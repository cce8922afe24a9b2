"""The operator behind `elliptical_select` on every backend against explicit inverses."""

from __future__ import annotations

import pytest
import torch
from conftest import Backend, make_backend
from tolerance import randn
from torch import Tensor

from reasonkern import scaling


@pytest.fixture(params=["reference", "cpu", "triton"])
def backend(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Backend:
    """Triton in blocks of 16 candidates, so that 21 cross blocks."""
    if request.param == "triton":
        kernels = pytest.importorskip("reasonkern.shaping.triton_kernels")
        monkeypatch.setattr(kernels, "SELECT_BLOCK", 16)
    return make_backend(request.param)


def by_inverses(h: Tensor, k: int, lam: float) -> list[int]:
    """Greedy argmax of h' inverse(Λ) h with Λ inverted anew for every pick."""
    matrix, chosen = lam * torch.eye(h.shape[1], dtype=torch.float64), []
    for _ in range(k):
        score = ((h @ torch.linalg.inv(matrix)) * h).sum(1)
        score[chosen] = -1
        top = score.sort(descending=True).values
        assert len(top) - len(chosen) == 1 or top[0] - top[1] > 1e-9 * top[0]  # no near tie
        chosen.append(int(score.argmax()))
        matrix += torch.outer(h[chosen[-1]], h[chosen[-1]])
    return chosen


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize(("count", "width", "k", "lam"), [(21, 5, 9, 0.1), (7, 40, 7, 0.01)])
def test_representation_based_exploration_at_test_time(
    backend: Backend, dtype: torch.dtype, count: int, width: int, k: int, lam: float
) -> None:
    h = randn(3, count, width, seed=5).to(dtype)
    got = backend("elliptical_select", backend.to(h), k, lam)
    assert got.dtype == torch.int64
    assert got.tolist() == [by_inverses(x.double(), k, lam) for x in h]


def test_elliptical_select_ties_and_zeros(backend: Backend) -> None:
    """Equal candidates: the lower index; what is left over when all scores are 0, in order."""
    one, two = torch.tensor([1.0, 0, 0, 0]), torch.tensor([0, 0.5, 0, 0])
    h = torch.stack((0 * one, two, one, one, two, 0 * one))[None]
    assert backend("elliptical_select", backend.to(h), 6, 1.0).tolist() == [[2, 3, 1, 4, 0, 5]]
    assert backend("elliptical_select", backend.to(0 * h), 6, 1.0).tolist() == [[*range(6)]]
    assert backend("elliptical_select", backend.to(h[:, :, :0]), 2, 1.0).tolist() == [[0, 1]]


def test_elliptical_select_front() -> None:
    h = randn(20, 7, seed=6)
    assert scaling.elliptical_select(h, 4).tolist() == by_inverses(h, 4, 0.01)
    half = h.half()
    assert scaling.elliptical_select(half, 4).tolist() == by_inverses(half.double(), 4, 0.01)
    assert scaling.elliptical_select(h.T.contiguous().T, 4).tolist() == by_inverses(h, 4, 0.01)
    assert scaling.elliptical_select(h[None], 3).shape == (1, 3)
    assert scaling.elliptical_select(h, 0).shape == (0,)
    assert scaling.elliptical_select(h[:0], 0).shape == (0,)
    for huge in (1e6 * h, 1e6 * h[None]):
        with pytest.raises(ValueError, match="a ridge of at least 1e-12 h'h = 16, got 0.01:"):
            scaling.elliptical_select(huge, 4)
    with pytest.raises(ValueError, match="lam: expected a ridge of at least 1e-12 h'h = inf, got"):
        scaling.elliptical_select(1e200 * h, 4)
    # h'h is more than float32 holds, the ridge is not.
    large = (h.float() * 2.0**62, 4, 0.25 * 4.0**62)
    assert scaling.elliptical_select(*large).tolist() == by_inverses(h.float().double(), 4, 0.25)
    with pytest.raises(ValueError, match=r"features: expected finite numbers, got nan at \(0, 2\)"):
        scaling.elliptical_select(torch.where(torch.arange(7) == 2, torch.nan, h), 1)
