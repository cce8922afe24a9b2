"""Ten thousand requests through one small table: no growth, no cross-talk, no wrong token."""

from __future__ import annotations

import random
import resource

import pytest
import torch

import reasonkern as rk
from reasonkern.demo.model import Decoding, seeded
from reasonkern.generation import Statistics, generate

pytestmark = pytest.mark.slow
VOCAB, REQUESTS, BATCH, NEW, SCOPES, T = 40, 10_000, 50, 24, 64, 0.3
ORDERS = (4, 3, 2)


def make_model() -> Decoding:
    model = seeded(VOCAB, 64, 32, 1, 0).double()
    for parameter in model.parameters():
        parameter.data *= 15.0 if parameter.ndim > 1 else 1
    return Decoding(model)


def contexts(text: list[int]) -> set[tuple[int, ...]]:
    return {tuple(text[i : i + n]) for n in ORDERS for i in range(len(text) - n + 1)}


def check_isolation(
    table: rk.NgramTable, known: dict[int, set[tuple[int, ...]]], rng: random.Random
) -> int:
    """A scope answers for contexts alone that it has read since its last reset."""
    asked = [rng.choice(sorted(known[rng.choice(list(known))])) for _ in range(200)]
    asked = [context for context in asked if len(context) == 4]
    scopes = [rng.randrange(SCOPES) for _ in asked]
    draft = table.draft(
        torch.tensor(asked), rk.DraftTree.chain(2), temperature=0.0, seed=0, position=4,
        scope=torch.tensor(scopes),
    )  # fmt: skip
    hits = draft.valid[:, 1].tolist()
    for context, scope, hit in zip(asked, scopes, hits, strict=True):
        read = known.get(scope, set())
        assert not hit or any(context[-n:] in read for n in ORDERS), (context, scope)
    return sum(hits)


def test_ten_thousand_requests_through_one_table():
    rng, model, statistics = random.Random(0), make_model(), Statistics()
    table = rk.NgramTable(1 << 12, vocab_size=VOCAB, orders=ORDERS, max_scopes=SCOPES)
    nbytes, known, hits, cancelled, full = table.nbytes, {}, 0, 0, 0
    prompts = [[rng.randrange(VOCAB) for _ in range(rng.randint(1, 12))] for _ in range(40)]
    resident = []
    for call in range(REQUESTS // BATCH):
        chosen = [rng.choice(prompts) for _ in range(BATCH // 2)]
        scope = torch.tensor([prompts.index(p) % SCOPES for p in chosen for _ in range(2)])
        options = {"temperature": T, "num_trajectories": 2, "seed": call, "eos": (7,)}
        new = rng.randint(1, NEW)
        free = generate(model, chosen, max_new_tokens=new, **options).texts
        cut = [rng.randint(1, 2 * NEW) for _ in range(BATCH)]
        lengths = [len(p) for p in chosen for _ in range(2)]

        def stop(request: int, text: list[int], cut=cut, lengths=lengths) -> bool:
            return len(text) - lengths[request] >= cut[request]

        found = generate(
            model, chosen, max_new_tokens=new, table=table, scope=scope, stop=stop,
            tree=rk.DraftTree.default(rng.choice((1, 8, 32))), statistics=statistics, **options,
        ).texts  # fmt: skip
        assert found == [text[:end] for text, end in zip(free, cut, strict=True)]
        cancelled += sum(end < len(text) for text, end in zip(free, cut, strict=True))
        full += sum(len(text) == new for text in found)
        for request, text in enumerate(free):
            read = known.setdefault(int(scope[request]), set())
            read |= contexts(chosen[request // 2] + text)
        hits += check_isolation(table, known, rng)
        if call % 10 == 9:
            forgotten = rng.choice(list(known))
            table.reset(forgotten)
            known.pop(forgotten)
        if call in (REQUESTS // BATCH // 2, REQUESTS // BATCH - 1):
            resident.append(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)
    stats = table.stats()
    assert table.nbytes == nbytes and stats["evictions"] > 1000 and stats["rejected"] == 0
    assert resident[1] - resident[0] < 64 * 1024  # KiB; the sets above take some
    assert cancelled > 500 and full > 500 and hits > 500
    assert statistics.mean_accepted > 1.3, str(statistics)
