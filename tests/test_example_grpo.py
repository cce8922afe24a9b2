"""examples/grpo.py: the loss is GRPO's over each answer, and the model learns to add."""

from __future__ import annotations

from typing import Any

import pytest
import torch

pytest.importorskip("transformers")

import reasonkern as rk
from examples import grpo


def test_a_reward_counts_from_the_start_of_the_answer() -> None:
    answers = torch.tensor([[11, grpo.EOS]]).repeat(4, 1)
    completions = torch.tensor(
        [[11, grpo.EOS, 0], [11, 11, grpo.EOS], [5, grpo.EOS, 0], [grpo.EOS, 11, 0]]
    )
    assert grpo.reward_of(completions, answers).tolist() == [1.0, 0.5, 0.0, 0.0]


def test_a_step_takes_the_gradient_of_the_formula(monkeypatch: pytest.MonkeyPatch) -> None:
    """The first update is on-policy: that of -mean over answers of the mean of A * logp."""
    monkeypatch.setattr(grpo, "EPOCHS", 1)
    seen: dict[str, Any] = {}

    class Optimizer:
        def step(self) -> None:
            seen["gradient"] = [p.grad.clone() for p in model.parameters()]

        def zero_grad(self) -> None:
            model.zero_grad()

    def generate(*args: Any, **options: Any) -> Any:
        seen["texts"] = texts = whole(*args, **options)
        return texts

    whole = grpo.generate
    monkeypatch.setattr(grpo, "generate", generate)
    model = grpo.make_model()
    prompts, answers = grpo.make_prompts(torch.Generator().manual_seed(1), 8)
    table = rk.NgramTable(1 << 8, vocab_size=model.config.vocab_size)
    mean, metrics = grpo.step(model, Optimizer(), rk.Objective.grpo(), prompts, answers, table, 3)
    assert metrics.compute()["ratio_mean"] == pytest.approx(1, abs=1e-5)

    tokens, lengths = seen["texts"].sequences, seen["texts"].lengths
    reward = grpo.reward_of(tokens[:, 4:], answers.repeat_interleave(grpo.GROUP, 0))
    assert mean == pytest.approx(reward.mean().item()) and reward.std() > 0
    groups = reward.view(8, grpo.GROUP)
    advantage = (groups - groups.mean(-1, keepdim=True)) / (groups.std(-1, keepdim=True) + 1e-4)
    loss = torch.zeros(())
    for row, length, a in zip(tokens, lengths.tolist(), advantage.flatten(), strict=True):
        logp = model(row[None, : 4 + length]).logits[0].log_softmax(-1)
        taken = logp[3 : 3 + length].gather(-1, row[4 : 4 + length, None])
        loss = loss - a * taken.mean() / len(tokens)
    loss.backward()
    torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    for gradient, parameter in zip(seen["gradient"], model.parameters(), strict=True):
        torch.testing.assert_close(gradient, parameter.grad, rtol=1e-3, atol=1e-6)


@pytest.mark.slow
def test_the_model_learns(capsys: pytest.CaptureFixture[str]) -> None:
    rewards = grpo.main(["--steps", "160"])
    assert sum(rewards[-20:]) / 20 > 0.5 > 0.2 > sum(rewards[:20]) / 20
    assert capsys.readouterr().out.count("ESS") == 8
