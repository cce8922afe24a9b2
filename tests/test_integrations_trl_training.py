"""Training runs of our GRPOTrainer, beside TRL 1.16's and on two processes."""

from __future__ import annotations

import math
import os
import re
import socket
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest
import torch
from torch.testing import assert_close
from trl_cases import (
    LENGTHS,
    RANKED,
    ROOT,
    add_logprobs,
    assert_same_gradients,
    loss_and_gradients,
    make_batch,
)
from trl_fixtures import Make

pytest_plugins = ("trl_fixtures",)
pytestmark = pytest.mark.peers


def test_readme(trl: ModuleType, ours: ModuleType, example: ModuleType, tmp_path: Path) -> None:
    """Before and after, with the names they use; the trainer of the second one takes a step."""
    text = (ROOT / "README.md").read_text()
    section = text.partition("## Your trainer: TRL")[2].partition("\n## ")[0]
    blocks = re.findall(r"```python\n(.*?)```", section, re.S)
    assert len(blocks) == 2
    for block, kind in zip(blocks, (trl.GRPOTrainer, ours.GRPOTrainer), strict=True):
        names = {
            "model": example.make_model(), "reward": example.reward,
            "config": example.make_config(str(tmp_path), 1, logging_steps=1),
            "data": example.make_dataset(), "tokenizer": example.make_tokenizer(),
        }  # fmt: skip
        exec(block, names)
        assert type(names["trainer"]) is kind
    names["trainer"].train()
    assert names["trainer"].objective.name == "gppo"
    assert "reasonkern/ess_frac" in names["trainer"].state.log_history[0]


RUNS = (
    "gppo", "bapo", "gtpo", "ce_gppo", "gspo", "gmpo", "reinforce", "dppo_tv", "clip_cov",
    "high_entropy",
)  # fmt: skip


@pytest.mark.parametrize("objective", RUNS)
def test_twenty_steps_have_finite_plotted_metrics(
    objective: str, example: ModuleType, tmp_path: Path
) -> None:
    history = example.main(["--objective", objective, "--steps", "20", "--out", str(tmp_path)])
    assert len(history) == 2
    assert (tmp_path / f"trl_{objective}.png").stat().st_size > 10_000
    for row in history:
        for name, value in row.items():
            assert value is None or math.isfinite(value), name
        assert {"entropy", "reasonkern/clip_frac", "reasonkern/ess_frac"} <= row.keys()
        assert ("clip_ratio/region_mean" in row) == (objective != "bapo")
        assert row["reasonkern/rows_nonfinite"] == 0
        assert 0 < row["reasonkern/ess_frac"] <= 1
        assert row["reasonkern/entropy_pos"] > 0 and row["reasonkern/ratio_var"] > 0


def test_a_run_equals_trls(trl: ModuleType, ours: ModuleType, make: Make) -> None:
    """The same tokens are sampled as long as rounding does not part the two: 4 updates."""
    options = {
        "max_steps": 4, "per_device_train_batch_size": 32, "num_generations": 8,
        "num_iterations": 2, "gradient_accumulation_steps": 2, "loss_type": "dapo",
    }  # fmt: skip
    found = []
    for kind in (ours.GRPOTrainer, trl.GRPOTrainer):
        trainer = make(kind, logging_steps=1, **options)
        trainer.train()
        found.append((trainer.state.log_history, trainer.model.state_dict()))
    for mine, theirs in zip(found[0][0], found[1][0], strict=True):
        for name in theirs.keys() - {"step_time"}:
            if not name.startswith("train_"):
                assert mine[name] == pytest.approx(theirs[name], rel=1e-3, abs=1e-4), name
    for name, weight in found[1][1].items():
        assert_close(found[0][1][name], weight, rtol=1e-3, atol=1e-4)


@pytest.mark.slow
def test_the_example_raises_the_reward(example: ModuleType) -> None:
    history = example.main(["--steps", "300"])
    assert history[0]["reward"] < 0.15
    assert history[-1]["reward"] > history[0]["reward"] + 0.3


# ---- two processes


def launch(script: str, *arguments: str) -> str:
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    command = [
        sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2",
        "--master_port", str(port), script, *arguments,
    ]  # fmt: skip
    environment = os.environ | {
        "PYTHONPATH": f"{ROOT}:{ROOT / 'tests'}", "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1",
        "TRL_EXPERIMENTAL_SILENCE": "1",
    }  # fmt: skip
    done = subprocess.run(
        command, env=environment, cwd=ROOT, capture_output=True, text=True, timeout=600
    )
    assert done.returncode == 0, done.stderr[-4000:]
    return done.stdout


def test_two_processes_equal_trl_and_one_process(
    ours: ModuleType, model_folder: Path, tmp_path: Path, make: Make
) -> None:
    out = tmp_path / "ranks.pt"
    launch("tests/trl_ranks.py", str(model_folder), str(out))
    results = torch.load(out)
    for name, options in RANKED.items():
        (loss, mine, metrics), (expected, theirs, their_metrics) = (
            results[owner, name] for owner in ("ours", "trl")
        )
        assert_close(loss, expected, rtol=1e-5, atol=1e-7)
        assert_same_gradients(mine, theirs)
        assert metrics.pop("rows") == [sum(LENGTHS)]  # of both ranks
        for key, values in their_metrics.items():
            assert metrics[key] == pytest.approx(values, rel=1e-4, abs=1e-6, nan_ok=True), key
        single = make(ours.GRPOTrainer, **options)
        whole, gradients = loss_and_gradients(single, add_logprobs(single, make_batch()))
        assert_close(loss, whole, rtol=1e-5, atol=1e-7)
        assert_same_gradients(mine, gradients)


@pytest.mark.slow
def test_the_example_runs_on_two_processes() -> None:
    printed = launch("examples/trl_grpo.py", "--objective", "gppo", "--steps", "10")
    assert printed.count("gppo: mean reward") == 1
