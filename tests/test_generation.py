"""The decoding loop around a small transformer in float64: the text of plain seeded sampling."""

from __future__ import annotations

import itertools
from typing import Any

import numpy as np
import pytest
import torch
from generation_cases import (
    BATCHES,
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
    whole_text,
)
from speculation_cases import generator
from torch import Tensor

import reasonkern as rk
from reasonkern.demo import arithmetic
from reasonkern.demo.context import Config, prepare
from reasonkern.demo.model import Decoding, seeded
from reasonkern.demo.tokenizer import BOS, EOS
from reasonkern.demo.train import fine_tune
from reasonkern.generation import chain_proposal, generate, loop
from reasonkern.generation.cache import SlotCache
from reasonkern.generation.passes import tree_pass


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("options", [
    {"temperature": 0.0}, {"temperature": 0.7}, {"temperature": 0.7, "top_p": 0.9, "min_p": 0.02},
], ids=str)  # fmt: skip
def test_plain_decoding_samples_from_whole_texts(options, device):
    texts, statistics = generate(model_on(device), PROMPTS, max_new_tokens=20, seed=5, **options)
    for prompt, text, seed in zip(PROMPTS, texts, rk.request_seeds(5, 4), strict=True):
        expected = whole_text(MODEL.model, prompt, 20, seed=seed[None], **options)
        assert text == expected
    assert statistics.mean_accepted == 1 and statistics.passes == 20


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("requests", BATCHES)
@pytest.mark.parametrize("temperature", [0.0, T])
@pytest.mark.parametrize("tree", TREES)
def test_speculation_gives_the_plain_text(requests, temperature, tree, device):
    given, each = BATCHES[requests]
    options = {
        "temperature": temperature, "max_new_tokens": NEW, "num_trajectories": each, "seed": 1,
    }  # fmt: skip
    expected = generate(MODEL, given, **options).texts
    table = taught(requests, temperature, device)
    found = generate(model_on(device), given, table=table, tree=TREES[tree], **options)
    assert found.texts == expected
    if tree != "auto":  # which may decide against it
        assert found.statistics.mean_accepted > LEAST


def test_a_default_device_changes_nothing():
    options = {"temperature": 0.4, "max_new_tokens": NEW, "seed": 1}
    expected = generate(MODEL, PROMPTS, **options).texts
    table = table_of()
    with torch.device("meta"):  # as torch.set_default_device("cuda")
        tree = rk.DraftTree(TREES["default"].parents.tolist())
        assert tree.attention_mask().device.type == "cpu"
        assert generate(MODEL, PROMPTS, table=table, tree=tree, **options).texts == expected


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


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("requests", BATCHES)
def test_any_drafter_gives_the_plain_text(requests, device):
    given, each = BATCHES[requests]
    options = {"temperature": 0.8, "max_new_tokens": NEW, "num_trajectories": each, "seed": 3}
    expected = generate(MODEL, given, **options).texts
    drafter = Adversary(expected, [p for p in given for _ in range(each)])
    found = generate(model_on(device), given, drafter=drafter, **options)
    assert found.texts == expected
    assert found.statistics.mean_accepted > LEAST


def test_a_text_may_end_in_id_0():
    """What stands for no token, where requests are over, is -1."""
    given, options = [[4, 0], [0]], {"temperature": 0.0, "max_new_tokens": 6}
    expected = [whole_text(MODEL.model, prompt, 6, temperature=0.0, seed=0) for prompt in given]
    assert generate(MODEL, given, **options).texts == expected
    assert generate(MODEL, given, drafter=Adversary(expected, given), **options).texts == expected
    table = table_of()
    for tree in (rk.DraftTree.chain(1), rk.DraftTree.chain(4)):  # which drafts what that has taught
        found = generate(MODEL, given, table=table, tree=tree, **options)
        assert found.texts == expected
    assert found.statistics.mean_accepted > 2


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


@pytest.mark.parametrize("device", DEVICES)
def test_eos_inside_a_path(device):
    """Ids that the plain text has come upon in the middle of accepted drafts."""
    options = {"temperature": T, "max_new_tokens": NEW, "num_trajectories": 4, "seed": 1}
    free = generate(MODEL, PROMPTS, **options).texts
    eos = sorted({text[17] for text in free} | {text[31] for text in free})[:3]
    expected = [_cut(text, eos) for text in free]
    assert len({len(text) for text in expected}) > 4
    table = taught(16, device=device)
    found = generate(model_on(device), PROMPTS, table=table, tree=TREES["80"], eos=eos, **options)
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


@pytest.mark.parametrize("device", DEVICES)
def test_half_precision_text_is_what_sample_draws_from_its_logits(device, monkeypatch):
    """Equality is of the verifier given its logits: in bfloat16 too."""
    for dtype in (torch.float32, torch.bfloat16):
        model = Decoding(make_model().model.to(device, dtype))
        rows: dict[tuple[int, int], Tensor] = {}
        right = loop.verify_tree

        def keep(logits, draft, tree, *, position, keeps=rows, verify=right, **rest):
            out = verify(logits, draft, tree, position=position, **rest)
            assert logits.dtype == dtype  # noqa: B023
            for b in range(len(logits)):
                for j in range(int(out.length[b])):
                    keeps[b, int(position[b]) + j] = logits[b, out.path[b, j]]
            return out

        given, table = PROMPTS[:1], taught(1, device=device)
        monkeypatch.setattr(loop, "verify_tree", keep)
        found = generate(model, given, temperature=T, max_new_tokens=NEW, seed=4,
                         table=table, tree=TREES["default"])  # fmt: skip
        monkeypatch.setattr(loop, "verify_tree", right)
        seed = rk.request_seeds(4, 1, device=device)
        for index, token in enumerate(found.texts[0], start=len(given[0])):
            row = rows[0, index][None]
            assert token == int(rk.sample(row, temperature=T, seed=seed, position=index))
        assert found.statistics.mean_accepted > LEAST


def test_numbers_of_numpy_are_numbers():
    plain = generate(MODEL, PROMPTS, temperature=0.5, max_new_tokens=5, seed=3, top_k=9)
    found = generate(
        MODEL, PROMPTS, temperature=np.float32(0.5), max_new_tokens=np.int64(5),
        seed=np.uint64(3), top_k=np.int32(9),
    )  # fmt: skip
    assert found.texts == plain.texts
    (text,) = generate(MODEL, PROMPTS[:1], temperature=0, max_new_tokens=np.int8(127)).texts
    assert len(text) == 127


@pytest.mark.parametrize("end", [NEW, NEW - 1])
def test_positions_end_where_texts_do(end):
    """A model that has just as many as its longest text needs, which waits as padding once over."""
    model = Decoding(seeded(VOCAB, 9 + NEW - 1, 32, 2, 0).double())
    seen = []

    class Watched(Decoding):
        def __call__(self, given: Any) -> Tensor:
            seen.append(given.positions.max())
            return super().__call__(given)

    watched, lengths = Watched(model.model), [len(prompt) for prompt in PROMPTS]
    options = {"temperature": T, "max_new_tokens": NEW, "seed": 1}
    expected = generate(model, PROMPTS, **options).texts
    ends = [NEW, NEW, end, NEW]

    def stop(request: int, text: list[int]) -> bool:
        return len(text) - lengths[request] == ends[request]

    drafter = Adversary([text + [1] * 9 for text in expected], PROMPTS)
    found = generate(watched, PROMPTS, drafter=drafter, stop=stop, **options)
    assert found.texts == [text[:end] for text, end in zip(expected, ends, strict=True)]
    assert found.statistics.mean_accepted > LEAST and max(seen) == 9 + NEW - 2


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
        flat = lambda tokens, tree, *a: tree_pass(tokens, tree, *a)._replace(positions=tokens * 0)  # noqa: E731
        monkeypatch.setattr(loop, "tree_pass", flat)
    assert generate(MODEL, PROMPTS, drafter=drafter, **options).texts != expected
