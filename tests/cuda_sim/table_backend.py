"""The operators of the n-gram table on CPU tensors, computed by the CUDA kernels in the simulator.

Arguments and results are those of the operators (reasonkern/speculation/table_op.py). `Settings`
says how kernels are launched, which may not change a result.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from cuda_sim import launch
from torch import Tensor

from reasonkern.speculation import table_sorted

STATE = ("keys", "slots", "extra", "counts", "ages", "clock", "epochs", "counters")
DRAFT = ("keys", "slots", "extra", "counts", "epochs", "counters", "orders")
TREE = ("parents", "ranks", "depths", "child_ptr", "child_index", "level_ptr", "level_nodes")


@dataclass(frozen=True)
class Settings(launch.Settings):
    """Blocks of the grid, threads of a block; few: the update of few items, without a sort."""

    blocks: int = 3
    threads: int = 64
    few: bool = True


KERNELS = launch.Kernels("table_sim", Settings())
using, module = KERNELS.using, KERNELS.module


def _run(op: str, fields: dict[str, Any]) -> None:
    extra = fields.pop("extra")
    if extra.numel():
        fields["sums" if extra.dtype == torch.int64 else "high"] = extra
    fields["sets"], fields["scopes"] = len(fields["keys"]), len(fields["epochs"])
    fields["topk"] = fields["slots"].shape[1]
    fields["context_stride"] = fields["context"].stride(0)
    module().run(op, KERNELS.launch(), launch.pointers(fields, strided=("context",)))


def table_draft(context: Tensor, *values: Any) -> tuple[Tensor, ...]:
    names = (*DRAFT, *TREE, "scope", "temperature", "seed", "position", "kind", "vocab", "strict")
    fields = {"context": context} | dict(zip(names, values, strict=True))
    batch, nodes, topk = len(context), len(fields["parents"]), fields["slots"].shape[1]
    law = (batch, nodes, topk) if fields["kind"] == 2 else (0,)
    out = {
        "tokens": context.new_empty(batch, nodes),
        "valid": context.new_empty((batch, nodes), dtype=torch.bool),
        "q_ids": context.new_empty(law),
        "q_logprob": context.new_empty(law, dtype=torch.float32),
    }
    sizes = {"batch": batch, "nodes": nodes, "levels": len(fields["level_ptr"]) - 1}
    sizes["inner_nodes"] = len(fields["level_nodes"])
    _run("draft", fields | out | sizes)
    return tuple(out.values())


def _update_fields(context: Tensor, *values: Any) -> dict[str, Any]:
    names = (*STATE, "orders", "max_count", "vocab", "ids", "logits", "lse", "scope", "strict")
    fields = {"context": context} | dict(zip(names, values, strict=True))
    return fields | {"rows": len(context), "width": fields["ids"].shape[1]}


def _keys(*args: Any, **room: Tensor) -> tuple[Tensor, Tensor]:
    fields = _update_fields(*args)
    items = fields["context"].new_empty(fields["rows"] * len(fields["orders"]))
    values = torch.empty(fields["ids"].shape, dtype=torch.int32)
    _run("keys", fields | {"items": items, "values": values} | room)
    return items, values


def _merge(*args: Any) -> None:
    *rest, items, pairs, totals = args
    sorted_rows = {"items": items, "pairs": pairs, "totals": totals}
    _run("merge", _update_fields(*rest) | sorted_rows)


def _merge_few(*args: Any) -> None:
    fields = _update_fields(*args)
    whole_vectors = -(-fields["rows"] * len(fields["orders"]) // 8) * 8
    bins = torch.empty(whole_vectors, dtype=torch.int16)
    items, values = _keys(*args, bins=bins)
    room = 2 * items.numel() * fields["width"]
    sums = {"sum_ids": torch.empty(room, dtype=torch.int32), "token_sums": items.new_empty(room)}
    _run("few", fields | {"items": items, "values": values, "bins": bins} | sums)


def table_update_(*args: Any) -> None:
    if KERNELS.settings.few:
        _merge_few(*args)
    else:
        table_sorted.update(_keys, _merge, *args)
