"""Operators of the state: schema, fake and registrations. Inference only, in place."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from .. import _load
from . import reference

# `Storage` of layout.py without the windows.
READ_STATE = (
    "Tensor spec, Tensor numbers, Tensor progress, Tensor set_offsets, Tensor set_ids, "
    "Tensor set_member"
)
SCHEMAS = {
    "modulate_logits_": "(Tensor(a!) logits, Tensor slot, Tensor? local_pos, "
    f"Tensor? draft_tokens, Tensor? parents, Tensor? temperature, {READ_STATE}, bool dense) -> ()",
    "commit_": "(Tensor slot, Tensor tokens, Tensor length, Tensor? entropy, Tensor? confidence, "
    f"{READ_STATE.replace('Tensor progress', 'Tensor(a!) progress')}, "
    "Tensor(b!) confidence_ring, Tensor(c!) entropy_ring, Tensor(d!) confidence_sum) -> ()",
}

_lib = torch.library.Library("reasonkern", "FRAGMENT")
_cuda = torch.library.Library("reasonkern_cuda", "FRAGMENT")
for _name, _schema in SCHEMAS.items():
    _lib.define(_name + _schema, tags=(torch.Tag.needs_fixed_stride_order,))
    _cuda.define(_name + _schema)

REFERENCE: dict[str, Callable[..., Any]] = {
    "modulate_logits_": reference.modulate_logits_,
    "commit_": reference.commit_,
}


SPEC = {"modulate_logits_": 6, "commit_": 5}  # place of that argument


def _fake(name: str) -> Callable[..., None]:
    def check(*args: Any) -> None:
        if args[0].device != args[SPEC[name]].device:
            raise RuntimeError(f"{name}: expected all tensors on one device")

    return check


def _cuda_entry(name: str) -> Callable[..., Any]:
    def call(*args: Any) -> Any:
        return _load.implementation(name, _load.choose_cuda_backend(name, args[0].device))(*args)

    return call


def has_cpu_kernels() -> bool:
    """Whether CPU tensors are served by the C++ operators, which check their arguments."""
    try:
        _load.implementation("modulate_logits_", "cpu")
    except RuntimeError:
        return False
    return True


for _name in SCHEMAS:
    # Nothing to differentiate: no layer between the caller and the kernel.
    _lib.impl(_name, torch.library.fallthrough_kernel, "Autograd")
    _lib.impl(_name, REFERENCE[_name], "CompositeExplicitAutograd")
    _lib.impl(_name, _cuda_entry(_name), "CUDA")
    torch.library.register_fake(f"reasonkern::{_name}", _fake(_name), lib=_lib)
    _load.register_op(
        _name,
        {
            "reference": REFERENCE[_name],
            "cpu": getattr(torch.ops.reasonkern, _name),
            "cuda": getattr(torch.ops.reasonkern_cuda, _name),
            "triton": _load.lazy(f"{__package__}.triton_modulation", _name),
        },
    )
