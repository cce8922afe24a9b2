"""The benchmark engine: pairing, correctness before time, result file, memory, picture."""

from __future__ import annotations

import dataclasses
import json
import os
import sys

import pytest
import torch
from benchmark_cases import CASE, FAST, PROVIDERS, doubling, toy_family

from benchmarks import __main__ as cli
from benchmarks import check, engine, generation, memory, report, timing
from benchmarks.case import Gate, Provider, Runner, Tolerance
from reasonkern.demo import arithmetic
from reasonkern.demo.model import seeded
from reasonkern.demo.tokenizer import FIRST_PIECE, Tokenizer

# ---- pairs


def test_pairs_alternate_and_every_call_is_reset():
    calls = []

    def runner(name):
        return Runner(lambda: calls.append(name), reset=lambda: calls.append(f"reset {name}"))

    first, second = timing.pair_times(runner("a"), runner("b"), 3, timing.cpu_clock)
    assert [c for c in calls if "reset" not in c] == ["a", "b", "b", "a", "a", "b"]
    assert calls[::2] == [f"reset {name}" for name in calls[1::2]]
    assert len(first) == len(second) == 3 and min(first + second) >= 0


def test_ratio_is_the_median_over_pairs_not_the_ratio_of_medians():
    # A machine that slows down tenfold half-way: each pair still says 2.
    ours, theirs = [1, 1, 10, 10, 10], [2, 2, 20, 20, 20]
    assert timing.pair_ratio(theirs, ours)["median"] == 2
    assert timing.pair_ratio([1, 100, 1], [1, 1, 1])["median"] == 1


@pytest.mark.parametrize(
    ("cost", "budget", "expected"), [(10.0, 1.0, 5), (0.1, 1.0, 11), (1e-6, 1.0, 51), (0, 1, 51)]
)
def test_number_of_pairs_follows_the_budget_within_bounds(cost, budget, expected):
    assert timing.pair_count(cost, budget, least=5, most=51) == expected


def test_a_gate_asks_for_its_number_of_pairs():
    case = dataclasses.replace(
        CASE, providers=("right", "copy"), gates=(Gate("time", 1e9, "copy", min_pairs=25),)
    )
    record = engine.run_case(toy_family(case), case, FAST)
    assert record["providers"][1]["pairs"] == 25 == record["gates"][0]["pairs"]


def test_runner_that_repeats_its_work_reports_the_time_of_one():
    times = [timing.cpu_clock(Runner(lambda: torch.ones(10), repeat=r)) for r in (1, 10**9)]
    assert times[1] < 1e-9 < times[0]


# ---- correctness before time


@pytest.fixture(scope="module")
def record():
    return engine.run_case(toy_family(), CASE, FAST)


def row(record, name):
    return next(r for r in record["providers"] if r["name"] == name)


@pytest.mark.parametrize("name", ["wrong", "nan", "short", "silent"])
def test_a_provider_that_does_not_match_has_a_cross_and_no_time(record, name):
    assert row(record, name)["status"] == "mismatch"
    assert not {"seconds", "ratio", "pairs", "peak_bytes"} & set(row(record, name))
    line = next(x for x in report.table(record).splitlines() if f" {name} " in x)
    assert "✗" in line and not any(unit in line for unit in ("ms", "µs", "%"))


def test_one_failing_provider_stops_nothing(record):
    assert row(record, "broken") == {
        "name": "broken",
        "status": "failed",
        "reason": "RuntimeError: first line",
    }
    assert (row(record, "absent")["status"], row(record, "absent")["reason"]) == (
        "skipped",
        "not installed",
    )
    assert row(record, "other-op")["status"] == "skipped"
    for name in ("right", "copy"):
        assert row(record, name)["seconds"]["median"] > 0


def test_a_provider_that_breaks_while_timed_loses_its_time():
    calls = iter(range(100))

    def fragile(x):
        if next(calls) > 1:
            raise MemoryError("no more")
        return 2 * x

    providers = {**PROVIDERS, "fragile": Provider("fragile", doubling(fragile))}
    case = dataclasses.replace(CASE, providers=("right", "fragile", "copy"))
    family = dataclasses.replace(toy_family(case), providers=providers)
    record = engine.run_case(family, case, FAST)
    assert row(record, "fragile")["status"] == "failed" and "seconds" not in row(record, "fragile")
    assert "seconds" in row(record, "copy")


@pytest.mark.parametrize(
    ("got", "allowed", "expected"),
    [(1.5, 1.0, 0.5), (3.0, 1.0, 2.0), (1.0, 0.0, 0.0), (1.1, 0.0, float("inf"))],
)
def test_excess_is_in_units_of_the_allowed_error(got, allowed, expected):
    truth = torch.ones((), dtype=torch.float64)
    found = check.excess(torch.tensor(got, dtype=torch.float64), truth, Tolerance(0.0, allowed))
    assert found == pytest.approx(expected)


def test_bandwidth_and_share_of_the_copy_ceiling():
    rows = {name: {"name": name, "status": "ok"} for name in ("right", "copy")}
    case = dataclasses.replace(CASE, passes=1)
    engine.summarise(toy_family(), case, rows, {"copy": ([1.0] * 3, [4.0] * 3)})
    # One pass in 1 s against two passes in 4 s.
    assert rows["right"]["bandwidth"] == case.input_bytes
    assert rows["copy"]["bandwidth"] == case.input_bytes / 2
    assert rows["right"]["copy_share"] == 2 and rows["copy"]["copy_share"] == 1


def test_thread_count_is_set_for_the_case_and_restored():
    before = torch.get_num_threads()
    with engine.thread_count(before + 1):
        assert torch.get_num_threads() == before + 1
    assert torch.get_num_threads() == before


# ---- result file


def test_result_file_is_complete_after_every_case(tmp_path, record):
    path = tmp_path / "new" / "result.json"
    store = engine.Store(path, {"cpu": "a"})
    for count in (1, 2):
        store.add({**record, "id": f"case {count}"})
        content = json.loads(path.read_text())
        assert content["schema"] == engine.SCHEMA and len(content["cases"]) == count
    assert os.listdir(path.parent) == ["result.json"]
    resumed = engine.Store(path, {"cpu": "a"}, resume=True)
    assert resumed.done("case 2") and not resumed.done("case 3")
    assert not engine.Store(path, {}).records


def test_record_schema(record):
    assert set(record) == {
        "id", "family", "op", "label", "shape", "dtype", "device", "threads", "input_bytes",
        "providers", "gates", "seconds",
    }  # fmt: skip
    assert record["input_bytes"] == 64 * 4 and record["shape"] == [64]
    measured = row(record, "copy")
    assert set(measured["seconds"]) == set(measured["ratio"]) == {"p20", "median", "p80"}
    assert measured["seconds"]["p20"] <= measured["seconds"]["p80"]
    assert json.loads(json.dumps(record)) == record


# ---- memory


@pytest.mark.skipif(not os.path.exists("/proc/self/clear_refs"), reason="needs Linux's clear_refs")
@pytest.mark.parametrize("mebibytes", [0, 48, 96])
def test_cpu_peak_sees_memory_that_the_call_has_given_back(mebibytes):
    # Buffers above glibc's largest mmap threshold return to the system when freed.
    x = torch.zeros(1 << 20)

    def call():
        temporary = torch.ones(mebibytes << 18)
        x.add_(1)
        del temporary

    peak = memory.cpu_peak(Runner(call)) / 2**20
    assert abs(peak - mebibytes) < 4


# ---- picture


def test_picture_names_its_source(record, tmp_path):
    pytest.importorskip("matplotlib")
    from benchmarks import plot

    machine = {"gpu": None, "cpu": "A CPU", "cores": 2, "torch": "2", "commit": "abc"}
    machine["date"] = "2026-01-02T03:04:05"
    target = tmp_path / "out" / "picture.png"
    plot.draw({"machine": machine, "cases": [record]}, target, "a/b.json")
    assert target.read_bytes().startswith(b"\x89PNG")
    rows = [row | {"accepted_by_trajectory": [1.5, 2.0]} for row in plot.timed(record)]
    target.unlink()
    grown = record | {"op": "accepted", "providers": rows}
    plot.draw({"machine": machine, "cases": [grown]}, target, "a/b.json")
    assert target.read_bytes().startswith(b"\x89PNG")
    caption = plot.caption(machine, "a/b.json")
    assert all(part in caption for part in ("a/b.json", "A CPU", "abc", "2026-01-02"))
    with pytest.raises(ValueError, match="no measured case"):
        plot.draw({"machine": machine, "cases": []}, target, "a/b.json")


def test_a_picture_without_matplotlib_names_the_extra(monkeypatch, tmp_path, capsys):
    """Before anything is measured."""
    from benchmarks import plot

    monkeypatch.setitem(sys.modules, "matplotlib", None)
    assert cli.main(["policy_loss", "--quick", "--plot", str(tmp_path / "picture.png")]) == 2
    assert "--plot needs matplotlib (pip install 'reasonkern[bench]')" in capsys.readouterr().err
    monkeypatch.setattr(sys, "argv", ["plot", "result.json", "picture.png"])
    with pytest.raises(SystemExit, match="benchmarks.plot needs matplotlib"):
        plot.main()


# ---- generation


@pytest.mark.parametrize("op", ["accepted", "generate", "flips"])
def test_the_cases_of_generation_run(op, monkeypatch):
    """On an untrained model: every provider's texts are those of plain decoding."""
    made = arithmetic.generate(2, samples=2)
    learnt = Tokenizer.learn(trace.prompt + trace.text for trace in made)
    model = seeded(FIRST_PIECE + len(learnt.pieces), 96, 32, 1, 0).eval()
    monkeypatch.setattr(generation, "trained", lambda label, device: (model, learnt))
    case = next(c for c in generation.FAMILY.cases if c.op == op)
    case = dataclasses.replace(case, shape=(*case.shape[:2], 1), pairs=1)
    record = engine.run_case(generation.FAMILY, case, FAST)
    rows = {row["name"]: row for row in record["providers"]}
    assert {row["status"] for row in rows.values()} <= {"ok", "skipped"}
    subject = record["providers"][0]
    assert subject["tokens"] > 0 if op == "flips" else subject["accepted"] >= 1
