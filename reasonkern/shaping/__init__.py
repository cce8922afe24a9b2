"""Advantages and rewards by group, exact, without a device sync: see README.md in this folder."""

from __future__ import annotations

from ..policy_loss import (
    conflict_token_weights,
    covariance_mask,
    entropy_filter,
    high_entropy_mask,
)
from . import op as op
from .advantages import (
    ReplaySample,
    anchor_update_,
    dynamic_sampling_mask,
    entropy_reshape,
    group_advantages,
    prioritised_sample,
)
from .exploration import elliptical_bonus
from .laser import adaptive_length_targets, laser, laser_d, laser_de
from .mixing import cosine, mix_rewards
from .rewards import (
    adactrl,
    composed_all_correct,
    concise_gated,
    format_length_surrogate,
    grpo_lambda,
    overlong_penalty,
    pass_at_k_reward,
    serial_decay,
    zero_sum_rewards,
)
from .temporal import gae, length_adaptive_lambda, tppo_masks

__all__ = [
    "ReplaySample",
    "adactrl",
    "adaptive_length_targets",
    "anchor_update_",
    "composed_all_correct",
    "concise_gated",
    "conflict_token_weights",
    "cosine",
    "covariance_mask",
    "dynamic_sampling_mask",
    "elliptical_bonus",
    "entropy_filter",
    "entropy_reshape",
    "format_length_surrogate",
    "gae",
    "group_advantages",
    "grpo_lambda",
    "high_entropy_mask",
    "laser",
    "laser_d",
    "laser_de",
    "length_adaptive_lambda",
    "mix_rewards",
    "overlong_penalty",
    "pass_at_k_reward",
    "prioritised_sample",
    "serial_decay",
    "tppo_masks",
    "zero_sum_rewards",
]
