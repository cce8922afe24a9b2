"""Operators of the state: schema, fake and registrations. Inference only, in place."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor

from .. import _load
from . import reference

STATE = "Tensor records, Tensor sets"  # `Storage` of layout.py
SCHEMAS = {
    "modulate_logits_": "(Tensor(a!) logits, Tensor slot, Tensor? local_pos, "
    f"Tensor? draft_tokens, Tensor? parents, Tensor? temperature, {STATE}, bool dense) -> ()",
    "commit_": "(Tensor slot, Tensor tokens, Tensor length, Tensor? entropy, Tensor? confidence, "
    f"{STATE.replace('Tensor records', 'Tensor(a!) records')}) -> ()",
}

REFERENCE: dict[str, Callable[..., Any]] = {
    "modulate_logits_": reference.modulate_logits_,
    "commit_": reference.commit_,
}


def _fake(name: str) -> Callable[..., None]:
    def check(*args: Any) -> None:
        if len({x.device for x in args if isinstance(x, Tensor)}) > 1:
            raise RuntimeError(f"{name}: expected all tensors on one device")

    return check


def has_cpu_kernels() -> bool:
    """Whether CPU tensors are served by the C++ operators, which check their arguments."""
    try:
        _load.implementation("modulate_logits_", "cpu")
    except RuntimeError:
        return False
    return True


for _name, _schema in SCHEMAS.items():
    _load.define_op(
        _name,
        _schema,
        reference=REFERENCE[_name],
        fake=_fake(_name),
        cuda=True,
        triton=_load.lazy(f"{__package__}.triton_modulation", _name),
    )
