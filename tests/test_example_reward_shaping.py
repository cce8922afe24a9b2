"""examples/reward_shaping.py: its stages add up, and it reads the files the demo reads."""

from __future__ import annotations

import gzip
import json
import math
import os
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest

from examples import reward_shaping
from reasonkern.demo.arithmetic import generate


def rows(text: str) -> list[dict[str, float | str]]:
    head, *lines = [line for line in text.split("\n\n")[0].splitlines() if set(line) != {"-"}]
    names = head.split()
    return [dict(zip(names, line.split(), strict=True)) for line in lines]


def test_default_traces(capsys: pytest.CaptureFixture[str]) -> None:
    assert reward_shaping.main([]) == 0
    out = capsys.readouterr().out
    table = rows(out)
    assert len(table) == 20 and {row["right"] for row in table} == {"yes", "no"}
    for row in table:
        x = {k: float(v) for k, v in row.items() if k not in ("right", "problem")}
        assert x["reward"] == pytest.approx(x["LASER-D"] + 0.5 * x["overlong"], abs=2e-3)
        mine = [float(r["reward"]) for r in table if r["problem"] == row["problem"]]
        assert x["advantage"] == pytest.approx(x["reward"] - sum(mine) / len(mine), abs=2e-3)
        assert x["filtered"] == pytest.approx(x["advantage"] - 0.1 * x["entropy"], abs=2e-3)
    assert "GTPO drops 0 of 20" in out


def test_the_command_stops_when_nobody_reads_on() -> None:
    command = [sys.executable, reward_shaping.__file__]
    environment = {**os.environ, "PYTHONPATH": str(Path(reward_shaping.__file__).parents[1])}
    with subprocess.Popen(
        command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE
    ) as process:
        assert process.stdout and process.stderr
        process.stdout.close()
        assert process.stderr.read() == b""
    assert process.returncode == 0


def test_a_file_and_a_limit_that_drops(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "traces.jsonl.gz"
    with gzip.open(path, "wt") as file:
        for trace in generate(problems=2, samples=3, seed=1):
            file.write(json.dumps(vars(trace)) + "\n")
    assert reward_shaping.main([str(path), "--max-entropy", "0.01"]) == 0
    out = capsys.readouterr().out
    assert {float(row["filtered"]) for row in rows(out)} == {0.0} and "drops 6 of 6" in out
    assert reward_shaping.main([str(tmp_path / "absent")]) == 2
    assert reward_shaping.main(["--max-entropy", "nan"]) == 2
    assert "cannot be read" in capsys.readouterr().err


def test_traces_that_differ_by_nothing_are_dropped_like_others(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """An advantage of 0, and text that is no valid Unicode."""
    path = tmp_path / "traces.jsonl"
    texts = {1: (("abab\ud800", True), ("abac", False)), 2: (("abad", True), ("abab", True))}
    with path.open("w") as file:
        for problem, answers in texts.items():
            for text, correct in answers:
                trace = {"problem_id": problem, "prompt": "", "text": text, "correct": correct}
                file.write(json.dumps(trace) + "\n")
    assert reward_shaping.main([str(path), "--max-entropy", "0.01"]) == 0
    out = capsys.readouterr().out
    assert {row["advantage"] for row in rows(out)} >= {"0.000"} and "drops 4 of 4" in out


def test_entropies_of_the_byte_model() -> None:
    text = b"abababac"
    (got,) = reward_shaping.entropies([text])
    padded = bytes(4) + text
    after: dict[bytes, Counter[int]] = {}
    for i in range(len(text)):
        after.setdefault(padded[i : i + 4], Counter())[padded[i + 4]] += 1
    for i in range(len(text)):
        counts = after[padded[i : i + 4]].values()
        p = [count / sum(counts) for count in counts]
        assert got[i].item() == pytest.approx(-sum(x * math.log(x) for x in p), abs=1e-6)
    assert got.max() == pytest.approx(math.log(2))
