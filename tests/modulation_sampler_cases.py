"""Controlled decoding with a model that is a function of the text, step by step and by trees."""

from __future__ import annotations

import random
from dataclasses import dataclass, replace
from typing import Any

import torch
from contract import bits
from speculation_cases import generator, random_tree
from torch import Tensor

import reasonkern as rk

VOCAB, END, WAIT, EOS = 24, 5, 7, 2
SETS = rk.TokenSets.from_ids({"reflect": [3, 8, 9], "switch": [4, 8], "all but few": range(6, 22)})
STATISTICS = ("logprob", "entropy", "entropy_raw", "confidence", "max_prob", "trigger")
FILTERS = ("temperature", "top_k", "top_p", "min_p", "seed")


@dataclass
class Request:
    """A seeded request and its text so far."""

    spec: rk.Modulation
    seed: int
    temperature: float
    top_k: int
    top_p: float
    min_p: float
    scale: float

    def row(self, text: list[int]) -> Tensor:
        """The model: (VOCAB,) logits after a text. Ties are frequent, the end is likely."""
        key = hash((self.seed, *text[-6:], len(text))) % (1 << 62)
        z = torch.randn(VOCAB, generator=generator(key)) * self.scale
        z[END] += 1.5
        if key % 7 == 0:
            z[torch.randperm(VOCAB, generator=generator(key + 1))[:9]] = -float("inf")
        return (z * 4).round() / 4 if key % 3 else z


def random_spec(r: random.Random) -> rk.Modulation:
    """Every control may meet every other one."""
    maybe = lambda share, part: part if r.random() < share else None  # noqa: E731
    budget = r.choice([None, None, 0, 3, 9, 14])
    minimum = r.choice([None, None, 2, 6]) if budget is None or budget > 6 else None
    phrase = r.choice([[END], [10, END], [11, 11, END], [11, 11, 12, END, 13]])
    soft = maybe(0.5, rk.SoftBudget(r.choice([0.0, 0.4, 0.7]), 0.25)) if budget else None
    return rk.Modulation(
        cyclic=maybe(0.6, rk.Cyclic(r.uniform(-4, 4), r.choice([4, 6.5, 30]), shift=r.random())),
        tip=maybe(0.5, rk.TIP(3.0, 4, set="switch")),
        constant=maybe(0.3, rk.Constant(r.uniform(-2, 2), set="switch")),
        ban=maybe(0.3, rk.Ban("all but few")) if minimum is None and soft is None else None,
        schedule=maybe(0.3, rk.Schedule([(2, 0.0), (8, 3.0), (12, -3.0)])),
        budget=None if budget is None else rk.Budget(budget, phrase, soft),
        min_think=None if minimum is None else rk.MinThink(minimum, r.choice([0, 2]), [WAIT, 14]),
        deepconf=maybe(0.3, rk.DeepConf(r.uniform(2.5, 5.0), r.choice([1, 3, 8]), eos=EOS)),
        entropy_trigger=maybe(0.5, rk.EntropyTrigger(r.choice([2, 5]), r.random(), 0.2, 0.1, 1.0)),
        think_start=r.choice([None, None, 15]),
        think_end=END,
    )  # fmt: skip


def random_requests(count: int, seed: int) -> list[Request]:
    r = random.Random(seed)
    return [
        Request(
            random_spec(r), r.getrandbits(63), r.choice([0.0, 0.7, 1.0, 1.5]),
            r.choice([0, 0, 5, 12]), r.choice([1.0, 1.0, 0.8]), r.choice([0.0, 0.0, 0.05]),
            r.choice([0.5, 1.5, 3.0]),
        )
        for _ in range(count)
    ]  # fmt: skip


def call(backend: Any, op: str, *args: Any) -> Any:
    """Results on the CPU; arguments that are changed in place lie on the backend's device."""
    to = backend.to
    out = backend(op, *([to(t) for t in a] if isinstance(a, list) else to(a) for a in args))
    return [x.cpu() for x in out] if isinstance(out, (tuple, list)) else to_cpu(out)


def to_cpu(x: Any) -> Any:
    return x.cpu() if isinstance(x, Tensor) else x


@dataclass
class Engine:
    """Requests in slots of a state, decoded by the operators of one backend."""

    requests: list[Request]
    backend: Any
    slots: list[int]

    def __post_init__(self) -> None:
        self.state = rk.ModulationState(max(self.slots) + 2, SETS, device=self.backend.device)
        for slot, request in zip(self.slots, self.requests, strict=True):
            self.state.add(slot, request.spec, prompt_tokens=[1, 15] if slot % 2 else [1])
        self.slot = torch.tensor(self.slots)
        self.text: list[list[int]] = [[] for _ in self.requests]
        self.told: list[list[tuple[Any, ...]]] = [[] for _ in self.requests]

    def op(self, name: str, *args: Any) -> Any:
        return call(self.backend, name, *args)

    def filters(self) -> list[Tensor]:
        types = (torch.float32, torch.int64, torch.float32, torch.float32, torch.int64)
        rows = [
            torch.tensor([getattr(q, name) for q in self.requests], dtype=dtype)
            for name, dtype in zip(FILTERS, types, strict=True)
        ]
        return [*rows, torch.tensor([len(text) for text in self.text])]

    def commit(self, tokens: Tensor, length: Tensor, statistics: list[Tensor]) -> None:
        entropy, confidence = statistics[1], statistics[3]
        self.op("commit_", self.slot, tokens, length, entropy, confidence, *self.state.tensors)
        columns = [x.bool() if x.dtype == torch.bool else bits(x) for x in statistics]
        for b, n in enumerate(length.tolist()):
            self.text[b] += tokens[b, :n].tolist()
            self.told[b] += zip(*(c[b, :n].tolist() for c in columns), strict=True)

    def step(self) -> None:
        """One token each, by `sample_controlled`."""
        logits = torch.stack([q.row(t) for q, t in zip(self.requests, self.text, strict=True)])
        token, *statistics = self.op("sample_controlled", logits, None, *self.filters(), self.slot,
                                     list(self.state.tensors))  # fmt: skip
        columns = [x.unsqueeze(-1) for x in statistics]
        self.commit(token.unsqueeze(-1), torch.ones_like(token), columns)

    def speculate(self, tree: rk.DraftTree, likely: list[list[int]], seed: int) -> Tensor:
        """One step by `verify_controlled`; `likely` are texts that drafts mostly follow."""
        r = random.Random(seed)
        batch, nodes = len(self.requests), tree.nodes
        logits = torch.empty(batch, nodes, VOCAB)
        drafts = torch.zeros(batch, nodes, dtype=torch.int64)
        for b, (request, text) in enumerate(zip(self.requests, self.text, strict=True)):
            prefixes = [text]
            logits[b, 0] = request.row(text)
            for node in range(1, nodes):
                before = prefixes[int(tree.parents[node])]
                follows = before == likely[b][: len(before)] and len(before) < len(likely[b])
                right = likely[b][len(before)] if follows else 0
                token = right if follows and r.random() < 0.7 else r.randrange(VOCAB)
                prefixes.append([*before, token])
                drafts[b, node] = token
                logits[b, node] = request.row(prefixes[-1])
        out = self.op("verify_controlled", logits, drafts, torch.ones_like(drafts).bool(), None,
                      None, *tree.children, *self.filters(), None, None, None, None, tree.depth,
                      tree.max_children, 4, self.slot, list(self.state.tensors), True)  # fmt: skip
        self.commit(out[0], out[1], list(out[7:]))
        return out[1]


def decode_both_ways(backend: Any, count: int, steps: int, seed: int) -> tuple[Engine, Engine, int]:
    """Engines that have decoded at least `steps` tokens; the number of accepted drafts."""
    requests = random_requests(count, seed)
    if backend.name == "triton" and backend.slow:  # interpreted filters take seconds a row
        requests = [replace(q, top_k=0, top_p=1.0) for q in requests]
    order = random.Random(seed).sample(range(2 * count), count)
    plain, by_trees = Engine(requests, backend, order), Engine(requests, backend, order)
    for _ in range(steps):
        plain.step()
    accepted = 0
    for turn in range(10 * steps):
        done = min(len(text) for text in by_trees.text)
        if done >= steps:
            break
        nodes = 2 + (seed + turn) % 8
        tree = rk.DraftTree.chain(nodes) if turn % 3 == 0 else random_tree(nodes, seed + turn)
        length = by_trees.speculate(tree, plain.text, 1000 * seed + turn)
        accepted += int((length - 1).clamp_min(0).sum())
    return plain, by_trees, accepted
