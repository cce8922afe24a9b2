"""What `verify_tree` says of a raw row: lse where its parts differ widely, the largest logits."""

from __future__ import annotations

import math
import os
import subprocess
import sys

import pytest
import torch
from speculation_cases import INF, generator
from tolerance import ulp
from torch import Tensor

from reasonkern import (
    Ban,
    Draft,
    DraftTree,
    Modulation,
    ModulationState,
    TokenSets,
    _load,
    sample,
    verify_tree,
)


@pytest.mark.parametrize("shift", [0.0, -300.0, 3e4, 5e4])
def test_lse_where_all_but_the_top_is_far_below(shift):
    """Equal values err all in the same direction. In fp32 64 of them are added to the top."""
    gap = torch.linspace(10, 40, 121)
    logits = -gap[:, None, None].expand(-1, 1, 9000).clone()
    logits[:, 0, 4567] = 0
    logits += shift
    valid = torch.ones(len(gap), 1, dtype=torch.bool)
    draft, tree = Draft(valid.long(), valid), DraftTree([-1])
    out = verify_tree(logits, draft, tree, temperature=1.0, seed=1, position=0)
    truth = logits[:, 0].double().logsumexp(-1)
    error = (out.lse[:, 0].double() - truth).abs()
    assert (error <= 2**-20 + ulp(truth, torch.float32)).all()


def lse_rows(kind: str) -> Tensor:
    """(8, 5000) logits: five tiles of the CPU kernels, each handled as the ones before it hint."""
    x = torch.randn(8, 5000, generator=generator(3))
    if kind == "rising":  # every tile is above and far from the last
        return x + torch.linspace(-400, 400, 5000).div(160).round() * 160
    if kind == "large at first":
        x[:, :1024] -= 1e6
    elif kind == "late top":
        x[:, 4999] = 40
    elif kind == "two tops":
        x[:, [1500, 3500]] = 30
    elif kind in ("empty", "far below"):
        x[:, ::3] = -INF if kind == "empty" else -1e4
        x[:, 1024:2048] = -INF
    return x * {"spread": 5.0, "large": 1e5, "flat": 0.1}.get(kind, 1.0)


@pytest.mark.parametrize(
    "kind", ["flat", "spread", "large", "rising", "large at first", "late top", "two tops", "empty",
             "far below"],
)  # fmt: skip
def test_lse_of_tiles_unlike_each_other(kind):
    logits = lse_rows(kind)
    valid = torch.ones(len(logits), 1, dtype=torch.bool)
    draft, tree = Draft(valid.long(), valid), DraftTree([-1])
    out = verify_tree(logits[:, None], draft, tree, temperature=1.0, seed=1, position=0)
    truth = logits.double().logsumexp(-1)
    error = (out.lse[:, 0].double() - truth).abs()
    assert (error <= 2**-20 + ulp(truth, torch.float32)).all()
    assert torch.equal(out.topk_logits[:, 0], logits.topk(12).values)


def test_lse_where_every_tile_but_one_weighs_just_too_little_for_a_full_sum():
    """The CPU kernels sum such tiles coarsely, 3 of 3.2 wrong where all logits are equal."""
    whole = 99 * 1024  # the rest is a part of its own
    light = (torch.linspace(-25, -21, 65).exp2() * 4 / 3.2).unsqueeze(-1)
    logits = torch.full((65, whole + 1023), -math.log(1024))
    logits[:, 1024:whole] += (light / 99).log()
    logits[:, whole:] += light.log()
    valid = torch.ones(65, 1, dtype=torch.bool)
    draft, tree = Draft(valid.long(), valid), DraftTree([-1])
    out = verify_tree(logits[:, None], draft, tree, temperature=1.0, seed=1, position=0)
    error = (out.lse[:, 0].double() - logits.double().logsumexp(-1)).abs()
    assert error.max() <= 2**-23


@pytest.mark.parametrize("change", ["mask", "control"])
def test_the_largest_logits_are_not_those_of_a_changed_row(change):
    """A draw may end with them where no other token can win, but not where they were forbidden."""
    logits = torch.full((1, 1, 3000), -5.0)
    logits[0, 0, :12] = 60.0
    draft = Draft(torch.zeros(1, 1, dtype=torch.int64), torch.ones(1, 1, dtype=torch.bool))
    given = {"temperature": 1.0, "seed": 3, "position": 0}
    if change == "mask":
        given["node_mask"] = torch.full((1, 1, 94), -1, dtype=torch.int32)
        given["node_mask"][0, 0, 0] = ~0xFFF
    else:
        state = ModulationState(1, TokenSets.from_ids({"top": list(range(12))}))
        state.add(0, Modulation(ban=Ban("top")), prompt_tokens=[])
        given["control"] = (state, torch.zeros(1, dtype=torch.int64))
    out = verify_tree(logits, draft, DraftTree([-1]), **given)
    assert out.topk_ids[0, 0].tolist() == list(range(12))
    masked = logits[:, 0].index_fill(1, torch.arange(12), -INF)
    expected = sample(masked, temperature=1.0, seed=3, position=0)
    assert out.tokens[0, 0] == expected and expected >= 12


@pytest.mark.skipif(not _load.available("cpu"), reason="library _C is not built")
@pytest.mark.parametrize("level", ["baseline", "v3"])
def test_lse_of_narrower_instruction_sets(level):
    """They add more numbers per lane. A process takes its level once."""
    tests = [
        test_lse_where_all_but_the_top_is_far_below,
        test_lse_of_tiles_unlike_each_other,
        test_lse_where_every_tile_but_one_weighs_just_too_little_for_a_full_sum,
    ]
    done = subprocess.run(
        [sys.executable, "-m", "pytest", *(f"{__file__}::{t.__name__}" for t in tests),
         "-p", "no:cacheprovider"],
        env={**os.environ, "REASONKERN_CPU": level}, capture_output=True, text=True, timeout=600,
    )  # fmt: skip
    assert done.returncode == 0 and "14 passed" in done.stdout, done.stdout
