"""What the comparisons of policy_loss with its peers share."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from policy_loss_literal import Batch, make_batch
from torch import Tensor

from reasonkern import Objective, policy_loss, token_weights

EXACT = {"rtol": 1e-9, "atol": 1e-12}
SINGLE = {"rtol": 2e-5, "atol": 2e-6}


def data(dtype: torch.dtype = torch.float64, seed: int = 0) -> Batch:
    """Without NaN in the untrained rows, which the peers multiply by 0."""
    b = make_batch(dtype, seed=seed).clean()
    return Batch(**(vars(b) | {"targets": b.targets.clamp_min(0)}))


def ours(b: Batch, x: Tensor, objective: Objective, mode: str, **options: Any) -> Any:
    weight = token_weights(b.mask, mode, **options)
    names = ("ref_logprob", "rollout_logprob")
    return policy_loss(x, b.targets, objective=objective, **b.given(*names, weight=weight))


# A peer's loss type and options, the objective that they mean, how it is aggregated.
Row = tuple[str, dict[str, Any], Objective, str]
# Of TRL and Liger, which share their names.
COMMON: list[Row] = [
    ("grpo", {}, Objective.grpo(), "seq-mean-token-mean"),
    ("grpo", {"beta": 0.1}, Objective.grpo(kl=("k3", 0.1)), "seq-mean-token-mean"),
    ("dapo", {"epsilon_high": 0.28}, Objective.dapo(), "token-mean"),
    ("dapo", {"delta": 1.5}, Objective.ppo(ratio_cap=1.5), "token-mean"),
    (
        "dapo",
        {"beta": 0.1, "use_bias_correction_kl": True},
        Objective.ppo(kl=("k3", 0.1, True)),
        "token-mean",
    ),
    ("bnpo", {}, Objective.ppo(), "token-mean"),
    ("cispo", {"epsilon_high": 1.5}, Objective.cispo(1.5), "token-mean"),
    ("sapo", {}, Objective.sapo(), "seq-mean-token-mean"),
    ("vespo", {}, Objective.vespo(), "token-mean"),
    (
        "grpo",
        {"importance_sampling_level": "sequence", "epsilon_low": 3e-4, "epsilon_high": 4e-4},
        Objective.gspo(),
        "seq-mean-token-mean",
    ),
    (
        "luspo",
        {"importance_sampling_level": "sequence"},
        Objective.gspo(0.8, 1.2),
        "seq-mean-token-sum",
    ),
]


def rows(table: list[Row]) -> Any:
    """A test of every row."""
    ids = ["-".join((row[0], *row[1])) for row in table]
    return pytest.mark.parametrize(("loss_type", "options", "objective", "mode"), table, ids=ids)
