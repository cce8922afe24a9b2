"""benchmarks/gpu.sh on a machine without a GPU: which commands it runs, resumes and judges."""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[1] / "benchmarks" / "gpu.sh"
pytestmark = pytest.mark.skipif(shutil.which("bash") is None, reason="needs bash")

# Notes its arguments; `answers` says what to do for those that hold a word: "WORD STATUS TEXT".
STAND_IN = """#!/bin/bash
echo "$(basename "$0") $*" >>"$CALLS"
while read -r word status text; do
  case "$*" in *"$word"*) echo "$text"; [ "$status" = hang ] && exec sleep 9; exit "$status" ;; esac
done <"$ANSWERS"
exit 0
"""


class Machine:
    """Stands for the GPU machine: its python and compute-sanitizer only note what they are told."""

    def __init__(self, folder: Path) -> None:
        self.out = folder / "out"
        self.calls, self.answers = folder / "calls", folder / "answers"
        for name in ("python", "compute-sanitizer"):
            (folder / name).write_text(STAND_IN)
            (folder / name).chmod(0o755)
        self.environment = {
            "PATH": f"{folder}:{os.environ['PATH']}", "PYTHON": str(folder / "python"),
            "CALLS": str(self.calls), "ANSWERS": str(self.answers),
        }  # fmt: skip
        self.answer()

    def answer(self, *rows: str) -> None:
        self.answers.write_text("".join(f"{row}\n" for row in rows))

    def run(self, *arguments: str, out: bool = True, **settings: str) -> tuple[int, list[str]]:
        """Exit status and the commands of one call."""
        self.calls.write_text("")
        where = ("--out", str(self.out)) if out else ()
        done = subprocess.run(
            ["bash", str(SCRIPT), *arguments, *where], env=self.environment | settings,
            capture_output=True, text=True, timeout=60,
        )  # fmt: skip
        self.printed = done.stdout + done.stderr
        return done.returncode, self.calls.read_text().splitlines()

    def verdicts(self, stage: str) -> dict[str, str]:
        kinds = (".ok", ".failed", ".refused", ".once")
        found = (path for path in (self.out / stage).iterdir() if path.suffix in kinds)
        return {path.name: path.read_text().strip() for path in found}


@pytest.fixture
def machine(tmp_path: Path) -> Machine:
    return Machine(tmp_path)


@pytest.mark.parametrize("arguments", [(), ("deploy",), ("build", "--out"), ("build", "--now")])
def test_a_wrong_command_line_runs_nothing(machine: Machine, arguments: tuple[str, ...]) -> None:
    assert machine.run(*arguments, out=False) == (2, [])
    assert "gpu.sh" in machine.printed


def test_the_stages_of_a_call_and_only_once(machine: Machine) -> None:
    status, calls = machine.run("build", "test", "sanitize", "bench")
    assert status == 0
    assert [call for call in calls if "install" in call or "info" in call] == calls[:2]
    assert sum("benchmarks.smoke" in call for call in calls) == 4  # two of them by the sanitizer
    order = ("install", "pytest", "racecheck", "benchmarks.plot")
    places = [next(i for i, call in enumerate(calls) if word in call) for word in order]
    assert places == sorted(places)
    for stage in ("build", "test", "sanitize", "bench"):
        assert {Path(name).suffix for name in machine.verdicts(stage)} == {".ok"}
    status, again = machine.run("build", "test", "sanitize", "bench")
    # Only what a shell asks before it decides.
    assert status == 0 and all("import xdist" in c or "--list" in c for c in again)


def test_a_failing_step_stops_nothing(machine: Machine) -> None:
    machine.answer("benchmarks.smoke 1 wrong")
    status, calls = machine.run("build", "bench")
    assert status == 1 and "benchmarks.plot" in calls[-1]
    assert machine.verdicts("build")["smoke-cuda.failed"] == "1"
    assert "smoke-triton.failed" in machine.verdicts("build")
    assert machine.run("bench")[0] == 0  # of the stages of the call


def test_what_there_is_no_time_for_is_done_by_the_next_call(machine: Machine) -> None:
    assert machine.run("build", LIMIT="19") == (3, [])
    assert machine.verdicts("build") == {}
    status, calls = machine.run("build")
    assert status == 0 and len(calls) == 4


def test_a_step_that_runs_out_of_time_has_a_second_chance(machine: Machine) -> None:
    machine.answer("pytest hang")
    assert machine.run("test", LIMIT="2", LEAST="0")[0] == 3
    assert machine.verdicts("test") == {"gpu.once": ""}
    machine.answer()
    status, calls = machine.run("test")
    assert status == 0 and "pytest tests" in calls[-1]


def test_out_of_time_twice_is_a_failure(machine: Machine) -> None:
    machine.answer("pytest hang")
    assert machine.run("test", LIMIT="2", LEAST="0")[0] == 3
    assert machine.run("test", LIMIT="2", LEAST="0")[0] == 1
    assert machine.verdicts("test")["gpu.failed"] == "out of time twice"


def test_benchmarks_go_on_as_long_as_they_are_called(machine: Machine) -> None:
    """Each call measures cases that the one before had no time for."""
    machine.answer("--resume hang")
    for _ in range(3):
        assert machine.run("bench", LIMIT="2", LEAST="0")[0] == 3
    machine.answer()
    assert machine.run("bench")[0] == 0


def test_a_refusal_of_the_sanitizer_is_no_failure(machine: Machine) -> None:
    machine.answer("memcheck 1 ERROR: device not supported", "racecheck 9 ERROR SUMMARY: 2 errors")
    assert machine.run("sanitize")[0] == 1
    found = machine.verdicts("sanitize")
    assert found == {"memcheck.refused": "ERROR: device not supported", "racecheck.failed": "9"}


def test_tests_run_in_parallel_where_they_can(machine: Machine) -> None:
    machine.answer("pytest 5 no tests")
    status, calls = machine.run("test")
    assert status == 0 and "-n 8" in calls[-1] and "--gpu-record" in calls[-1]
    shutil.rmtree(machine.out)
    machine.answer("import 1 ModuleNotFoundError")
    assert "-n 8" not in machine.run("test")[1][-1]


def test_wheels_are_installed_first(machine: Machine) -> None:
    _, calls = machine.run("build", "--wheels", "/some/where")
    wheels = [call for call in calls if "--find-links /some/where" in call]
    assert wheels and calls[: len(wheels)] == wheels
    assert any(call.endswith("numpy<2.4") for call in wheels)
