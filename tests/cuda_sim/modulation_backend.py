"""`modulate_logits_` and `commit_` on CPU tensors, computed by the CUDA kernels in the simulator.

Arguments are those of the operators (reasonkern/modulation/op.py). How the kernels are launched is
in `settings`; no choice may change a result.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from cuda_sim import launch
from torch import Tensor

from reasonkern.modulation import layout as at


@dataclass(frozen=True)
class Settings(launch.Settings):
    """threads: of a block, which takes a row of logits; 0 = as many as a launch on a GPU has."""

    threads: int = 0


KERNELS = launch.Kernels("modulation_sim", Settings())
using, module = KERNELS.using, KERNELS.module


def _launch(threads: int) -> dict[str, Any]:
    return KERNELS.launch(threads=KERNELS.settings.threads or threads)


def state_fields(records: Tensor, sets: Tensor) -> dict[str, Any]:
    """The tensors of a `Storage` and their sizes."""
    sizes = {"slots": len(records), "entries": len(sets) - at.SET_ENTRIES}
    return {"records": records, "sets": sets, **sizes}


def modulate_logits_(
    logits: Tensor, slot: Tensor, local_pos: Tensor | None, draft_tokens: Tensor | None,
    parents: Tensor | None, temperature: Tensor | None, records: Tensor, sets: Tensor, dense: bool,
) -> None:  # fmt: skip
    fields = state_fields(records, sets) | {
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
    confidence: Tensor | None, records: Tensor, sets: Tensor,
) -> None:  # fmt: skip
    fields = state_fields(records, sets) | {
        "slot": slot, "tokens": tokens, "length": length, "batch": tokens.shape[0],
        "steps": tokens.shape[1], "entropy": entropy, "confidence": confidence,
    }  # fmt: skip
    if fields["batch"]:
        module().commit(_launch(32), launch.pointers(fields))
