"""Reasoning traces: the record, reading a JSONL file, and the groups that RL learns from."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from .. import shaping
from .._jsonl import TraceError, read_records, show
from .._progress import counted

__all__ = ["Trace", "TraceError", "load_traces"]


@dataclass(frozen=True)
class Trace:
    """One logged chain of thought; traces of the same `problem_id` form a group."""

    problem_id: int | str
    prompt: str
    text: str
    correct: bool


def _is_id(value: object) -> bool:
    return isinstance(value, int | str) and not isinstance(value, bool)


FIELDS: dict[str, tuple[Callable[[Any], bool], str]] = {
    "problem_id": (_is_id, "an integer or a string"),
    "prompt": (lambda value: isinstance(value, str), "a string"),
    "text": (lambda value: isinstance(value, str) and value != "", "a non-empty string"),
    "correct": (lambda value: isinstance(value, bool), "true or false"),
}


def load_traces(path: str | Path) -> list[Trace]:
    """Read a JSONL file, gzip-compressed or plain (told by its first bytes, not by its name)."""
    path = Path(path)
    traces = [_parse(where, record) for where, record in read_records(path)]
    if not traces:
        raise TraceError(f"{path}: holds no traces (expected one JSON object per line)")
    check_groups(traces, str(path))
    return traces


def check_groups(traces: Sequence[Trace], source: str) -> None:
    """At least one problem needs both outcomes: else every group-normalised advantage is 0."""
    if not mixed_groups(traces):
        problems = len({trace.problem_id for trace in traces})
        raise TraceError(
            f"{source}: no group has both outcomes. The advantage of a trace is its reward minus "
            "the mean of its group (same 'problem_id'), so RL needs a problem with at least one "
            "trace whose 'correct' is true and one where it is false; got "
            f"{counted(len(traces), 'trace')} of {counted(problems, 'problem')}, "
            f"{sum(trace.correct for trace in traces)} correct"
        )


def mixed_groups(traces: Sequence[Trace]) -> dict[int | str, list[int]]:
    """problem_id → indices of its traces, for the problems that have both outcomes."""
    groups: dict[int | str, list[int]] = {}
    for index, trace in enumerate(traces):
        groups.setdefault(trace.problem_id, []).append(index)
    return {
        problem: members
        for problem, members in groups.items()
        if len({traces[index].correct for index in members}) == 2
    }


def first_groups(traces: list[Trace], most: int) -> list[Trace]:
    """All traces when there are at most `most`; else the first whole groups with both outcomes."""
    if len(traces) <= most:
        return traces
    chosen: list[Trace] = []
    for members in mixed_groups(traces).values():
        if chosen and len(chosen) + len(members) > most:
            break
        chosen += [traces[index] for index in members]
    return chosen


def group_advantages(traces: Sequence[Trace]) -> dict[int, float]:
    """Index of a trace → its advantage as in GRPO; mixed groups only."""
    groups = enumerate(mixed_groups(traces).values())
    members = [(index, group) for group, indices in groups for index in indices]
    reward = torch.tensor([traces[index].correct for index, _ in members], dtype=torch.float64)
    group = torch.tensor([group for _, group in members], dtype=torch.int64)
    values = shaping.group_advantages(reward, group, eps=0.0).tolist()
    return {index: value for (index, _), value in zip(members, values, strict=True)}


def _parse(where: str, record: dict[str, Any]) -> Trace:
    for name, (accepts, expected) in FIELDS.items():
        if name not in record:
            present = ", ".join(map(repr, record)) or "none"
            raise TraceError(f"{where}: field '{name}' is missing (fields present: {present})")
        if not accepts(record[name]):
            got = show(record[name])
            raise TraceError(f"{where}: field '{name}' must be {expected}, got {got}")
    return Trace(**{name: record[name] for name in FIELDS})
