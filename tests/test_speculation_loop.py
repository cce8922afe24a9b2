"""Table, drafts and verification together, on a toy model whose laws are known."""

from __future__ import annotations

import pytest
import torch
from speculation_cases import generator

import reasonkern as rk

VOCAB, BATCH, STEPS = 12, 60, 40
TREE = rk.DraftTree([-1, 0, 0, 1, 1, 3, 5])
TABLE = 2.5 * torch.randn(VOCAB, VOCAB, VOCAB, generator=generator(0))


def rows(tokens: torch.Tensor, before: torch.Tensor) -> torch.Tensor:
    """The toy model's logits after the last two tokens."""
    return TABLE[before, tokens]


def step(table, text, seeds, mode, temperature):
    context = torch.tensor([t[-2:] for t in text])
    position = torch.tensor([len(t) - 2 for t in text])
    drafted = table.draft(
        context, TREE, temperature=temperature, seed=seeds, position=position, mode=mode
    )
    parents = TREE.parents.long().clamp_min(0)
    before = drafted.tokens[:, parents]
    before[:, 0] = context[:, -2]
    out = rk.verify_tree(
        rows(drafted.tokens, before), drafted, TREE, temperature=temperature, seed=seeds,
        position=position, mode=mode, topk=6,
    )  # fmt: skip
    table.update_verified(context, out)
    for b, t in enumerate(text):
        t += out.tokens[b, : out.length[b]].tolist()


def plain(seeds, temperature):
    text = [torch.zeros(BATCH).long(), torch.zeros(BATCH).long()]
    for n in range(STEPS):
        logits = rows(text[-1], text[-2])
        text.append(rk.sample(logits, temperature=temperature, seed=seeds, position=n))
    return torch.stack(text[2:], 1).tolist()


@pytest.mark.parametrize("temperature", [0.0, 0.8])
@pytest.mark.parametrize("mode", ["shared", "target-only"])
def test_equality_gives_the_plain_text_and_learns(mode, temperature):
    seeds = rk.request_seeds(3, BATCH)
    table = rk.NgramTable(1 << 12, vocab_size=VOCAB, orders=(2,), topk=6)
    text, calls = [[0, 0] for _ in range(BATCH)], 0
    while min(map(len, text)) < STEPS + 2:
        step(table, text, seeds, mode, temperature)
        calls += 1
    assert [t[2 : STEPS + 2] for t in text] == plain(seeds, temperature)
    assert calls < 0.7 * STEPS  # it does speculate


def test_rejection_follows_the_target_while_the_table_learns():
    """The law of each token after its two predecessors, over all requests and steps."""
    table = rk.NgramTable(1 << 12, vocab_size=VOCAB, orders=(2,), topk=6)
    text, seeds = [[0, 0] for _ in range(600)], rk.request_seeds(4, 600)
    for _ in range(12):
        step(table, text, seeds, "rejection", 0.9)
    counts = torch.zeros(VOCAB, VOCAB, VOCAB)
    for t in text:
        for a, b, c in zip(t, t[1:], t[2:], strict=False):
            counts[a, b, c] += 1
    law = (TABLE.double() / 0.9).softmax(-1)
    report = rk.speculation.laws.g_test("transition", counts.flatten(0, 1), law.flatten(0, 1))
    assert report.holds, str(report)
    assert sum(map(len, text)) > 1.5 * 600 * 12  # it does speculate
