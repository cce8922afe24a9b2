"""`modulate_logits_` and `commit_` on CPU tensors, computed by the CUDA kernels in the simulator.

Arguments are those of the operators (reasonkern/modulation/op.py). How the kernels are launched is
in `settings`; no choice may change a result.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from types import ModuleType
from typing import Any

from cuda_sim.build import load
from torch import Tensor

ORDERS = ("forward", "reverse", "random")
STATE = ("spec", "numbers", "progress", "set_offsets", "set_ids", "set_member")


@dataclass(frozen=True)
class Settings:
    """threads: of a block, which takes a row of logits; 0 = as many as a launch on a GPU has."""

    threads: int = 0
    order: str = "forward"
    seed: int = 0


settings = Settings()


@contextmanager
def using(**changes: Any) -> Iterator[None]:
    """Launches differently inside the `with` block."""
    global settings
    before, settings = settings, replace(settings, **changes)
    try:
        yield
    finally:
        settings = before


@cache
def module() -> ModuleType:
    return load([Path(__file__).with_name("modulation_sim.cpp")], "modulation_sim")


def _launch(threads: int) -> dict[str, int]:
    order = ORDERS.index(settings.order)
    return {"threads": settings.threads or threads, "order": order, "seed": settings.seed}


def _pointers(fields: dict[str, Any]) -> dict[str, Any]:
    for name, value in fields.items():
        if isinstance(value, Tensor) and name != "logits":
            assert value.is_contiguous(), name
    return {
        k: v.data_ptr() if isinstance(v, Tensor) else v for k, v in fields.items() if v is not None
    }


def _state(tensors: tuple[Tensor, ...]) -> dict[str, Any]:
    fields: dict[str, Any] = dict(zip(STATE, tensors, strict=True))
    fields["slots"], fields["entries"] = len(fields["spec"]), len(fields["set_ids"])
    return fields | {"count": len(fields["set_offsets"]) - 1}


def modulate_logits_(
    logits: Tensor, slot: Tensor, local_pos: Tensor | None, draft_tokens: Tensor | None,
    parents: Tensor | None, temperature: Tensor | None, *rest: Any,
) -> None:  # fmt: skip
    *tensors, dense = rest
    fields = _state(tuple(tensors)) | {
        "logits": logits, "rows": logits.shape[0], "vocab": logits.shape[1],
        "stride": logits.stride(0), "slot": slot, "local_pos": local_pos,
        "draft_tokens": draft_tokens, "parents": parents,
        "nodes": 1 if parents is None else len(parents), "temperature": temperature,
        "dense": dense,
    }  # fmt: skip
    if fields["rows"]:
        dtype = str(logits.dtype).removeprefix("torch.")
        # Rows are short here: as many threads as on a GPU would idle, at a price.
        threads = min(64, module().row_threads(fields["entries"], dense))
        module().modulate(dtype, _launch(threads), _pointers(fields))


def commit_(
    slot: Tensor, tokens: Tensor, length: Tensor, entropy: Tensor | None,
    confidence: Tensor | None, *rest: Tensor,
) -> None:  # fmt: skip
    fields = _state(rest[: len(STATE)]) | {
        "slot": slot, "tokens": tokens, "length": length, "batch": tokens.shape[0],
        "steps": tokens.shape[1], "entropy": entropy, "confidence": confidence,
    }  # fmt: skip
    names = ("confidence_ring", "entropy_ring", "confidence_sum")
    fields |= dict(zip(names, rest[len(STATE) :], strict=True))
    if fields["batch"]:
        module().commit(_launch(32), _pointers(fields))
