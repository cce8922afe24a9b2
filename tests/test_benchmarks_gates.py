"""Gates on what was measured, and the command line that holds them."""

from __future__ import annotations

import dataclasses
import json

import pytest
from benchmark_cases import CASE, FAST, broken, toy_family, with_rows

from benchmarks import __main__ as cli
from benchmarks import engine, policy_loss, report, shaping
from benchmarks.case import Gate


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


QUANTILES = {"p20": 1.0, "median": 1.0, "p80": 1.0}


def test_a_gate_on_tokens_per_step():
    rows = {"name": "right", "accepted": 3.0}, {"name": "copy", "accepted": 2.0}
    gates = Gate("accepted", 1.25, "copy"), Gate("accepted", 2.0, "copy")
    record = with_rows(*rows, gates=gates)
    assert [g["value"] for g in record["gates"]] == [1.5, 1.5]
    assert [g["status"] for g in record["gates"]] == ["pass", "fail"]
    assert "3.00 tokens per step" in report.table(
        with_rows({**rows[0], "seconds": QUANTILES, "ratio": QUANTILES, "pairs": 1, "bandwidth": 1})
    )


# ---- command line


@pytest.fixture
def toy(monkeypatch):
    """The command line over the toy family with these gates on its subject."""

    def use(*gates):
        case = dataclasses.replace(CASE, providers=("right", "copy", "wrong"), gates=gates)
        monkeypatch.setattr(cli.families, "NAMES", ("toy",))
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
    quick = listed(capsys, "--quick")
    assert 0 < len(quick) < len(listed(capsys))
    narrower = listed(capsys, "--quick", "--case", "float32")
    assert narrower == [case for case in quick if "float32" in case] != []


def test_threads_replace_the_cases_own_and_their_gates(capsys):
    loss = "policy_loss/dapo-entropy-inplace/256x151936/float32"
    assert len(listed(capsys, "--case", loss)) == 2
    assert listed(capsys, "--case", loss, "--threads", "3") == [f"{loss}/t3/cpu"]
    assert listed(capsys, "--check", "--threads", "3") == []
