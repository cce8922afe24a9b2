"""Derives reasonkern/_evidence.py from the committed results: `python -m benchmarks.evidence`.

A backend counts as run on an architecture when a committed result says so: a benchmark with a CUDA
case in which it reproduced the truth and was timed, or a test run on the GPU in which every test
that reached it passed. Tests that failed count against it until a newer run of them passes, and a
kernel that was written anew is new: older results do not speak for it (`WRITTEN_ANEW`). The
files say which: their machine has an `architecture` ("sm_90"); a benchmark's row names its
`backend` and the registered `ops` it ran; a test run (`pytest --gpu-record FILE`) has a row per op
and backend, and names the tests of which it was `lost` what they had reached.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks" / "results"
TARGET = ROOT / "reasonkern" / "_evidence.py"
GPU_BACKENDS = ("cuda", "triton")
# (op, backend) -> since when the kernel is another one. Delete what a newer result speaks for.
WRITTEN_ANEW = {
    (op, "triton"): "2026-11-27T20:00"
    for op in ("sample", "sample_controlled", "verify_controlled", "verify_tree")
}

HEAD = '''"""Which backend has run, and matched, on which GPU architecture.

Generated from benchmarks/results by `python -m benchmarks.evidence`; do not edit.
"""

# (op, architecture, backend) -> where and when
EVIDENCE: dict[tuple[str, str, str], str] = {'''

Key = tuple[str, str, str]


def collect(results: Path = RESULTS) -> dict[Key, str]:
    """Every (op, architecture, backend) that counts; its newest good result speaks for it."""
    good: dict[Key, tuple[str, str]] = {}
    tested: dict[Key, tuple[str, bool]] = {}
    for path in sorted(results.glob("**/*.json")):
        content = json.loads(path.read_text())
        machine = content.get("machine", {})
        if not machine.get("gpu"):
            continue
        date = machine["date"]
        text = f"{machine['gpu']}, {date[:10]} ({path.relative_to(results).as_posix()})"
        for key, passed in test_runs(content, machine["architecture"]):
            tested[key] = max(tested.get(key, ("", False)), (date, passed))
            if passed and is_of_this_kernel(key, date):
                good[key] = max(good.get(key, ("", "")), (date, text))
        for key in matching_runs(content.get("cases", []), machine["architecture"]):
            if is_of_this_kernel(key, date):
                good[key] = max(good.get(key, ("", "")), (date, text))
    failed = {key for key, (_, passed) in tested.items() if not passed}
    return {key: text for key, (_, text) in sorted(good.items()) if key not in failed}


def is_of_this_kernel(key: Key, date: str) -> bool:
    """Whether a result of that time is about the kernel as it is now."""
    op, _, backend = key
    return date >= WRITTEN_ANEW.get((op, backend), "")


def test_runs(content: dict[str, Any], architecture: str) -> Iterator[tuple[Key, bool]]:
    """The keys that the tests of one result file reached, and whether all of those tests passed.

    A lost test may have reached any of them: a file with one vouches for nothing.
    """
    for row in content.get("tests", []):
        key = (row["op"], architecture, row["backend"])
        if row["failed"]:
            yield key, False
        elif row["passed"] and not content["lost"]:
            yield key, True


def matching_runs(cases: list[dict[str, Any]], architecture: str) -> Iterator[Key]:
    """The keys that one result file vouches for."""
    for case in cases:
        for row in case["providers"] if case["device"] == "cuda" else ():
            ran = row["status"] == "ok" and row.get("match") and "seconds" in row
            if ran and row.get("backend") in GPU_BACKENDS:
                yield from ((op, architecture, row["backend"]) for op in row["ops"])


def render(evidence: dict[Key, str]) -> str:
    """The text of reasonkern/_evidence.py."""
    rows = [f"\n    {key!r}: {text!r}," for key, text in evidence.items()]
    return HEAD + "".join(rows) + ("\n}\n" if rows else "}\n")


def main() -> int:
    """Writes the file, or with --check says whether it is up to date."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.evidence", description=__doc__)
    parser.add_argument("--check", action="store_true", help="write nothing; exit 1 when stale")
    text = render(collect())
    if not parser.parse_args().check:
        TARGET.write_text(text)
    elif TARGET.read_text() != text:
        print("reasonkern/_evidence.py is stale: run python -m benchmarks.evidence")
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
