"""A benchmark family of one op, x -> 2 x, and records written by hand."""

from __future__ import annotations

import torch

from benchmarks import engine
from benchmarks.case import Case, Family, Provider, Runner, Skip, Tolerance, Truth

FAST = engine.Effort(seconds=0.0, least_pairs=3, most_pairs=3, memory=False)


def doubling(work):
    def build(case, x):
        return Runner(lambda: work(x), lambda y: {"y": y})

    return {"double": build}


def absent(case, x):
    raise Skip("not installed")


def broken(x):
    raise RuntimeError("first line\nsecond line")


PROVIDERS = {
    "right": Provider("right", doubling(lambda x: 2 * x)),
    "copy": Provider("copy", doubling(lambda x: x.clone()), checked=False, passes=2),
    "wrong": Provider("wrong", doubling(lambda x: 2 * x + (x == x[0]))),
    "nan": Provider("nan", doubling(lambda x: torch.where(x == x[0], float("nan"), 2 * x))),
    "short": Provider("short", doubling(lambda x: 2 * x[1:])),
    "silent": Provider("silent", {"double": lambda case, x: Runner(lambda: 2 * x)}),
    "absent": Provider("absent", {"double": absent}),
    "broken": Provider("broken", doubling(broken)),
    "other-op": Provider("other-op", {}),
}
CASE = Case("double", (64,), "float32", "cpu", passes=2, providers=tuple(PROVIDERS), threads=1)


def toy_family(*cases):
    def truth(case, x):
        return Truth({"y": 2 * x.double()}, {"y": Tolerance(1e-6, 0.0)})

    return Family("toy", cases or (CASE,), PROVIDERS, lambda case, seed: torch.randn(64), truth)


def with_rows(*rows, gates=()):
    """A record as `run_case` makes it, from hand-written rows."""
    record = engine.describe(toy_family(), CASE, [{"status": "ok", **row} for row in rows])
    record["gates"] = [engine.judge(gate, record, {"features": ["avx2"]}) for gate in gates]
    return record
