"""Operators of the table: schema, fake and registrations.

Inference only: there is nothing to differentiate and the update writes in place.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from .. import _load
from . import reference_table as reference
from . import table_sorted

# Of one tree, as `DraftTree.tensors` has them; but nodes may have any numbers, the root 0.
TREE_ARGS = (
    "Tensor parents, Tensor ranks, Tensor depths, Tensor child_ptr, Tensor child_index, "
    "Tensor level_ptr, Tensor level_nodes"
)
SCHEMAS = {
    "table_draft": "(Tensor context, Tensor keys, Tensor slots, Tensor extra, Tensor counts, "
    f"Tensor epochs, Tensor(a!) counters, int[] orders, {TREE_ARGS}, Tensor? scope, "
    "Tensor temperature, Tensor seed, Tensor position, int kind, int vocab_size, bool strict) -> "
    "(Tensor tokens, Tensor valid, Tensor q_ids, Tensor q_logprob)",
    "table_update_": "(Tensor context, Tensor(a!) keys, Tensor(b!) slots, Tensor(c!) extra, "
    "Tensor(d!) counts, Tensor(e!) ages, Tensor(f!) clock, Tensor epochs, Tensor(g!) counters, "
    "int[] orders, int max_count, int vocab_size, Tensor ids, Tensor logits, Tensor? lse, "
    "Tensor? scope, bool strict) -> ()",
}

# The update on a device: both kernels, or one by one around the sort of `table_sorted.update`.
_UPDATE_ARGS = SCHEMAS["table_update_"].partition(") ->")[0]
FEW_ITEMS = 4096  # pairs of a row and an order, kFewItems of table_few.cuh
CUDA_STEPS = {
    "table_merge_few_": f"{_UPDATE_ARGS}) -> ()",
    "table_keys": f"{_UPDATE_ARGS}) -> (Tensor items, Tensor values)",
    "table_merge_": f"{_UPDATE_ARGS}, Tensor items, Tensor pairs, Tensor totals) -> ()",
}


def _fake_draft(context: Tensor, *args: Any) -> tuple[Tensor, ...]:
    slots, parents, kind = args[1], args[7], args[-3]
    shape = (context.shape[0], parents.shape[0])
    law = (*shape, slots.shape[1]) if kind == reference.REJECTION else (0,)
    return (
        context.new_empty(shape),
        context.new_empty(shape, dtype=torch.bool),
        context.new_empty(law),
        context.new_empty(law, dtype=torch.float32),
    )


REFERENCE: dict[str, Callable[..., Any]] = {
    "table_draft": reference.table_draft,
    "table_update_": reference.table_update_,
}
FAKE: dict[str, Callable[..., Any]] = {
    "table_draft": _fake_draft,
    "table_update_": lambda *args: None,
}

# ---- registrations


def _update_cuda(*args: Any) -> None:
    steps, rows, orders = torch.ops.reasonkern_cuda, len(args[0]), args[9]
    if rows * len(orders) <= FEW_ITEMS:
        steps.table_merge_few_(*args)
    else:
        table_sorted.update(steps.table_keys, steps.table_merge_, *args)


for _name, _schema in SCHEMAS.items():
    _load.define_op(
        _name,
        _schema,
        reference=REFERENCE[_name],
        fake=FAKE[_name],
        cuda=True,
        triton=_load.lazy(f"{__package__}.triton_table", _name),
    )
for _name, _schema in CUDA_STEPS.items():
    _load.CUDA_LIBRARY.define(_name + _schema)
_load.CUDA_LIBRARY.impl("table_update_", _update_cuda, "CUDA")
