"""Benchmarks of speculation: the n-gram table."""

from __future__ import annotations

from benchmarks import speculation_table as table
from benchmarks.case import Family

FAMILY = Family("speculation", table.CASES, table.PROVIDERS, table.inputs, table.truth)
