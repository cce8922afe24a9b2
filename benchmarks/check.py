"""Does a provider compute what it is timed for?"""

from __future__ import annotations

import torch

from benchmarks.case import Tolerance, Truth

BLOCK_ROWS = 64  # a float64 difference of a whole gradient would double the memory in use


def compare(outputs: dict[str, torch.Tensor], truth: Truth) -> dict[str, float]:
    """Per output: its largest error in units of the allowed error (above 1 is a mismatch)."""
    return {
        name: excess(got.detach(), truth.values[name], truth.tolerance[name])
        for name, got in outputs.items()
    }


def excess(got: torch.Tensor, truth: torch.Tensor, tolerance: Tolerance) -> float:
    """Largest error ÷ allowed error; infinite for a wrong shape and for NaN."""
    if got.shape != truth.shape:
        return float("inf")
    if truth.numel() == 0:
        return 0.0
    rel, absolute = (
        torch.as_tensor(x, dtype=truth.dtype, device=truth.device).expand_as(truth)
        for x in (tolerance.rel, tolerance.absolute)
    )
    blocks = (t.split(BLOCK_ROWS) if t.ndim else (t,) for t in (got, truth, rel, absolute))
    return max(_block_excess(*block) for block in zip(*blocks, strict=True))


def _block_excess(
    got: torch.Tensor, truth: torch.Tensor, rel: torch.Tensor, absolute: torch.Tensor
) -> float:
    error = (got.to(truth.dtype) - truth).abs()
    allowed = truth.abs() * rel + absolute
    # Where nothing is allowed only equality passes: 0/0 must count as 0, x/0 as infinite.
    worst = torch.where(error == 0, error, error / allowed)
    return float(torch.nan_to_num(worst, nan=float("inf"), posinf=float("inf")).max())
