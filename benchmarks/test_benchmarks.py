"""pytest-benchmark entry: `pytest benchmarks/test_benchmarks.py --benchmark-json FILE`.

For the conventional workflow of storing and comparing runs. It times one provider after the other;
ratios to rely on come from the interleaved pairs of `python -m benchmarks`.
"""

from __future__ import annotations

import functools
from typing import Any

import pytest
import torch

pytest.importorskip("pytest_benchmark")

from benchmarks import engine, families  # noqa: E402
from benchmarks.case import Case, Skip, Truth  # noqa: E402

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
WORK = [
    (family, case, provider)
    for family in map(families.load, families.NAMES)
    for case in family.cases
    if case.quick and case.device == DEVICE and case.rotate == 1
    for provider in case.providers
]


@functools.lru_cache(maxsize=1)
def inputs_and_truth(family: str, case: Case) -> tuple[Any, Truth]:
    """Made once per case: its providers follow each other."""
    found = families.load(family)
    inputs = found.inputs(case, 0)
    return inputs, found.truth(case, inputs)


@pytest.mark.parametrize(
    ("family", "case", "provider"), WORK, ids=[f"{c.id}-{p}" for _, c, p in WORK]
)
def test_speed(benchmark, family, case, provider):
    benchmark.group = case.id
    benchmark.extra_info["input_bytes"] = case.input_bytes
    row = {"name": provider, "status": "ok"}
    with engine.thread_count(case.threads):
        inputs, truth = inputs_and_truth(family.name, case)
        try:
            runner = engine.admit(family, case, inputs, provider, truth, row)
        except Skip as why:
            pytest.skip(str(why))
        if row["status"] == "mismatch":
            pytest.skip(f"does not match float64: {row['reason']}")

        def call() -> None:
            runner.call()
            if DEVICE == "cuda":
                torch.cuda.synchronize()

        benchmark.pedantic(call, setup=runner.reset, rounds=7, warmup_rounds=1)
