"""Operators of the family: schema, fake and registrations.

Neither is differentiable: advantages, returns and choices are targets, constants of the loss.
``reference`` serves every device, C++ the CPU key, Triton the CUDA key.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from .. import _load
from . import reference

SCHEMAS = {
    "gae": "(Tensor reward, Tensor value, Tensor? mask, Tensor? row_lam, Tensor? row_lam_value, "
    "Tensor? bootstrap_value, Tensor? truncated, float gamma, float lam, float lam_value, "
    "bool bootstrap_last) -> (Tensor advantage, Tensor returns)",
    "elliptical_select": "(Tensor features, int k, float lam) -> Tensor",
}
REFERENCE: dict[str, Callable[..., Any]] = {
    "gae": reference.gae,
    "elliptical_select": reference.elliptical_select,
}


def _fake_gae(reward: Tensor, *args: Any) -> tuple[Tensor, Tensor]:
    return reward.new_empty(reward.shape), reward.new_empty(reward.shape)


def _fake_select(features: Tensor, k: int, lam: float) -> Tensor:
    return features.new_empty((features.shape[0], k), dtype=torch.int64)


FAKE: dict[str, Callable[..., Any]] = {"gae": _fake_gae, "elliptical_select": _fake_select}


# ---- registrations

TRITON_SERVES = {"gae": _load.below_float64}

for _name, _schema in SCHEMAS.items():
    _load.define_op(
        _name,
        _schema,
        reference=REFERENCE[_name],
        fake=FAKE[_name],
        cuda=False,
        triton=_load.lazy(f"{__package__}.triton_kernels", _name),
        triton_serves=TRITON_SERVES.get(_name),
    )
