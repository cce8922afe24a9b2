"""`elliptical_bonus`: exploration by representation, from one Cholesky factor per group."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from .. import _checks
from .._checks import check_tensor
from ..policy_loss.selection import uniform
from .groups import Groups, narrow

MODES = ("leave-one-out", "leverage")
# The Gram matrix is off by 1e-16 of its trace, the bonus then by 1e-16 tr K / λ of its value.
SMALLEST_RIDGE = 1e-12


def elliptical_bonus(
    features: Tensor,
    group: Tensor,
    lam: float = 0.01,
    mode: str = "leave-one-out",
    *,
    lam_relative: bool = False,
    project: int | None = None,
    seed: int = 0,
    max_groups: int | None = None,
    max_group_size: int | None = None,
) -> Tensor:
    """How unlike the others of its group each response is (RepExp, arXiv 2510.11686).

    With Φ the features of a group, centred, and Λ = λI + Φ'Φ: the leverage is h_i = φ_i' Λ⁻¹ φ_i,
    the leave-one-out bonus b_i = φ_i' (Λ - φ_i φ_i')⁻¹ φ_i. The released code reaches Λ⁻¹ by G
    rank-one updates of a d×d matrix; here both come from the G×G Gram matrix K = ΦΦ'::

        a = (lam * eye(G) + K).inverse().diagonal()
        leverage, leave_one_out = 1 - lam * a, 1 / (lam * a) - 1

    in float64, the groups side by side in (groups, largest group, d). When λ is far below the
    eigenvalues of K, which has rank G - 1 at most, every b_i saturates at G - 1 and every h_i at
    1 - 1/G: the bonus then says nothing. ``lam_relative`` or ``project`` avoids that. The code adds
    0.01 b to the reward, in groups with a correct answer only: weights and gates of `mix_rewards`.

    Args:
        features: (N, d), mean last-layer hidden state of each response, any floating dtype.
        group: (N,) int64 ids.
        lam: ridge λ > 0. Code: 0.01.
        mode: "leave-one-out" (the code's default) or "leverage" (its training script's choice).
        lam_relative: λ becomes lam · tr K / (G - 1), in units of the mean eigenvalue.
        project: width of a sparse random projection before all else, entries ±√(s/k) or 0 with
            density 1/s = 1/√d, as in the paper (its k: 32 to 512); None = the exact features.
        seed: of the projection. The released code draws a new one in every call.
        max_groups: upper bound of the number of groups. None = found from ``group``, which
            synchronises a CUDA device; with both bounds given nothing does.
        max_group_size: upper bound of the size of a group; None = found likewise. A group beyond a
            bound raises ValueError on CPU; on CUDA, and in torch.compile, it is NaN.

    Returns:
        (N,) float32 (float64 for float64 features), not normalised; 0 for a group of one or of
        equal features.

    Raises:
        ValueError: wrong shape, dtype or device, an unknown mode, a number out of range; on CPU
            also features that are not finite and a λ below 1e-12 tr K, where rounding would decide
            the result (on CUDA both give NaN).

    Example:
        >>> import torch
        >>> from reasonkern.shaping import elliptical_bonus
        >>> features = torch.tensor([[1.0, 0.0], [1.0, 0.0], [0.0, 1.0]])
        >>> elliptical_bonus(features, torch.tensor([0, 0, 0]), lam=1.0)
        tensor([0.1053, 0.1053, 0.6154])
    """
    if check_tensor("features", features).ndim != 2 or not features.is_floating_point():
        got = f"{tuple(features.shape)}, {features.dtype}"
        _checks.fail("features", "floating point of shape (N, d)", got)
    _checks.check_number("lam", lam, 0.0, exclusive=True)
    _checks.check_choice("mode", mode, MODES)
    for name, bound in (("max_groups", max_groups), ("max_group_size", max_group_size)):
        if bound is not None:
            _checks.check_integer(name, bound, 1)
    groups = Groups(group, features, "features")
    if not len(features):
        return narrow(features.new_zeros(0), features)
    phi = features.detach().double()
    _checks.check_finite("features", phi, expected="finite numbers")
    if project is not None:
        phi = phi @ sparse_projection(phi.shape[1], project, seed, phi.device)
    shape = (
        _bound("max_groups", max_groups, groups.exists().sum(), len(phi)),
        _bound("max_group_size", max_group_size, groups.size().max(), len(phi)),
    )
    out = _by_group(phi, groups, shape, lam, mode, lam_relative)
    return narrow(out, features)


def _bound(name: str, given: int | None, needed: Tensor, sequences: int) -> int:
    if given is None:
        return int(needed)
    if _checks.reads_values(needed) and given < int(needed):
        _checks.fail(name, f"at least {int(needed)}, which group has", given)
    return min(given, sequences)  # there are no more groups, and no larger ones


def _by_group(
    phi: Tensor, groups: Groups, shape: tuple[int, int], lam: float, mode: str, relative: bool
) -> Tensor:
    """Groups side by side, padded with zero vectors: those add 1/λ to the diagonal, no more."""
    every = torch.ones_like(groups.index, dtype=torch.bool)
    rank = groups.count_before(every)
    fits = (groups.index < shape[0]) & (groups.size() <= shape[1])
    # What does not fit goes to a last slot that is cut off.
    slot = torch.where(fits, groups.index * shape[1] + rank, shape[0] * shape[1])
    padded = phi.new_zeros(shape[0] * shape[1] + 1, phi.shape[1]).index_copy(0, slot, phi)
    used = phi.new_zeros(len(padded)).index_fill(0, slot, 1.0)[:-1].view(shape)
    padded = padded[:-1].view(*shape, -1)
    size = used.sum(1, True)
    # Shifted by the first member, so that equal features are centred to exactly 0.
    padded = (padded - padded[:, :1]) * used.unsqueeze(-1)
    mean = padded.sum(1, True) / size.clamp_min(1).unsqueeze(-1)
    padded = (padded - mean) * used.unsqueeze(-1)
    gram = padded @ padded.mT
    trace = gram.diagonal(dim1=1, dim2=2).sum(1, True)
    ridge = torch.full_like(size, lam)
    if relative:
        ridge = lam * trace / (size - 1)
        ridge = torch.where(ridge > 0, ridge, 1.0)  # one or equal features: K = 0, the bonus is 0
    lost = ridge < SMALLEST_RIDGE * trace
    if _checks.reads_values(phi) and lost.any():
        _checks.fail(
            "lam", f"a ridge of at least {SMALLEST_RIDGE} tr K", f"{lam}: it is rounded away"
        )
    matrix = gram + torch.diag_embed(ridge.expand(shape))
    factor, _ = torch.linalg.cholesky_ex(matrix)
    one = torch.eye(shape[1], dtype=phi.dtype, device=phi.device)
    # Not cholesky_inverse, which waits for the device to raise where a matrix is singular.
    root = torch.linalg.solve_triangular(factor, one, upper=False)
    diagonal = root.square().sum(1) * ridge
    bonus = 1 / diagonal - 1 if mode == "leave-one-out" else 1 - diagonal
    bonus = torch.where(trace == 0, 0.0, bonus.clamp_min(0))  # else 2e-16, by rounding of some λ
    bonus = torch.where(lost, torch.nan, bonus)
    bonus = torch.cat((bonus.flatten(), phi.new_full((1,), torch.nan)))
    return bonus[slot]


def sparse_projection(width: int, project: int, seed: int, device: torch.device) -> Tensor:
    """(width, project) of a very sparse random projection (Li, Hastie, Church 2006), float64."""
    _checks.check_integer("project", project, 1)
    seed = _checks.check_seed("seed", seed)
    sparsity = math.sqrt(max(width, 1))
    drawn = uniform(width * project, seed, device).view(width, project)
    sign = torch.sign(drawn - 0.5 / sparsity)  # -1 with probability 1 / (2 sparsity)
    value = torch.where(drawn < 1 / sparsity, sign, 0.0)
    return value * math.sqrt(sparsity / project)
