"""Cases of verification: a visited row against softmax of it, a step against sampling its rows."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

import reasonkern as rk
from benchmarks.case import DTYPES, Case, Gate, Provider, Runner, Tolerance, Truth
from reasonkern import _load

VOCAB, TEMPERATURE, DEPTH = 151_936, 0.6, 3


@dataclass
class Step:
    """Rows (B, N, V), and drafts that are accepted to the last node of a chain."""

    logits: Tensor
    draft: rk.Draft
    tree: rk.DraftTree
    seed: Tensor


def inputs(case: Case, seed: int) -> Step:
    """peaked: nothing but the top survives pruning; flat: every token does, at first."""
    batch, nodes, vocab = case.shape
    g = torch.Generator().manual_seed(seed)
    logits = torch.randn(batch, nodes, vocab, generator=g)
    if case.label.startswith("peaked"):
        logits *= 2.0
        logits[..., 5], logits[..., 77] = 35.0, 34.0
    else:
        logits *= 0.5
    logits = logits.to(DTYPES[case.dtype])
    seeds, tree = rk.request_seeds(seed, batch), rk.DraftTree.chain(nodes)
    tokens = torch.zeros(batch, nodes, dtype=torch.int64)
    for node in range(nodes - 1):
        row = logits[:, node]
        tokens[:, node + 1] = rk.sample(row, temperature=TEMPERATURE, seed=seeds, position=node)
    draft = rk.Draft(tokens, torch.ones_like(tokens, dtype=torch.bool))
    return Step(logits, draft, tree, seeds)


def verify(step: Step) -> rk.Verified:
    return rk.verify_tree(
        step.logits, step.draft, step.tree, temperature=TEMPERATURE, seed=step.seed, position=0
    )


def ours(case: Case, step: Step) -> Runner:
    names = ("tokens", "length", "topk_ids")
    outputs = lambda out: {n: getattr(out, n).double() for n in names}  # noqa: E731
    return Runner(lambda: verify(step), outputs, repeat=case.shape[0] * case.shape[1])


def softmax(case: Case, step: Step) -> Runner:
    rows = step.logits.flatten(0, 1).split(1)
    return Runner(lambda: [torch.softmax(row, -1) for row in rows], repeat=len(rows))


def sampling(case: Case, step: Step) -> Runner:
    """`rk.sample` on the rows that the step visits, in one call."""
    rows, nodes = step.logits.flatten(0, 1), case.shape[1]
    position = torch.arange(nodes).repeat(case.shape[0])
    seed = step.seed.repeat_interleave(nodes)
    return Runner(
        lambda: rk.sample(rows, temperature=TEMPERATURE, seed=seed, position=position),
        repeat=len(rows),
    )


def truth(case: Case, step: Step) -> Truth:
    batch = case.shape[0]
    fill = lambda x, dtype: torch.full((batch,), x, dtype=dtype)  # noqa: E731
    out = _load.implementation("verify_tree", "reference")(
        step.logits, *step.draft[:2], None, None, *step.tree.children,
        fill(TEMPERATURE, torch.float32), fill(0, torch.int64), fill(1.0, torch.float32),
        fill(0.0, torch.float32), step.seed, fill(0, torch.int64), None, None, None, None,
        step.tree.depth, step.tree.max_children, 12,
    )  # fmt: skip
    values = {"tokens": out[0].double(), "length": out[1].double(), "topk_ids": out[3].double()}
    return Truth(values, dict.fromkeys(values, Tolerance(0.0, 0.0)))


def case_of(label: str, dtype: str, shape: tuple[int, int], *gates: Gate, peer: str) -> Case:
    return Case(
        "verify_row" if peer == "softmax" else "verify_step", (*shape, VOCAB), dtype, "cpu",
        passes=1, providers=("reasonkern", peer), threads=1, label=label, gates=gates,
    )  # fmt: skip


CASES = (
    case_of("peaked", "float32", (8, 1), Gate("time", 0.5, "softmax"), peer="softmax"),
    case_of("flat", "float32", (8, 1), Gate("time", 1.5, "softmax"), peer="softmax"),
    case_of("peaked", "bfloat16", (8, 1), peer="softmax"),
    case_of("flat", "bfloat16", (8, 1), peer="softmax"),
    case_of("peaked", "float32", (4, DEPTH + 1), peer="sample"),
    case_of("flat", "float32", (4, DEPTH + 1), peer="sample"),
)
PROVIDERS = {
    "reasonkern": Provider("reasonkern", {"verify_row": ours, "verify_step": ours}),
    "softmax": Provider("softmax", {"verify_row": softmax}, checked=False),
    "sample": Provider("sample", {"verify_step": sampling}, checked=False),
}
