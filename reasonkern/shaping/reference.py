"""The definitions of the family's operators in plain torch, any device, float32 or float64.

`gae` loops over the tokens of a row and `elliptical_select` over its picks; other backends do not.
"""

from __future__ import annotations

import torch
from torch import Tensor


def gae(
    reward: Tensor,
    value: Tensor,
    mask: Tensor | None,
    row_lam: Tensor | None,
    row_lam_value: Tensor | None,
    bootstrap_value: Tensor | None,
    truncated: Tensor | None,
    gamma: float,
    lam: float,
    lam_value: float,
    bootstrap_last: bool,
) -> tuple[Tensor, Tensor]:
    batch, length = reward.shape
    zeros = reward.new_zeros(batch)
    active = torch.ones_like(reward, dtype=torch.bool) if mask is None else mask
    bootstrapped = torch.ones_like(zeros, dtype=torch.bool) if truncated is None else truncated
    decay = gamma * (lam if row_lam is None else row_lam)
    decay_value = gamma * (lam_value if row_lam_value is None else row_lam_value)
    # V of the next token; `at_end` marks rows where no token has been met yet.
    following = zeros if bootstrap_value is None else torch.where(bootstrapped, bootstrap_value, 0)
    at_end = bootstrapped if bootstrap_last else torch.zeros_like(bootstrapped)
    carry, carry_value = zeros, zeros
    advantage, returns = (reward.new_zeros(reward.shape) for _ in range(2))
    for t in range(length - 1, -1, -1):
        on, v = active[:, t], value[:, t]
        delta = reward[:, t] + gamma * torch.where(at_end, v, following) - v
        a, b = delta + decay * carry, delta + decay_value * carry_value
        carry, carry_value = torch.where(on, a, carry), torch.where(on, b, carry_value)
        following, at_end = torch.where(on, v, following), at_end & ~on
        advantage[:, t], returns[:, t] = torch.where(on, a, 0), torch.where(on, b + v, 0)
    return advantage, returns


def elliptical_select(features: Tensor, k: int, lam: float) -> Tensor:
    h = features.double()
    groups, count, _ = h.shape
    score = h.square().sum(-1) / lam
    factor = h.new_zeros(groups, count, max(k - 1, 0))
    picks = torch.empty((groups, k), dtype=torch.int64, device=h.device)
    for j in range(k):
        best = score.argmax(-1, keepdim=True)  # the first one among equals
        picks[:, j] = best[:, 0]
        if j + 1 < k:
            at = best.unsqueeze(-1)
            row = h.take_along_dim(at, 1).mT  # (groups, width, 1)
            own = factor.take_along_dim(at, 1).mT
            column = ((h @ row) / lam - factor @ own).squeeze(-1)
            column = column / (1 + score.gather(-1, best)).sqrt()
            factor[:, :, j] = column
            score = torch.where(score < 0, -1.0, (score - column.square()).clamp_min(0))
        score = score.scatter(-1, best, -1.0)
    return picks
