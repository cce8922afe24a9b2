"""Last: time and peak memory of the loss (value and gradient), fused and eager, side by side."""

from __future__ import annotations

import ctypes
import re
import statistics
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .._progress import progress
from . import eager
from .context import Context
from .train import (
    KL_COEF,
    build_objective,
    fused_policy_loss,
    policy_rows,
    snapshot_logprob,
)
from .windows import logged_batches

Loss = Callable[[Tensor], Tensor]


def measure_loss(context: Context) -> None:
    """Interleaved pairs on the logits of a logged batch, so that drift hits both alike."""
    config = context.config
    batch = logged_batches(context.sequences, 1, config.batch, config.window, context.rng)[0]
    # Every row counts here: the fused loss would not even read the padding.
    batch = replace(batch, mask=torch.ones_like(batch.mask)).to(context.device)
    objective = build_objective(config.objective)
    with torch.no_grad():
        logits = context.model(batch.ids)
    old = snapshot_logprob(context.model, batch)
    rows = policy_rows(context, batch, old, old)

    def fused(x: Tensor) -> Tensor:
        return fused_policy_loss(x, rows, objective).loss

    def plain(x: Tensor) -> Tensor:
        return eager.policy_loss(x, rows, config.objective, objective, KL_COEF)

    seconds: dict[str, list[float]] = {"fused": [], "eager": []}
    buffer = logits.clone()
    order: list[tuple[str, Loss]] = [("fused", fused), ("eager", plain)]
    with progress("loss cost, fused and eager", config.pairs + 1) as update:
        for _, loss in order:  # warm-up: memory is judged on the second call of a shape
            _timed(loss, buffer, logits)
        peaks = {name: _peak(loss, buffer, logits) for name, loss in order}
        update("memory")
        for _ in range(config.pairs):
            order.reverse()
            for name, loss in order:
                seconds[name].append(_timed(loss, buffer, logits))
            update(f"{statistics.median(seconds['fused']) * 1e3:.1f} ms")
    context.results["cost"] = _summary(seconds, peaks, logits)


def _summary(
    seconds: dict[str, list[float]], peaks: dict[str, int | None], logits: Tensor
) -> dict[str, Any]:
    ratios = [e / f for e, f in zip(seconds["eager"], seconds["fused"], strict=True)]
    return {
        "shape": list(logits.shape),
        "dtype": str(logits.dtype).removeprefix("torch."),
        "logits_bytes": logits.numel() * logits.element_size(),
        "threads": torch.get_num_threads(),
        "seconds": seconds,
        "speedup": statistics.median(ratios),
        "extra_bytes": peaks,
    }


class _Source(torch.autograd.Function):
    """Stands for the lm_head: its output is no leaf, and the gradient that arrives is dropped."""

    @staticmethod
    def forward(ctx: Any, anchor: Tensor, logits: Tensor) -> Tensor:
        return logits.detach()

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[None, None]:
        return None, None


def _run(loss: Loss, buffer: Tensor) -> None:
    anchor = torch.zeros((), device=buffer.device, requires_grad=True)
    value = loss(_Source.apply(anchor, buffer))  # type: ignore[no-untyped-call]
    value.backward()


def _timed(loss: Loss, buffer: Tensor, logits: Tensor) -> float:
    """The refill of the buffer, which an in-place gradient overwrites, is not timed."""
    buffer.copy_(logits)
    _synchronise(buffer)
    begin = time.perf_counter()
    _run(loss, buffer)
    _synchronise(buffer)
    return time.perf_counter() - begin


def _peak(loss: Loss, buffer: Tensor, logits: Tensor) -> int | None:
    """Bytes above what was in use before the call; None where the system does not tell."""
    buffer.copy_(logits)
    if buffer.is_cuda:
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        _run(loss, buffer)
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() - before
    try:
        _trim_heap()
        Path("/proc/self/clear_refs").write_text("5")  # resets the high-water mark
        status = Path("/proc/self/status")
        before = _kilobytes(status.read_text(), "VmRSS")
        _run(loss, buffer)
        return 1024 * max(0, _kilobytes(status.read_text(), "VmHWM") - before)
    except OSError:
        return None


def _trim_heap() -> None:
    """Gives free pages back: the call would reuse them, and its memory would not show."""
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(0)


def _kilobytes(status: str, key: str) -> int:
    found = re.search(rf"{key}:\s+(\d+) kB", status)
    if found is None:
        raise OSError(f"/proc/self/status has no {key}")
    return int(found[1])


def _synchronise(tensor: Tensor) -> None:
    if tensor.is_cuda:
        torch.cuda.synchronize()
