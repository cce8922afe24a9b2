"""The GPU cases of speculation, with their inputs made on the CPU, and the smoke run's calls."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from benchmarks import check, smoke, speculation, speculation_verify
from benchmarks.case import Tolerance, Truth

CUDA = [c for c in speculation.FAMILY.cases if c.device == "cuda"]


def test_case_ids_are_unique_and_name_known_providers():
    cases = speculation.FAMILY.cases
    assert len({c.id for c in cases}) == len(cases)
    for case in cases:
        assert {g.against for g in case.gates} - {""} <= set(case.providers[1:])
        for name in case.providers:
            assert case.op in speculation.FAMILY.providers[name].build


def test_gates_are_those_of_the_design():
    gates = {(c.op, c.shape[0], g.text()) for c in CUDA for g in c.gates}
    calls = {
        (f"table_{op}", b, "≤ 20 µs per item") for op in ("draft", "update") for b in (1, 32, 256)
    }
    steps = {("verify_step", b, "≤ 30 µs per item") for b in (1, 32)}
    assert gates == calls | steps | {("verify_step", 256, "time ≤ 1.5 × copy")}
    assert max(speculation_verify.VISITS) == 5  # 5 µs for each, and 5
    assert sum(speculation_verify.VISITS) / len(speculation_verify.VISITS) == 3.5


@pytest.mark.parametrize(
    ("op", "label"),
    [(op, label) for op in ("verify_step", "sample") for label in ("peaked", "flat")]
    + [("verify_step", f"peaked, {speculation_verify.TYPICAL}")],
)
def test_a_step_visits_what_the_case_says(op, label):
    case = next(c for c in CUDA if c.op == op and c.shape[0] == 256 and c.label == label)
    case = dataclasses.replace(case, shape=(9, case.shape[1], 5003), device="cpu")
    step = speculation_verify.tree_step(case, 0)
    values = speculation_verify.on_the_cpu(case, step)  # refuses another number of visits
    runner = speculation_verify.OURS[op](case, step)
    truth = Truth(values, dict.fromkeys(values, Tolerance(0.0, 0.0)))
    assert set(check.compare(runner.outputs(runner.call()), truth).values()) == {0.0}
    if op == "verify_step":
        leaves = any(int(step.tree.ranks[node]) > 0 for _, node in step.visited.tolist())
        assert leaves == label.endswith(speculation_verify.TYPICAL)
        assert leaves or values["length"].tolist() == [2, 3, 4, 5] * 2 + [2]
        assert len(step.rows) == sum(values["length"])


@pytest.mark.parametrize("backend", ["cuda", "triton"])
def test_smoke_calls_repeat_themselves_and_notice(backend):
    reached = set()
    for family in smoke.FAMILIES:
        for name, call in smoke.checks(backend, family):
            if "151936" in name:
                continue
            first = call("cpu")
            assert smoke.differing(call("cpu"), first) == []
            for key, x in first.items():
                assert smoke.differing(first | {key: x + 1}, first) == [key] * bool(x.numel())
            reached.add(family)
    assert "speculation" in reached and ("shaping" in reached) == (backend == "triton")


def test_smoke_notices_nan():
    x = {"x": torch.ones(3)}
    assert smoke.differing({"x": torch.tensor([1.0, float("nan"), 1.0])}, x) == ["x"]
