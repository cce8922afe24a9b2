"""Table, drafts and verification together, on a toy model whose laws are known."""

from __future__ import annotations

from contextlib import contextmanager

import pytest
import torch
from generation_cases import MODEL, PROMPTS, table_of
from launches import Launches
from speculation_cases import generator

import reasonkern as rk
from reasonkern import _checks
from reasonkern.generation import generate

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


def by_rejection(logits, draft, tree, temperature, seed, position):
    given = {"temperature": temperature, "seed": seed, "position": position}
    out = rk.verify_tree(logits, draft, tree, mode="rejection", **given)
    return out.tokens, out.length


def everything(context, logits, key):
    """What makes tensors of its own, given those of a caller."""
    tree, table = rk.DraftTree.default(6), rk.NgramTable(64, vocab_size=VOCAB, orders=(2,))
    table.update(context, context, torch.full_like(context, -2) * 0.5)
    given = {"temperature": 0.8, "seed": 3, "position": 5}
    drafted = table.draft(context, tree, **given)
    out = rk.verify_tree(logits, drafted, tree, eos=[VOCAB], max_length=4, num_nodes=5, **given)
    table.update_verified(context, out, scope=0, all_nodes=(logits, drafted, tree))
    rk.compact_kv_(key, key.clone(), 0 * out.length, out.path, out.length)
    tuned = rk.tune_tree([[1, 2, 3] * 9], 5).parents
    report = rk.check_verifier(by_rejection, draws=1 << 12)
    texts = generate(MODEL, PROMPTS, temperature=0.5, max_new_tokens=9, table=table_of()).texts
    return [tree.attention_mask(), drafted.tokens, *out[:5], key, tuned, len(table), report, texts]


@contextmanager
def default_of(value):
    if isinstance(value, torch.device):
        with value:
            yield
        return
    before = torch.get_default_dtype()
    torch.set_default_dtype(value)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


@pytest.mark.parametrize("value", [torch.float64, torch.bfloat16, torch.device("meta")], ids=str)
def test_torchs_default_dtype_and_device_do_not_matter(value):
    """Tensors lie where those of the caller do, and have the dtypes that are written."""
    logits = torch.randn(2, 6, VOCAB, generator=generator(2))
    given = torch.tensor([[3, 4], [5, 6]]), logits, torch.randn(2, 1, 9, 4)
    expected = everything(*given[:2], given[2].clone())
    with default_of(value):
        found = everything(*given)
    assert list(map(str, found)) == list(map(str, expected))


def test_launches_of_a_step(monkeypatch):
    """At most, where values are not checked, as on a GPU; a number is one of its own."""
    monkeypatch.setattr(_checks, "reads_values", lambda tensor: False)
    table = rk.NgramTable(64, vocab_size=VOCAB, orders=(2, 1))
    context, scope = torch.tensor([[3, 4], [5, 6], [7, 8]]), torch.arange(3)
    logits = torch.randn(3, TREE.nodes, VOCAB, generator=generator(3))
    given = {"temperature": torch.full((3,), 0.8), "seed": rk.request_seeds(0, 3)}
    given["position"] = scope + 5
    numbers = given | {"temperature": 0.8}
    filters = {"top_k": scope + 3, "top_p": given["temperature"]}
    drafted = table.draft(context, TREE, **given)
    out = rk.verify_tree(logits, drafted, TREE, **given)
    layers = [torch.zeros(3, 1, 9, 4) for _ in range(4)]
    nodes = (logits, drafted, TREE)
    for most, call in (
        (1, lambda: table.draft(context, TREE, **given, scope=scope)),
        (2, lambda: table.draft(context, TREE, **numbers)),
        (3, lambda: rk.verify_tree(logits, drafted, TREE, **given)),
        (4, lambda: rk.verify_tree(logits, drafted, TREE, **numbers)),
        (1, lambda: rk.sample(logits[:, 0], **given, **filters, min_p=given["temperature"])),
        (2, lambda: rk.sample(logits[:, 0], **given, **filters)),
        (3, lambda: rk.sample(logits[:, 0], **given)),
        (6, lambda: table.update_verified(context, out)),
        (7, lambda: table.update_verified(context, out, scope=scope)),
        (13, lambda: table.update_verified(context, out, all_nodes=nodes)),
        (2, lambda: rk.compact_kv_(layers[:2], layers[2:], scope, out.path, out.length)),
    ):
        with Launches() as launches:
            call()
        assert launches.count.total() <= most
