"""A small transformer in float64, and tables that have seen other trajectories of its prompts."""

from __future__ import annotations

from copy import deepcopy
from functools import cache
from typing import Any

import pytest
import torch
from speculation_cases import random_tree

import reasonkern as rk
from reasonkern.demo.model import Decoding, Transformer, seeded
from reasonkern.generation import generate

VOCAB, WINDOW, NEW = 40, 256, 60
PROMPTS = [[3, 1, 4, 1, 5], [9], [2, 6, 5, 3, 5, 8, 9, 7, 9], [3, 2]]
BATCHES = {
    1: (PROMPTS[:1], 1),
    4: (PROMPTS, 1),
    16: (PROMPTS, 4),
}  # requests: prompts, each so many
T = 0.3
LEAST = 1.3  # tokens per step below which a test of speculation tests nothing

TREES = {
    "default": rk.DraftTree.default(16), "random": random_tree(20, 3), "auto": "auto",
    "80": rk.DraftTree.default(80),
}  # fmt: skip


def make_model(seed: int = 0, scale: float = 15.0) -> Decoding:
    model = seeded(VOCAB, WINDOW, 32, 2, seed).double()
    for parameter in model.parameters():
        parameter.data *= scale if parameter.ndim > 1 else 1
    return Decoding(model)


MODEL = make_model()
DEVICES = (
    "cpu",
    pytest.param("cuda", marks=[
        pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU"),
    ]),
)  # fmt: skip


@cache
def model_on(device: str) -> Decoding:
    """`MODEL`, or a copy of it on another device: its texts are the same."""
    return MODEL if device == "cpu" else Decoding(deepcopy(MODEL.model).to(device))


def table_of(**changes: Any) -> rk.NgramTable:
    return rk.NgramTable(1 << 14, **({"vocab_size": VOCAB} | changes))


@cache
def lesson(requests: int, temperature: float) -> dict[str, Any]:
    table = table_of()
    generate(
        MODEL, BATCHES[requests][0], num_trajectories=16, seed=99, temperature=temperature,
        max_new_tokens=NEW, table=table, tree=rk.DraftTree.default(8),
    )  # fmt: skip
    return table.state_dict()


def taught(requests: int, temperature: float = T, device: str = "cpu") -> rk.NgramTable:
    """A table that has seen other trajectories of the prompts."""
    table = table_of(device=device)
    table.load_state_dict(lesson(requests, temperature))
    return table


def whole_text(model: Transformer, prompt: list[int], new: int, **options: Any) -> list[int]:
    """One causal pass over the whole text for every token, and `sample`."""
    text = list(prompt)
    for _ in range(new):
        with torch.no_grad():
            logits = model(torch.tensor([text]))[:, -1]
        text.append(int(rk.sample(logits, position=len(text), **options)))
    return text[len(prompt) :]
