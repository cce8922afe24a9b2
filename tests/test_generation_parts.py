"""What the decoding loop is made of: prompts, cache, drafts and trees, statistics, errors."""

from __future__ import annotations

import copy
import itertools
import warnings
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from generation_cases import (
    DEVICES,
    LEAST,
    MODEL,
    NEW,
    PROMPTS,
    TREES,
    VOCAB,
    T,
    make_model,
    model_on,
    table_of,
    taught,
)
from speculation_cases import generator

import reasonkern as rk
from reasonkern.demo.model import Decoding
from reasonkern.generation import Statistics, chain_proposal, generate, loop, prompts, trees
from reasonkern.generation.cache import SlotCache
from reasonkern.generation.drafts import plant
from reasonkern.generation.passes import prompt_pass
from reasonkern.generation.trees import SIZES, BestTree, Hindsight, Timing, Timings

# ---- the prompt


@pytest.mark.parametrize("chunk", [1, 3, 4, prompts.CHUNK])
def test_the_table_learns_the_law_after_every_token(chunk, monkeypatch):
    """Of prompts in chunks and of plain steps, the last of which no draft waits for."""
    options = {"temperature": T, "max_new_tokens": 20, "tree": rk.DraftTree.chain(1), "seed": 1}
    table, expected = table_of(storage="exact"), table_of(storage="exact")
    monkeypatch.setattr(prompts, "CHUNK", chunk)
    texts = generate(MODEL, PROMPTS, table=table, **options).texts
    scopes = prompts.scopes_of(PROMPTS, table)
    for prompt, text, scope in zip(PROMPTS, texts, scopes, strict=True):
        tokens = torch.tensor([[*prompt, *text[:-1]]])
        with torch.no_grad():
            logits = MODEL.model(tokens).float()
        values, ids = logits.topk(table.topk)
        expected.update_from_sequence(
            tokens, ids, values, lse=logits.logsumexp(-1), lengths=torch.tensor([tokens.shape[1]]),
            scope=scope,
        )  # fmt: skip
    found, wanted = table.state_dict(), expected.state_dict()
    order, other = (state["keys"].flatten().argsort() for state in (found, wanted))
    assert torch.equal(found["keys"].flatten()[order], wanted["keys"].flatten()[other])
    for name in ("slots", "counts"):
        assert torch.equal(found[name][order], wanted[name][other]), name
    sums = found["extra"][order], wanted["extra"][other]
    assert (sums[0] - sums[1]).abs().max() < 2**30 * 1e-6 < sums[0].max()


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
    assert scopes == [prompts.scopes_of([PROMPTS[k]], table)[0] for k in (0, 2, 0)]
    many = [[i, j] for i in range(4) for j in range(4)]
    assert sorted(prompts.scopes_of(many, table)) == list(range(16))
    assert prompts.scopes_of([*many, [9]], table)[:16] == prompts.scopes_of(many, table)


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


def test_a_pass_sees_a_multiple_of_eight_slots():
    cache = SlotCache(1, MODEL.device)
    seen = [len(cache.open(nodes, longest)[1]) for nodes, longest in ((1, 0), (3, 5), (1, 8))]
    assert seen == [8, 8, 16]


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
    (None, r"a pair \(tokens, parents\) for each request, got None"),
    ([1, 2, 3], r"a pair \(tokens, parents\) for each request, got \[1, 2, 3\]"),
    (([1, 2], [-1]), "as many parents as tokens"), (([1.0], [-1]), r"ids in .*, got 1.0"),
    ((torch.ones(1), [-1]), "a sequence of token ids, got Tensor"), (([1], [-0.5]), "got -0.5"),
    (([], 0), "a sequence of parents, got 0"),
])  # fmt: skip
def test_bad_proposals(proposal, message):
    with pytest.raises(ValueError, match=message):
        generate(MODEL, PROMPTS[:1], temperature=0, max_new_tokens=4,
                 drafter=lambda *_: [proposal])  # fmt: skip
    with pytest.raises(ValueError, match="1 proposals, one per request"):
        generate(MODEL, PROMPTS[:1], temperature=0, max_new_tokens=4, drafter=lambda *_: [])


class World:
    """A request alone, whose next token the first child of a node holds with a given chance."""

    def __init__(self, seconds: dict[int, float], known: Any = None) -> None:
        self.seconds, self.random = seconds, generator(0)
        self.known: Timings = {}
        for size, steps in (known or {}).items():
            self.known[1, size] = Timing()
            self.known[1, size].recent.extend(steps)
        self.best, self.text, self.held, self.done = BestTree(self.known), [], [], False
        self.children = [x.tolist() for x in rk.DraftTree.default(80).children]

    def run(self, accepted: float, steps: int) -> list[int]:
        """The sizes taken."""
        taken = []
        for _ in range(steps):
            choice, begin = self.best.next(1), len(self.text)
            while len(self.held) < begin + 90:
                self.held.append(float(torch.rand((), generator=self.random)) < accepted)
            chain = self.chain(begin)
            if choice.watched:
                tokens = [begin + chain.index(n) - 1 if n in chain[1:] else -1 for n in range(80)]
                self.best.drafted([self], [tokens])
            emitted = sum(node < choice.tree.nodes for node in chain)
            self.text += range(begin, begin + emitted)
            self.best.took(self.seconds[choice.tree.nodes])
            taken.append(choice.tree.nodes)
        return taken

    def chain(self, begin: int) -> list[int]:
        """The root and the first children that hold the next tokens."""
        pointers, index = self.children
        path = [0]
        while self.held[begin + len(path) - 1] and pointers[path[-1]] < pointers[path[-1] + 1]:
            path.append(index[pointers[path[-1]]])
        return path

    def pace(self, taken: list[int]) -> float:
        """Time of a token."""
        return sum(self.seconds[size] for size in taken) / len(self.text)


FREE = dict.fromkeys(SIZES, 1.0)
MILD = {size: 1.0 + 0.02 * size for size in SIZES}
LINEAR = {size: 1.0 + size for size in SIZES}


def test_the_best_tree_follows_times_and_acceptance():
    assert World(FREE).run(0.7, 400).count(80) > 320
    assert World(MILD).run(0.9, 400)[50:].count(1) < 8
    assert World(MILD).run(0.02, 800)[200:].count(1) > 500
    world = World(MILD)
    before = world.run(0.0, 300)[50:]
    assert before.count(1) > 220 and max(before) < 32
    assert min(world.run(0.9, 400)[100:]) >= 8  # learnt while nothing was drafted


@pytest.mark.parametrize("seconds", [MILD, LINEAR, {size: size**2 for size in SIZES}])
@pytest.mark.parametrize("accepted", [0.0, 0.1, 0.5, 0.9])
def test_the_best_tree_is_not_slower_than_plain_decoding(seconds, accepted):
    """Sizes that do not pay are tried within the share of the time set aside for them."""
    world = World(seconds)
    world.run(accepted, 100)
    world.text.clear(), world.held.clear()
    assert world.pace(world.run(accepted, 2000)) < 1.02 * seconds[1]


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("wrong", [[9.0], [2.0] * 3], ids=str)
def test_an_interruption_is_forgotten(size, wrong):
    """The first turn of a size took nine times as long, or all that are remembered twice."""
    seconds = {other: 1.0 if other <= size else 4.0 for other in SIZES}
    known = {other: [time] * 3 for other, time in seconds.items()} | {size: wrong}
    assert World(seconds, known).run(0.7, 12000)[10000:].count(size) > 1500


def test_hindsight_finds_the_paths_of_the_verifier(monkeypatch):
    """A draft compared with the text, which it does not depend on, is a draft verified."""
    steps, right, tree, table = [], loop.verify_tree, TREES["80"], taught(1)

    def keep(logits, draft, shape, *, position, **rest):
        out = right(logits, draft, shape, position=position, **rest)
        steps.append((draft.tokens.where(draft.valid, -1).tolist(), position.tolist(), out))
        return out

    monkeypatch.setattr(loop, "verify_tree", keep)
    given = PROMPTS[:1]
    found = generate(MODEL, given, temperature=T, max_new_tokens=NEW, table=table, tree=tree)
    text, hindsight = given[0] + found.texts[0], Hindsight(tree)
    for tokens, position, out in steps:
        path = hindsight._path(SimpleNamespace(text=text, done=True), position[0], tokens[0])
        assert path[: out.length[0]] == out.path[0, : out.length[0]].tolist()
        short = SimpleNamespace(text=text[: position[0]], done=False)
        assert hindsight._path(short, position[0], tokens[0]) is None
    assert found.statistics.mean_accepted > LEAST


def test_hindsight_forgets():
    """A first child is always right, later none: of the older half nothing is left to be seen."""
    tree = TREES["80"]
    hindsight, path = Hindsight(tree), [0]
    while below := [n for n, up in enumerate(tree.parents.tolist()) if up == path[-1]]:
        path.append(below[0])
    for token, accepted in ((5, len(path)), (6, 1)):
        texts = [SimpleNamespace(text=[0], done=False) for _ in range(600)]
        hindsight.add(texts, [[0, *[5] * 79]] * 600)
        assert hindsight.expected()[0] == pytest.approx(1)  # not long enough to know
        for one in texts:
            one.text = [0, *[token] * 90]
        found = hindsight.expected()
        assert found[0] == pytest.approx(1) and found[-1] == pytest.approx(accepted, rel=0.1)


def test_the_time_of_a_larger_size_is_guessed_from_those_below():
    """It grows half as fast per node as between the last two."""
    assert trees._at_least([1.0]) == 1.0
    assert trees._at_least([1.0, 1.5, 3.5]) == 3.5 + 0.5 * (3.5 - 1.5) / (4 - 2) * (8 - 4)
    assert trees._at_least([2.0, 1.0]) == 1.0


def test_a_part_of_a_draft_is_the_draft_of_a_part():
    table, whole = taught(4), TREES["80"]
    context = torch.tensor([[-1] * max(0, 4 - len(p)) + p[-4:] for p in PROMPTS])
    scope = torch.tensor(prompts.scopes_of(PROMPTS, table))
    options = {"temperature": T, "seed": 1, "position": 5, "scope": scope}
    every = table.draft(context, whole, **options)
    assert every.valid[:, 20:].any()
    for size in SIZES:
        part = table.draft(context, whole.prefix(size), **options)
        assert torch.equal(part.tokens, every.tokens[:, :size])
        assert torch.equal(part.valid, every.valid[:, :size])


def test_auto_looks_back_at_the_drafts_of_the_texts_under_way(monkeypatch):
    seen, right = [], BestTree.drafted

    def drafted(self, requests, tokens):
        seen.extend(zip([(r.done, r.text[-1]) for r in requests], tokens, strict=True))
        right(self, requests, tokens)

    monkeypatch.setattr(BestTree, "drafted", drafted)
    texts = generate(
        MODEL, PROMPTS[:3], temperature=T, max_new_tokens=NEW, table=taught(4), seed=1,
        stop=lambda request, text: request == 1 and len(text) > 20,
    ).texts  # fmt: skip
    assert len(texts[1]) == 20 and len(seen) > NEW // 8
    assert all((done, last) == (False, row[0]) for (done, last), row in seen)
    assert {len(row) for _, row in seen} == {80} and any(max(row[1:]) >= 0 for _, row in seen)


def test_auto_keeps_the_times_of_its_steps_by_batch_size():
    model = make_model()
    options = {"temperature": T, "max_new_tokens": NEW}
    generate(
        model, PROMPTS[:3], drafter=lambda r, _: [chain_proposal([1, 2, 3])] * len(r), **options
    )
    generate(model, PROMPTS[:3], table=table_of(), tree=TREES["80"], **options)
    assert not model.timings  # neither a drafter's time nor that of a tree that was given
    found = generate(model, PROMPTS[:3], table=table_of(), **options)
    assert (4, 1) in model.timings and {batch for batch, _ in model.timings} <= {1, 2, 4}
    assert {size for _, size in model.timings} <= set(found.statistics.sizes) <= set(SIZES)
    known = dict(model.timings)
    generate(model, PROMPTS[:3], table=taught(4), **options)
    assert all(model.timings[key] is timing for key, timing in known.items())


# ---- statistics and errors


@pytest.mark.parametrize("device", DEVICES)
def test_statistics_add_up(device):
    statistics, table = Statistics(), taught(4, device=device)
    options = {"temperature": T, "max_new_tokens": NEW, "table": table, "tree": TREES["80"]}
    before = table.stats()
    for seed in range(2):
        generate(model_on(device), PROMPTS, seed=seed, statistics=statistics, **options)
    after = table.stats()
    assert statistics.hits == {n: hits - before["hits"][n] for n, hits in after["hits"].items()}
    assert statistics.misses == after["misses"] - before["misses"] > 0
    assert statistics.tokens == 2 * 4 * NEW and statistics.steps < statistics.tokens
    assert set(statistics.sizes) == {80}
    assert statistics.passes <= statistics.steps <= 4 * statistics.passes
    rates = statistics.hit_rates
    assert list(rates) == [4, 3, 2] and 0.2 < sum(rates.values()) <= 1
    timed = {name for name, seconds in statistics.seconds.items() if seconds > 0}
    assert timed == {"prompt", "draft", "forward", "verify", "update"}
    assert statistics.tokens_per_second > 0
    assert f"{statistics.tokens} tokens" in str(statistics) and "order 4" in str(statistics)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
@pytest.mark.skipif(not rk._load.available("cuda"), reason="the reference waits more often")
@pytest.mark.parametrize("tree", [rk.DraftTree.chain(1), TREES["80"]], ids=["plain", "80"])
def test_a_step_waits_for_the_gpu_once(tree):
    model, table, found = model_on("cuda"), taught(4, device="cuda"), []
    for new in (8, NEW):  # a call's own waits come with both
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            torch.cuda.set_sync_debug_mode("warn")
            try:
                out = generate(model, PROMPTS, temperature=T, max_new_tokens=new, table=table,
                               tree=tree, eos=(VOCAB,))  # fmt: skip
            finally:
                torch.cuda.set_sync_debug_mode("default")
        waits = sum("synchronizing" in str(warning.message) for warning in caught)
        found.append((waits, out.statistics.passes))
    (few, short), (many, long) = found
    assert 0 < many - few <= long - short, found


def test_a_model_without_finite_logits():
    class Broken(Decoding):
        def __call__(self, given):
            return super().__call__(given) * torch.nan

    with pytest.raises(RuntimeError, match="request 0: .* after 5 tokens have no finite value"):
        generate(Broken(MODEL.model), PROMPTS[:1], temperature=T, max_new_tokens=4)


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_a_model_with_bad_rows(value):
    """Such a row gives the arg-max of what is finite and teaches nothing; prompts hold some."""

    class Uneven(Decoding):
        def __call__(self, given):
            logits = super().__call__(given)
            if given.logits:
                logits[..., 0].masked_fill_(given.tokens % 3 == 0, value)
            return logits

    model = Uneven(MODEL.model)
    options = {"temperature": T, "max_new_tokens": NEW, "seed": 1}
    expected = generate(model, PROMPTS, **options).texts
    assert any(token % 3 == 0 for text in (*PROMPTS, *expected) for token in text[:-1])
    found = generate(model, PROMPTS, **options, table=table_of(), tree=rk.DraftTree.default(16))
    assert found.texts == expected and found.statistics.mean_accepted > 1


ERRORS = {
    "no prompts": ({"prompts": []}, "prompts: expected at least one"),
    "one prompt": ({"prompts": [1, 2]}, "prompt 0: expected a sequence of token ids, got int"),
    "tensor": ({"prompts": torch.ones(1, 2)}, r"prompts: .* \(ids.tolist\(\) of.*, got Tensor"),
    "text": ({"prompts": "two"}, "prompts: expected a sequence of prompts, .*, got str"),
    "empty prompt": ({"prompts": [[1], []]}, "prompt 1: expected at least one token"),
    "no ids": ({"prompts": [[1.0]]}, r"prompt 0: expected ids in \[0, 40\).* got 1.0"),
    "foreign id": ({"prompts": [[1, 40]]}, r"prompt 0: expected ids in \[0, 40\)"),
    "negative id": ({"prompts": [[-1]]}, r"prompt 0: expected ids in \[0, 40\).* got -1"),
    "no tokens": ({"max_new_tokens": 0}, "max_new_tokens: expected an integer >= 1"),
    "no trajectories": ({"num_trajectories": 0}, "num_trajectories: expected an integer >= 1"),
    "a flag of tokens": ({"max_new_tokens": True}, "max_new_tokens: .* got True"),
    "a flag of trajectories": ({"num_trajectories": True}, "num_trajectories: .* got True"),
    "temperature": ({"temperature": -1.0}, "temperature: expected finite values >= 0"),
    "small table": ({"table": table_of(vocab_size=39)}, "table: expected vocab_size >= 40"),
    "no table": ({"table": {}}, "table: expected an NgramTable, got dict"),
    "both": ({"drafter": len, "table": table_of()}, "drafter: expected None with a table"),
    "tree": ({"tree": 80}, r'tree: expected a DraftTree \(.*\) or "auto", got 80'),
    "tree file": ({"tree": "tree.json"}, r"tree: expected .*DraftTree.load reads one.*'tree.json'"),
    "temperatures": ({"temperature": torch.ones(3)}, r"expected shape \(requests,\) = \(4,\)"),
    "no temperature": ({"temperature": None}, "temperature: expected a number .*, got None"),
    "no function": ({"drafter": 3}, "drafter: expected a function of requests and texts, got 3"),
    "tree alone": ({"tree": rk.DraftTree.chain(3)}, "tree: expected a table to fill it from"),
    "scope alone": ({"scope": 1}, "scope: expected None without a table"),
    "scopes": ({"table": table_of(), "scope": torch.arange(3)}, r"scope: expected .*\(4,\)"),
    "half a scope": ({"table": table_of(), "scope": 0.5}, "scope: expected an integer or a "),
    "no such scope": (
        {"table": table_of(max_scopes=2), "scope": torch.arange(4)},
        r"scope: expected values in \[0, 2\), got 2 at",
    ),
    "seeds": ({"seed": torch.arange(3)}, "seed: expected shape"),
    "no seeds": ({"seed": torch.arange(4, device="meta")}, "seed: expected a tensor with values"),
    "eos": ({"eos": 2}, "eos: expected a sequence of token ids, got int"),
    "a flag for an id": ({"eos": [True]}, r"eos: expected ids in \[0, .* got True"),
    "stop": ({"stop": 2}, "stop: expected a function or None, got 2"),
    "emit": ({"emit": []}, r"emit: expected a function or None, got \[\]"),
    "statistics": ({"statistics": True}, "statistics: expected a Statistics or None, got bool"),
    "no proposals": ({"drafter": lambda *_: None}, "drafter: expected a list of prop.*, got None"),
}  # fmt: skip


@pytest.mark.parametrize("case", ERRORS)
def test_errors(case):
    changes, message = ERRORS[case]
    options = {"prompts": PROMPTS, "temperature": T, "max_new_tokens": 4} | changes
    with pytest.raises(ValueError, match=message):
        generate(MODEL, options.pop("prompts"), **options)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"vocab_size": None}, "model.vocab_size: expected an int, got None"),
        ({"device": "cpu"}, "model.device: expected a torch.device, got 'cpu'"),
        ({"timings": []}, r"model.timings: expected a dict, got \[\]"),
        ({"vocab_size": 41}, r"the model's logits: .* \(B, N, vocab_size\) = .* 41\), got \(4, "),
    ],
)
def test_a_model_that_is_not_as_it_says(changes, message):
    model = copy.copy(MODEL)
    vars(model).update(changes)
    with pytest.raises(ValueError, match=message):
        generate(model, PROMPTS[:4], temperature=0, max_new_tokens=4)


@pytest.mark.parametrize(
    "model, got", [(3, "int"), (type(MODEL), f"the class {type(MODEL).__name__}")]
)
def test_no_model(model, got):
    with pytest.raises(ValueError, match=f"model: expected a Model: an object .*, got {got}"):
        generate(model, PROMPTS, temperature=0, max_new_tokens=4)


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
