"""What the stages of the demo share: the settings, the data, the model and the results so far."""

from __future__ import annotations

import os
import time
from dataclasses import dataclass, field
from pathlib import Path
from random import Random
from typing import Any

import torch

from . import arithmetic
from .eager import FORMULAS
from .model import Transformer, seeded
from .tokenizer import VOCABULARY, Tokenizer
from .traces import Trace, first_groups, load_traces
from .windows import Encoded, encode

MAX_TRACES = 1024
# Of the time budget, at the end of the stage.
SHARES = {"sft": 0.35, "policy": 0.65, "solve": 0.85, "control": 0.93}


@dataclass(frozen=True)
class Config:
    """The command line, as values."""

    traces: Path | None = None
    objective: str = "dapo"
    device: str = "cpu"
    out: Path = Path("demo-out")
    seed: int = 0
    steps: int = 60  # optimiser steps of each stage
    batch: int = 4
    window: int = 256
    width: int = 128
    layers: int = 4
    problems: int = 2  # solved in stages 3 and 4
    pairs: int = 5  # interleaved timings of the two formulations
    minutes: float = 4.5  # a slow or busy machine takes fewer steps instead of longer


class DemoError(ValueError):
    """The demo cannot start; the message names the option and what it accepts."""


@dataclass
class Context:
    """Stages are functions of a context; each fills its part of `results` as it goes."""

    config: Config
    device: torch.device
    tokenizer: Tokenizer
    sequences: list[Encoded]
    model: Transformer
    rng: Random
    results: dict[str, Any] = field(default_factory=lambda: {"shortened": {}})
    begin: float = field(default_factory=time.perf_counter)

    def out_of_time(self, stage: str) -> bool:
        """Whether the stage has to end; if so, that is noted in the results."""
        late = self._seconds_left(stage) < 0
        if late:
            self.results["shortened"][stage] = self.config.steps
        return late

    def affordable_steps(self, stage: str, done: int) -> int:
        """Steps that fit into the stage at the pace of the `done` steps so far."""
        left = self._seconds_left(stage)
        pace = (60 * self.config.minutes * SHARES[stage] - left) / done
        # The snapshots and comparisons take the other third.
        steps = int(0.66 * left / pace)
        if steps < self.config.steps:
            self.results["shortened"][stage] = self.config.steps
        return min(steps, self.config.steps)

    def _seconds_left(self, stage: str) -> float:
        limit = 60 * self.config.minutes * SHARES[stage]
        return limit - (time.perf_counter() - self.begin)


def prepare(config: Config) -> Context:
    """Read or generate the traces, learn the tokenizer, build the model."""
    check(config)
    traces = _read(config)
    tokenizer = Tokenizer.learn(text for trace in traces for text in (trace.prompt, trace.text))
    device = torch.device(config.device)
    model = seeded(VOCABULARY, config.window, config.width, config.layers, config.seed).to(device)
    sequences = encode(traces, tokenizer)
    context = Context(config, device, tokenizer, sequences, model, Random(config.seed))
    context.results["data"] = {
        "source": _shown(config.traces) if config.traces else "generated arithmetic",
        "traces": len(traces),
        "problems": len({trace.problem_id for trace in traces}),
        "correct": sum(trace.correct for trace in traces),
        "tokens": sum(len(sequence.ids) for sequence in sequences),
        "vocabulary": VOCABULARY,
        "learnt_pieces": len(tokenizer.pieces),
        "parameters": model.parameter_count(),
    }
    return context


def check(config: Config) -> None:
    """Refuse a setting before any work is done."""
    if config.objective not in FORMULAS:
        names = ", ".join(FORMULAS)
        raise DemoError(f"--objective: expected one of {names}; got {config.objective!r}")
    try:
        torch.zeros((), device=config.device).item()  # device meta has no values
    except (RuntimeError, AssertionError) as error:
        reason = str(error).splitlines()[0]
        raise DemoError(f"--device {config.device}: not usable here ({reason})") from error
    if not -(2**63) <= config.seed < 2**63:
        raise DemoError(f"--seed: expected an integer in [-2^63, 2^63), got {config.seed}")
    try:
        config.out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise DemoError(f"--out {config.out}: cannot be made ({error.strerror})") from error
    if not os.access(config.out, os.W_OK):
        raise DemoError(f"--out {config.out}: not writable")


def _shown(path: Path) -> str:
    """A name that is not UTF-8 cannot be printed as it is."""
    return os.fsencode(path).decode("utf-8", "replace")


def _read(config: Config) -> list[Trace]:
    if config.traces is None:
        return arithmetic.generate(seed=config.seed)
    traces = load_traces(config.traces)
    kept = first_groups(traces, MAX_TRACES)
    if len(kept) < len(traces):
        print(f"using {len(kept)} of {len(traces)} traces: the first groups with both outcomes")
    return kept
