"""`check_verifier`: whether a verifier of drafted tokens leaves the target's law unchanged."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from .. import _checks
from . import noise
from .draft import Draft
from .enumerate import exact_report
from .laws import Law, LawReport, g_test
from .toy import Toy
from .tree import DraftTree
from .verify import request_seeds

CHUNK = 1 << 14
JOINT = 3  # tokens of the joint law
DRAWN, EXACT = (16, 3, 3), (4, 2, 2)  # vocabulary, children, depth
ARGUMENTS = ("logits", "draft", "tree", "temperature", "seed", "position")


def check_verifier(
    fn: Callable[..., Any],
    *,
    vocab: int | None = None,
    children: int | None = None,
    depth: int | None = None,
    draws: int = 2**20,
    seed: int = 0,
    exact: bool = False,
    shared: bool = False,
) -> LawReport:
    """Tests whether a speculative verifier, this project's or any other, emits the target's law.

    A toy target (the next token's law depends on the last token and the depth, some tokens are
    impossible) and a toy drafter (another law, on half of the vocabulary) make ``draws``
    independent steps. Children are drawn without replacement by Gumbel-Top-K, in the order of their
    ranks. G-tests then compare four kinds of laws with the target's: "marginal", of the first
    token; "pair", of the first tokens of two neighbours in the batch, which are independent;
    "joint", of the first three tokens, where the target itself continues shorter steps; and
    "length > j", of token j given the one before it, over the steps that emitted it. A law is
    broken when its p-value is below 1e-6, and not tested where too few steps come to it. Noise that
    requests further apart share may break none of them. The default's draws take 10 to 20 s with
    `verify_tree` on a core of a CPU; 2^14 are a quick look, below a second.

    With ``exact``, the law is enumerated instead: ``fn`` is run once for every outcome of every
    random choice and the laws must agree to a total variation of 1e-12. ``fn`` then takes its
    randomness from the harness: ``draws.target(prefix)`` and ``draws.draft(prefix)`` are lists of
    probabilities after the tokens ``prefix``, ``draws.children(prefix)`` the tokens drawn there, in
    draw order (empty at the last depth); ``coins.below(x)`` is true with probability x,
    ``coins.choice(weights)`` an index with probabilities in proportion to the weights.

    Args:
        fn: ``fn(logits, draft, tree, temperature, seed, position) -> (tokens, length)`` with logits
            (B, N, V) float32, a `Draft` and a `DraftTree`, temperature 1.0, seed (B,) int64,
            position 0, all of them positional; tokens (B, D + 1) and length (B,), at least 1,
            int64 or int32. With ``exact``: ``fn(draws, coins) -> tokens``, a list of integers.
        vocab: V, at least 2; at most 6 with ``exact``. None = 16, 4 with ``exact``.
        children: of every node above the last level, at least 1 and at most V; at most 3 with
            ``exact``. None = 3, 2 with ``exact``.
        depth: D, at least 1; at most 3 with ``exact``, where the cost is a power of it. None = 3, 2
            with ``exact``.
        draws: steps to draw; not used with ``exact``.
        seed: of the toy models and the steps.
        exact: enumerate instead of drawing.
        shared: draft with the noise that `sample` uses at the same position, as ``mode="shared"``
            does; for verifiers by equality.

    Returns:
        `LawReport`: true when every law that could be tested holds, and one could; ``untested``
        names the others; printing it shows them all.

    Raises:
        ValueError: a parameter out of range; ``fn`` does not take its arguments, or returned
            something else, or of a wrong dtype, shape, length or token.

    Example:
        >>> import reasonkern as rk
        >>> def equality(logits, draft, tree, temperature, seed, position):
        ...     out = rk.verify_tree(logits, draft, tree, temperature=temperature, seed=seed,
        ...                          position=position, mode="target-only")
        ...     return out.tokens, out.length
        >>> bool(rk.check_verifier(equality, vocab=4, children=2, depth=2, draws=4096))
        True
    """
    vocab, children, depth = (
        default if given is None else given
        for given, default in zip((vocab, children, depth), EXACT if exact else DRAWN, strict=True)
    )
    _checks.check_integer("vocab", vocab, 2, 6 if exact else 4096)
    most = min(3 if exact else 64, vocab)
    _checks.check_integer("children", children, 1, most, f" (vocab = {vocab})")
    _checks.check_integer("depth", depth, 1, 3 if exact else 8)
    vocab, children, depth = int(vocab), int(children), int(depth)  # NumPy's small ones overflow
    seed = _checks.check_seed("seed", seed)
    _check_takes(fn, ("draws", "coins") if exact else ARGUMENTS)
    toy = Toy(vocab, children, depth, seed)
    if exact:
        return exact_report(fn, toy)
    _checks.check_integer("draws", draws, 1, 1 << 32)
    draws = int(draws)
    tree = full_tree(children, depth)
    counts = Counts(toy)
    seeds = request_seeds(seed, draws)
    for chunk in seeds.split(CHUNK):
        logits, draft = draw_step(toy, tree, chunk, shared)
        result = fn(logits, draft, tree, 1.0, chunk, 0)
        counts.add(*_checked_result(result, len(chunk), toy))
    return LawReport(counts.laws())


def full_tree(children: int, depth: int) -> DraftTree:
    """Every node above the last level has `children` children; breadth first."""
    parents, level = [-1], [0]
    for _ in range(depth):
        below: list[int] = []
        for node in level:
            below += range(len(parents), len(parents) + children)
            parents += [node] * children
        level = below
    return DraftTree(parents)


def draw_step(toy: Toy, tree: DraftTree, seed: Tensor, shared: bool) -> tuple[Tensor, Draft]:
    """Logits (B, N, V) and drafts of one step per seed, all after token 0 at position 0."""
    batch = len(seed)
    nodes = (batch, tree.nodes)
    tokens = seed.new_zeros(nodes)
    logits = toy.logits.new_empty((*nodes, toy.vocab))
    q_ids = tokens.new_full((*nodes, toy.entry), -1)
    q_logprob = logits.new_full((*nodes, toy.entry), -torch.inf)
    pointers, index = (t.tolist() for t in tree.children)
    streams = [(d, noise.TARGET, 0) if shared else (0, noise.DRAFT, d) for d in range(toy.depth)]
    g = [
        noise.gumbel(noise.row_words(seed, torch.full_like(seed, at), toy.vocab, *stream))
        for at, *stream in streams
    ]
    for node, d in enumerate(tree.depths.tolist()):
        last = tokens[:, node]
        logits[:, node] = toy.logits[d, last]
        below = index[pointers[node] : pointers[node + 1]]
        if not below:
            continue
        ids, logprob = toy.q_ids[d, last], toy.q_logprob[d, last]
        order = (logprob + g[d].gather(1, ids)).argsort(dim=-1, descending=True, stable=True)
        tokens[:, below] = ids.gather(1, order[:, : len(below)])
        q_ids[:, node], q_logprob[:, node] = ids, logprob
    return logits, Draft(tokens, torch.ones_like(tokens, dtype=torch.bool), q_ids, q_logprob)


class Counts:
    """How often each cell of each law was seen."""

    def __init__(self, toy: Toy) -> None:
        self.toy, self.depth = toy, toy.depth
        v, self.joint_length = toy.vocab, min(JOINT, toy.depth + 1)
        zeros = toy.target.new_zeros  # float32 would not tell 2^24 from the next count
        self.first = zeros(v)
        self.pair = zeros(v * v)
        self.later = [zeros(v * v) for _ in range(toy.depth)]
        self.joint = zeros(v**self.joint_length)
        self.generator = torch.Generator().manual_seed(toy.seed)

    def add(self, tokens: Tensor, length: Tensor) -> None:
        v = self.toy.vocab
        self.first += torch.bincount(tokens[:, 0], minlength=v)
        one, other = tokens[: len(tokens) // 2 * 2, 0].view(-1, 2).T
        self.pair += torch.bincount(one * v + other, minlength=v * v)
        for j in range(1, self.depth + 1):
            pair = tokens[:, j - 1] * v + tokens[:, j]
            self.later[j - 1] += torch.bincount(pair[length > j], minlength=v * v)
        cell = last = tokens[:, 0]
        for j in range(1, self.joint_length):
            own = torch.multinomial(self.toy.target[j, last], 1, generator=self.generator)[:, 0]
            last = torch.where(length > j, tokens[:, j], own)
            cell = cell * v + last
        self.joint += torch.bincount(cell, minlength=v**self.joint_length)

    def laws(self) -> tuple[Law, ...]:
        v, target = self.toy.vocab, self.toy.target
        first = target[0, :1]
        laws = [g_test("marginal", self.first[None], first)]
        laws.append(g_test("pair", self.pair[None], (first.T * first).view(1, -1)))
        law = self.toy.joint(self.joint_length)
        laws.append(g_test("joint", self.joint[None], law[None]))
        for j, seen in enumerate(self.later, start=1):
            laws.append(g_test(f"length > {j}", seen.view(v, v), target[j]))
        return tuple(laws)


def _checked_result(result: object, batch: int, toy: Toy) -> tuple[Tensor, Tensor]:
    if not isinstance(result, tuple | list) or len(result) != 2:
        _checks.fail("fn's result", "the pair (tokens, length)", type(result).__name__)
    tokens, length = result
    _checks.check_dtype("tokens", tokens, torch.int64, torch.int32)
    _checks.check_shape("tokens", tokens, (batch, toy.depth + 1), "(B, D + 1)")
    _checks.check_dtype("length", length, torch.int64, torch.int32)
    _checks.check_shape("length", length, (batch,), "(B,)")
    tokens, length = tokens.cpu().long(), length.cpu().long()
    _checks.check_range("length", length, 1, toy.depth + 2)
    emitted = torch.arange(toy.depth + 1, device=length.device) < length.unsqueeze(-1)
    _checks.check_range("tokens", tokens, 0, toy.vocab, where=emitted)
    return tokens.clamp(0, toy.vocab - 1), length


def _check_takes(fn: Callable[..., Any], names: tuple[str, ...]) -> None:
    """The function takes these positional arguments, as far as its signature can be read."""
    expected = f"a function ({', '.join(names)}), all of them positional"
    if not callable(fn):
        _checks.fail("fn", expected, repr(fn))
    try:
        signature = inspect.signature(fn)
    except (TypeError, ValueError):  # of a built-in one
        return
    try:
        signature.bind(*names)
    except TypeError as error:
        _checks.fail("fn", expected, f"{signature} ({error})")
