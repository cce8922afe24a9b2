"""Benchmarks of speculation: the n-gram table, and verification."""

from __future__ import annotations

from typing import Any

from benchmarks import speculation_table as table
from benchmarks import speculation_verify as verify
from benchmarks.case import Case, Family, Provider, Truth


def _ours(name: str) -> Provider:
    """One provider of the ops of both parts."""
    return Provider(name, {**table.PROVIDERS[name].build, **verify.PROVIDERS[name].build})


SHARED = table.PROVIDERS.keys() & verify.PROVIDERS.keys()
PROVIDERS = table.PROVIDERS | verify.PROVIDERS | {name: _ours(name) for name in sorted(SHARED)}


def _part(case: Case) -> Any:
    return table if case.op.startswith("table") else verify


def inputs(case: Case, seed: int) -> Any:
    return _part(case).inputs(case, seed)


def truth(case: Case, given: Any) -> Truth:
    answer: Truth = _part(case).truth(case, given)
    return answer


FAMILY = Family("speculation", table.CASES + verify.CASES, PROVIDERS, inputs, truth)
