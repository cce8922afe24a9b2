"""The families that have benchmarks."""

from __future__ import annotations

import importlib

from benchmarks.case import Family

NAMES = (
    "policy_loss", "linear_policy_loss", "speculation", "generation", "modulation", "shaping",
)  # fmt: skip


def load(name: str) -> Family:
    """The family of that name."""
    if name not in NAMES:
        raise ValueError(f"family: expected one of {', '.join(NAMES)}, got {name!r}")
    family: Family = importlib.import_module(f"benchmarks.{name}").FAMILY
    return family
