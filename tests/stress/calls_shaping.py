"""Valid calls of the shaping family, by the name of the function."""

from __future__ import annotations

from typing import Any

import torch
from draws import FLOATS, Arguments, Draw

from reasonkern import shaping


def answers(draw: Draw) -> Arguments:
    n = draw.size()
    return {
        "length": draw.ids(40, n).to(draw.choice(torch.int64, torch.float32)),
        "correct": draw.bools(n, share=0.5),
        "group": draw.ids(3, n, low=-1),
    }


def rewards(draw: Draw, name: str = "reward") -> Arguments:
    n = draw.size()
    reward = draw.normal(n, dtype=draw.choice(*FLOATS)).round()
    return {name: reward, "group": draw.ids(3, n)}


def without_group(draw: Draw) -> Arguments:
    arguments = answers(draw)
    del arguments["group"]
    return arguments


def levels(draw: Draw) -> Any:
    return draw.choice([9.0, 19.0, 29.0], torch.tensor([9, 19, 29]))


def adactrl(draw: Draw) -> Arguments:
    arguments = answers(draw)
    return arguments | {"tag": draw.ids(2, len(arguments["group"]), low=-1), "easy_above": 0.625}


def adaptive_length_targets(draw: Draw) -> Arguments:
    return answers(draw) | {"lower": 5, "upper": 30, "step": draw.choice(5, 7), "rollouts": 3}


def anchor_update_(draw: Draw) -> Arguments:
    shapes = [(draw.size(),), (2, draw.size())]
    dtype = draw.choice(*FLOATS)
    return {
        "ema_params": [torch.randn(s) for s in shapes],
        "params": [torch.randn(s).to(dtype) for s in shapes],
        "decay": draw.choice(0.0, 0.9, 1.0),
    }


def run_anchor_update_(ema_params: Any, params: Any, decay: Any) -> Any:
    if isinstance(ema_params, list):
        ema_params = [x.clone() if isinstance(x, torch.Tensor) else x for x in ema_params]
    shaping.anchor_update_(ema_params, params, decay)
    return ema_params


def composed_all_correct(draw: Draw) -> Arguments:
    shape = draw.size(), draw.integer(1, 4)
    valid = draw.maybe(lambda: draw.bools(*shape))
    return {"correct": draw.bools(*shape), "valid": valid, "mode": draw.choice("all", "last")}


def concise_gated(draw: Draw) -> Arguments:
    return answers(draw) | {"limit": draw.choice(1, 30)}


def cosine(draw: Draw) -> Arguments:
    step = draw.number(0, 20)
    return {"step": step, "total": draw.number(0.5, 10), "start": 1.0, "end": draw.number(-1, 1)}


def elliptical_bonus(draw: Draw) -> Arguments:
    n, d = draw.size(), draw.integer(1, 6)
    return {
        "features": draw.normal(n, d, dtype=draw.choice(*FLOATS)),
        "group": draw.ids(3, n),
        "lam": 0.01,
        "mode": draw.choice("leave-one-out", "leverage"),
        "lam_relative": draw.flag(),
        "project": draw.choice(None, 3),
        "seed": draw.integer(0, 9),
        "max_groups": draw.choice(None, 3),
        "max_group_size": draw.choice(None, 9),
    }


def entropy_reshape(draw: Draw) -> Arguments:
    arguments = rewards(draw, "advantage")
    n = len(arguments["group"])
    active = draw.maybe(lambda: draw.bools(n))
    return arguments | {"entropy_mean": draw.positive(n), "active": active}


def format_length_surrogate(draw: Draw) -> Arguments:
    arguments = without_group(draw)
    n = len(arguments["length"])
    soft = draw.maybe(lambda: draw.bools(n))
    given = {"length": arguments["length"], "answer_format": draw.bools(n), "soft_format": soft}
    return given | {"scale": draw.choice(3072.0, 10.0), "peak": draw.choice(0.5, 0.1)}


def gae(draw: Draw) -> Arguments:
    shape, dtype = (draw.size(), draw.size()), draw.choice(*FLOATS)
    bootstrap = draw.choice("zero", "last", "given")
    return {
        "reward": draw.normal(*shape, dtype=dtype),
        "value": draw.normal(*shape, dtype=dtype),
        "mask": draw.maybe(lambda: draw.bools(*shape)),
        "gamma": draw.choice(1.0, 0.9),
        "lam": draw.choice(0.95, draw.positive(shape[0]).clamp_max(1)),
        "lam_value": draw.choice(None, 1.0),
        "bootstrap": bootstrap,
        "bootstrap_value": draw.normal(shape[0]) if bootstrap == "given" else None,
        "truncated": draw.maybe(lambda: draw.bools(shape[0])),
    }


def group_advantages(draw: Draw) -> Arguments:
    arguments = rewards(draw)
    return arguments | {
        "length": draw.ids(9, len(arguments["group"])),
        "baseline": draw.choice("group-mean", "leave-one-out", "length-weighted", "none"),
        "scale": draw.choice("std", "none", "batch-std"),
        "eps": draw.choice(1e-4, 0.0),
    }


def grpo_lambda(draw: Draw) -> Arguments:
    return answers(draw) | {"alpha": 0.6, "top_fraction": draw.choice(0.2, 1.0)}


def laser(draw: Draw) -> Arguments:
    arguments = without_group(draw)
    target = draw.choice(20.0, draw.positive(len(arguments["length"]), high=30.0))
    return arguments | {"target": target, "mode": draw.choice("reward", "penalty", "hybrid")}


def laser_d(draw: Draw) -> Arguments:
    return answers(draw) | {"targets": levels(draw), "bonus": 0.5, "wrong": -0.5}


def laser_de(draw: Draw) -> Arguments:
    arguments = laser_d(draw)
    return arguments | {"repetitive": draw.maybe(lambda: draw.bools(len(arguments["group"])))}


def length_adaptive_lambda(draw: Draw) -> Arguments:
    return {"length": draw.ids(99, draw.size()), "alpha": draw.choice(0.05, 1.0)}


def mix_rewards(draw: Draw) -> Arguments:
    n, names = draw.size(), ("right", "short")
    return {
        "components": {name: draw.normal(n, dtype=draw.choice(*FLOATS)) for name in names},
        "weights": dict.fromkeys(names, 0.5),
        "gates": draw.maybe(lambda: {"short": draw.bools(n)}),
        "normalise": draw.choice("none", "per-component"),
        "schedule": draw.choice(None, {"short": 0.3}),
        "group": draw.ids(3, n),
        "eps": 1e-4,
    }


def overlong_penalty(draw: Draw) -> Arguments:
    length = without_group(draw)["length"]
    return {"length": length, "max_length": 30, "buffer": draw.choice(1, 10, 30), "factor": 1.0}


def prioritised_sample(draw: Draw) -> Arguments:
    n = draw.size()
    k = draw.integer(0, n)
    return {"advantage": draw.normal(n), "k": k, "alpha": draw.choice(0.0, 1.0, 3.0), "seed": 3}


def serial_decay(draw: Draw) -> Arguments:
    arguments = answers(draw)
    del arguments["length"]
    return arguments


def tppo_masks(draw: Draw) -> Arguments:
    shape = draw.size(), draw.size()
    return {
        "mask": draw.bools(*shape),
        "generated_this_step": draw.bools(*shape),
        "finished": draw.bools(shape[0]),
        "truncated": draw.maybe(lambda: draw.bools(shape[0])),
        "drop_tail": draw.choice(0, 2),
    }


def zero_sum_rewards(draw: Draw) -> Arguments:
    n = draw.size()
    return {"detected": draw.bools(n), "harmful": draw.maybe(lambda: draw.bools(n))}


CALLS = {
    "adactrl": (shaping.adactrl, adactrl),
    "adaptive_length_targets": (shaping.adaptive_length_targets, adaptive_length_targets),
    "anchor_update_": (run_anchor_update_, anchor_update_),
    "composed_all_correct": (shaping.composed_all_correct, composed_all_correct),
    "concise_gated": (shaping.concise_gated, concise_gated),
    "cosine": (shaping.cosine, cosine),
    "dynamic_sampling_mask": (shaping.dynamic_sampling_mask, rewards),
    "elliptical_bonus": (shaping.elliptical_bonus, elliptical_bonus),
    "entropy_reshape": (shaping.entropy_reshape, entropy_reshape),
    "format_length_surrogate": (shaping.format_length_surrogate, format_length_surrogate),
    "gae": (shaping.gae, gae),
    "group_advantages": (shaping.group_advantages, group_advantages),
    "grpo_lambda": (shaping.grpo_lambda, grpo_lambda),
    "laser": (shaping.laser, laser),
    "laser_d": (shaping.laser_d, laser_d),
    "laser_de": (shaping.laser_de, laser_de),
    "length_adaptive_lambda": (shaping.length_adaptive_lambda, length_adaptive_lambda),
    "mix_rewards": (shaping.mix_rewards, mix_rewards),
    "overlong_penalty": (shaping.overlong_penalty, overlong_penalty),
    "pass_at_k_reward": (shaping.pass_at_k_reward, rewards),
    "prioritised_sample": (shaping.prioritised_sample, prioritised_sample),
    "serial_decay": (shaping.serial_decay, serial_decay),
    "tppo_masks": (shaping.tppo_masks, tppo_masks),
    "zero_sum_rewards": (shaping.zero_sum_rewards, zero_sum_rewards),
}
