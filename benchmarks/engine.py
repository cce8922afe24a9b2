"""Runs cases: correctness first, then interleaved pairs, then memory, then gates."""

from __future__ import annotations

import contextlib
import dataclasses
import gc
import json
import os
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch

from benchmarks import check, memory, timing
from benchmarks.case import Case, Family, Gate, Runner, Skip

SCHEMA = 1
CEILING = "copy"


@dataclasses.dataclass(frozen=True)
class Effort:
    """How long to measure."""

    seconds: float = 20.0
    """Budget per pair of providers; the least number of pairs is run even when it costs more."""
    least_pairs: int = 5
    most_pairs: int = 51
    memory: bool = True


QUICK = Effort(seconds=1.5, most_pairs=15)


def with_threads(case: Case, threads: int | None) -> Case:
    """The case with its number of threads replaced (a CUDA case has none)."""
    if not threads or case.device == "cuda":
        return case
    return dataclasses.replace(case, threads=threads)


def run_case(
    family: Family,
    case: Case,
    effort: Effort = Effort(),
    machine: dict[str, Any] | None = None,
    progress: Callable[[str], None] = lambda _: None,
) -> dict[str, Any]:
    """Measures one case and returns its record; a failing provider stops nothing."""
    began = time.perf_counter()
    with thread_count(case.threads):
        inputs = family.inputs(case, 0)
        rows, runners = admit_all(family, case, inputs, progress)
        times = measure_pairs(case, runners, rows, effort, progress)
        measure_memory(family, case, runners, rows, effort, progress)
        runners.clear()
    summarise(family, case, rows, times)
    record = describe(family, case, list(rows.values()))
    record["gates"] = [judge(g, record, machine or {}) for g in case.gates]
    record["seconds"] = round(time.perf_counter() - began, 1)
    return record


def failed_case(
    family: Family, case: Case, error: Exception, machine: dict[str, Any]
) -> dict[str, Any]:
    """The record of a case whose inputs or truth could not be made."""
    rows: list[dict[str, Any]] = [{"name": name, "status": "ok"} for name in case.providers]
    for row in rows:
        with recorded_failure(row):
            raise error
    record = describe(family, case, rows)
    return {**record, "gates": [judge(g, record, machine) for g in case.gates], "seconds": 0.0}


def describe(family: Family, case: Case, rows: list[dict[str, Any]]) -> dict[str, Any]:
    """The part of a record that says what was measured."""
    return {
        "id": case.id,
        "family": family.name,
        "op": case.op,
        "label": case.label,
        "shape": list(case.shape),
        "dtype": case.dtype,
        "device": case.device,
        "threads": case.threads,
        "input_bytes": case.input_bytes,
        "providers": rows,
    }


def admit_all(
    family: Family, case: Case, inputs: Any, progress: Callable[[str], None]
) -> tuple[dict[str, dict[str, Any]], dict[str, Runner]]:
    """Builds every provider and lets those through that reproduce the float64 truth."""
    progress("float64 truth")
    truth = family.truth(case, inputs)
    rows: dict[str, dict[str, Any]] = {}
    runners: dict[str, Runner] = {}
    for name in case.providers:
        progress(f"checking {name}")
        rows[name] = row = {"name": name, "status": "ok"}
        with recorded_failure(row):
            runners[name] = admit(family, case, inputs, name, truth, row)
        if row["status"] != "ok":
            runners.pop(name, None)
        release()
    return rows, runners


def admit(
    family: Family, case: Case, inputs: Any, name: str, truth: Any, row: dict[str, Any]
) -> Runner:
    """One provider, checked; its row says why when it is not `ok`."""
    provider = family.providers[name]
    if case.op not in provider.build:
        raise Skip(f"has no {case.op}")
    runner = provider.build[case.op](case, inputs)
    runner.reset()
    outputs = runner.outputs(runner.call())
    row.update(runner.about)
    if provider.checked:
        row["match"] = {k: round(v, 4) for k, v in check.compare(outputs, truth).items()}
        worst = max(row["match"], key=row["match"].__getitem__, default=None)
        if worst is None or row["match"][worst] > 1.0:
            row["status"] = "mismatch"
            times = f"{row['match'][worst]:.3g} × the allowed error" if worst else "no output"
            row["reason"] = f"{worst}: {times}"
    del outputs
    if case.rotate > 1 and row["status"] == "ok":
        return rotated(family, case, name, runner)
    return runner


def rotated(family: Family, case: Case, name: str, runner: Runner) -> Runner:
    """Graph replay over several input sets, so that none of them is found in the L2."""
    build = family.providers[name].build[case.op]
    others = [build(case, family.inputs(case, seed)) for seed in range(1, case.rotate)]
    return timing.graph_replay([runner, *others])


def measure_pairs(
    case: Case,
    runners: dict[str, Runner],
    rows: dict[str, dict[str, Any]],
    effort: Effort,
    progress: Callable[[str], None],
) -> dict[str, tuple[list[float], list[float]]]:
    """Per provider the times of (subject, provider) in interleaved pairs; the subject is first."""
    times: dict[str, tuple[list[float], list[float]]] = {}
    if not runners:
        return times
    clock = timing.cuda_clock() if case.device == "cuda" else timing.cpu_clock
    subject = next(iter(runners))
    for name in [n for n in runners if n != subject] or [subject]:
        with recorded_failure(rows[name]):
            # One untimed round warms both up and says how many pairs the budget pays for.
            once = time.perf_counter()
            clock(runners[subject]), clock(runners[name])
            cost = time.perf_counter() - once
            asked = (gate.min_pairs for gate in case.gates if gate.against == name)
            least = max([effort.least_pairs, *asked])
            pairs = timing.pair_count(cost, effort.seconds, least, max(least, effort.most_pairs))
            pairs = case.pairs or pairs
            progress(f"{subject} against {name}, {pairs} pairs")
            times[name] = timing.pair_times(runners[subject], runners[name], pairs, clock)
        if rows[name]["status"] != "ok":
            times.pop(name, None)
        release()
    return times


def measure_memory(
    family: Family,
    case: Case,
    runners: dict[str, Runner],
    rows: dict[str, dict[str, Any]],
    effort: Effort,
    progress: Callable[[str], None],
) -> None:
    """Peak extra memory of every provider that was let through."""
    for name in runners if effort.memory and case.memory and case.rotate == 1 else ():
        if rows[name]["status"] == "ok" and family.providers[name].checked:
            progress(f"memory of {name}")
            with contextlib.suppress(Exception):
                rows[name]["peak_bytes"] = memory.peak_extra(family, case, name, runners[name])
            release()


def summarise(
    family: Family,
    case: Case,
    rows: dict[str, dict[str, Any]],
    times: dict[str, tuple[list[float], list[float]]],
) -> None:
    """Writes times, bandwidths and pair ratios into the rows."""
    if not times:
        return
    subject = next(name for name, row in rows.items() if row["status"] == "ok")
    own = [t for name in times for t in times[name][0]]
    rows[subject].update(seconds=timing.quantiles(own), ratio={"median": 1.0}, pairs=len(own))
    for name, (ours, theirs) in times.items():
        if name != subject:
            ratio = timing.pair_ratio(theirs, ours)
            rows[name].update(seconds=timing.quantiles(theirs), ratio=ratio, pairs=len(theirs))
    ceiling = rows.get(CEILING, {})
    for name, row in rows.items():
        if "seconds" in row and case.flops:
            row["flop_rate"] = case.flops / row["seconds"]["median"]
        elif "seconds" in row:
            passes = family.providers[name].passes or case.passes
            row["bandwidth"] = passes * case.input_bytes / row["seconds"]["median"]
            if "ratio" in ceiling:
                share = passes / (family.providers[CEILING].passes or case.passes)
                row["copy_share"] = share * ceiling["ratio"]["median"] / row["ratio"]["median"]


def judge(gate: Gate, record: dict[str, Any], machine: dict[str, Any]) -> dict[str, Any]:
    """The verdict on one gate: pass, fail, reported (not enforced here) or not measured."""
    rows = {row["name"]: row for row in record["providers"]}
    subject = record["providers"][0]
    value = _gate_value(gate, subject, rows, record["input_bytes"])
    pairs = rows.get(gate.against, {}).get("pairs")
    verdict = {"text": gate.text(), "value": value, "pairs": pairs}
    if value is None:
        status = "not measured"
    elif (value <= gate.bound) if gate.upper else (value >= gate.bound):
        status = "pass"
    else:
        status = "fail"
    present = {*(machine.get("features") or ()), *(machine.get("packages") or ())}
    if gate.needs and gate.needs not in present:
        status, verdict["note"] = "reported", f"this machine has no {gate.needs}"
    return {**verdict, "bound": gate.bound, "status": status}


def _gate_value(
    gate: Gate, subject: dict[str, Any], rows: dict[str, dict[str, Any]], input_bytes: int
) -> float | None:
    if subject["status"] != "ok":
        return None
    if gate.quantity == "memory":
        peak = subject.get("peak_bytes")
        base = rows.get(gate.against, {}).get("peak_bytes") if gate.against else input_bytes
        return None if peak is None or not base else peak / base
    if gate.quantity == "microseconds":
        return 1e6 * float(subject["seconds"]["median"]) if "seconds" in subject else None
    if gate.quantity == "copy_share":
        return subject.get("copy_share")
    other = rows.get(gate.against, {})
    if gate.quantity == "accepted":
        return float(subject["accepted"] / other["accepted"]) if "accepted" in other else None
    if other.get("status") != "ok" or "ratio" not in other:
        return None
    ratio = float(other["ratio"]["median"])
    return 1.0 / ratio if gate.quantity == "time" else ratio


def gates_hold(records: Sequence[dict[str, Any]]) -> bool:
    """Whether no gate failed; a gate that could not be measured has failed."""
    return all(
        gate["status"] in ("pass", "reported") for record in records for gate in record["gates"]
    )


class Store:
    """The result file: rewritten after every case, so an interrupted run keeps what it has."""

    def __init__(self, path: Path | None, machine: dict[str, Any], resume: bool = False) -> None:
        self.path, self.machine = path, machine
        self.records: list[dict[str, Any]] = []
        if resume and path and path.exists():
            found = json.loads(path.read_text())
            if found.get("schema") == SCHEMA:
                self.records = found["cases"]

    def done(self, case_id: str) -> bool:
        """Whether an earlier run of this file has the case."""
        return any(record["id"] == case_id for record in self.records)

    def content(self) -> dict[str, Any]:
        """What the file holds."""
        return {"schema": SCHEMA, "machine": self.machine, "cases": self.records}

    def add(self, record: dict[str, Any]) -> None:
        """Adds a case and writes the file under a new name first, then over the old one."""
        self.records.append(record)
        if self.path is None:
            return
        self.path.parent.mkdir(parents=True, exist_ok=True)
        part = self.path.with_name(self.path.name + ".part")
        part.write_text(json.dumps(self.content(), indent=1) + "\n")
        os.replace(part, self.path)


@contextlib.contextmanager
def thread_count(threads: int | None) -> Iterator[None]:
    """torch's number of threads for the length of a case."""
    before = torch.get_num_threads()
    if threads:
        torch.set_num_threads(threads)
    try:
        yield
    finally:
        torch.set_num_threads(before)


@contextlib.contextmanager
def recorded_failure(row: dict[str, Any]) -> Iterator[None]:
    """Turns an exception into the row's status: one failing provider stops nothing."""
    try:
        yield
    except Skip as why:
        row.update(status="skipped", reason=str(why))
    except Exception as error:
        first = (str(error).strip().splitlines() or [""])[0]
        row.update(status="failed", reason=f"{type(error).__name__}: {first}"[:200])


def release() -> None:
    """Gives freed memory back before the next provider."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
