"""GRPO in a training loop of your own: rollouts with a draft table, a fused loss; on CPU, offline.

A Qwen2 with 0.1 M random parameters learns to add: after "3 + 4 =" it has to write "7" and end the
text. A completion's reward is the share of that answer it gets right from its start.

    pip install "reasonkern[transformers]"      # once reasonkern is installed
    python examples/grpo.py                     # a minute or so
    python examples/grpo.py --objective gppo    # any objective whose constructor needs no argument
"""

from __future__ import annotations

import argparse
import os
from collections.abc import Sequence

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import torch  # noqa: E402
from torch import Tensor  # noqa: E402
from transformers import Qwen2Config, Qwen2ForCausalLM  # noqa: E402

import reasonkern as rk  # noqa: E402
from reasonkern.integrations.transformers import generate  # noqa: E402

PAD, EOS, PLUS, EQUALS, ZERO = range(5)  # ZERO + 7 is the digit 7
GROUP, EPOCHS, MICRO_BATCHES, NEW_TOKENS, TEMPERATURE = 16, 2, 2, 3, 1.0


def make_model() -> Qwen2ForCausalLM:
    torch.manual_seed(0)
    return Qwen2ForCausalLM(Qwen2Config(
        vocab_size=ZERO + 10, hidden_size=64, intermediate_size=128, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=64,
        pad_token_id=PAD, eos_token_id=EOS, bos_token_id=None,
    ))  # fmt: skip


def make_prompts(generator: torch.Generator, count: int) -> tuple[Tensor, Tensor]:
    """Sums below 10: (count, 4) tokens, (count, 2) answers."""
    a, b = torch.randint(5, (2, count), generator=generator)
    fill = torch.ones_like(a)
    prompts = torch.stack((ZERO + a, PLUS * fill, ZERO + b, EQUALS * fill), -1)
    return prompts, torch.stack((ZERO + a + b, EOS * fill), -1)


def reward_of(completions: Tensor, answers: Tensor) -> Tensor:
    """(N,) share of the answer that is right from its start."""
    right = completions[:, : answers.shape[-1]] == answers
    return right.int().cumprod(-1).float().mean(-1)


def step(
    model: Qwen2ForCausalLM,
    optimizer: torch.optim.Optimizer,
    objective: rk.Objective,
    prompts: Tensor,
    answers: Tensor,
    table: rk.NgramTable,
    seed: int,
) -> tuple[float, rk.PolicyMetrics]:
    """One batch of rollouts, `EPOCHS` updates; their mean reward, and the metrics of the last."""
    # Lossless, whatever policy the table has learnt from.
    texts = generate(
        model, prompts, temperature=TEMPERATURE, max_new_tokens=NEW_TOKENS, num_trajectories=GROUP,
        table=table, seed=seed,
    )  # fmt: skip
    tokens, start = texts.sequences, prompts.shape[-1]
    reward = reward_of(tokens[:, start:], answers.repeat_interleave(GROUP, 0))
    group = torch.arange(len(prompts)).repeat_interleave(GROUP)
    advantage = rk.shaping.group_advantages(reward, group)

    # The token that follows each position, and whether it is one of the completion.
    column = torch.arange(tokens.shape[-1])
    kept = column < start + texts.lengths[:, None]
    targets = tokens.roll(-1, -1)
    mask = kept.roll(-1, -1) & (column >= start - 1) & (column < tokens.shape[-1] - 1)
    weight = rk.token_weights(mask, "seq-mean-token-mean")  # of the whole batch, cut below
    with torch.no_grad():
        logits = model(tokens, attention_mask=kept.long()).logits
        stats = rk.token_stats(logits, targets, mask=mask, temperature=TEMPERATURE)

    metrics: list[rk.PolicyMetrics] = []
    for _ in range(EPOCHS):
        metrics.clear()
        for rows in torch.arange(len(tokens)).chunk(MICRO_BATCHES):
            out = rk.policy_loss(
                model(tokens[rows], attention_mask=kept[rows].long()).logits,
                targets[rows],
                old_logprob=stats.logprob[rows],
                advantage=advantage[rows],
                weight=weight[rows],
                objective=objective,
                temperature=TEMPERATURE,
                inplace_grad=True,
            )
            out.loss.backward()
            metrics.append(out.metrics)
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
    return reward.mean().item(), sum(metrics)


def main(arguments: Sequence[str] | None = None) -> list[float]:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--objective", default="grpo", help="default: %(default)s")
    parser.add_argument("--steps", type=int, default=200, help="default: %(default)s")
    options = parser.parse_args(arguments)
    objective = getattr(rk.Objective, options.objective)()
    model = make_model()
    optimizer = torch.optim.AdamW(model.parameters(), 1e-3)
    table = rk.NgramTable(1 << 12, vocab_size=model.config.vocab_size)
    generator, rewards = torch.Generator().manual_seed(0), []
    for n in range(options.steps):
        prompts, answers = make_prompts(generator, 8)
        reward, metrics = step(model, optimizer, objective, prompts, answers, table, seed=n)
        rewards.append(reward)
        if (n + 1) % 20 == 0:
            values = {name: value.item() for name, value in metrics.compute().items()}
            print(
                f"step {n + 1}: reward {sum(rewards[-20:]) / 20:.2f}, "
                f"entropy {values['entropy']:.2f}, clipped {values['clip_frac']:.3f}, "
                f"ESS {values['ess_frac']:.3f}",
                flush=True,
            )
    return rewards


if __name__ == "__main__":
    main()
