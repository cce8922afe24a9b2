"""Where drafts come from: the n-gram table, or a function of the texts."""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from numbers import Integral
from typing import Protocol

import torch

from .. import _checks
from ..speculation import Draft, DraftTree

Proposal = tuple[Sequence[int], Sequence[int]]


class Drafter(Protocol):
    """A function that proposes continuations of texts."""

    def __call__(
        self, requests: Sequence[int], texts: Sequence[list[int]], /
    ) -> Sequence[Proposal]:
        """Proposes for each request that is not over; any text and any tree is allowed.

        Args:
            requests: indices that stay the same during a run.
            texts: their tokens so far, prompts included; not to be changed.

        Returns:
            (tokens, parents) of each: ``parents[i]`` is the index of the proposed token that token
            i follows, below i, or -1 where it follows the text. ``([], [])`` proposes nothing.
        """


@lru_cache(maxsize=256)
def _tree(parents: tuple[int, ...]) -> DraftTree:
    return DraftTree(parents)


def _checked_pair(proposal: object) -> Proposal:
    if not isinstance(proposal, (tuple, list)) or len(proposal) != 2:
        _checks.fail("drafter", "a pair (tokens, parents) for each request", repr(proposal))
    return proposal[0], proposal[1]


def plant(
    proposals: Sequence[Proposal], roots: Sequence[int], vocab_size: int, device: torch.device
) -> tuple[Draft, DraftTree]:
    """One tree that holds the tree of every request, nodes identified by their path of ranks.

    Args:
        proposals: of each request, see `Drafter`; a request without drafts has ``([], [])``.
        roots: the last token of each text; -1 for a request that is over.
        vocab_size: ids are below it.
        device: of the result.
    """
    place: dict[tuple[int, int], int] = {}  # (parent, rank) -> node
    parents = [-1]
    rows: list[dict[int, int]] = []  # node -> token
    for tokens, above in map(_checked_pair, proposals):
        _check_proposal(tokens, above, vocab_size)
        nodes, ranks, row = [0], {0: 0}, {}
        for token, parent in zip(tokens, above, strict=True):
            mother = nodes[parent + 1]
            rank = ranks.get(mother, 0)
            ranks[mother] = rank + 1
            node = place.setdefault((mother, rank), len(parents))
            if node == len(parents):
                parents.append(mother)
            nodes.append(node)
            row[node] = token
        rows.append(row)
    filled = [
        [max(root, 0), *(row.get(node, max(root, 0)) for node in range(1, len(parents)))]
        for root, row in zip(roots, rows, strict=True)
    ]
    valid = [
        [root >= 0, *(node in row for node in range(1, len(parents)))]
        for root, row in zip(roots, rows, strict=True)
    ]
    draft = Draft(torch.tensor(filled, device=device), torch.tensor(valid, device=device))
    return draft, _tree(tuple(parents))


def _check_proposal(tokens: Sequence[int], parents: Sequence[int], vocab_size: int) -> None:
    _checks.check_ids("drafter", tokens, vocab_size)
    if isinstance(parents, str) or not isinstance(parents, Sequence):
        _checks.fail("drafter", "a sequence of parents", repr(parents))
    if len(tokens) != len(parents):
        expected = f"as many parents as tokens, {len(tokens)}"
        _checks.fail("drafter", expected, f"{len(parents)} parents")
    for index, parent in enumerate(parents):
        if not isinstance(parent, Integral) or not -1 <= parent < index:
            _checks.fail("drafter", f"parents[{index}] in [-1, {index})", parent)


def chain_proposal(tokens: Sequence[int]) -> Proposal:
    """The proposal of tokens that follow one another.

    Args:
        tokens: ids, the first one following the text.
    """
    return tokens, range(-1, len(tokens) - 1)
