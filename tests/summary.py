"""A dated summary of a test run as Markdown: pytest --summary=FILE (make test-all writes docs/)."""

from __future__ import annotations

import datetime
import importlib.metadata
import os
import platform
import subprocess
import time
from collections import Counter
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PACKAGES = (
    "torch", "numpy", "triton", "pytest", "hypothesis", "trl", "transformers", "accelerate",
    "liger-kernel", "verl", "openrlhf", "tensordict", "ray",
)  # fmt: skip
SLOWEST = 10


class Summary:
    """Counts what ran, and writes it when the run is over."""

    def __init__(self, path: Path) -> None:
        self.path, self.start = path, time.monotonic()
        self.outcomes: Counter[tuple[str, str]] = Counter()
        self.seconds: Counter[str] = Counter()
        self.tests: list[tuple[float, str]] = []
        self.reasons: Counter[str] = Counter()

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        file = report.nodeid.partition("::")[0]
        self.seconds[file] += report.duration
        if report.when == "call":
            self.tests.append((report.duration, report.nodeid))
        if report.skipped:
            reason = (
                report.longrepr[2] if isinstance(report.longrepr, tuple) else "expected to fail"
            )
            self.reasons[str(reason).removeprefix("Skipped: ")] += 1
        if report.when == "call" or report.outcome != "passed":
            self.outcomes[file, report.outcome] += 1

    def pytest_sessionfinish(self, session: pytest.Session, exitstatus: int) -> None:
        if hasattr(session.config, "workerinput"):
            return  # a worker of pytest-xdist: the process that started it hears every report
        self.path.write_text("\n".join(self.lines(session, exitstatus)) + "\n")

    def lines(self, session: pytest.Session, exitstatus: int) -> list[str]:
        totals = {o: self.total(o) for o in ("passed", "failed", "skipped")}
        arguments = " ".join(str(a) for a in session.config.invocation_params.args)
        text = [
            f"# Test run of {datetime.date.today()}",
            "",
            f"`pytest {arguments}` at {revision()}: {totals['passed']} passed, "
            f"{totals['failed']} failed, {totals['skipped']} skipped in "
            f"{time.monotonic() - self.start:.0f} s (exit status {int(exitstatus)}).",
            "",
            f"{machine()}; Python {platform.python_version()}, "
            + ", ".join(f"{name} {version(name)}" for name in PACKAGES)
            + ".",
            "",
            "| file | passed | failed | skipped | seconds |",
            "|---|--:|--:|--:|--:|",
        ]
        for file in sorted({file for file, _ in self.outcomes}):
            counts = (self.outcomes[file, o] for o in totals)
            text.append(
                f"| {file} | " + " | ".join(map(str, counts)) + f" | {self.seconds[file]:.0f} |"
            )
        if self.reasons:
            text += ["", "Skipped:", ""] + [f"* {n} × {r}" for r, n in self.reasons.most_common()]
        text += ["", "Slowest:", ""]
        text += [f"* {s:.1f} s {name}" for s, name in sorted(self.tests, reverse=True)[:SLOWEST]]
        return text

    def total(self, outcome: str) -> int:
        return sum(n for (_, o), n in self.outcomes.items() if o == outcome)


def version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "(not installed)"


def revision() -> str:
    """The commit, "+changes" when the working tree differs from it."""
    try:
        done = subprocess.run(
            ["git", "describe", "--always", "--dirty=+changes"],
            cwd=ROOT, capture_output=True, text=True, check=True,
        )  # fmt: skip
    except (OSError, subprocess.CalledProcessError):
        return "no git commit"
    return done.stdout.strip()


def machine() -> str:
    import torch

    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else "no GPU"
    return f"{platform.system()} {platform.machine()}, {os.cpu_count()} cores, {gpu}"
