"""Valid calls of the decoding loop, by the name of the function."""

from __future__ import annotations

from typing import Any

import torch
from calls_modulation import SLOTS, VOCAB, cloned, state
from calls_speculation import filters, tree
from draws import Arguments, Draw
from torch import Tensor

import reasonkern as rk
from reasonkern.generation import Pass, Statistics, chain_proposal, generate
from reasonkern.generation.trees import Timings

EMBEDDING = torch.randn(VOCAB, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


class Mean:
    """Attends alike to all it may see: whatever the cache holds wrongly changes the text."""

    vocab_size, device = VOCAB, torch.device("cpu")

    def __init__(self) -> None:
        self.timings: Timings = {}

    def __call__(self, given: Pass) -> Tensor:
        own = EMBEDDING[given.tokens]
        _, every = given.cache.update(own[:, None], own[:, None], 0)
        seen = given.seen.double()
        return (own + seen @ every[:, 0] / seen.sum(-1, keepdim=True)) @ EMBEDDING.T


MODEL = Mean()


def request(draw: Draw) -> Arguments:
    """Everything but what drafts. Two trajectories of one or more prompts, or one of each."""
    twice = draw.flag()
    prompts = [draw.ids(VOCAB, draw.integer(1, 5)).tolist() for _ in range(draw.integer(1, 3))]
    requests = len(prompts) * (1 + twice)
    arguments: Arguments = {
        "prompts": prompts,
        "twice": twice,
        "temperature": draw.choice(0.0, 0.7, draw.positive(requests)),
        "max_new_tokens": draw.integer(1, 6),
        "seed": draw.choice(0, (1 << 64) - 1, draw.ids(1 << 62, requests)),
        "eos": draw.choice((), [5, 6]),
        "state": draw.maybe(lambda: state(draw)),
        "slot": torch.tensor([*range(SLOTS), *(-1,) * SLOTS])[:requests],
    }
    return arguments | filters(draw, requests)


def from_table(draw: Draw) -> Arguments:
    arguments = request(draw)
    return arguments | {
        "table": rk.NgramTable(256, vocab_size=VOCAB, orders=(2, 1), topk=4),
        "tree": draw.choice("auto", tree(draw)),
        "scope": draw.choice(None, 1, draw.ids(3, len(arguments["slot"]))),
    }


def from_drafter(draw: Draw) -> Arguments:
    nodes = draw.integer(0, 5)
    parents = [draw.integer(-1, node - 1) for node in range(nodes)]
    tokens = draw.ids(VOCAB, nodes)
    return request(draw) | {"tokens": tokens, "parents": torch.tensor(parents, dtype=torch.int64)}


def decode(
    prompts: Any, twice: Any, state: Any, slot: Any, **arguments: Any
) -> tuple[list[list[int]], Statistics]:
    """Of at most 24 tokens a text, prompt included: any longer `max_new_tokens` is legal."""
    return generate(
        MODEL, prompts, num_trajectories=1 + bool(twice), **arguments,
        control=None if state is None else (cloned(state), slot),
        stop=lambda _, text: len(text) >= 24,
    )  # fmt: skip


def run_generate(table: Any, tree: Any, scope: Any, **arguments: Any) -> Any:
    texts, statistics = decode(table=table, tree=tree, scope=scope, **arguments)
    assert texts == decode(**arguments)[0], "a table changed the text"
    return statistics.mean_accepted, statistics.hit_rates, str(statistics)


def plain(x: Any) -> Any:
    """A tensor as the lists that a drafter returns."""
    readable = isinstance(x, Tensor) and not x.is_meta and x.layout == torch.strided
    return x.tolist() if readable else x


def run_drafter(tokens: Any, parents: Any, **arguments: Any) -> Any:
    def propose(requests: Any, texts: Any) -> Any:
        return [(plain(tokens), plain(parents)) for _ in requests]

    texts, statistics = decode(drafter=propose, **arguments)
    assert texts == decode(**arguments)[0], "a drafter changed the text"
    return statistics.mean_accepted


CALLS = {
    "generate": (run_generate, from_table),
    "Drafter": (run_drafter, from_drafter),
    "chain_proposal": (chain_proposal, lambda draw: {"tokens": draw.ids(VOCAB, 3).tolist()}),
}
