"""Benchmarks of speculation: the n-gram table, and verification."""

from __future__ import annotations

from typing import Any

from benchmarks import speculation_table as table
from benchmarks import speculation_verify as verify
from benchmarks.case import Case, Family, Truth, merged

PROVIDERS = merged(table.PROVIDERS, verify.PROVIDERS)


def _part(case: Case) -> Any:
    return table if case.op.startswith("table") else verify


def inputs(case: Case, seed: int) -> Any:
    return _part(case).inputs(case, seed)


def truth(case: Case, given: Any) -> Truth:
    answer: Truth = _part(case).truth(case, given)
    return answer


FAMILY = Family("speculation", table.CASES + verify.CASES, PROVIDERS, inputs, truth)
