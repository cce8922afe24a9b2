"""`elliptical_select`: a greedy subset of responses that are unlike each other in features."""

from __future__ import annotations

import torch
from torch import Tensor

from .. import _checks
from .._checks import check_tensor
from ..shaping import op as op
from ..shaping.exploration import SMALLEST_RIDGE


def elliptical_select(features: Tensor, k: int, lam: float = 0.01) -> Tensor:
    """Picks k of N candidates by greedy elliptical scores (test-time RepExp, arXiv 2510.11686).

    Each pick is the candidate with the largest ``h' Λ⁻¹ h``, then ``Λ += h h'``, from Λ = λI. The
    paper draws its first pick at random and updates Λ⁻¹ (d×d); this is the same choice by pivoted
    Cholesky of the Gram matrix: one column per pick, no d×d matrix, in float64. Equivalent to::

        chosen, matrix = torch.zeros(N, dtype=torch.bool), lam * torch.eye(d)
        for _ in range(k):
            score = ((features @ matrix.inverse()) * features).sum(-1)
            pick = score.masked_fill(chosen, -1).argmax()
            chosen[pick], matrix = True, matrix + features[pick].outer(features[pick])

    Args:
        features: (N, d), or (P, N, d) for P prompts at once, any floating dtype; mean last-layer
            hidden states, centred or not.
        k: picks, 0 to N.
        lam: ridge λ > 0. The paper's is not known to us; 0.01 is that of its training code.

    Returns:
        (k,) or (P, k) int64, in the order picked; equal scores: the lower index.

    Raises:
        ValueError: wrong shape or dtype, k or lam out of range; on CPU features that are not finite
            or a λ below 1e-12 of the largest h'h, where rounding would choose (on CUDA the picks
            are distinct but else undefined).

    Example:
        >>> import torch
        >>> from reasonkern.scaling import elliptical_select
        >>> elliptical_select(torch.tensor([[2.0, 0.0], [1.9, 0.0], [0.0, 1.0]]), 2)
        tensor([0, 2])
    """
    check_tensor("features", features)
    if features.ndim not in (2, 3) or not features.is_floating_point():
        expected = "floating point of shape (N, d) or (P, N, d)"
        _checks.fail("features", expected, f"{tuple(features.shape)}, {features.dtype}")
    _checks.check_integer("k", k, 0, features.shape[-2])
    _checks.check_number("lam", lam, 0.0, exclusive=True)
    x = features.detach()
    x = x if x.dtype == torch.float64 else x.float()
    x = x if x.stride(-1) == 1 else x.contiguous()
    _checks.check_finite("features", x, expected="finite numbers")
    if _checks.reads_values(x) and x.numel():
        largest = torch.linalg.vector_norm(x, dim=-1, dtype=torch.float64).max().item()
        least = SMALLEST_RIDGE * largest * largest
        if lam < least:
            expected = f"a ridge of at least {SMALLEST_RIDGE} h'h = {least:.2g}"
            _checks.fail("lam", expected, f"{lam}: it is rounded away")
    batched = x if x.ndim == 3 else x.unsqueeze(0)
    out: Tensor = torch.ops.reasonkern.elliptical_select(batched, k, float(lam))
    return out if x.ndim == 3 else out[0]
