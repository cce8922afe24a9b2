"""Operators of the sampler: schema, fake and registrations. Inference only: no autograd.

`state` holds the tensors of `layout.Storage`; without a slot there are none.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from .. import _load
from ..speculation import verify_op
from . import reference_sampler

STATISTICS = (
    "Tensor logprob, Tensor entropy, Tensor entropy_raw, Tensor confidence, Tensor max_prob, "
    "Tensor trigger"
)
_VERIFY_ARGS, _VERIFIED = verify_op.SCHEMAS["verify_tree"].split(") -> (")
SCHEMAS = {
    "sample_controlled": f"(Tensor logits, Tensor? mask, {verify_op.ROW_ARGS}, Tensor? slot, "
    f"Tensor[] state) -> (Tensor token, {STATISTICS})",
    "verify_controlled": f"{_VERIFY_ARGS}, Tensor? slot, Tensor[] state, bool stats) -> "
    f"({_VERIFIED.removesuffix(')')}, {STATISTICS})",
}

REFERENCE: dict[str, Callable[..., Any]] = {
    "sample_controlled": reference_sampler.sample_controlled,
    "verify_controlled": reference_sampler.verify_controlled,
}


# ---- fake: shapes and dtypes only


def _fake_statistics(logits: Tensor, shape: tuple[int, ...]) -> list[Tensor]:
    dtypes = (*(torch.float32,) * 5, torch.bool)
    return [logits.new_empty(shape, dtype=dtype) for dtype in dtypes]


def _fake_sample_controlled(logits: Tensor, *args: Any) -> tuple[Tensor, ...]:
    token = logits.new_empty(logits.shape[:1], dtype=torch.int64)
    return token, *_fake_statistics(logits, tuple(logits.shape[:1]))


def _fake_verify_controlled(logits: Tensor, *args: Any) -> tuple[Tensor, ...]:
    *plain, _, _, stats = args
    verified = verify_op.FAKE["verify_tree"](logits, *plain)
    rows = (logits.shape[0], verified[0].shape[1] if stats else 0)
    return *verified, *_fake_statistics(logits, rows)


FAKE = {"sample_controlled": _fake_sample_controlled, "verify_controlled": _fake_verify_controlled}


# ---- registrations

TRITON_SERVES = {
    "sample_controlled": verify_op.TRITON_SERVES["sample"],
    "verify_controlled": verify_op.TRITON_SERVES["verify_tree"],
}

for _name, _schema in SCHEMAS.items():
    _load.define_op(
        _name,
        _schema,
        reference=REFERENCE[_name],
        fake=FAKE[_name],
        cuda=True,
        triton=_load.lazy(f"{__package__}.triton_sampler", _name),
        triton_serves=TRITON_SERVES[_name],
    )
