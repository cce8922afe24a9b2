"""The decoding loop around a small transformer in float64: the text of plain seeded sampling."""

from __future__ import annotations

import itertools
from functools import cache
from typing import Any

import pytest
import torch
from speculation_cases import generator, random_tree
from torch import Tensor

import reasonkern as rk
from reasonkern.demo import arithmetic
from reasonkern.demo.context import Config, prepare
from reasonkern.demo.model import Decoding, Transformer, seeded
from reasonkern.demo.tokenizer import BOS, EOS
from reasonkern.demo.train import fine_tune
from reasonkern.generation import Statistics, chain_proposal, generate, loop, prompts
from reasonkern.generation.cache import SlotCache
from reasonkern.generation.drafts import plant
from reasonkern.generation.passes import prompt_pass
from reasonkern.generation.trees import SIZES, BestTree

VOCAB, WINDOW, NEW = 40, 256, 60
PROMPTS = [[3, 1, 4, 1, 5], [9], [2, 6, 5, 3, 5, 8, 9, 7, 9], [3, 2]]
BATCHES = {
    1: (PROMPTS[:1], 1),
    4: (PROMPTS, 1),
    16: (PROMPTS, 4),
}  # requests: prompts, each so many
T = 0.3
LEAST = 1.3  # tokens per step below which a test of speculation tests nothing


def make_model(seed: int = 0, scale: float = 15.0) -> Decoding:
    model = seeded(VOCAB, WINDOW, 32, 2, seed).double()
    for parameter in model.parameters():
        parameter.data *= scale if parameter.ndim > 1 else 1
    return Decoding(model)


MODEL = make_model()


def table_of(**changes: Any) -> rk.NgramTable:
    return rk.NgramTable(1 << 14, **({"vocab_size": VOCAB} | changes))


@cache
def lesson(requests: int, temperature: float) -> dict[str, Any]:
    table = table_of()
    generate(
        MODEL, BATCHES[requests][0], num_trajectories=16, seed=99, temperature=temperature,
        max_new_tokens=NEW, table=table, tree=rk.DraftTree.default(8),
    )  # fmt: skip
    return table.state_dict()


def taught(requests: int, temperature: float = T) -> rk.NgramTable:
    """A table that has seen other trajectories of the prompts."""
    table = table_of()
    table.load_state_dict(lesson(requests, temperature))
    return table


def whole_text(model: Transformer, prompt: list[int], new: int, **options: Any) -> list[int]:
    """One causal pass over the whole text for every token, and `sample`."""
    text = list(prompt)
    for _ in range(new):
        with torch.no_grad():
            logits = model(torch.tensor([text]))[:, -1]
        text.append(int(rk.sample(logits, position=len(text), **options)))
    return text[len(prompt) :]


# ---- the text


@pytest.mark.parametrize("options", [
    {"temperature": 0.0}, {"temperature": 0.7}, {"temperature": 0.7, "top_p": 0.9, "min_p": 0.02},
], ids=str)  # fmt: skip
def test_plain_decoding_samples_from_whole_texts(options):
    texts, statistics = generate(MODEL, PROMPTS, max_new_tokens=20, seed=5, **options)
    for prompt, text, seed in zip(PROMPTS, texts, rk.request_seeds(5, 4), strict=True):
        expected = whole_text(MODEL.model, prompt, 20, seed=seed[None], **options)
        assert text == expected
    assert statistics.mean_accepted == 1 and statistics.passes == 20


TREES = {
    "default": rk.DraftTree.default(16), "random": random_tree(20, 3), "auto": "auto",
    "80": rk.DraftTree.default(80),
}  # fmt: skip


@pytest.mark.parametrize("requests", BATCHES)
@pytest.mark.parametrize("temperature", [0.0, T])
@pytest.mark.parametrize("tree", TREES)
def test_speculation_gives_the_plain_text(requests, temperature, tree):
    given, each = BATCHES[requests]
    options = {
        "temperature": temperature, "max_new_tokens": NEW, "num_trajectories": each, "seed": 1,
    }  # fmt: skip
    expected = generate(MODEL, given, **options).texts
    found = generate(MODEL, given, table=taught(requests, temperature), tree=TREES[tree], **options)
    assert found.texts == expected
    if tree != "auto":  # which may decide against it
        assert found.statistics.mean_accepted > LEAST


@pytest.mark.parametrize("scope", ["private", "shared", "one", None], ids=str)
def test_scopes_do_not_matter_to_the_text(scope):
    options = {"temperature": 0.15, "max_new_tokens": NEW, "num_trajectories": 4}
    rows = {
        "private": torch.arange(16), "shared": torch.arange(4).repeat_interleave(4), "one": 0,
    }  # fmt: skip
    drafts = {"table": table_of(), "tree": TREES["default"], "scope": rows.get(scope)}
    generate(MODEL, PROMPTS, seed=1, **drafts, **options)
    found = generate(MODEL, PROMPTS, seed=2, **drafts, **options)
    assert found.texts == generate(MODEL, PROMPTS, seed=2, **options).texts
    assert found.statistics.mean_accepted > LEAST


def test_options_by_request():
    """Each request has the text that it has alone with the same seed."""
    rows = {
        "temperature": torch.tensor([0.0, 0.4, 0.6, 0.5]), "top_k": torch.tensor([0, 5, 0, 9]),
        "top_p": torch.tensor([1.0, 0.9, 1.0, 0.8]), "min_p": torch.tensor([0.0, 0.0, 0.1, 0.0]),
        "seed": rk.request_seeds(8, 4),
    }  # fmt: skip
    found = generate(
        MODEL, PROMPTS, max_new_tokens=NEW, table=taught(4), tree=TREES["default"], **rows
    )
    assert found.statistics.mean_accepted > LEAST
    for index, (prompt, text) in enumerate(zip(PROMPTS, found.texts, strict=True)):
        own = {name: x[index : index + 1] for name, x in rows.items()}
        assert text == generate(MODEL, [prompt], max_new_tokens=NEW, **own).texts[0]


class Adversary:
    """Proposes trees that hold the true continuation, wrong tokens, or nothing."""

    def __init__(self, truth: list[list[int]], prompts: list[list[int]]) -> None:
        self.truth = [p + t for p, t in zip(prompts, truth, strict=True)]
        self.generator = generator(5)

    def __call__(self, requests: Any, texts: Any) -> list[Any]:
        found = []
        for request, text in zip(requests, texts, strict=True):
            right = self.truth[request][len(text) : len(text) + 4]
            draw = torch.randint(0, VOCAB, (6,), generator=self.generator).tolist()
            wrong = [t for t in draw if not right or t != right[0]]
            kind = draw[0] % 3
            if kind == 0:
                found.append(([], []))
            elif kind == 1:
                found.append(chain_proposal([*right, draw[1]]))
            else:  # wrong siblings first, then the right one, each with a child
                tokens = [*wrong[:2], *right[:1], draw[2], *right[1:2]]
                first = len(wrong[:2])
                parents = [-1] * (first + len(right[:1])) + [0] + [first] * len(right[1:2])
                found.append((tokens, parents if wrong else [-1] * len(tokens)))
        return found


@pytest.mark.parametrize("requests", BATCHES)
def test_any_drafter_gives_the_plain_text(requests):
    given, each = BATCHES[requests]
    options = {"temperature": 0.8, "max_new_tokens": NEW, "num_trajectories": each, "seed": 3}
    expected = generate(MODEL, given, **options).texts
    drafter = Adversary(expected, [p for p in given for _ in range(each)])
    found = generate(MODEL, given, drafter=drafter, **options)
    assert found.texts == expected
    assert found.statistics.mean_accepted > LEAST


@pytest.mark.slow
def test_the_demos_trained_model(tmp_path):
    """Texts of its vocabulary of 32,768, ended by its EOS, in float64."""
    context = prepare(Config(out=tmp_path, steps=40, minutes=1e6))
    fine_tune(context)
    model = Decoding(context.model.double())
    made = arithmetic.generate(4, samples=2, seed=1)
    texts = list(dict.fromkeys(trace.prompt for trace in made))
    given = [[BOS, *context.tokenizer.encode(text)] for text in texts]
    table = rk.NgramTable(1 << 16, vocab_size=model.vocab_size)
    options = {"max_new_tokens": 100, "eos": (EOS,), "seed": 1}
    teach = options | {"seed": 2, "temperature": 0.6, "num_trajectories": 4}
    generate(model, given, table=table, tree=rk.DraftTree.default(8), **teach)
    for temperature, (prompts_of, each) in itertools.product(
        (0.0, 0.6), ((given[:1], 1), (given, 1), (given, 4))
    ):
        own = options | {"temperature": temperature, "num_trajectories": each}
        expected = generate(model, prompts_of, **own).texts
        for tree in (TREES["default"], "auto"):
            found = generate(model, prompts_of, table=table, tree=tree, **own)
            assert found.texts == expected
            assert tree == "auto" or found.statistics.mean_accepted > LEAST


def test_eos_inside_a_path():
    """Ids that the plain text has come upon in the middle of accepted drafts."""
    options = {"temperature": T, "max_new_tokens": NEW, "num_trajectories": 4, "seed": 1}
    free = generate(MODEL, PROMPTS, **options).texts
    eos = sorted({text[17] for text in free} | {text[31] for text in free})[:3]
    expected = [_cut(text, eos) for text in free]
    assert len({len(text) for text in expected}) > 4
    found = generate(MODEL, PROMPTS, table=taught(16), tree=TREES["80"], eos=eos, **options)
    assert found.texts == expected
    assert found.statistics.mean_accepted > LEAST
    assert sum(map(len, found.texts)) == found.statistics.tokens


def _cut(text: list[int], eos: list[int]) -> list[int]:
    return next((text[: i + 1] for i, token in enumerate(text) if token in eos), text)


def test_a_stop_inside_a_path_and_what_is_emitted():
    """Requests end at different steps, some by cancellation; the others go on undisturbed."""
    options = {"temperature": T, "max_new_tokens": NEW, "num_trajectories": 4, "seed": 1}
    free = generate(MODEL, PROMPTS, **options).texts
    ends = [7 + 3 * request if request % 3 else NEW for request in range(16)]
    lengths = [len(p) for p in PROMPTS for _ in range(4)]
    emitted: list[list[int]] = [[] for _ in range(16)]
    inside = []

    def stop(request: int, text: list[int]) -> bool:
        return len(text) - lengths[request] == ends[request]

    def emit(request: int, tokens: list[int]) -> None:
        emitted[request] += tokens
        inside.append(len(tokens))

    found = generate(
        MODEL, PROMPTS, table=taught(16), tree=TREES["80"], stop=stop, emit=emit, **options
    )
    assert found.texts == [text[:end] for text, end in zip(free, ends, strict=True)] == emitted
    assert found.statistics.mean_accepted > LEAST and max(inside) > 3


def test_half_precision_text_is_what_sample_draws_from_the_logits_it_was_given(monkeypatch):
    """Equality is of the verifier given its logits: in bfloat16 too."""
    for dtype in (torch.float32, torch.bfloat16):
        model = Decoding(make_model().model.to(dtype))
        rows: dict[tuple[int, int], Tensor] = {}
        right = loop.verify_tree

        def keep(logits, draft, tree, *, position, keeps=rows, verify=right, **rest):
            out = verify(logits, draft, tree, position=position, **rest)
            assert logits.dtype == dtype  # noqa: B023
            for b in range(len(logits)):
                for j in range(int(out.length[b])):
                    keeps[b, int(position[b]) + j] = logits[b, out.path[b, j]]
            return out

        given, table = PROMPTS[:1], taught(1)
        monkeypatch.setattr(loop, "verify_tree", keep)
        found = generate(model, given, temperature=T, max_new_tokens=NEW, seed=4,
                         table=table, tree=TREES["default"])  # fmt: skip
        monkeypatch.setattr(loop, "verify_tree", right)
        seed = rk.request_seeds(4, 1)
        for index, token in enumerate(found.texts[0], start=len(given[0])):
            row = rows[0, index][None]
            assert token == int(rk.sample(row, temperature=T, seed=seed, position=index))
        assert found.statistics.mean_accepted > LEAST


def _full_mask(tree: rk.DraftTree, *_: Any) -> Tensor:
    return torch.ones(tree.nodes, tree.nodes, dtype=torch.bool)


@pytest.mark.parametrize("broken", ["mask", "moves", "positions"])
def test_a_broken_loop_gives_another_text(broken, monkeypatch):
    options = {"temperature": T, "max_new_tokens": NEW, "seed": 1}
    expected = generate(MODEL, PROMPTS, **options).texts
    drafter = Adversary(expected, PROMPTS)
    if broken == "mask":
        monkeypatch.setattr("reasonkern.generation.passes._tree_mask", _full_mask)
    elif broken == "moves":
        commit = SlotCache.commit
        still = lambda self, path, accepted, moves=True: commit(self, path, accepted, False)  # noqa: E731
        monkeypatch.setattr(SlotCache, "commit", still)
    else:
        monkeypatch.setattr(MODEL, "window", 9)
    assert generate(MODEL, PROMPTS, drafter=drafter, **options).texts != expected


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
    "tree": ({"tree": 80}, 'tree: expected a DraftTree or "auto", got int'),
    "tree name": ({"tree": "best"}, "tree: expected 'auto', got 'best'"),
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
