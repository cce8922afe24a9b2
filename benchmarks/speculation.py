"""Benchmarks of speculation: the n-gram table, and verification."""

from __future__ import annotations

from typing import Any

from benchmarks import speculation_table as table
from benchmarks import speculation_verify as verify
from benchmarks.case import Case, Family, Provider, Truth

BUILD = {**table.PROVIDERS["reasonkern"].build, **verify.PROVIDERS["reasonkern"].build}
PROVIDERS = table.PROVIDERS | verify.PROVIDERS | {"reasonkern": Provider("reasonkern", BUILD)}


def _part(case: Case) -> Any:
    return verify if case.op.startswith("verify") else table


def inputs(case: Case, seed: int) -> Any:
    return _part(case).inputs(case, seed)


def truth(case: Case, given: Any) -> Truth:
    answer: Truth = _part(case).truth(case, given)
    return answer


FAMILY = Family("speculation", table.CASES + verify.CASES, PROVIDERS, inputs, truth)
