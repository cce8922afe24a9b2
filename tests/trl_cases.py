"""Inputs of the tests against TRL: batches, trainers, gradients."""

from __future__ import annotations

from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

ROOT = Path(__file__).parent.parent
LENGTHS = (5, 3, 1, 0, 4, 5)  # completions; the fourth is masked out, as a truncated one can be
PROMPT, COMPLETION = 4, 5
RANKED: dict[str, dict[str, Any]] = {
    "dapo": {"loss_type": "dapo", "per_device_train_batch_size": 4},
    "grpo": {"loss_type": "grpo", "per_device_train_batch_size": 4},
}


def make_batch(seed: int = 0, **changes: Any) -> dict[str, Any]:
    """What TRL's `_compute_loss` gets; log-probabilities near those of a random model."""
    g = torch.Generator().manual_seed(seed)
    rows = len(LENGTHS)
    completion_mask = (torch.arange(COMPLETION) < torch.tensor(LENGTHS)[:, None]).long()
    prompt_mask = torch.ones(rows, PROMPT, dtype=torch.long)
    prompt_mask[1, :2] = 0  # padded on the left
    batch = {
        "prompt_ids": torch.randint(2, 14, (rows, PROMPT), generator=g),
        "prompt_mask": prompt_mask,
        "completion_ids": torch.randint(2, 14, (rows, COMPLETION), generator=g),
        "completion_mask": completion_mask,
        "advantages": torch.tensor([1.3, -0.7, 0.9, 1.0, -1.1, 0.0]),
        "num_items_in_batch": torch.tensor(50),
    }
    return batch | changes


def add_logprobs(trainer: Any, batch: dict[str, Any], seed: int = 1) -> dict[str, Any]:
    """Old log-probabilities up to e^+-0.5 from the model's own, reference ones as well."""
    ids = torch.cat((batch["prompt_ids"], batch["completion_ids"]), 1)
    mask = torch.cat((batch["prompt_mask"], batch["completion_mask"]), 1)
    with torch.no_grad():
        logp = trainer._get_per_token_logps_and_entropies(trainer.model, ids, mask, COMPLETION)[0]
    g = torch.Generator().manual_seed(seed)
    noise = [scale * torch.randn(logp.shape, generator=g) for scale in (0.5, 0.3, 0.3)]
    names = ("old_per_token_logps", "ref_per_token_logps", "sampling_per_token_logps")
    return batch | {name: logp + n for name, n in zip(names, noise, strict=True)}


def make_trainer(kind: Any, example: ModuleType, folder: Path, output: Path, **options: Any) -> Any:
    own = {name: options.pop(name) for name in ("objective", "logits") if name in options}
    options = {
        "per_device_train_batch_size": 6,
        "num_generations": 2,
        "num_iterations": 1,
    } | options
    model = options.pop("model", None) or example.Qwen2ForCausalLM.from_pretrained(folder)
    trainer = kind(
        model, example.reward, args=example.make_config(str(output), 1, **options),
        train_dataset=example.make_dataset(), processing_class=example.make_tokenizer(),
        **own,
    )  # fmt: skip
    trainer.current_gradient_accumulation_steps = trainer.args.gradient_accumulation_steps
    trainer.model.train()
    return trainer


def loss_and_gradients(trainer: Any, batch: dict[str, Any]) -> tuple[Tensor, dict[str, Tensor]]:
    trainer.model.zero_grad()
    loss = trainer.compute_loss(trainer.model, batch)
    loss.backward()
    return loss.detach(), {n: p.grad for n, p in trainer.model.named_parameters()}


def assert_same_gradients(mine: dict[str, Tensor], theirs: dict[str, Tensor]) -> None:
    """Within fp32 rounding: 2e-6 of the largest element (a key bias's gradient is 0 but for it)."""
    assert mine.keys() == theirs.keys()
    largest = max(g.abs().max().item() for g in theirs.values())
    assert largest > 1e-2
    for name, expected in theirs.items():
        difference = (mine[name] - expected).abs().max().item()
        assert difference <= 2e-6 * largest, f"{name}: {difference} of {largest}"


def assert_as_accurate(
    mine: dict[str, Tensor], theirs: dict[str, Tensor], truth: dict[str, Tensor]
) -> None:
    """At most twice the error of theirs against the same in float64, plus 2 ulp of the largest."""
    assert mine.keys() == theirs.keys() == truth.keys()
    largest = max(g.abs().max().item() for g in truth.values())
    assert largest > 1e-2
    off_by = lambda g, name: (g[name].double() - truth[name]).abs().max().item()  # noqa: E731
    for name in truth:
        allowed = 2 * off_by(theirs, name) + 4 * torch.finfo(torch.float32).eps * largest
        assert off_by(mine, name) <= allowed, f"{name}: {off_by(mine, name)} of {allowed}"
