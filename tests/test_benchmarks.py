"""The benchmark engine: pairing, correctness before time, result file, gates, picture."""

from __future__ import annotations

import dataclasses
import json
import os
import sys

import pytest
import torch

from benchmarks import __main__ as cli
from benchmarks import check, engine, generation, memory, policy_loss, report, shaping, timing
from benchmarks.case import Case, Family, Gate, Provider, Runner, Skip, Tolerance, Truth
from reasonkern.demo import arithmetic
from reasonkern.demo.model import seeded
from reasonkern.demo.tokenizer import FIRST_PIECE, Tokenizer

FAST = engine.Effort(seconds=0.0, least_pairs=3, most_pairs=3, memory=False)


# ---- a family of one op, x -> 2 x


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


# ---- gates


def timed(name, ratio, **more):
    return {"name": name, "ratio": {"median": ratio}, "pairs": 5, "seconds": {}, **more}


@pytest.mark.parametrize(
    ("gate", "value", "status"),
    [
        (Gate("time", 2.0, "copy"), 2.0, "pass"),
        (Gate("time", 1.9, "copy"), 2.0, "fail"),
        (Gate("speedup", 18, "eager"), 18.5, "pass"),
        (Gate("speedup", 19, "eager"), 18.5, "fail"),
        (Gate("memory", 0.01), 2 / 256, "pass"),
        (Gate("memory", 0.005), 2 / 256, "fail"),
        (Gate("copy_share", 0.85), 0.9, "pass"),
        (Gate("copy_share", 0.95), 0.9, "fail"),
        (Gate("speedup", 1, "absent"), None, "not measured"),
        (Gate("time", 1.9, "copy", needs="avx512"), 2.0, "reported"),
        (Gate("time", 1.9, "copy", needs="avx2"), 2.0, "fail"),
    ],
)
def test_gate_verdicts(gate, value, status):
    rows = (
        {"name": "ours", "peak_bytes": 2, "copy_share": 0.9},
        timed("copy", 0.5),
        timed("eager", 18.5),
    )
    record = with_rows(*rows, gates=(gate,))
    verdict = record["gates"][0]
    assert (verdict["value"], verdict["status"]) == (value, status)
    assert engine.gates_hold([record]) == (status in ("pass", "reported"))
    assert verdict["status"] in report.table({**record, "providers": []})


def test_no_gate_holds_for_a_subject_that_does_not_match():
    record = with_rows(
        {"name": "ours", "status": "mismatch"}, timed("copy", 9.0), gates=(Gate("time", 2, "copy"),)
    )
    assert record["gates"][0]["status"] == "not measured" and not engine.gates_hold([record])


# ---- command line


@pytest.fixture
def toy(monkeypatch):
    """The command line over the toy family with these gates on its subject."""

    def use(*gates):
        case = dataclasses.replace(CASE, providers=("right", "copy", "wrong"), gates=gates)
        monkeypatch.setattr(cli.families, "load", lambda name: toy_family(case))
        monkeypatch.setattr(engine, "Effort", lambda: FAST)

    return use


@pytest.mark.parametrize(("bound", "status"), [(1e9, 0), (0.0, 1)])
def test_check_exits_1_when_a_gate_fails(toy, tmp_path, capsys, bound, status):
    toy(Gate("time", bound, "copy"))
    path = tmp_path / "r.json"
    assert cli.main(["--device", "cpu", "--check", "--json", str(path)]) == status
    content = json.loads(path.read_text())
    assert [r["name"] for r in content["cases"][0]["providers"]] == ["right", "copy"]
    lines = capsys.readouterr().out.splitlines()
    assert "torch" in lines[0] and "commit" in lines[0]
    assert lines[-1] == ("all gates hold" if status == 0 else "a gate FAILED")


def test_without_check_a_failed_gate_is_only_shown(toy, capsys):
    toy(Gate("time", 0.0, "copy"))
    assert cli.main(["--device", "cpu"]) == 0
    out = capsys.readouterr().out
    assert "— fail" in out and "✗" in out


def test_check_without_any_gate_is_not_a_success(toy):
    toy()
    assert cli.main(["--device", "cpu", "--check", "--case", "double"]) == 2


def test_case_whose_inputs_fail_is_recorded(toy, tmp_path, monkeypatch):
    toy(Gate("time", 1.0, "copy"))
    family = cli.families.load("toy")
    unlucky = dataclasses.replace(family, truth=lambda case, x: broken(x))
    monkeypatch.setattr(cli.families, "load", lambda name: unlucky)
    path = tmp_path / "r.json"
    assert cli.main(["--device", "cpu", "--check", "--json", str(path)]) == 1
    case = json.loads(path.read_text())["cases"][0]
    assert {r["status"] for r in case["providers"]} == {"failed"}
    assert case["gates"][0]["status"] == "not measured"


def test_interrupt_keeps_finished_cases(tmp_path, monkeypatch):
    cases = [dataclasses.replace(CASE, label=label, providers=("right",)) for label in "ab"]
    monkeypatch.setattr(cli.families, "load", lambda name: toy_family(*cases))
    real = engine.run_case

    def interrupted(family, case, *rest):
        if case.label == "b":
            raise KeyboardInterrupt
        return real(family, case, FAST)

    monkeypatch.setattr(engine, "run_case", interrupted)
    path = tmp_path / "r.json"
    assert cli.main(["--device", "cpu", "--json", str(path)]) == 130
    assert [c["label"] for c in json.loads(path.read_text())["cases"]] == ["a"]


def listed(capsys, *arguments):
    assert cli.main(["--list", "--device", "cpu", *arguments]) == 0
    lines = capsys.readouterr().out.splitlines()
    return [x.split()[0] for x in lines if x and not x.startswith(" ")]


def test_list_selects(capsys):
    stats = "token_stats/256x151936/float32/t2/cpu"
    assert listed(capsys, "--case", "token_stats/256x151936") == [stats]
    assert all("bfloat16" in case for case in listed(capsys, "--dtype", "bf16"))
    assert len(listed(capsys, "policy_loss", "--check")) == len(policy_loss.CPU_GATED)
    assert all(case.startswith("linear") for case in listed(capsys, "linear_policy_loss"))
    assert len(listed(capsys, "shaping", "--check")) == len(shaping.GATED)
    assert 0 < len(listed(capsys, "--quick")) < len(listed(capsys))


def test_threads_replace_the_cases_own_and_their_gates(capsys):
    loss = "policy_loss/dapo-entropy-inplace/256x151936/float32"
    assert len(listed(capsys, "--case", loss)) == 2
    assert listed(capsys, "--case", loss, "--threads", "3") == [f"{loss}/t3/cpu"]
    assert listed(capsys, "--check", "--threads", "3") == []


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


def test_a_gate_on_tokens_per_step():
    rows = {"name": "right", "accepted": 3.0}, {"name": "copy", "accepted": 2.0}
    gates = Gate("accepted", 1.25, "copy"), Gate("accepted", 2.0, "copy")
    record = with_rows(*rows, gates=gates)
    assert [g["value"] for g in record["gates"]] == [1.5, 1.5]
    assert [g["status"] for g in record["gates"]] == ["pass", "fail"]
    assert "3.00 tokens per step" in report.table(
        with_rows({**rows[0], "seconds": QUANTILES, "ratio": QUANTILES, "pairs": 1, "bandwidth": 1})
    )


QUANTILES = {"p20": 1.0, "median": 1.0, "p80": 1.0}


@pytest.mark.parametrize("op", ["accepted", "generate", "flips"])
def test_the_cases_of_generation_run(op, monkeypatch):
    """On an untrained model: every provider's texts are those of plain decoding."""
    made = arithmetic.generate(2, samples=2)
    learnt = Tokenizer.learn(trace.prompt + trace.text for trace in made)
    model = seeded(FIRST_PIECE + len(learnt.pieces), 96, 32, 1, 0).eval()
    monkeypatch.setattr(generation, "trained", lambda label: (model, learnt))
    case = next(c for c in generation.FAMILY.cases if c.op == op)
    case = dataclasses.replace(case, shape=(*case.shape[:2], 1), pairs=1)
    record = engine.run_case(generation.FAMILY, case, FAST)
    rows = {row["name"]: row for row in record["providers"]}
    assert {row["status"] for row in rows.values()} <= {"ok", "skipped"}
    subject = record["providers"][0]
    assert subject["tokens"] > 0 if op == "flips" else subject["accepted"] >= 1
