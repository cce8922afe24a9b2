"""Random requests over a small vocabulary, and one decoding loop that any backend can run."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

import reasonkern as rk
from reasonkern.modulation.state import ModulationState

VOCAB, START, END = 16, 14, 15
SETS = {"reflect": (1, 2, 3), "other": (3, 4, 5), "words": (2, 6)}


def random_phrase(r: random.Random, most: int, avoid: Sequence[int] = ()) -> list[int]:
    """Few distinct ids, so that its beginnings come up again in it and in the text."""
    ids = [v for v in (0, 1, 7, 8) if v not in avoid]
    return [r.choice(ids) for _ in range(r.randint(1, most))]


def random_budget(r: random.Random, end: int | None) -> rk.Budget:
    ids = random_phrase(r, 5)
    if end is not None:
        ids.insert(r.randint(0, len(ids)), end)
    tokens = r.randint(0, 12)
    soft = rk.SoftBudget(r.choice([0.0, 0.3, 0.7]), 0.25) if tokens and r.random() < 0.4 else None
    return rk.Budget(tokens, ids, soft)


def random_minimum(r: random.Random, most: int) -> rk.MinThink:
    tokens, ignore = r.randint(0, min(8, most)), r.randint(0, 2)
    wait = random_phrase(r, 3, avoid=[])
    return rk.MinThink(tokens, ignore or int(tokens == 0), wait)


def random_spec(r: random.Random, windows: bool = False) -> rk.Modulation:
    """Every part with probability one half."""

    def maybe(make: Callable[[], Any]) -> Any:
        return make() if r.random() < 0.5 else None

    def name() -> str:
        return r.choice(list(SETS))

    start = maybe(lambda: START)
    end = END if r.random() < 0.8 else None
    budget = maybe(lambda: random_budget(r, end))
    most = budget.tokens if budget is not None else 8
    ranges = [(r.randint(0, 5), r.randint(6, 20)), (30, 40)] if r.random() < 0.5 else None
    points = sorted(r.sample(range(30), r.randint(1, 4)))
    return rk.Modulation(
        cyclic=maybe(
            lambda: rk.Cyclic(r.uniform(-5, 5), r.choice([4, 7.5, 12.25]), r.uniform(-2, 2), ranges,
                              name())
        ),
        tip=maybe(lambda: rk.TIP(3.0, r.randint(0, 6), name())),
        constant=maybe(lambda: rk.Constant(r.uniform(-2, 2), name())),
        ban=maybe(lambda: rk.Ban("words")) if budget is None or budget.soft is None else None,
        schedule=maybe(lambda: rk.Schedule([(t, r.uniform(-2, 2)) for t in points], name())),
        budget=budget,
        min_think=maybe(lambda: random_minimum(r, most)) if end is not None else None,
        deepconf=maybe(lambda: rk.DeepConf(0.5, 5, eos=9)) if windows else None,
        entropy_trigger=maybe(lambda: rk.EntropyTrigger(window=4)) if windows else None,
        think_start=start,
        think_end=end,
    )  # fmt: skip


def random_prompt(r: random.Random) -> list[int]:
    return [r.choice([0, 1, 7, START, END]) for _ in range(r.randint(0, 6))]


def make_state(slots: int) -> ModulationState:
    return rk.ModulationState(slots, rk.TokenSets.from_ids(SETS))


def random_requests(slots: int, seed: int, windows: bool = False) -> list[tuple[Any, list[int]]]:
    r = random.Random(seed)
    return [(random_spec(r, windows), random_prompt(r)) for _ in range(slots)]


# ---- decoding


@dataclass
class Loop:
    """Decodes traces of a toy model with draft steps of one shape, on one backend.

    The model's logits depend on the position and the token before it; noise depends on the trace
    and the position: the token is a function of the text alone, however it is drafted.
    """

    backend: Any
    requests: list[tuple[rk.Modulation, list[int]]]
    seed: int = 0
    limit: int = 24
    """Tokens of a trace."""
    text: list[list[int]] = field(init=False)
    drafts: int = field(default=0, init=False)
    accepted: int = field(default=0, init=False)

    def __post_init__(self) -> None:
        g = torch.Generator().manual_seed(self.seed)
        traces = len(self.requests)
        self.model = 2 * torch.randn(self.limit + 8, VOCAB + 1, VOCAB, generator=g)
        blocked = torch.rand(self.model.shape, generator=g) < 0.1
        self.model[blocked] = -float("inf")  # a grammar, at times against a forced id
        uniform = torch.rand(traces, self.limit + 8, VOCAB, generator=g)
        self.noise = -(-uniform.clamp_min(1e-6).log()).log()
        self.temperature = torch.where(torch.rand(traces, generator=g) < 0.2, 0.0, 0.8)
        self.state = make_state(traces)
        self.slot = torch.arange(traces)
        self.text = [[] for _ in range(traces)]
        for slot, (spec, prompt) in enumerate(self.requests):
            self.state.add(slot, spec, prompt)

    def preempt(self, r: random.Random, share: float) -> None:
        """Takes traces out and puts them back into other slots."""
        out = [i for i in range(len(self.text)) if r.random() < share]
        slots = [int(self.slot[i]) for i in out]
        for slot in slots:
            self.state.remove(slot)
        r.shuffle(slots)
        for i, slot in zip(out, slots, strict=True):
            spec, prompt = self.requests[i]
            self.state.add(slot, spec, prompt, self.text[i])
            self.slot[i] = slot

    def step(self, parents: Sequence[int], r: random.Random, chain: bool) -> None:
        """Drafts a tree, modulates all rows in one call, walks it, commits what was accepted."""
        traces, nodes = len(self.text), len(parents)
        depth = depths(parents)
        length = torch.tensor([len(t) for t in self.text])
        last = torch.tensor([t[-1] if t else VOCAB for t in self.text])
        drafts = self._draft(parents, r, last, length)
        place = length[:, None] + torch.tensor(depth)
        logits = self.model[place, drafts].flatten(0, 1)
        heat = self.temperature.repeat_interleave(nodes)
        live = (length < self.limit).long()
        slot = torch.where(live > 0, self.slot, -1)
        if chain:
            local = torch.arange(nodes).repeat(traces)
            rows = (slot.repeat_interleave(nodes), local, drafts.flatten(), None)
        else:
            rows = (slot, None, drafts, torch.tensor(parents, dtype=torch.int32))
        self._call("modulate_logits_", logits, *rows, heat, *self.state.tensors, True)
        noise = self.noise[torch.arange(traces)[:, None], place]
        scaled = logits.view(traces, nodes, VOCAB) / self.temperature.clamp_min(1e-6)[:, None, None]
        noisy = torch.where(self.temperature[:, None, None] > 0, noise, 0.0)
        tokens, counts = self._walk(parents, drafts, (scaled + noisy).argmax(-1))
        self._call("commit_", slot, tokens, counts, None, None, *self.state.tensors)

    def _call(self, op: str, *args: Any) -> None:
        moved = [self.backend.to(a) for a in args]
        self.backend(op, *moved)
        for ours, theirs in zip(args, moved, strict=True):
            if isinstance(ours, Tensor) and ours is not theirs:
                ours.copy_(theirs)

    def _draft(
        self, parents: Sequence[int], r: random.Random, last: Tensor, length: Tensor
    ) -> Tensor:
        """(B, N): plausible ids, ids that mean something, and here and there the end of a draft."""
        g = torch.Generator().manual_seed(r.randrange(1 << 30))
        traces, nodes = len(self.text), len(parents)
        likely = [0, 1, 2, 3, 7, 8, 9, END, START, -1]
        pool = torch.tensor(likely)[torch.randint(0, len(likely), (traces, nodes), generator=g)]
        drafts = pool.clone()
        drafts[:, 0] = last
        depth = depths(parents)
        for i, parent in enumerate(parents[1:], start=1):
            before = drafts[:, parent].clamp_min(0)
            best = (
                self.model[length + depth[i] - 1, before]
                + self.noise[torch.arange(traces), length + depth[i] - 1]
            )
            good = torch.rand(traces, generator=g) < 0.7
            drafts[:, i] = torch.where(good, best.argmax(-1), pool[:, i])
            drafts[:, i] = torch.where(drafts[:, parent] < 0, -1, drafts[:, i])
        return drafts

    def _walk(
        self, parents: Sequence[int], drafts: Tensor, chosen: Tensor
    ) -> tuple[Tensor, Tensor]:
        children: list[list[int]] = [[] for _ in parents]
        for node, parent in enumerate(parents[1:], start=1):
            children[parent].append(node)
        tokens = torch.full((len(self.text), max(depths(parents)) + 1), -1)
        counts = torch.zeros(len(self.text), dtype=torch.int64)
        for b, text in enumerate(self.text):
            node: int | None = 0
            row = chosen[b].tolist()
            while node is not None and len(text) < self.limit:
                tokens[b, counts[b]] = row[node]
                counts[b] += 1
                text.append(row[node])
                node = next((c for c in children[node] if int(drafts[b, c]) == row[node]), None)
            self.drafts += len(parents) - 1
            self.accepted += max(0, int(counts[b]) - 1)
        return tokens, counts

    def run(self, shapes: Sequence[Sequence[int]] = ((-1,),), preempt: float = 0.0) -> None:
        """Decodes all traces; steps take the shapes in turn."""
        r = random.Random(self.seed + 1)
        step = 0
        while any(len(text) < self.limit for text in self.text):
            parents = shapes[step % len(shapes)]
            chain = list(parents) == list(range(-1, len(parents) - 1)) and step % 2 == 0
            self.step(parents, r, chain)
            if preempt:
                self.preempt(r, preempt)
            step += 1


def depths(parents: Sequence[int]) -> list[int]:
    out = [0]
    for parent in parents[1:]:
        out.append(out[parent] + 1)
    return out


def state_of(*specs: rk.Modulation, slots: int = 4) -> rk.ModulationState:
    state = make_state(slots)
    for slot, spec in enumerate(specs):
        state.add(slot, spec, [])
    return state


class Vocabulary:
    """What `from_tokenizer` asks of a tokenizer."""

    def __init__(self, *pieces: str) -> None:
        self.pieces = pieces

    def get_vocab(self) -> dict[str, int]:
        return {piece: 100 + i for i, piece in enumerate(self.pieces)}


BYTE_LEVEL = Vocabulary(
    "wait", "Ġwait", "Wait", "ĠWait", "ait", "ĠKuwait", "WAITING", "ĠcafÃ©", "Ġ"
)
SENTENCES = Vocabulary("▁wait", "wait", "Wait", "▁café", "▁Kuwait", "<0x0A>")


# ---- operators of a backend


def modulate(
    backend, logits: Tensor, state: rk.ModulationState, slot: Tensor, *rows, temperature=None,
    dense: bool = True,
) -> Tensor:  # fmt: skip
    """The operator of a backend on a copy."""
    rows = rows or (None, None, None)
    out = logits.to(backend.device, copy=True)
    args = [backend.to(x) for x in (slot, *rows, temperature, *state.tensors)]
    backend("modulate_logits_", out, *args, dense)
    return out.cpu()


def commit(backend, state: rk.ModulationState, slot, tokens, length, *statistics) -> None:
    statistics = statistics or (None, None)
    moved = [backend.to(x) for x in state.tensors]
    rows = [backend.to(x) for x in (slot, tokens, length, *statistics)]
    backend("commit_", *rows, *moved)
    for ours, theirs in zip(state.tensors, moved, strict=True):
        ours.copy_(theirs)


def one(spec: rk.Modulation, prompt=(), generated=()) -> rk.ModulationState:
    state = make_state(1)
    state.add(0, spec, prompt, generated)
    return state


def row_of(backend, spec, z, generated=(), prompt=(), temperature=1.0, dense=True) -> Tensor:
    """One modulated row."""
    z = torch.as_tensor(z).unsqueeze(0)
    heat = torch.tensor([temperature], dtype=torch.float32)
    state = one(spec, prompt, generated)
    return modulate(backend, z, state, torch.tensor([0]), temperature=heat, dense=dense).squeeze(0)
