"""Two processes that share a batch choose what one process with the whole batch chooses."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import parallel_ranks
import pytest
import torch
from policy_loss_literal import make_batch
from test_policy_loss_adaptive import ADAPTIVE, names
from test_policy_loss_bapo import VARIANTS, random_batch
from test_policy_loss_selection import entropies, rows
from torch import Tensor

import reasonkern as rk

# Rows of rank 0 of the loss batch; the other rank has the rest.
SHARE = {"uneven": 1, "all": 4}


def bounds(split: Any, group: Any) -> dict[str, Tensor]:
    out = {}
    for variant in VARIANTS:
        for seed in range(8):
            r, a, mask, p = (split(x) for x in random_batch(seed, 40))
            extra = {"rollout_logprob": p} if variant == "paper" else {}
            pair = rk.bapo_bounds(r, a, mask, variant=variant, data_group=group, **extra)
            out[f"bounds {variant} {seed}"] = torch.stack(pair)
    return out


def masks(split: Any, group: Any) -> dict[str, Tensor]:
    out = {}
    for seed in range(2):
        h, used = (split(x) for x in entropies(seed, 101, torch.float32))
        out[f"high {seed}"] = rk.high_entropy_mask(h, used, 0.2, data_group=group)
        lp, a, used = (split(x) for x in rows(seed))
        for mode, fraction in (("clip", 0.05), ("kl", 0.1)):
            out[f"{mode} {seed}"] = rk.covariance_mask(
                lp, a, used, mode=mode, fraction=fraction, seed=seed, data_group=group
            )
        out[f"tied {seed}"] = rk.covariance_mask(
            lp, 0 * a, used, mode="kl", fraction=0.6, data_group=group
        )
    return out


def losses(split: Any, group: Any) -> dict[str, Tensor]:
    parallel = None if group is None else rk.Parallel(data_group=group)
    out = {}
    for name, (make, _) in ADAPTIVE.items():
        for seed in range(2):
            b = make_batch(seed=seed)
            b = b.map(lambda x: x if x.ndim == 0 else split(x))
            loss = rk.policy_loss(
                b.logits, b.targets, objective=make(), parallel=parallel, **b.given(*names(name))
            )
            out[f"{name} {seed}"] = loss.token_loss
    return out


RANK = """
for name, first in t.SHARE.items():
    def split(x, first=first):
        at = first * len(x) // 4
        return x[:at] if rank == 0 else x[at:]
    found = t.bounds(split, dist.group.WORLD) | t.masks(split, dist.group.WORLD)
    torch.save(found | t.losses(split, dist.group.WORLD), f"{folder}/{name}{rank}.pt")
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("ranks")
    imports = "import test_policy_loss_adaptive_ranks as t"
    parallel_ranks.run_script(imports, RANK, folder, seconds=300)
    return folder


@pytest.mark.parametrize("share", SHARE)
def test_two_ranks_equal_one_process(folder: Path, share: str) -> None:
    ranks = [torch.load(folder / f"{share}{rank}.pt") for rank in range(2)]

    def whole(x: Tensor) -> Tensor:
        return x

    for name, expected in bounds(whole, None).items():
        assert torch.equal(ranks[0][name], ranks[1][name])
        assert torch.equal(ranks[0][name], expected), name
    chosen = masks(whole, None)
    assert all(mask.any() for mask in chosen.values())
    for name, expected in chosen.items():
        assert torch.equal(torch.cat([found[name] for found in ranks]), expected), name
    for name, expected in losses(whole, None).items():
        found = torch.cat([found[name] for found in ranks])
        torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-13)
