"""Derives reasonkern/_evidence.py from the committed results: `python -m benchmarks.evidence`.

A backend counts as run on an architecture when a committed result holds a CUDA case in which it
reproduced the truth and was timed. The result file says which: its machine has an `architecture`
("sm_90"), and the provider's row names its `backend` and the registered `ops` it ran.
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

HEAD = '''"""Which backend has run, and matched, on which GPU architecture.

Generated from benchmarks/results by `python -m benchmarks.evidence`; do not edit.
"""

# (op, architecture, backend) -> where and when
EVIDENCE: dict[tuple[str, str, str], str] = {'''

Key = tuple[str, str, str]


def collect(results: Path = RESULTS) -> dict[Key, str]:
    """Every (op, architecture, backend) with a matching run; the newest result speaks for it."""
    newest: dict[Key, tuple[str, str]] = {}
    for path in sorted(results.glob("**/*.json")):
        content = json.loads(path.read_text())
        machine = content.get("machine", {})
        if not machine.get("gpu"):
            continue
        date = machine["date"][:10]
        text = f"{machine['gpu']}, {date} ({path.relative_to(results).as_posix()})"
        for key in matching_runs(content["cases"], machine["architecture"]):
            newest[key] = max(newest.get(key, ("", "")), (date, text))
    return {key: text for key, (_, text) in sorted(newest.items())}


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
