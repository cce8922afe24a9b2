"""Random and hard inputs of `sample`, `verify_tree` and `compact_kv_`, as operator arguments."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from reasonkern import DraftTree

DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
INF = float("inf")


def generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def random_tree(nodes: int, seed: int) -> DraftTree:
    g = generator(seed)
    parents = [int(torch.randint(max(0, i - 5), i, (), generator=g)) for i in range(1, nodes)]
    return DraftTree([-1, *parents])


@dataclass(frozen=True)
class Rows:
    """Per-request arguments, in the operators' order."""

    temperature: Tensor
    top_k: Tensor
    top_p: Tensor
    min_p: Tensor
    seed: Tensor
    position: Tensor

    def args(self) -> tuple[Tensor, ...]:
        return tuple(getattr(self, name) for name in self.__dataclass_fields__)


def rows(batch: int, vocab: int, seed: int, filters: str = "mixed") -> Rows:
    """filters: "off", or "mixed" where each is on for some rows; some rows are greedy."""
    g = generator(seed)

    def uniform(low: float, high: float) -> Tensor:
        return low + (high - low) * torch.rand(batch, generator=g)

    temperature = uniform(0.3, 1.6)
    if batch > 2:
        temperature[batch // 2] = 0.0
    integers = torch.randint(-(2**62), 2**62, (batch,), generator=g)
    position = torch.randint(0, 2**34, (batch,), generator=g)
    off = torch.zeros(batch, dtype=torch.int64), torch.ones(batch), torch.zeros(batch)
    if filters == "off":
        return Rows(temperature, *off, integers, position)
    top_k = torch.randint(0, min(vocab, 300) + 2, (batch,), generator=g)
    return Rows(temperature, top_k, uniform(0.05, 1.3), uniform(-0.05, 0.2), integers, position)


def random_logits(shape: tuple[int, ...], seed: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """A spread that differs from row to row; every third row has many ties."""
    g = generator(seed)
    x = torch.randn(shape, generator=g) * 6 * torch.rand((*shape[:-1], 1), generator=g)
    flat = x.view(-1, shape[-1])
    flat[::3] = (flat[::3] * 2).round() / 2
    return x.to(dtype)


def random_mask(shape: tuple[int, ...], seed: int) -> Tensor:
    words = (*shape[:-1], (shape[-1] + 31) // 32)
    return torch.randint(-(2**31), 2**31, words, generator=generator(seed), dtype=torch.int32)


@dataclass(frozen=True)
class Step:
    """Arguments of the operator verify_tree."""

    logits: Tensor
    tokens: Tensor
    valid: Tensor
    tree: DraftTree
    rows: Rows
    q_ids: Tensor | None = None
    q_logprob: Tensor | None = None
    eos: Tensor | None = None
    max_length: Tensor | None = None
    node_mask: Tensor | None = None
    num_nodes: Tensor | None = None
    topk: int = 4

    def args(self) -> tuple[Any, ...]:
        t = self.tree
        return (
            self.logits, self.tokens, self.valid, self.q_ids, self.q_logprob, *t.children,
            *self.rows.args(), self.eos, self.max_length, self.node_mask, self.num_nodes,
            t.depth, t.max_children, self.topk,
        )  # fmt: skip


def likely_tokens(logits: Tensor, tree: DraftTree, seed: int) -> Tensor:
    """(B, N) drafts that a walk often follows: the child of rank r holds a likely token of its
    parent's row."""
    batch, nodes, vocab = logits.shape
    g = generator(seed)
    noisy = logits.float().nan_to_num(-1e9, -1e9, -1e9) + torch.randn(logits.shape, generator=g)
    order = noisy.argsort(-1, descending=True)
    tokens = torch.randint(0, vocab, (batch, nodes), generator=g)
    for node in range(1, nodes):
        parent, rank = int(tree.parents[node]), int(tree.ranks[node])
        tokens[:, node] = order[:, parent, min(rank, vocab - 1)]
    return tokens


def draft_law(
    logits: Tensor, tree: DraftTree, entry: int, seed: int
) -> tuple[Tensor, Tensor, Tensor]:
    """(tokens, q_ids, q_logprob): children drawn without replacement from a law near the target's,
    which leaves some slots empty."""
    batch, nodes, vocab = logits.shape
    g = generator(seed)
    entry = min(entry, vocab)
    noisy = logits.float().nan_to_num(-1e9, -1e9, -1e9) + torch.randn(logits.shape, generator=g)
    value, ids = noisy.topk(entry, -1)
    empty = torch.rand(value.shape, generator=g) < 0.2
    empty[..., 0] = False
    value = value.masked_fill(empty, -INF)
    logprob = value.log_softmax(-1)
    ids = ids.masked_fill(empty, -1)
    uniform = torch.rand(value.shape, generator=g).clamp(1e-9, 1 - 1e-7)
    order = (logprob - (-uniform.log()).log()).argsort(-1, descending=True)
    tokens = torch.randint(0, vocab, (batch, nodes), generator=g)
    for node in range(1, nodes):
        parent, rank = int(tree.parents[node]), int(tree.ranks[node])
        if rank < entry:
            slot = order[:, parent, rank : rank + 1]
            tokens[:, node] = ids[:, parent].gather(1, slot).squeeze(1)
    return tokens, ids, logprob


def random_step(
    seed: int,
    *,
    batch: int = 5,
    nodes: int = 9,
    vocab: int = 211,
    rejection: bool = False,
    filters: str = "mixed",
    dtype: torch.dtype = torch.float32,
    limits: bool = True,
    bad: bool = True,
) -> Step:
    """A step whose walks differ: padding, invalid nodes, masks, EOS, caps and bad rows included."""
    g = generator(seed + 1000)
    tree = random_tree(nodes, seed)
    logits = random_logits((batch, nodes, vocab), seed, dtype)
    if bad and batch > 4:
        logits[0, 1, vocab // 3] = float("nan")
        logits[1, 0, vocab - 1] = INF
        logits[2, 1] = -INF
    entry: tuple[Tensor | None, Tensor | None] = (None, None)
    if rejection:
        tokens, *entry = draft_law(logits, tree, 6, seed)  # type: ignore[assignment]
    else:
        tokens = likely_tokens(logits, tree, seed)
    valid = torch.rand((batch, nodes), generator=g) < 0.9
    valid[:, 0] = True
    if batch > 5:
        valid[5, 0] = False
    tokens[:, -1] = torch.tensor([-1, vocab, 2**40])[torch.arange(batch) % 3]
    step = Step(logits, tokens, valid & (tokens >= -1), tree, rows(batch, vocab, seed, filters),
                *entry)  # fmt: skip
    if not limits:
        return step
    return replace(
        step,
        eos=torch.randint(0, vocab, (3,), generator=g),
        max_length=torch.randint(0, tree.depth + 3, (batch,), generator=g),
        num_nodes=torch.randint(1, nodes + 1, (batch,), generator=g),
        node_mask=random_mask(logits.shape, seed) | random_mask(logits.shape, seed + 1),
    )


def on(backend, args):
    return [backend.to(a) for a in args]


def cases(backend, few: int, many: int) -> range:
    """Interpreted filters take seconds a row: one case there."""
    if backend.name == "triton" and backend.slow:
        return range(1)
    return range(few if backend.slow else many)
