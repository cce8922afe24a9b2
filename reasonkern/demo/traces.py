"""Reasoning traces: the record, reading a JSONL file, and the groups that RL learns from."""

from __future__ import annotations

import gzip
import json
import zlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, cast

GZIP_MAGIC = b"\x1f\x8b"


class TraceError(ValueError):
    """A trace file that cannot be used; the message names the file, the line and the field."""


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
    try:
        traces = [_parse(line, f"{path}, line {number}") for number, line in _lines(path)]
    except OSError as error:
        raise TraceError(f"{path}: cannot be read ({error.strerror or error})") from error
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
            f"trace whose 'correct' is true and one where it is false; got {len(traces)} traces "
            f"of {problems} problems, {sum(trace.correct for trace in traces)} correct"
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
    """Index of a trace → (reward − group mean) / group standard deviation; mixed groups only."""
    advantages = {}
    for members in mixed_groups(traces).values():
        mean = sum(traces[index].correct for index in members) / len(members)
        deviation = (mean * (1 - mean)) ** 0.5
        for index in members:
            advantages[index] = (traces[index].correct - mean) / deviation
    return advantages


def _lines(path: Path) -> Iterator[tuple[int, bytes]]:
    """Non-blank lines with their numbers; a damaged gzip stream is named with the line it hits."""
    number = 0
    with path.open("rb") as raw:
        packed = raw.read(2) == GZIP_MAGIC
        raw.seek(0)
        stream = cast(BinaryIO, gzip.GzipFile(fileobj=raw)) if packed else raw
        try:
            for number, line in enumerate(stream, start=1):
                if line.strip():
                    yield number, line
        except EOFError as error:
            raise TraceError(
                f"{path}, line {number + 1}: the gzip stream ends early (truncated file)"
            ) from error
        except (gzip.BadGzipFile, zlib.error) as error:
            raise TraceError(
                f"{path}, line {number + 1}: the gzip stream is damaged ({error})"
            ) from error


def _parse(line: bytes, where: str) -> Trace:
    try:
        record = json.loads(line.decode())
    except UnicodeDecodeError as error:
        raise TraceError(f"{where}: not UTF-8 (byte {error.start + 1} of the line)") from error
    except json.JSONDecodeError as error:
        raise TraceError(f"{where}, column {error.colno}: not JSON ({error.msg})") from error
    except (ValueError, RecursionError) as error:
        raise TraceError(f"{where}: not JSON ({error})") from error
    if not isinstance(record, dict):
        raise TraceError(f"{where}: expected a JSON object, got {_show(record)}")
    for name, (accepts, expected) in FIELDS.items():
        if name not in record:
            present = ", ".join(map(repr, record)) or "none"
            raise TraceError(f"{where}: field '{name}' is missing (fields present: {present})")
        if not accepts(record[name]):
            got = _show(record[name])
            raise TraceError(f"{where}: field '{name}' must be {expected}, got {got}")
    return Trace(**{name: record[name] for name in FIELDS})


def _show(value: object) -> str:
    text = json.dumps(value)
    return f"{type(value).__name__} {text if len(text) <= 60 else text[:57] + '...'}"
