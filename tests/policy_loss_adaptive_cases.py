"""The formulas of the objectives that look at the whole batch, written out in float64."""

from __future__ import annotations

import math
from collections.abc import Callable

import policy_loss_literal as literal
import pytest
import torch
from policy_loss_literal import Batch, spread
from test_policy_loss_bapo import GRIDS, LOOPS
from torch import Tensor

from reasonkern import Objective
from reasonkern.policy_loss import selection

FRACTION, LOW, HIGH, COEF = 0.4, -1.0, 2.0, 0.7
# Factors per row of the batch, as of `conflict_token_weights`.
LAMBDA = torch.tensor([2.0, 1, 0, 4, 1, 1]).expand(4, 6)

TokenLoss = Callable[[Tensor, Tensor], Tensor]


def advantages(b: Batch) -> Tensor:
    return spread(b, b.advantage)


def bapo(variant: str, **dual: float) -> Callable[[Batch], TokenLoss]:
    def make(b: Batch) -> TokenLoss:
        def loss(logp: Tensor, entropy: Tensor) -> Tensor:
            used, a = b.weight != 0, advantages(b)
            r = (logp - b.old_logprob).exp()
            p = b.rollout_logprob.exp()
            rows = (x[used].tolist() for x in (r.detach(), a, p))
            clipped = literal.ppo(r, a, *LOOPS[variant](*rows, *GRIDS[variant]))
            return literal.dual(clipped, a, dual["c"]) if dual else clipped

        return loss

    return make


def covariance(b: Batch, logp: Tensor) -> Tensor:
    used, a, lp = b.weight != 0, advantages(b), logp.detach()
    return (a - a[used].mean()) * (lp - lp[used].mean())


def clip_cov(b: Batch) -> TokenLoss:
    def loss(logp: Tensor, entropy: Tensor) -> Tensor:
        used, a, r = b.weight != 0, advantages(b), (logp - b.old_logprob).exp()
        cov = covariance(b, logp)
        unclipped = torch.where(a > 0, r <= 1.2, r >= 0.8)
        eligible = used & unclipped & (cov > LOW) & (cov < HIGH)
        count = min(max(1, int(FRACTION * int(used.sum()))), int(eligible.sum()))
        keys = selection.random_keys(used.numel(), 5, used.device, ()).view(used.shape)
        order = keys[eligible].sort(descending=True).values
        dropped = eligible & (keys >= order[count - 1]) if count else eligible
        return torch.where(dropped, 0.0, literal.ppo(r, a, 0.8, 1.2))

    return loss


def kl_cov(b: Batch) -> TokenLoss:
    def loss(logp: Tensor, entropy: Tensor) -> Tensor:
        used, a, log_r = b.weight != 0, advantages(b), logp - b.old_logprob
        cov = covariance(b, logp)
        count = max(1, int(FRACTION * int(used.sum())))
        chosen = cov >= cov[used].sort(descending=True).values[count - 1]
        return -log_r.exp() * a + torch.where(chosen, COEF * log_r.abs(), 0.0)

    return loss


def high_entropy(b: Batch) -> TokenLoss:
    def loss(logp: Tensor, entropy: Tensor) -> Tensor:
        used, h = b.weight != 0, entropy.detach()
        count = math.ceil(FRACTION * int(used.sum()))
        kept = h >= h[used].sort(descending=True).values[count - 1]
        r = (logp - b.old_logprob).exp()
        return torch.where(kept, literal.ppo(r, advantages(b), 0.8, 1.28), 0.0)

    return loss


def gtpo(b: Batch, factor: Tensor | None = None, limit: float = 1.6) -> TokenLoss:
    def loss(logp: Tensor, entropy: Tensor) -> Tensor:
        out = torch.zeros_like(logp).flatten()
        a, lp = advantages(b).flatten(), logp.flatten()
        for index in literal.sequences(b):
            if len(index):
                mean = entropy.detach().flatten()[index].mean()
                shaped = a[index] - 0.1 * mean if mean <= limit else 0 * a[index]
                out = out.index_put((index,), -shaped * lp[index])
        return out.view(logp.shape) * (1 if factor is None else factor)

    return loss


def tppo(b: Batch) -> TokenLoss:
    return lambda logp, _: literal.ppo((logp - b.old_logprob).exp(), advantages(b), 0.8, 1.28)


Entry = tuple[Callable[[], Objective], Callable[[Batch], TokenLoss]]
COV = {"fraction": FRACTION}
ADAPTIVE: dict[str, Entry] = {
    "bapo paper": (Objective.bapo, bapo("paper")),
    "bapo code": (lambda: Objective.bapo("code"), bapo("code", c=3.0)),
    "clip_cov": (lambda: Objective.clip_cov(low=LOW, high=HIGH, seed=5, **COV), clip_cov),
    "kl_cov": (lambda: Objective.kl_cov(coef=COEF, **COV), kl_cov),
    "high_entropy": (lambda: Objective.high_entropy(FRACTION), high_entropy),
    "gtpo": (lambda: Objective.gtpo(max_entropy=1.6), gtpo),
    "tppo": (Objective.tppo, tppo),
}
every = pytest.mark.parametrize("name", ADAPTIVE)


def names(name: str) -> tuple[str, ...]:
    return ("rollout_logprob",) if name == "bapo paper" else ()
