"""Operators of verification: schema, fake and registrations. Inference only: no autograd."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from .. import _load
from . import cache, reference_verify
from .tree import check_rows

ROW_ARGS = (
    "Tensor temperature, Tensor top_k, Tensor top_p, Tensor min_p, Tensor seed, Tensor position"
)
SCHEMAS = {
    "sample": f"(Tensor logits, Tensor? mask, {ROW_ARGS}) -> Tensor",
    "verify_tree": "(Tensor logits, Tensor tokens, Tensor valid, Tensor? q_ids, Tensor? q_logprob, "
    f"Tensor child_ptr, Tensor child_index, {ROW_ARGS}, Tensor? eos, Tensor? max_length, "
    "Tensor? node_mask, Tensor? num_nodes, int depth, int max_children, int topk) -> "
    "(Tensor tokens, Tensor length, Tensor path, Tensor topk_ids, Tensor topk_logits, Tensor lse, "
    "Tensor status)",
    "compact_kv_": "(Tensor(a!) key, Tensor(b!) value, Tensor lengths, Tensor path, "
    "Tensor accepted, Tensor start, Tensor? block_table) -> ()",
}

REFERENCE: dict[str, Callable[..., Any]] = {
    "sample": reference_verify.sample,
    "verify_tree": reference_verify.verify_tree,
    "compact_kv_": cache.compact_kv_,
}


# ---- fake: shapes and dtypes only


def _fake_sample(logits: Tensor, *args: Any) -> Tensor:
    return logits.new_empty(logits.shape[:1], dtype=torch.int64)


def _fake_verify_tree(logits: Tensor, *args: Any) -> tuple[Tensor, ...]:
    check_rows(logits)
    depth, _, topk = args[-3:]
    rows = (logits.shape[0], depth + 1)
    shapes = (rows, rows[:1], rows, (*rows, topk), (*rows, topk), rows, rows[:1])
    dtypes = (*(torch.int64,) * 4, torch.float32, torch.float32, torch.int32)
    return tuple(logits.new_empty(s, dtype=d) for s, d in zip(shapes, dtypes, strict=True))


FAKE: dict[str, Callable[..., Any]] = {
    "sample": _fake_sample,
    "verify_tree": _fake_verify_tree,
    "compact_kv_": lambda *args: None,
}


# ---- registrations


def _verify_in_triton(
    logits: Tensor, tokens: Tensor, valid: Tensor, q_ids: Tensor | None, *args: Any
) -> bool:
    return _load.below_float64(logits) and q_ids is None  # by equality


TRITON_SERVES: dict[str, Callable[..., bool]] = {
    "sample": _load.below_float64,
    "verify_tree": _verify_in_triton,
}
TRITON = {name: _load.lazy(f"{__package__}.triton_verify", name) for name in TRITON_SERVES}

for _name, _schema in SCHEMAS.items():
    _load.define_op(
        _name,
        _schema,
        reference=REFERENCE[_name],
        fake=FAKE[_name],
        cuda=True,
        triton=TRITON.get(_name),
        triton_serves=TRITON_SERVES.get(_name),
    )
