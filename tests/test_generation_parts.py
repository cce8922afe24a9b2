"""What the decoding loop is made of: prompts, cache, drafts and trees, statistics, errors."""

from __future__ import annotations

import itertools

import pytest
import torch
from generation_cases import (
    MODEL,
    NEW,
    PROMPTS,
    TREES,
    VOCAB,
    T,
    make_model,
    table_of,
    taught,
)
from speculation_cases import generator

import reasonkern as rk
from reasonkern.demo.model import Decoding
from reasonkern.generation import Statistics, generate, loop, prompts
from reasonkern.generation.cache import SlotCache
from reasonkern.generation.drafts import plant
from reasonkern.generation.passes import prompt_pass
from reasonkern.generation.trees import SIZES, BestTree

# ---- the prompt


@pytest.mark.parametrize("chunk", [1, 3, 4])
def test_prompts_in_chunks(chunk, monkeypatch):
    """The same text, and a table that has learnt the same from the prompt."""
    options = {"temperature": T, "max_new_tokens": 1, "tree": rk.DraftTree.chain(1)}
    tables = table_of(storage="exact"), table_of(storage="exact")
    expected = generate(MODEL, PROMPTS, table=tables[0], **options).texts
    monkeypatch.setattr(prompts, "CHUNK", chunk)
    assert generate(MODEL, PROMPTS, table=tables[1], **options).texts == expected
    first, second = (t.state_dict() for t in tables)
    assert torch.equal(first["keys"].sort().values, second["keys"].sort().values)
    assert len(tables[0]) == len(tables[1]) > 20


def test_prompt_logits_exist_for_a_chunk_at_a_time(monkeypatch):
    monkeypatch.setattr(prompts, "LOGITS", 3 * VOCAB)
    seen = []
    right = MODEL.__class__.__call__

    def call(self, given):
        seen.append((given.tokens.numel(), given.logits))
        return right(self, given)

    monkeypatch.setattr(MODEL.__class__, "__call__", call)
    generate(MODEL, [[1] * 20], temperature=0, max_new_tokens=1, table=table_of())
    assert [rows for rows, logits in seen[:7]] == [3] * 6 + [1]
    seen.clear()
    generate(MODEL, [[1] * 20], temperature=0, max_new_tokens=1)
    assert seen[0] == (19, False)


def test_equal_prompts_are_read_once_and_share_a_scope(monkeypatch):
    rows = []
    right = prompts.prompt_pass
    monkeypatch.setattr(
        prompts, "prompt_pass", lambda tokens, *a: rows.append(len(tokens)) or right(tokens, *a)
    )
    generate(MODEL, [PROMPTS[0], PROMPTS[2], PROMPTS[0]], temperature=T, max_new_tokens=2,
             num_trajectories=3, table=table_of())  # fmt: skip
    assert rows == [2]
    table = table_of(max_scopes=16)
    scopes = prompts.scopes_of([PROMPTS[0], PROMPTS[2], PROMPTS[0]], table)
    assert scopes[0] == scopes[2] != scopes[1]
    assert scopes[1] == prompts.scopes_of([PROMPTS[2]], table)[0]
    many = [[i, j] for i in range(4) for j in range(4)]
    assert sorted(prompts.scopes_of(many, table)) == list(range(16))


# ---- the cache


def test_a_cache_that_grows_and_loses_requests_keeps_what_is_committed():
    model = make_model()
    texts = torch.randint(0, VOCAB, (3, 30), generator=generator(1))
    whole = SlotCache(3, model.device)
    with torch.no_grad():
        expected = model(prompt_pass(texts, whole, 0, True))
        parts = SlotCache(3, model.device)
        rows = torch.arange(3)
        for begin in range(0, 30, 5):
            if begin == 15:
                rows = torch.tensor([2, 0, 2])
                parts.take(rows)
            logits = model(prompt_pass(texts[rows, begin : begin + 5], parts, begin, True))
            torch.testing.assert_close(logits, expected[rows, begin : begin + 5])
            parts.commit(torch.arange(5).repeat(3, 1), torch.full((3,), 5))


# ---- drafts and trees


def test_proposals_are_planted_by_rank():
    proposals = [([5, 6, 7], [-1, -1, 0]), ([], []), ([8, 9, 1, 2], [-1, 0, 1, -1])]
    draft, tree = plant(proposals, [10, -1, 12], VOCAB, torch.device("cpu"))
    assert tree.parents.tolist() == [-1, 0, 0, 1, 3]
    assert draft.tokens.tolist() == [[10, 5, 6, 7, 10], [0] * 5, [12, 8, 2, 9, 1]]
    assert draft.valid.tolist() == [
        [True] * 4 + [False], [False] * 5, [True] * 5,
    ]  # fmt: skip


@pytest.mark.parametrize("proposal, message", [
    (([VOCAB], [-1]), r"ids in \[0, 40\), got 40"), (([1], [0]), r"parents\[0\] in \[-1, 0\)"),
    (([1, 2], [-1]), "as many parents as tokens"),
    (None, r"a pair \(tokens, parents\) for each request, got None"),
    ([1, 2, 3], r"a pair \(tokens, parents\) for each request, got \[1, 2, 3\]"),
])  # fmt: skip
def test_bad_proposals(proposal, message):
    with pytest.raises(ValueError, match=message):
        generate(MODEL, PROMPTS[:1], temperature=0, max_new_tokens=4,
                 drafter=lambda *_: [proposal])  # fmt: skip
    with pytest.raises(ValueError, match="1 proposals, one per request"):
        generate(MODEL, PROMPTS[:1], temperature=0, max_new_tokens=4, drafter=lambda *_: [])


def choices(seconds: dict[int, float], accepted: float, steps: int = 400) -> list[int]:
    """Sizes that are taken when a share of the chain of first children is accepted."""
    best, random, taken = BestTree(lambda tree, _: seconds[tree.nodes]), generator(0), []
    for _ in range(steps):
        tree = best.next(1)
        path, pointers, index = [0], *(x.tolist() for x in tree.children)
        while pointers[path[-1]] < pointers[path[-1] + 1]:
            if float(torch.rand((), generator=random)) > accepted:
                break
            path.append(index[pointers[path[-1]]])
        best.observe(tree, [path])
        taken.append(tree.nodes)
    return taken


def test_the_best_tree_follows_times_and_acceptance():
    free = dict.fromkeys(SIZES, 1.0)
    assert choices(free, 0.7).count(80) > 390
    linear = {size: 1.0 + size for size in SIZES}
    assert choices(linear, 0.05).count(1) > 380
    mild = {size: 1.0 + 0.02 * size for size in SIZES}
    good, bad = choices(mild, 0.9), choices(mild, 0.02)
    assert good[50:].count(1) < 5
    assert bad[100:].count(1) > 250 and 8 in bad[200:]  # tried again now and then


def test_auto_times_each_size_once_per_batch_size(monkeypatch):
    model, trials = make_model(), []
    right = loop.Run._trials
    monkeypatch.setattr(loop.Run, "_trials", lambda self: trials.append(1) or right(self))
    generate(model, PROMPTS, temperature=T, max_new_tokens=20, table=table_of())
    assert {size for _, size in model.seconds} == set(SIZES)
    assert set(dict(model.seconds)) >= {(4, size) for size in SIZES}
    batches = {batch for batch, _ in model.seconds}
    generate(model, PROMPTS, temperature=T, max_new_tokens=20, table=table_of())
    assert {batch for batch, _ in model.seconds} == batches
    assert len(trials) == len(batches)


# ---- statistics and errors


def test_look_ups_of_trials_are_not_counted(monkeypatch):
    """Sizes that take as long as they have nodes: plain steps, which ask no table."""
    tried, trial = [], loop.Run._trial

    def slow(run, tree, now):
        trial(run, tree, now)
        tried.append(tree.nodes)
        return tree.nodes / 4

    monkeypatch.setattr(loop.Run, "_trial", slow)
    found = generate(make_model(), PROMPTS, temperature=T, max_new_tokens=9, table=taught(4))
    assert max(tried) >= 8 and set(found.statistics.sizes) == {1}
    assert found.statistics.hits.total() == found.statistics.misses == 0


def test_statistics_add_up():
    statistics, table = Statistics(), taught(4)
    options = {"temperature": T, "max_new_tokens": NEW, "table": table, "tree": TREES["80"]}
    for seed in range(2):
        generate(MODEL, PROMPTS, seed=seed, statistics=statistics, **options)
    assert statistics.tokens == 2 * 4 * NEW and statistics.steps < statistics.tokens
    assert set(statistics.sizes) == {80}
    assert statistics.passes <= statistics.steps <= 4 * statistics.passes
    rates = statistics.hit_rates
    assert list(rates) == [4, 3, 2] and 0.2 < sum(rates.values()) <= 1
    timed = {name for name, seconds in statistics.seconds.items() if seconds > 0}
    assert timed == {"prompt", "draft", "forward", "verify", "update"}  # no trials: a given tree
    assert statistics.tokens_per_second > 0
    assert f"{statistics.tokens} tokens" in str(statistics) and "order 4" in str(statistics)


def test_a_model_without_finite_logits():
    class Broken(Decoding):
        def __call__(self, given):
            return super().__call__(given) * torch.nan

    with pytest.raises(RuntimeError, match="request 0: .* after 5 tokens have no finite value"):
        generate(Broken(MODEL.model), PROMPTS[:1], temperature=T, max_new_tokens=4)


ERRORS = {
    "no prompts": ({"prompts": []}, "prompts: expected at least one"),
    "empty prompt": ({"prompts": [[1], []]}, "prompt 1: expected at least one token"),
    "foreign id": ({"prompts": [[1, 40]]}, r"prompt 0: expected ids in \[0, 40\)"),
    "negative id": ({"prompts": [[-1]]}, r"prompt 0: expected ids in \[0, 40\).* got -1"),
    "no tokens": ({"max_new_tokens": 0}, "max_new_tokens: expected an integer >= 1"),
    "no trajectories": ({"num_trajectories": 0}, "num_trajectories: expected an integer >= 1"),
    "temperature": ({"temperature": -1.0}, "temperature: expected finite values >= 0"),
    "small table": ({"table": table_of(vocab_size=39)}, "table: expected vocab_size >= 40"),
    "no table": ({"table": {}}, "table: expected an NgramTable, got dict"),
    "both": ({"drafter": len, "table": table_of()}, "drafter: expected None with a table"),
    "tree": ({"tree": 80}, r'tree: expected a DraftTree \(.*\) or "auto", got 80'),
    "tree file": ({"tree": "tree.json"}, r"tree: expected .*DraftTree.load reads one.*'tree.json'"),
    "no temperature": ({"temperature": None}, "temperature: expected a number .*, got None"),
    "no function": ({"drafter": 3}, "drafter: expected a function of requests and texts, got 3"),
    "tree alone": ({"tree": rk.DraftTree.chain(3)}, "tree: expected a table to fill it from"),
    "scope alone": ({"scope": 1}, "scope: expected a table"),
    "scopes": ({"table": table_of(), "scope": torch.arange(3)}, r"scope: expected .*\(4,\)"),
    "seeds": ({"seed": torch.arange(3)}, "seed: expected shape"),
}  # fmt: skip


@pytest.mark.parametrize("case", ERRORS)
def test_errors(case):
    changes, message = ERRORS[case]
    options = {"prompts": PROMPTS, "temperature": T, "max_new_tokens": 4} | changes
    with pytest.raises(ValueError, match=message):
        generate(MODEL, options.pop("prompts"), **options)


def test_a_table_elsewhere_is_an_error():
    table = table_of()
    table._state = table._state._replace(keys=table._state.keys.to("meta"))
    with pytest.raises(ValueError, match=r"table: expected the model's device, cpu .*got meta"):
        generate(MODEL, PROMPTS, temperature=0, max_new_tokens=4, table=table)


def test_ids_that_a_larger_table_has_learnt_elsewhere_are_not_drafted():
    """A table may be shared by models of different vocabularies: text is never at risk."""
    table = table_of(vocab_size=100)
    every = torch.tensor(list(itertools.product(range(VOCAB), repeat=2)))
    context = torch.cat((torch.full((len(every), 2), -1), every), 1)
    table.update(context, torch.full((len(every), 1), 99), torch.zeros(len(every), 1))
    options = {"temperature": T, "max_new_tokens": NEW}
    found = generate(MODEL, PROMPTS, table=table, tree=TREES["default"], scope=0, **options)
    assert found.texts == generate(MODEL, PROMPTS, **options).texts
    assert sum(found.statistics.hits.values()) > 100
