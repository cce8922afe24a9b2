"""The demo: the eager formulation, and a tiny run end to end."""

import json
import math
import os
import re
import signal
import subprocess
import sys
import warnings
from pathlib import Path

import pytest
import torch

import reasonkern as rk
from reasonkern import demo
from reasonkern.__main__ import _shorten_spins, main
from reasonkern._progress import progress
from reasonkern.demo import control, eager, report, tokenizer
from reasonkern.demo.context import _shown, prepare
from reasonkern.demo.train import build_objective

REPOSITORY = Path(__file__).resolve().parent.parent
TINY = {"steps": 8, "batch": 2, "window": 48, "width": 32, "layers": 1, "pairs": 2, "problems": 2}


# ---- the eager formulation


@pytest.mark.parametrize("name", eager.FORMULAS)
def test_eager_formulation_equals_policy_loss(name):
    generator = torch.Generator().manual_seed(5)
    logits = torch.randn(4, 9, 37, generator=generator, dtype=torch.float64)
    targets = torch.randint(37, (4, 9), generator=generator)
    mask = torch.rand(4, 9, generator=generator) < 0.8
    logprob, _ = eager.logprob_and_entropy(logits, targets)
    drift = 0.01 if name in ("gspo", "vespo") else 0.5
    old = logprob + drift * torch.randn(4, 9, generator=generator, dtype=torch.float64)
    advantage = torch.tensor([1.0, -1.0, 0.7, -0.7], dtype=torch.float64)
    weight = rk.token_weights(mask, mode="token-mean").double()
    rows = eager.Rows(targets, advantage, weight, old, old + 0.1)
    objective = build_objective(name)
    leaf, twin = logits.clone().requires_grad_(), logits.clone().requires_grad_()
    expected = eager.policy_loss(leaf, rows, name, objective, objective.kl.coef)
    expected.backward()
    out = rk.policy_loss(
        twin,
        targets,
        old_logprob=old,
        rollout_logprob=old,
        advantage=advantage,
        weight=weight,
        objective=objective,
        ref_logprob=rows.ref_logprob,
    )
    out.loss.backward()
    torch.testing.assert_close(out.loss.detach(), expected.detach(), rtol=1e-9, atol=1e-12)
    torch.testing.assert_close(twin.grad, leaf.grad, rtol=1e-7, atol=1e-10)


def test_every_token_and_sequence_objective_has_a_formula():
    named = {
        name
        for name, member in vars(rk.Objective).items()
        if isinstance(member, classmethod) and not name.startswith("_") and name != "custom"
    }
    assert set(eager.FORMULAS) == named


# ---- the run


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    out = tmp_path_factory.mktemp("demo")
    status = demo.run(demo.Config(out=out, **TINY))
    return out, status, json.loads((out / "results.json").read_text())


def test_tiny_run_learns_and_agrees_with_eager(finished):
    _, status, results = finished
    assert status == 0 and results["complete"]
    assert results["data"]["vocabulary"] >= 32_000
    losses = results["sft"]["loss"]
    assert len(losses) == TINY["steps"] and losses[-1] < losses[0]
    deviation = results["summary"]["deviation"]
    assert deviation["steps"] == 8
    assert deviation["loss"] <= 1e-4 and deviation["gradient"] <= 1e-4


def test_tiny_run_reports_every_metric_of_stage_2(finished):
    _, _, results = finished
    steps = results["policy"]["steps"]
    assert len(steps) == 4 * results["policy"]["batches"]
    assert results["summary"]["policy"]["nonfinite"] == 0
    first = steps[0]
    assert first["ratio_min"] == first["ratio_max"] == 1.0 and first["kl_ref_k3"] == 0.0
    assert steps[-1]["kl_ref_k3"] > 0
    assert {"entropy", "ess_frac", "clip_frac_pos_high", "kl_old_k3"} <= set(first)


def test_tiny_run_solves_problems_with_and_without_speculation(finished):
    _, _, results = finished
    solved = results["solve"]
    assert [run["trajectories"] for run in solved["outcomes"]] == [1, 4, 16]
    assert solved["equal"] == solved["texts"] == TINY["problems"] * 32
    for run in [*solved["outcomes"], solved["at_once"]]:
        assert run["tokens_per_step"] >= 1 and min(run["tokens_per_second"].values()) > 0


def test_tiny_run_controls_reflection_and_budget(finished):
    _, _, results = finished
    runs = {run["name"]: run for run in results["control"]["runs"]}
    assert list(runs) == ["plain", "CyclicReflex", "budget 64", "both"]
    for run in runs.values():
        assert run["texts"] == TINY["problems"] * control.TRAJECTORIES
        assert 0 < run["thinking"] <= run["tokens"] == sum(run["tokens_at"]) / run["texts"]
        assert run["reflections"] == sum(run["reflections_at"]) / run["texts"]
        assert 0 < run["entropy"] <= math.log(results["data"]["vocabulary"])
    assert runs["CyclicReflex"]["reflections"] > runs["plain"]["reflections"]


def test_a_budget_ends_thinking_and_the_wave_moves_reflection(monkeypatch):
    """In a window of more than a period and the budget, by a model that has learnt little."""
    monkeypatch.setattr(control, "PERIOD", 24)
    monkeypatch.setattr(control, "BUDGET", 30)
    context = prepare(demo.Config(**(TINY | {"window": 128})))
    control.control_reflection(context)
    plain, cyclic, budget, both = context.results["control"]["runs"]
    for run in (budget, both):
        assert run["thinking"] <= 31  # the newline before the end
    half = [sum(cyclic["reflections_at"][i::3]) for i in range(3)]  # rises, turns, falls
    assert half[0] > 4 * half[2] and sum(cyclic["reflections_at"]) > sum(plain["reflections_at"])


def test_texts_without_reflection_skip_the_control(capsys):
    context = prepare(demo.Config(**TINY))
    context.tokenizer = tokenizer.Tokenizer.learn(["one two three"] * 3)
    control.control_reflection(context)
    assert "control" not in context.results
    assert "stage 4 skipped: the traces have no Wait" in capsys.readouterr().out


def test_tiny_run_measures_time_and_memory(finished):
    _, _, results = finished
    cost = results["cost"]
    assert all(len(cost["seconds"][name]) == TINY["pairs"] for name in ("fused", "eager"))
    assert cost["shape"] == [TINY["batch"], TINY["window"], results["data"]["vocabulary"]]
    eager_extra = cost["extra_bytes"]["eager"]
    assert eager_extra is None or eager_extra >= cost["logits_bytes"]


def test_plots_are_drawn(finished):
    pytest.importorskip("matplotlib")
    image = pytest.importorskip("matplotlib.image")
    out, _, _ = finished
    for name in (
        "stage1_fine_tuning",
        "stage2_policy",
        "stage3_speculation",
        "stage4_control",
        "loss_cost",
    ):
        pixels = image.imread(out / f"{name}.png")
        assert min(pixels.shape[:2]) > 300
        assert pixels[..., :3].std() > 0.02


def test_a_plot_without_reflections_warns_of_nothing(finished):
    plots = pytest.importorskip("reasonkern.demo.plots")
    _, _, results = finished
    runs = [run | {"reflections_at": [0] * len(run["tokens_at"])}
            for run in results["control"]["runs"]]  # fmt: skip
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        plots._control(results["control"] | {"runs": runs})


def test_a_file_may_have_any_name(tmp_path):
    """One that looks like a formula ended the run after its last stage."""
    plots = pytest.importorskip("reasonkern.demo.plots")
    figure, _ = plots._figure(1, 1, r"Stage 1: fine-tuning on x$\frac$.jsonl")
    figure.savefig(tmp_path / "figure.png")
    assert _shown(Path(os.fsdecode(b"a\xff.jsonl"))) == "a\ufffd.jsonl"


def test_table_names_the_figures(finished):
    out, _, results = finished
    text = report.table(results)
    for words in (
        "nats/token",
        "stage 3, 16 at once",
        "stage 4, both",
        "times faster",
        "max |Δloss|",
        "within 1e-04",
    ):
        assert words in text


def test_one_problem_is_no_problems(finished):
    _, _, results = finished
    few = results["data"] | {"traces": 4, "problems": 1, "correct": 2}
    assert ": 4 traces of 1 problem, 2 correct, " in report.table(results | {"data": few})


def test_a_slow_machine_takes_fewer_steps(tmp_path):
    assert demo.run(demo.Config(out=tmp_path, minutes=1e-6, **TINY)) == 0
    results = json.loads((tmp_path / "results.json").read_text())
    assert len(results["sft"]["loss"]) == len(results["policy"]["steps"]) == 1
    text = report.table(results)
    assert text.count("1 of 8 steps in the time budget") == 2
    assert [run["trajectories"] for run in results["solve"]["outcomes"]] == [1]
    assert "1 of 1 texts equal with and without speculation (64 without the time budget)" in text
    assert re.search(r"total time +\d+ s, over the budget of 0 s", text)


def test_the_table_says_why_speculation_is_slower_with_few_answers(finished):
    _, _, results = finished
    run = {"trajectories": 1, "tokens_per_step": 1.1}
    slow = run | {"tokens_per_second": {"plain": 300.0, "speculation": 275.0}}
    fast = run | {"tokens_per_second": {"plain": 275.0, "speculation": 300.0}}
    for outcomes, count in (([fast], 0), ([slow, slow, fast], 1)):
        solved = results["solve"] | {"outcomes": outcomes, "at_once": fast}
        text = report.table(results | {"solve": solved})
        assert text.count("takes 1.20 × a plain one's time: with 1.10 tokens") == count


def test_the_command_starts_anew_with_threads_that_spin_a_short_while(monkeypatch):
    """Only as a command of its own, and not against what the environment asks for."""
    started = []
    monkeypatch.setattr(os, "execv", lambda *given: started.append(given))
    monkeypatch.setattr(os, "environ", {})
    monkeypatch.setattr(sys, "orig_argv", ["python", "-m", "ipykernel_launcher", "-f", "x.json"])
    _shorten_spins()
    assert not started and os.environ == {}
    monkeypatch.setattr(sys, "orig_argv", ["python", "-m", "reasonkern", "demo"])
    for _ in range(2):
        _shorten_spins()
    assert os.environ == {"GOMP_SPINCOUNT": "1000"}
    assert started == [(sys.executable, [sys.executable, "-m", "reasonkern", "demo"])]


def test_a_deviation_of_nan_is_the_worst():
    results = {"deviations": [{"loss": 0.0, "gradient": math.nan}, {"loss": 0.0, "gradient": 1e-7}]}
    assert report.summary(results)["deviation"]["worst"] == math.inf


def test_without_matplotlib_the_message_names_the_extra(monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    assert not report.can_plot()
    assert "reasonkern[demo]" in capsys.readouterr().out


def test_without_tqdm_progress_is_plain_lines(monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "tqdm", None)
    with progress("stage", 40) as update:
        for step in range(40):
            update(f"loss {step}")
    printed = capsys.readouterr().out.splitlines()
    assert len(printed) == 10
    assert re.fullmatch(r"stage: 40/40 \[\d+ s\] loss 39", printed[-1])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--objective", "magic"], "--objective: expected one of ppo, .*got 'magic'"),
        (["--device", "nowhere"], "--device nowhere: not usable here"),
        (["--device", "meta"], "--device meta: not usable here"),
        (["--seed", str(2**63)], r"--seed: expected an integer in \[-2\^63, 2\^63\), got 9223"),
        (["--out", "{file}/sub"], "--out .*cannot be made"),
    ],
)
def test_bad_options_are_one_line(arguments, message, tmp_path, capsys):
    (tmp_path / "file").touch()
    filled = [argument.replace("{file}", str(tmp_path / "file")) for argument in arguments]
    assert main(["demo", "--out", str(tmp_path), *filled]) == 2
    printed = capsys.readouterr().err
    assert re.match("error: " + message, printed) and printed.count("\n") == 1


def test_info_lists_the_ops(capsys):
    assert main(["info"]) == 0
    assert "policy_loss" in capsys.readouterr().out


def interrupted_run(out, stop_at):
    """Runs the demo until `stop_at` appears in its progress, then sends Ctrl-C."""
    command = [sys.executable, "-m", "reasonkern", "demo", "--out", str(out)]
    command += ["--steps", "20000", "--batch", "1", "--window", "24"]
    process = subprocess.Popen(
        command,
        cwd=REPOSITORY,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        env={**os.environ, "PYTHONUNBUFFERED": "1"},
        # A runner in the background may have made the signal ignored, which children inherit.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )
    seen = b""
    while stop_at not in seen:
        piece = os.read(process.stdout.fileno(), 4096)
        assert piece, seen.decode()
        seen += piece
    process.send_signal(signal.SIGINT)
    rest, _ = process.communicate(timeout=60)
    return process.returncode, (seen + rest).decode()


def test_ctrl_c_leaves_the_results_so_far(tmp_path):
    status, printed = interrupted_run(tmp_path, b"loss ")
    assert status == 130, printed
    assert "interrupted; writing the results so far" in printed and "Traceback" not in printed
    results = json.loads((tmp_path / "results.json").read_text())
    assert not results["complete"] and results["sft"]["loss"] and "policy" not in results
    if "no plots" not in printed:
        assert (tmp_path / "stage1_fine_tuning.png").stat().st_size > 5000


@pytest.mark.parametrize("minutes", ["0", "-1", "nan", "inf", "x"])
def test_a_budget_that_is_none(minutes: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        main(["demo", "--minutes", minutes])
    error = capsys.readouterr().err
    assert stop.value.code == 2
    assert f"finite number > 0, got {minutes}" in error or "invalid float value: 'x'" in error
