# ruff: noqa
"""Variants of the modulation kernels on a GPU: equal to the definition, then timed in turn.

python tools/modfast/compare.py build/modfast/*.so     (the package need not have CUDA kernels)

A graph holds 64 launches; graphs of all variants are replayed in turn, in random order. us per
launch: median (20th, 80th percentile), and the median of the ratios to the one-element add_ and to
the first variant of the same round.
"""

from __future__ import annotations

import ctypes
import random
import statistics
import struct
import sys
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

sys.path.insert(0, ".")
from benchmarks import modulation_gpu as cases
from benchmarks.modulation_gpu import BATCH, LAUNCHES, NODES, SMALL, VOCAB
from reasonkern import _load
from reasonkern.modulation import layout as at

ROUNDS = 60
Launch = Callable[[], None]


def address(x: Tensor | None) -> int:
    return 0 if x is None else x.data_ptr()


def packed(step: cases.Step, records: Tensor) -> bytes:
    sets = step.state.tensors.sets
    entries = len(sets) - at.SET_ENTRIES
    bounds = address(sets)
    return struct.pack(
        "<3Q2q", address(records), bounds, bounds + 8 * at.SET_ENTRIES, len(records), entries
    )


def rows(step: cases.Step, records: Tensor, logits: Tensor, slot: Tensor, tree: bool) -> bytes:
    n, vocab = logits.shape
    drafts, parents = (step.drafts, step.parents) if tree else (None, None)
    return packed(step, records) + struct.pack(
        "<Q3q4QqQ?7x", address(logits), n, vocab, logits.stride(0), address(slot), 0, address(drafts),
        address(parents), NODES if tree else 1, address(step.temperature), False,
    )  # fmt: skip


def commit(step: cases.Step, records: Tensor, tokens: Tensor, length: Tensor) -> bytes:
    return packed(step, records) + struct.pack(
        "<4Q2q2Q",
        address(records),
        address(step.slot),
        address(tokens),
        address(length),
        *tokens.shape,
        0,
        0,
    )


def launcher(library: ctypes.CDLL, name: str, params: bytes) -> Launch:
    buffer = ctypes.create_string_buffer(params, len(params))
    function = getattr(library, name)

    def call() -> None:
        stream = ctypes.c_void_p(torch.cuda.current_stream().cuda_stream)
        if error := function(buffer, stream):
            raise RuntimeError(f"{name}: CUDA error {error}")

    return call


def graph_of(call: Launch) -> torch.cuda.CUDAGraph:
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        call()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for _ in range(LAUNCHES):
            call()
    return graph


class Case:
    """A kind of call: what the definition makes of it, and a call of each variant on data of its own."""

    def __init__(self, kind: str, vocab: int = VOCAB, late: bool = False) -> None:
        self.kind = kind
        n = BATCH * (NODES if kind == "tree" else 1)
        op = "control_tree" if kind == "tree" else "control_rows"
        case = cases.Case(
            op, (BATCH, vocab), "bfloat16", "cuda", passes=0, providers=(), input_shape=(n, vocab)
        )
        self.step = cases.inputs(case, 0)
        self.records = self.step.state.tensors.records
        if late:  # the budget is spent, the phrase is looked for
            self.records[:, [at.T, at.SPENT]] += 9000
        self.slot = torch.full_like(self.step.slot, -1) if kind == "padding" else self.step.slot
        self.tokens = self.step.drafts[:, :4].contiguous()
        self.length = torch.full_like(self.slot, 4)

    def expected(self) -> Tensor:
        records, sets = self.records.clone(), self.step.state.tensors.sets
        if self.kind == "commit":
            _load.implementation("commit_", "reference")(
                self.step.slot, self.tokens, self.length, None, None, records, sets
            )
            return records
        z = self.step.logits.clone()
        drafts = (self.step.drafts, self.step.parents) if self.kind == "tree" else (None, None)
        _load.implementation("modulate_logits_", "reference")(
            z, self.slot, None, *drafts, self.step.temperature, records, sets, False
        )
        return z

    def of(self, library: ctypes.CDLL) -> tuple[Launch, Tensor, Launch]:
        """(call, what it writes, reset)."""
        records = self.records.clone()
        if self.kind == "commit":
            params = commit(self.step, records, self.tokens, self.length)
            return launcher(library, "commit", params), records, lambda: records.copy_(self.records)
        z = self.step.logits.clone()
        params = rows(self.step, records, z, self.slot, self.kind == "tree")
        call = launcher(library, "rows", params)
        self.kept = getattr(self, "kept", []) + [records]
        return call, z, lambda: None


def equal(a: Tensor, b: Tensor) -> bool:
    """Bit for bit; of NaN none is there."""
    return torch.equal(
        a.view(torch.int16) if a.dtype == torch.bfloat16 else a,
        b.view(torch.int16) if b.dtype == torch.bfloat16 else b,
    )


def compare(label: str, case: Case, libraries: dict[str, ctypes.CDLL]) -> None:
    want = case.expected()
    runs: dict[str, tuple[torch.cuda.CUDAGraph, Launch]] = {}
    one = torch.zeros(1, device="cuda")
    runs["add_"] = graph_of(lambda: one.add_(1.0)), lambda: None
    for name, library in libraries.items():
        call, got, reset = case.of(library)
        call()
        torch.cuda.synchronize()
        if not equal(got, want):
            print(f"{label:16s} {name:12s} WRONG: {int((got != want).sum())} differ")
            continue
        runs[name] = graph_of(call), reset
    times: dict[str, list[float]] = {name: [] for name in runs}
    for _ in range(ROUNDS):
        for name in random.sample(list(runs), len(runs)):
            graph, reset = runs[name]
            reset()
            begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            begin.record()
            graph.replay()
            end.record()
            torch.cuda.synchronize()
            times[name].append(begin.elapsed_time(end) * 1e3 / LAUNCHES)
    first = next((name for name in runs if name != "add_"), "add_")
    for name, values in times.items():
        low, *_, high = statistics.quantiles(values, n=5)
        of_add, of_first = (
            statistics.median(x / y for x, y in zip(values, times[other], strict=True))
            for other in ("add_", first)
        )
        print(
            f"{label:16s} {name:12s} {statistics.median(values):6.2f} us ({low:.2f}, {high:.2f})"
            f"  {of_add:5.2f} x add_  {of_first:5.2f} x {first}", flush=True,
        )  # fmt: skip


def main(paths: list[str]) -> None:
    libraries = {Path(p).stem: ctypes.CDLL(str(Path(p).resolve())) for p in paths}
    print(torch.cuda.get_device_name(), torch.__version__)
    for label, case in (
        ("rows", ("rows",)), ("rows V=32,000", ("rows", SMALL)), ("padding", ("padding",)), ("tree", ("tree",)),
        ("commit", ("commit",)), ("commit, late", ("commit", VOCAB, True)), ("rows, late", ("rows", VOCAB, True)),
    ):  # fmt: skip
        compare(label, Case(*case), libraries)


if __name__ == "__main__":
    main(sys.argv[1:])
