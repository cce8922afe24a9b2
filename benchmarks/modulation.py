"""Benchmarks of modulation: rows under control, the sampler, and both on a GPU."""

from __future__ import annotations

from typing import Any

from benchmarks import modulation_gpu as gpu
from benchmarks import modulation_rows as rows
from benchmarks import modulation_sampler as sampler
from benchmarks.case import Case, Family, Truth, merged

PARTS = (rows, sampler, gpu)
PROVIDERS = merged(*(part.PROVIDERS for part in PARTS))


def _part_of(case: Case) -> Any:
    return next(part for part in PARTS if case.op in {c.op for c in part.CASES})


def inputs(case: Case, seed: int) -> Any:
    return _part_of(case).inputs(case, seed)


def truth(case: Case, given: Any) -> Truth:
    answer: Truth = _part_of(case).truth(case, given)
    return answer


FAMILY = Family(
    "modulation", tuple(case for part in PARTS for case in part.CASES), PROVIDERS, inputs, truth
)
