"""Clocks and interleaved pairs.

Two medians taken one after the other drift apart on a shared machine; the median of ratios of
neighbouring calls does not, so every comparison here is made of pairs with alternating order.
"""

from __future__ import annotations

import contextlib
import gc
import time
from collections.abc import Callable, Iterator, Sequence

import numpy as np
import torch

from benchmarks.case import Runner

Clock = Callable[[Runner], float]


def cpu_clock(runner: Runner) -> float:
    """Seconds of one call; the result is released after the clock has stopped."""
    runner.reset()
    start = time.perf_counter()
    result = runner.call()
    seconds = time.perf_counter() - start
    del result
    return seconds / runner.repeat


def cuda_clock(flush_bytes: int = 1 << 28, flushes: int = 4) -> Clock:
    """A clock of CUDA events.

    Writing a scratch buffer before the first event empties the L2 of the inputs and keeps the
    device busy while the host queues the call, so that host latency is not measured.
    """
    flush = torch.empty(flush_bytes, dtype=torch.int8, device="cuda")
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))

    def clock(runner: Runner) -> float:
        runner.reset()
        for _ in range(flushes):
            flush.zero_()
        start.record()
        result = runner.call()
        end.record()
        end.synchronize()
        del result
        return float(start.elapsed_time(end)) / 1e3 / runner.repeat

    return clock


def graph_replay(runners: Sequence[Runner]) -> Runner:
    """One CUDA graph of the calls of several runners, each with its own buffers.

    A graph holds addresses, not tensors: the runners, and with them their inputs, must outlive it.
    """
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for runner in runners:
            runner.call()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        held = [(runner, runner.call()) for runner in runners]

    def replay() -> object:
        graph.replay()
        return held

    return Runner(call=replay, repeat=len(runners))


def pair_times(
    first: Runner, second: Runner, pairs: int, clock: Clock, tick: Callable[[], None] = lambda: None
) -> tuple[list[float], list[float]]:
    """Times of both, taken in neighbouring calls whose order alternates."""
    times: tuple[list[float], list[float]] = ([], [])
    with quiet_gc():
        for i in range(pairs):
            order = (0, 1) if i % 2 == 0 else (1, 0)
            for which in order:
                times[which].append(clock((first, second)[which]))
            tick()
    return times


@contextlib.contextmanager
def quiet_gc() -> Iterator[None]:
    """No garbage collection inside a timed region."""
    gc.collect()
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()


def pair_count(seconds_per_pair: float, budget: float, least: int, most: int) -> int:
    """As many pairs as the budget pays for, within bounds, and odd (a median without averaging)."""
    affordable = int(budget / max(seconds_per_pair, 1e-9))
    return max(least, min(most, affordable)) | 1


def quantiles(values: Sequence[float]) -> dict[str, float]:
    """p20, median and p80."""
    p20, p50, p80 = np.quantile(np.asarray(values, dtype=np.float64), [0.2, 0.5, 0.8])
    return {"p20": float(p20), "median": float(p50), "p80": float(p80)}


def pair_ratio(numerator: Sequence[float], denominator: Sequence[float]) -> dict[str, float]:
    """Quantiles of the ratios of neighbouring calls."""
    return quantiles([a / b for a, b in zip(numerator, denominator, strict=True)])
