"""The demo: traces, tokenizer, windows, the eager formulation, and a tiny run end to end."""

import gzip
import json
import math
import os
import re
import signal
import subprocess
import sys
from pathlib import Path
from random import Random

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import reasonkern as rk
from reasonkern import demo
from reasonkern.__main__ import main
from reasonkern._progress import progress
from reasonkern.demo import arithmetic, control, eager, report, tokenizer, traces, windows
from reasonkern.demo.context import prepare
from reasonkern.demo.train import build_objective

REPOSITORY = Path(__file__).resolve().parent.parent
REAL = REPOSITORY.parent / "shared" / "data" / "traces" / "traces.jsonl.gz"
GENERATED = arithmetic.generate(problems=8, samples=4, seed=3)
TOKENIZER = tokenizer.Tokenizer.learn(trace.prompt + trace.text for trace in GENERATED)
TINY = {"steps": 8, "batch": 2, "window": 48, "width": 32, "layers": 1, "pairs": 2, "problems": 2}


# ---- tokenizer


@given(st.text(st.characters(exclude_categories=())))
def test_tokenizer_round_trip(text):
    ids = TOKENIZER.encode(text)
    assert TOKENIZER.decode(ids) == text
    assert all(0 <= token < tokenizer.VOCABULARY for token in ids)


@given(st.lists(st.sampled_from([trace.text[:40] for trace in GENERATED] + ["Wait,", "é", "\n"])))
def test_tokenizer_round_trip_on_known_words(parts):
    text = " ".join(parts)
    assert TOKENIZER.decode(TOKENIZER.encode(text)) == text


def test_tokenizer_learns_words_deterministically():
    texts = [trace.text for trace in GENERATED]
    again = tokenizer.Tokenizer.learn(texts)
    assert again.pieces == tokenizer.Tokenizer.learn(texts).pieces
    assert len(again.encode(" Wait")) == 1
    assert len(again.encode(texts[0])) < 0.7 * len(texts[0])  # digits stay single
    assert tokenizer.VOCABULARY >= 32_000


def test_tokenizer_keeps_digits_apart():
    assert len(TOKENIZER.encode("1234")) == 4


# ---- traces

GOOD = {"problem_id": 1, "prompt": "p", "text": "t", "correct": True}


def lines(*records):
    return "\n".join(r if isinstance(r, str) else json.dumps(r) for r in records).encode()


def without(name):
    return {key: value for key, value in GOOD.items() if key != name}


MALFORMED = {
    "missing field": (lines(GOOD, without("correct")), r"line 2: field 'correct' is missing"),
    "string for bool": (lines({**GOOD, "correct": "yes"}), r"line 1: field 'correct' must be true"),
    "int for bool": (lines({**GOOD, "correct": 1}), r"field 'correct' must be .*got int 1"),
    "float id": (lines({**GOOD, "problem_id": 1.5}), r"field 'problem_id' must be an integer"),
    "bool id": (lines({**GOOD, "problem_id": True}), r"field 'problem_id' must be an integer"),
    "null text": (lines(GOOD, "", {**GOOD, "text": None}), r"line 3: field 'text' must be"),
    "empty text": (lines({**GOOD, "text": ""}), r"field 'text' must be a non-empty string"),
    "not JSON": (lines(GOOD, '{"problem_id": 1,'), r"line 2, column \d+: not JSON"),
    "not an object": (lines(GOOD, "[1, 2]"), r"line 2: expected a JSON object, got list \[1, 2\]"),
    "nested too deeply": (b"[" * 200_000, r"line 1.*not JSON"),
    "not UTF-8": (lines(GOOD) + b"\n\xff\xfe", r"line 2: not UTF-8 \(byte 1"),
    "empty": (b"", r"holds no traces"),
    "blank lines": (b"\n \n", r"holds no traces"),
    "one outcome": (lines(GOOD, {**GOOD, "problem_id": 2, "correct": False}), r"no group has both"),
    "truncated gzip": (gzip.compress(lines(GOOD) * 50)[:-12], r"truncated file"),
    "damaged gzip": (gzip.compress(lines(GOOD))[:-8] + bytes(8), r"gzip stream is damaged"),
}


@pytest.mark.parametrize("case", MALFORMED)
def test_malformed_traces_name_file_line_and_field(case, tmp_path, capsys):
    content, message = MALFORMED[case]
    path = tmp_path / "bad.jsonl"
    path.write_bytes(content)
    with pytest.raises(traces.TraceError, match=message) as error:
        traces.load_traces(path)
    assert str(path) in str(error.value)
    assert main(["demo", "--traces", str(path), "--out", str(tmp_path)]) == 2
    assert str(error.value) in capsys.readouterr().err


def test_missing_file_is_a_trace_error(tmp_path):
    with pytest.raises(traces.TraceError, match="cannot be read"):
        traces.load_traces(tmp_path / "absent.jsonl")


@pytest.mark.parametrize("pack", [bytes, gzip.compress])
def test_traces_are_read_plain_and_compressed(pack, tmp_path):
    path = tmp_path / "traces"
    path.write_bytes(pack(lines(GOOD, {**GOOD, "correct": False, "extra": 1})))
    assert [trace.correct for trace in traces.load_traces(path)] == [True, False]


def test_advantages_are_normalised_within_the_group():
    records = [
        traces.Trace(p, "", "t", c) for p, c in [(1, True), (2, True), (1, False), (2, True)]
    ]
    records += [traces.Trace(1, "", "t", False), traces.Trace(1, "", "t", False)]
    advantages = traces.group_advantages(records)
    assert set(advantages) == {0, 2, 4, 5}
    values = torch.tensor([advantages[index] for index in (0, 2, 4, 5)], dtype=torch.float64)
    assert values[0] > 0 > values[1]
    assert values.mean().abs() < 1e-12
    assert (values.std(correction=0) - 1).abs() < 1e-12


def test_many_traces_are_cut_to_whole_mixed_groups():
    kept = traces.first_groups(GENERATED, 10)
    assert len(kept) == 8 and {trace.problem_id for trace in kept} == {0, 1}


# ---- generated arithmetic


@given(st.integers(0, 10_000))
@settings(max_examples=20, deadline=None)
def test_generated_traces_are_verifiable(seed):
    made = arithmetic.generate(problems=3, samples=4, seed=seed)
    assert len(traces.mixed_groups(made)) == 3
    for trace in made:
        assert "Wait, " in trace.text
        assert trace.correct == arithmetic.verify(trace.prompt, trace.text)
        if not trace.correct:
            assert arithmetic.slips(trace.text)


def test_generated_traces_catch_some_slips_and_are_reproducible():
    caught = [trace for trace in GENERATED if trace.correct and arithmetic.slips(trace.text)]
    assert caught and all("is wrong" in trace.text for trace in caught)
    assert arithmetic.generate(8, 4, seed=3) == GENERATED != arithmetic.generate(8, 4, seed=4)


def test_verifier_rejects_other_answers():
    trace = next(trace for trace in GENERATED if trace.correct)
    answer = arithmetic.expected_answer(trace.prompt)
    assert not arithmetic.verify(trace.prompt, trace.text.replace(f"{{{answer}}}", "{7777}"))
    assert not arithmetic.verify(trace.prompt, "no box")
    with pytest.raises(ValueError, match="Start with"):
        arithmetic.expected_answer("What is love?")


# ---- windows


def test_windows_shift_targets_and_mask_prompt_and_end():
    encoded = windows.encode(GENERATED, TOKENIZER)
    batch = windows.random_batch(encoded, 6, 40, Random(0))
    assert not batch.mask[:, -1].any()
    assert batch.mask.any(1).all()
    used = batch.mask[:, :-1]
    assert torch.equal(batch.targets[:, :-1][used], batch.ids[:, 1:][used])
    whole = windows.logged_batches(encoded[:4], 1, 4, 400, Random(0))[0]
    assert whole.mask.sum(1).sort().values.tolist() == sorted(
        len(TOKENIZER.encode(trace.text)) + 1 for trace in GENERATED[:4]
    )


@given(st.integers(8, 300), st.integers(1, 300), st.integers(1, 600))
def test_windows_cover_the_text(window, prompt, text):
    encoded = windows.Encoded(list(range(prompt + text)), prompt, 0, 1.0)
    starts = encoded.starts(window)
    targets = {t for s in starts for t in range(s + 1, min(s + window, prompt + text))}
    assert targets >= set(range(prompt, prompt + text))
    assert starts == sorted(set(starts))


def test_a_huge_group_is_cut_with_both_outcomes():
    right, wrong = (windows.Encoded([1] * 20, 5, 0, advantage) for advantage in (0.5, -2.0))
    batches = windows.logged_batches([right] * 300 + [wrong] * 9, 2, 4, 16, Random(0))
    assert len(batches) == 2
    assert {value for batch in batches for value in batch.advantage.tolist()} == {0.5, -2.0}


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


def test_a_slow_machine_takes_fewer_steps(tmp_path):
    assert demo.run(demo.Config(out=tmp_path, minutes=1e-6, **TINY)) == 0
    results = json.loads((tmp_path / "results.json").read_text())
    assert len(results["sft"]["loss"]) == len(results["policy"]["steps"]) == 1
    assert report.table(results).count("1 of 8 steps in the time budget") == 2


def test_a_deviation_of_nan_is_the_worst():
    results = {"deviations": [{"loss": 0.0, "gradient": math.nan}, {"loss": 0.0, "gradient": 1e-7}]}
    assert report.summary(results)["deviation"]["worst"] == math.inf


def test_without_matplotlib_the_message_names_the_extra(monkeypatch, tmp_path, capsys):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    assert report.write_plots({}, tmp_path) == []
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
    if "plots skipped" not in printed:
        assert (tmp_path / "stage1_fine_tuning.png").stat().st_size > 5000


@pytest.mark.skipif(not REAL.exists(), reason=f"no real traces at {REAL}")
def test_real_traces_load_and_round_trip():
    real = traces.load_traces(REAL)
    learnt = tokenizer.Tokenizer.learn(trace.text for trace in real)
    assert len(traces.mixed_groups(real)) == 5
    for trace in real:
        assert learnt.decode(learnt.encode(trace.text)) == trace.text
    assert all(sequence.advantage for sequence in windows.encode(real, learnt))


@pytest.mark.parametrize("minutes", ["0", "-1", "nan", "inf", "x"])
def test_a_budget_that_is_none(minutes: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        main(["demo", "--minutes", minutes])
    error = capsys.readouterr().err
    assert stop.value.code == 2
    assert f"finite number > 0, got {minutes}" in error or "invalid float value: 'x'" in error
