"""The speculative loop of a small transformer gives the text of plain seeded sampling.

Everything that a real engine needs takes part: a key-value cache with holes, the tree's attention
mask and positions, compaction, requests that end at different steps, padding rows.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from speculation_cases import generator, random_tree
from torch import Tensor

import reasonkern as rk

VOCAB, WIDTH, HEADS, LAYERS, WINDOW = 40, 16, 2, 2, 4
TREE = random_tree(16, 3)
TREES = {  # taken in turn, step by step
    "random trees": [random_tree(2 + seed % 15, seed) for seed in range(30)],
    "chain": [rk.DraftTree.chain(6)],
    "default": [rk.DraftTree.default(16)],
}


class Transformer:
    """Two layers of attention and a perceptron in float64; every weight is random."""

    def __init__(self, seed: int) -> None:
        g = generator(seed)

        def weight(*shape: int) -> Tensor:
            return torch.randn(*shape, generator=g, dtype=torch.float64) / math.sqrt(shape[-2])

        self.embedding = weight(VOCAB, WIDTH) * math.sqrt(VOCAB)
        self.qkv = [weight(WIDTH, 3 * WIDTH) for _ in range(LAYERS)]
        self.out = [weight(WIDTH, WIDTH) for _ in range(LAYERS)]
        self.up = [weight(WIDTH, 2 * WIDTH) for _ in range(LAYERS)]
        self.down = [weight(2 * WIDTH, WIDTH) for _ in range(LAYERS)]
        self.head = weight(WIDTH, VOCAB) * 3.5

    def embed(self, tokens: Tensor, positions: Tensor) -> Tensor:
        rate = 0.4 ** torch.arange(WIDTH // 2, dtype=torch.float64)
        angle = positions[..., None] * rate
        return self.embedding[tokens] + 0.3 * torch.cat((angle.sin(), angle.cos()), -1)

    def __call__(self, tokens: Tensor, positions: Tensor, attend: Callable[..., Tensor]) -> Tensor:
        """Logits (B, N, V); attend(layer, q, k, v), each (B, H, N, D), sees the past too."""
        x = self.embed(tokens, positions)
        for layer in range(LAYERS):
            qkv = _normed(x) @ self.qkv[layer]
            q, k, v = qkv.unflatten(-1, (3, HEADS, -1)).permute(2, 0, 3, 1, 4)
            x = x + attend(layer, q, k, v).transpose(1, 2).flatten(2) @ self.out[layer]
            x = x + torch.relu(_normed(x) @ self.up[layer]) @ self.down[layer]
        return _normed(x) @ self.head


def _normed(x: Tensor) -> Tensor:
    return x / x.square().mean(-1, keepdim=True).sqrt()


def _attention(q: Tensor, k: Tensor, v: Tensor, seen: Tensor) -> Tensor:
    return torch.nn.functional.scaled_dot_product_attention(q, k, v, seen)


def without_cache(model: Transformer, tokens: Tensor) -> Tensor:
    """Logits (B, L, V) of whole texts in one causal pass."""
    length = tokens.shape[1]
    seen = torch.ones(length, length, dtype=torch.bool).tril()
    attend = lambda _, q, k, v: _attention(q, k, v, seen)  # noqa: E731
    return model(tokens, torch.arange(length).expand_as(tokens), attend)


class Cache:
    """Keys and values of a batch; `lengths` tokens of each request are committed."""

    def __init__(self, batch: int, slots: int) -> None:
        shape = (LAYERS, batch, HEADS, slots, WIDTH // HEADS)
        # Seen, it would show; NaN would show even where the mask hides it.
        self.keys, self.values = (torch.full(shape, 1e30, dtype=torch.float64) for _ in range(2))
        self.lengths = torch.zeros(batch, dtype=torch.int64)

    def forward(self, model: Transformer, tokens: Tensor, tree: rk.DraftTree) -> Tensor:
        """Logits (B, N, V) of the nodes, which take the slots from `lengths` on."""
        nodes, used = tree.nodes, int(self.lengths.max()) + tree.nodes
        slots = (self.lengths[:, None] + torch.arange(nodes))[:, None, :, None]
        offset = torch.arange(used) - self.lengths[:, None]  # slot's node, negative: committed
        inside = (offset >= 0) & (offset < nodes)
        in_tree = tree.attention_mask()[:, offset.clamp(0, nodes - 1)].transpose(0, 1)
        seen = ((offset < 0)[:, None] | (in_tree & inside[:, None])).unsqueeze(1)

        def attend(layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            past = self.keys[layer, :, :, :used], self.values[layer, :, :, :used]
            for cache, new in zip(past, (k, v), strict=True):
                cache.scatter_(2, slots.expand_as(new), new)
            return _attention(q, *past, seen)

        return model(tokens, tree.positions(self.lengths), attend)

    def commit(self, path: Tensor, accepted: Tensor) -> None:
        layers = self.keys.unbind(), self.values.unbind()
        rk.compact_kv_(*layers, self.lengths, path, accepted)
        self.lengths += accepted


@dataclass
class Requests:
    """Prompts of different lengths, and how each is sampled."""

    prompts: Tensor  # (B, L) padded on the right with -1
    options: dict[str, Any]  # of sample and verify_tree, (B,) each
    padding: Tensor  # (B,) bool: rows that must stay empty

    def take(self, order: Tensor) -> Requests:
        options = {name: x[order] for name, x in self.options.items()}
        return Requests(self.prompts[order], options, self.padding[order])


def requests(batch: int, seed: int) -> Requests:
    """Greedy and sampled rows, with none, one or all of the filters; every ninth is padding."""
    g = generator(seed)
    row = torch.arange(batch)
    prompts = torch.randint(0, VOCAB, (batch, 7), generator=g)
    prompts[torch.arange(7) >= 2 + row[:, None] % 6] = -1
    temperature = 0.4 + 0.6 * torch.rand(batch, generator=g)
    options = {
        "temperature": temperature.where(row % 5 != 1, 0.0),
        "top_k": torch.where(row % 4 == 1, 7 + row % 3, 0),
        "top_p": torch.where(row % 4 >= 2, 0.9, 1.0),
        "min_p": torch.where(row % 4 == 3, 0.03, 0.0),
        "seed": rk.request_seeds(seed, batch),
    }
    return Requests(prompts, options, row % 9 == 8)


class Text:
    """The tokens of a batch, (B, slots), the first `lengths` of each row."""

    def __init__(self, given: Requests, new: int, model: Transformer) -> None:
        self.prompt = (given.prompts >= 0).sum(1)
        self.lengths, self.end = self.prompt.clone(), self.prompt + new
        self.end = self.end.where(~given.padding, self.prompt)
        batch, width = given.prompts.shape
        self.tokens = torch.full((batch, width + new), -1)
        self.tokens[:, :width] = given.prompts
        self.cache = Cache(batch, width + new + 32)
        self.cache.forward(model, given.prompts.clamp_min(0), rk.DraftTree.chain(width))
        self.cache.lengths += self.prompt - 1  # the last token has no entry yet

    @property
    def left(self) -> Tensor:
        return self.end - self.lengths

    def context(self) -> Tensor:
        """(B, WINDOW) the last tokens; all -1 where the request is over."""
        at = self.lengths[:, None] - WINDOW + torch.arange(WINDOW)
        last = self.tokens.gather(1, at.clamp_min(0)).where(at >= 0, -1)
        return last.where(self.left[:, None] > 0, -1)

    def extend(self, tokens: Tensor, count: Tensor) -> None:
        new = torch.arange(tokens.shape[1]) < count[:, None]
        row, j = new.nonzero(as_tuple=True)
        self.tokens[row, self.lengths[row] + j] = tokens[row, j]
        self.lengths += count


def plain(model: Transformer, given: Requests, new: int) -> Text:
    """One token per pass; `sample` and nothing else decides."""
    text, tree = Text(given, new, model), rk.DraftTree.chain(1)
    while (active := text.left > 0).any():
        last = text.tokens.gather(1, text.lengths[:, None] - 1)
        logits = text.cache.forward(model, last, tree)[:, 0]
        token = rk.sample(logits, position=text.lengths, **given.options)
        text.cache.commit(torch.zeros(len(token), 1, dtype=torch.int64), active.long())
        text.extend(token[:, None], active.long())
    return text


class Learning:
    """A table that all requests share, or with a scope for each."""

    def __init__(self, scopes: Tensor | None = None, *, learns: bool = True) -> None:
        self.table = rk.NgramTable(1 << 16, vocab_size=VOCAB, orders=(WINDOW, 3, 2), topk=8)
        self.scopes, self.learns = scopes, learns

    def draft(self, text: Text, tree: rk.DraftTree, given: Requests) -> rk.Draft:
        temperature, seed = given.options["temperature"], given.options["seed"]
        return self.table.draft(
            text.context(), tree, temperature=temperature, seed=seed, position=text.lengths,
            scope=self.scopes,
        )  # fmt: skip

    def read(self, context: Tensor, out: rk.Verified) -> None:
        if self.learns:
            self.table.update_verified(context, out, scope=self.scopes)


class Adversary:
    """Drafts that know the text to come: right, wrong, repeated, out of range, switched off."""

    def __init__(self, truth: Tensor) -> None:
        self.truth, self.generator = truth, generator(5)

    def draft(self, text: Text, tree: rk.DraftTree, given: Requests) -> rk.Draft:
        shape = (len(text.lengths), tree.nodes)
        at = text.lengths[:, None] - 1 + tree.depths
        right = self.truth.gather(1, at.clamp_max(self.truth.shape[1] - 1))
        wrong = torch.randint(-3, VOCAB + 3, shape, generator=self.generator)
        fate = torch.rand(shape, generator=self.generator)
        tokens = torch.where(fate < 0.5, right, wrong)
        tokens[:, 0] = right[:, 0]
        valid = torch.rand(shape, generator=self.generator) < 0.8
        valid[:, 0] = text.left > 0
        return rk.Draft(tokens, valid)

    def read(self, context: Tensor, out: rk.Verified) -> None:
        pass


def speculative(
    model: Transformer, given: Requests, new: int, trees: list[rk.DraftTree], drafter: Any
) -> tuple[Text, float]:
    """The text, and the mean number of tokens per step of a request."""
    text, steps, turn = Text(given, new, model), 0, itertools.cycle(trees)
    while (active := text.left > 0).any():
        context, tree = text.context(), next(turn)
        draft = drafter.draft(text, tree, given)
        # A model has no row for an id that does not exist; the verifier must not enter it.
        logits = text.cache.forward(model, draft.tokens.clamp(0, VOCAB - 1), tree)
        out = rk.verify_tree(
            logits, draft, tree, position=text.lengths, max_length=text.left.clamp_min(0), topk=8,
            **given.options,
        )  # fmt: skip
        assert torch.equal(out.length > 0, active)
        drafter.read(context, out)
        text.cache.commit(out.path, out.length)
        text.extend(out.tokens, out.length)
        steps += int(active.sum())
    return text, int((text.end - text.prompt).sum()) / steps


def check(batch: int, new: int, case: str) -> None:
    model, given = Transformer(0), requests(batch, 1)
    expected = plain(model, given, new)
    check_is_plain(model, given, expected)
    trees, drafter, least = TREES.get(case, [TREE]), Learning(), 1.3
    if case == "empty":
        drafter, least = Learning(learns=False), 1.0
    elif case == "scopes":
        drafter = Learning(torch.arange(batch))
    elif case == "other table":
        least = 1.0
        teach(drafter, Transformer(1), given, new)
    elif case == "adversarial":
        drafter = Adversary(expected.tokens)
    order = torch.arange(batch)
    if case == "permuted":
        order = torch.randperm(batch, generator=generator(2))
    text, accepted = speculative(model, given.take(order), new, trees, drafter)
    assert torch.equal(text.tokens, expected.tokens[order])
    assert accepted == 1.0 if case == "empty" else accepted > least


def check_is_plain(model: Transformer, given: Requests, text: Text) -> None:
    """Each token is what `sample` draws from the logits of one causal pass over the text."""
    logits = without_cache(model, text.tokens.clamp_min(0))
    for t in range(2, text.tokens.shape[1]):
        token = rk.sample(logits[:, t - 1], position=t, **given.options)
        new = (t >= text.prompt) & (t < text.end)
        assert torch.equal(token[new], text.tokens[:, t][new]), t


def teach(drafter: Learning, model: Transformer, given: Requests, new: int) -> None:
    """The table reads another model's texts and learns nothing from this one's."""
    speculative(model, given, new, [TREE], drafter)
    assert len(drafter.table) > 500
    drafter.learns = False


CASES = (
    "empty", "shared", "scopes", "other table", "adversarial", "permuted", "random trees", "chain",
    "default",
)  # fmt: skip


@pytest.mark.parametrize("case", ("empty", "shared", "adversarial", "random trees"))
def test_speculation_gives_the_plain_text(case):
    check(27, 40, case)


@pytest.mark.slow
@pytest.mark.parametrize("case", CASES)
def test_speculation_gives_the_plain_text_of_a_hundred_seeds(case):
    check(114, 500, case)


def _full_mask(tree: rk.DraftTree, *_: Any) -> Tensor:
    return torch.ones(tree.nodes, tree.nodes, dtype=torch.bool)


def _same_position(tree: rk.DraftTree, length: Tensor) -> Tensor:
    return length[:, None].expand(-1, tree.nodes)


@pytest.mark.parametrize("name, broken", [
    ("attention_mask", _full_mask), ("positions", _same_position), ("compact_kv_", None),
])  # fmt: skip
def test_a_broken_engine_gives_another_text(name, broken, monkeypatch):
    model, given, tree = Transformer(0), requests(27, 1), TREE
    expected = plain(model, given, 40)
    if broken is None:
        monkeypatch.setattr(rk, name, lambda *_: None)
    else:  # in the drafts' tree alone: prompts go through a chain
        right = getattr(rk.DraftTree, name)
        choose = lambda self, *args: (broken if self == tree else right)(self, *args)  # noqa: E731
        monkeypatch.setattr(rk.DraftTree, name, choose)
    text, _ = speculative(model, given, 40, [tree], Adversary(expected.tokens))
    assert not torch.equal(text.tokens, expected.tokens)
