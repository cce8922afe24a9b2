"""The operators of verification on CPU tensors, computed by the CUDA kernels in the simulator.

Arguments and results are those of the operators (reasonkern/speculation/verify_op.py). How the
kernels are launched is in `Settings`; no choice may change a result but the last bits of `lse`,
which depend on the number of threads that share a row.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from cuda_sim import launch
from cuda_sim.modulation_backend import state_fields
from torch import Tensor

REQUESTS = ("temperature", "top_k", "top_p", "min_p", "seed", "position")


@dataclass(frozen=True)
class Settings(launch.Settings):
    """teams: requests under way; blocks: of a cluster; threads: of a block; stages: slices of rows
    that fit into its shared memory; abreast: a block draws a row by itself (by equality)."""

    teams: int = 3
    blocks: int = 2
    threads: int = 32
    stages: int = 2
    abreast: bool = False


KERNELS = launch.Kernels("verify_sim", Settings())
using, module = KERNELS.using, KERNELS.module
ELEMENTS = (torch.float32, torch.bfloat16, torch.float16, torch.float64)  # ElementType
STRIDED = ("logits", "mask", "cache")


def _rows(logits: Tensor, mask: Tensor | None) -> dict[str, Any]:
    deep = logits.ndim == 3
    return {
        "logits": logits, "type": ELEMENTS.index(logits.dtype), "mask": mask,
        "batch": logits.shape[0],
        "nodes": logits.shape[1] if deep else 1, "vocab": logits.shape[-1],
        "stride_b": logits.stride(0), "stride_n": logits.stride(1) if deep else 0,
        "mask_stride_b": 0 if mask is None else mask.stride(0),
        "mask_stride_n": mask.stride(1) if mask is not None and deep else 0,
    }  # fmt: skip


def _run(op: str, fields: dict[str, Any]) -> None:
    module().run(op, KERNELS.launch(), launch.pointers(fields, STRIDED))


STATISTICS = ("logprob", "entropy", "entropy_raw", "row_confidence", "max_prob")


def _control(slot: Tensor | None, state: list[Tensor]) -> dict[str, Any]:
    if slot is None:
        return {}
    return state_fields(*state) | {"slot": slot}


def _statistics(*shape: int) -> dict[str, Tensor]:
    return {n: torch.empty(shape) for n in STATISTICS} | {
        "trigger": torch.empty(shape, dtype=torch.bool)
    }


def sample(logits: Tensor, mask: Tensor | None, *requests: Tensor) -> Tensor:
    token = torch.empty(logits.shape[0], dtype=torch.int64)
    fields = _rows(logits, mask) | dict(zip(REQUESTS, requests, strict=True)) | {"token": token}
    _run("sample", fields)
    return token


def sample_controlled(logits: Tensor, mask: Tensor | None, *rest: Any) -> tuple[Tensor, ...]:
    *requests, slot, state = rest
    token, told = torch.empty(logits.shape[0], dtype=torch.int64), _statistics(logits.shape[0])
    fields = _rows(logits, mask) | dict(zip(REQUESTS, requests, strict=True)) | {"token": token}
    _run("sample", fields | told | _control(slot, state))
    return token, *told.values()


def verify_controlled(*args: Any) -> tuple[Tensor, ...]:
    *plain, slot, state, stats = args
    depth = plain[-3]
    told = _statistics(len(plain[0]), depth + 1 if stats else 0)
    return *verify_tree(*plain, **_control(slot, state), **(told if stats else {})), *told.values()


def verify_tree(
    logits: Tensor, tokens: Tensor, valid: Tensor, q_ids: Tensor | None, q_logprob: Tensor | None,
    child_ptr: Tensor, child_index: Tensor, *rest: Any, **more: Any,
) -> tuple[Tensor, ...]:  # fmt: skip
    *requests, eos, max_length, node_mask, num_nodes, depth, _, topk = rest
    rows = (logits.shape[0], depth + 1)
    unset = 1 << 20  # what no output may keep
    out = {
        "out_tokens": torch.full(rows, unset, dtype=torch.int64),
        "length": torch.full(rows[:1], unset, dtype=torch.int64),
        "path": torch.full(rows, unset, dtype=torch.int64),
        "topk_ids": torch.full((*rows, topk), unset, dtype=torch.int64),
        "topk_logits": torch.full((*rows, topk), math.nan),
        "lse": torch.full(rows, math.nan),
        "status": torch.full(rows[:1], unset, dtype=torch.int32),
    }
    fields = _rows(logits, node_mask) | dict(zip(REQUESTS, requests, strict=True)) | out
    fields |= {
        "tokens": tokens, "valid": valid, "q_ids": q_ids, "q_logprob": q_logprob,
        "entry": 0 if q_ids is None else q_ids.shape[-1], "child_ptr": child_ptr,
        "child_index": child_index, "eos": eos, "eos_count": 0 if eos is None else len(eos),
        "max_length": max_length, "num_nodes": num_nodes, "depth": depth, "topk": topk,
    }  # fmt: skip
    _run("verify", fields | more)
    return tuple(out.values())


def compact_kv_(
    key: Tensor, value: Tensor, lengths: Tensor, path: Tensor, accepted: Tensor, start: Tensor,
    block_table: Tensor | None,
) -> None:  # fmt: skip
    slot, head = (2, 1) if block_table is None else (1, 2)
    for cache_ in (key, value):
        strides = [cache_.stride(d) * cache_.element_size() for d in (0, slot, head)]
        alignment = math.gcd(cache_.data_ptr(), *strides)
        word = module().word_bytes(cache_.shape[3] * cache_.element_size(), alignment)
        fields = {
            "cache": cache_, "element_bytes": cache_.element_size(), "batch": len(lengths),
            "heads": cache_.shape[head], "head_dim": cache_.shape[3], "steps": path.shape[1],
            "stride_block": cache_.stride(0), "stride_slot": cache_.stride(slot),
            "stride_head": cache_.stride(head), "lengths": lengths, "path": path,
            "accepted": accepted, "start": start, "block_table": block_table,
            "max_blocks": 0 if block_table is None else block_table.shape[1],
            "block_size": cache_.shape[slot],
        }  # fmt: skip
        given = launch.pointers(fields, STRIDED)
        module().compact(min(word, 8), KERNELS.launch(blocks=1), given)
