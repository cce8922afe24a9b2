"""No function waits for the device: each runs on meta tensors, which have no values to read.

Nor does one copy numbers from the host, which waits, too.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NoReturn

import pytest
import torch

from reasonkern import scaling, shaping

N = 12


class Fakes:
    """Inputs without values, on a device that is not the CPU."""

    def __init__(self, device: str = "meta") -> None:
        self.group = torch.zeros(N, dtype=torch.int64, device=device)
        self.correct = torch.zeros(N, dtype=torch.bool, device=device)
        self.length = torch.zeros(N, dtype=torch.int64, device=device)
        self.reward = torch.zeros(N, device=device)
        self.features = torch.zeros(N, 6, device=device)
        self.rows = torch.zeros(N, 5, device=device)
        self.mask = torch.zeros(N, 5, dtype=torch.bool, device=device)
        self.ids = torch.zeros(N, 5, dtype=torch.int64, device=device)


@pytest.fixture
def fakes(monkeypatch: pytest.MonkeyPatch) -> Fakes:
    def copy(*_: object, **__: object) -> NoReturn:
        raise AssertionError("a copy from the host waits for the device: fill a tensor there")

    for name in ("tensor", "as_tensor"):
        monkeypatch.setattr(torch, name, copy)
    return Fakes()


CALLS: dict[str, Callable[[Fakes], Any]] = {
    "adactrl": lambda f: shaping.adactrl(f.length, f.correct, f.group, f.group),
    "adaptive_length_targets": lambda f: shaping.adaptive_length_targets(
        f.length, f.correct, f.group, lower=1, upper=9
    ),
    "anchor_update_": lambda f: shaping.anchor_update_([f.rows], [f.rows], 0.5),
    "composed_all_correct": lambda f: shaping.composed_all_correct(f.mask, mode="last"),
    "concise_gated": lambda f: shaping.concise_gated(f.length, f.correct, f.group, limit=9),
    "dynamic_sampling_mask": lambda f: shaping.dynamic_sampling_mask(f.reward, f.group),
    "elliptical_bonus": lambda f: shaping.elliptical_bonus(
        f.features, f.group, max_groups=3, max_group_size=8
    ),
    "entropy_reshape": lambda f: shaping.entropy_reshape(f.reward, f.reward, f.group),
    "format_length_surrogate": lambda f: shaping.format_length_surrogate(f.length, f.correct),
    "gae": lambda f: shaping.gae(f.rows, f.rows, f.mask, lam=f.reward, bootstrap="last"),
    "group_advantages": lambda f: shaping.group_advantages(
        f.reward, f.group, length=f.length, baseline="length-weighted"
    ),
    "grpo_lambda": lambda f: shaping.grpo_lambda(f.length, f.correct, f.group, alpha=0.5),
    "laser": lambda f: shaping.laser(f.length, f.correct, target=f.length, mode="hybrid"),
    "laser_d": lambda f: shaping.laser_d(f.length, f.correct, f.group, targets=(1, 2, 3)),
    "laser_de": lambda f: shaping.laser_de(f.length, f.correct, f.group, targets=(1, 2, 3)),
    "length_adaptive_lambda": lambda f: shaping.length_adaptive_lambda(f.length),
    "mix_rewards": lambda f: shaping.mix_rewards(
        {"a": f.reward, "b": f.reward}, {"a": 1.0, "b": 2.0}, {"a": f.correct},
        normalise="per-component", group=f.group,
    ),
    "overlong_penalty": lambda f: shaping.overlong_penalty(f.length, max_length=9, buffer=3),
    "pass_at_k_reward": lambda f: shaping.pass_at_k_reward(f.reward, f.group),
    "serial_decay": lambda f: shaping.serial_decay(f.correct, f.group),
    "tppo_masks": lambda f: shaping.tppo_masks(f.mask, f.mask, f.correct, drop_tail=2),
    "zero_sum_rewards": lambda f: shaping.zero_sum_rewards(f.correct, f.correct),
    "cons_at_k": lambda f: scaling.cons_at_k(f.ids, f.group, 3),
    "difficulty_grade": lambda f: scaling.difficulty_grade(f.rows),
    "elliptical_select": lambda f: scaling.elliptical_select(f.features, 3),
    "flexible_verification": lambda f: scaling.flexible_verification(f.mask),
    "focal_bce": lambda f: scaling.focal_bce(f.reward, f.correct, alpha=0.25),
    "length_statistics": lambda f: scaling.length_statistics(f.length, f.correct),
    "markov_improvement": lambda f: scaling.markov_improvement(f.mask),
    "pass_at_k": lambda f: scaling.pass_at_k(9, f.group, 3),
    "tail_answers": lambda f: scaling.tail_answers(f.ids[None], 2),
    "vote_ids": lambda f: scaling.vote_ids(f.ids, f.rows),
}  # fmt: skip
FLOAT64 = {"difficulty_grade", "length_statistics", "markov_improvement", "pass_at_k"}
# Tested with policy_loss; on the host by nature; a generator of a device needs the device.
ELSEWHERE = {"conflict_token_weights", "covariance_mask", "entropy_filter", "high_entropy_mask"}
ON_THE_HOST = {
    "cosine", "finish_plan", "greedy_cluster", "route_peers", "select_diverse", "subthought_split",
    "temperature_vote", "text_similarity", "vote",
}  # fmt: skip
WITH_A_GENERATOR = {"prioritised_sample"}


def test_every_function_is_here() -> None:
    functions = {
        name
        for module in (shaping, scaling)
        for name in module.__all__
        if not isinstance(getattr(module, name), (type, tuple))
    }
    assert functions == set(CALLS) | ELSEWHERE | ON_THE_HOST | WITH_A_GENERATOR


@pytest.mark.parametrize("name", CALLS)
def test_no_value_is_read(fakes: Fakes, name: str) -> None:
    out = CALLS[name](fakes)
    for x in (out,) if isinstance(out, torch.Tensor) else out or ():
        assert x.device.type == "meta"
        wide = name in FLOAT64 and x.is_floating_point()
        assert x.dtype in (torch.bool, torch.int64, torch.float64 if wide else torch.float32)


def test_a_read_would_be_noticed(fakes: Fakes) -> None:
    """The exception that the docstring of elliptical_bonus names: sizes that it is not given."""
    with pytest.raises(RuntimeError, match="item.. cannot be called on meta tensors"):
        shaping.elliptical_bonus(fakes.features, fakes.group)
