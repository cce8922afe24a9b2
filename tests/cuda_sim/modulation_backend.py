"""`modulate_logits_` and `commit_` on CPU tensors, computed by the CUDA kernels in the simulator.

Arguments are those of the operators (reasonkern/modulation/op.py). How the kernels are launched is
in `settings`; no choice may change a result.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from cuda_sim import launch
from torch import Tensor

from reasonkern.modulation.layout import Storage

# Fields of `Storage`, whose windows share names with what is pushed into them.
WINDOWS = ("confidence_ring", "entropy_ring", "confidence_sum")
STATE = (*Storage._fields[: -len(WINDOWS)], *WINDOWS)


@dataclass(frozen=True)
class Settings(launch.Settings):
    """threads: of a block, which takes a row of logits; 0 = as many as a launch on a GPU has."""

    threads: int = 0


KERNELS = launch.Kernels("modulation_sim", Settings())
using, module = KERNELS.using, KERNELS.module


def _launch(threads: int) -> dict[str, Any]:
    return KERNELS.launch(threads=KERNELS.settings.threads or threads)


def state_fields(tensors: Sequence[Tensor]) -> dict[str, Any]:
    """The tensors of a `Storage`, with or without the windows, and their sizes."""
    fields: dict[str, Any] = dict(zip(STATE, tensors, strict=False))
    fields["slots"], fields["entries"] = len(fields["spec"]), len(fields["set_ids"])
    return fields | {"count": len(fields["set_offsets"]) - 1}


def modulate_logits_(
    logits: Tensor, slot: Tensor, local_pos: Tensor | None, draft_tokens: Tensor | None,
    parents: Tensor | None, temperature: Tensor | None, *rest: Any,
) -> None:  # fmt: skip
    *tensors, dense = rest
    fields = state_fields(tensors) | {
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
        module().modulate(dtype, _launch(threads), launch.pointers(fields, ("logits",)))


def commit_(
    slot: Tensor, tokens: Tensor, length: Tensor, entropy: Tensor | None,
    confidence: Tensor | None, *rest: Tensor,
) -> None:  # fmt: skip
    fields = state_fields(rest) | {
        "slot": slot, "tokens": tokens, "length": length, "batch": tokens.shape[0],
        "steps": tokens.shape[1], "entropy": entropy, "confidence": confidence,
    }  # fmt: skip
    if fields["batch"]:
        module().commit(_launch(32), launch.pointers(fields))
