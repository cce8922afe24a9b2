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
# float64 rows of gae go to the reference: its Triton kernel computes in float32.
TRITON_FLOAT64 = {"elliptical_select"}


def _fake_gae(reward: Tensor, *args: Any) -> tuple[Tensor, Tensor]:
    return reward.new_empty(reward.shape), reward.new_empty(reward.shape)


def _fake_select(features: Tensor, k: int, lam: float) -> Tensor:
    return features.new_empty((features.shape[0], k), dtype=torch.int64)


FAKE: dict[str, Callable[..., Any]] = {"gae": _fake_gae, "elliptical_select": _fake_select}


def _cuda_entry(name: str) -> Callable[..., Any]:
    def call(*args: Any) -> Any:
        backend = _load.choose_cuda_backend(name, args[0].device)
        if args[0].dtype == torch.float64 and name not in TRITON_FLOAT64:
            backend = "reference"
        return _load.implementation(name, backend)(*args)

    return call


_lib = torch.library.Library("reasonkern", "FRAGMENT")
for _name, _schema in SCHEMAS.items():
    _lib.define(_name + _schema, tags=(torch.Tag.needs_fixed_stride_order,))
    _lib.impl(_name, REFERENCE[_name], "CompositeExplicitAutograd")
    _lib.impl(_name, _cuda_entry(_name), "CUDA")
    _lib.impl(_name, torch.library.fallthrough_kernel, "Autograd")
    torch.library.register_fake(f"reasonkern::{_name}", FAKE[_name], lib=_lib)
    _load.register_op(
        _name,
        {
            "reference": REFERENCE[_name],
            "cpu": getattr(torch.ops.reasonkern, _name),
            "triton": _load.lazy(f"{__package__}.triton_kernels", _name),
        },
    )
