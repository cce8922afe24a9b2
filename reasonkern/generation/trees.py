"""How many nodes a step drafts: as many as its time is worth, or none."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

from ..speculation import DraftTree
from ..speculation.tree import RANK_RATES

if TYPE_CHECKING:
    import numpy as np

SIZES = (1, 8, 16, 32, 80)  # nodes per request; 1 is plain decoding
PRIOR = 4.0  # steps of a request that the rates of typical traces count as, at first
MEMORY = 0.98  # weight of what is known of a node after each step that uses it
PROBE = 64  # every so many steps a neighbouring size is tried: tables learn, texts grow
TURN = 4  # steps with one choice


def batch_size(requests: int) -> int:
    """What times are known for: the power of 4 that holds so many requests."""
    size = 1
    while size < requests:
        size *= 4
    return size


class FixedTree:
    """Always the same tree."""

    def __init__(self, tree: DraftTree) -> None:
        self._tree = tree

    def next(self, requests: int) -> DraftTree:
        """The tree of the next step."""
        return self._tree

    def observe(self, tree: DraftTree, paths: Sequence[Sequence[int]]) -> None:
        """Takes in which nodes a step visited."""


class BestTree:
    """The prefix of the default tree that emits most tokens per second.

    Its expected tokens come from how often each node was visited when it was in use, its time from
    `measure`, by batch size.
    """

    def __init__(self, measure: Callable[[DraftTree, int], float]) -> None:
        import numpy as np  # importing the package does without

        whole = DraftTree.default(SIZES[-1])
        self._trees = [whole.prefix(size) for size in SIZES]
        self._measure = measure
        self._visits, self._steps = PRIOR * _likelihoods(whole), np.full(len(whole), PRIOR)
        self._count = self._best = 0

    def next(self, requests: int) -> DraftTree:
        """The tree of the next step, for so many requests that are not finished."""
        if self._count % TURN == 0:
            batch = batch_size(requests)
            expected = (self._visits / self._steps).cumsum()
            speeds = [expected[len(t) - 1] / self._measure(t, batch) for t in self._trees]
            self._best = speeds.index(max(speeds))
        self._count += 1
        probes, rest = divmod(self._count, PROBE)
        best = self._best if rest else self._best + (1 if probes % 2 else -1)
        return self._trees[min(max(best, 0), len(SIZES) - 1)]

    def observe(self, tree: DraftTree, paths: Sequence[Sequence[int]]) -> None:
        """Takes in the nodes that a step visited, by request."""
        nodes = len(tree)
        if nodes == 1:  # the root is always visited
            return
        self._visits[:nodes] *= MEMORY
        self._steps[:nodes] *= MEMORY
        self._steps[:nodes] += len(paths)
        for path in paths:
            self._visits[list(path)] += 1


def _likelihoods(tree: DraftTree) -> np.ndarray[tuple[int], np.dtype[np.float64]]:
    """Of every node: that it is visited, by the rates that the default tree was made from."""
    import numpy as np

    found = np.ones(len(tree))
    parents, ranks = tree.parents.tolist(), tree.ranks.tolist()
    for node in range(1, len(tree)):
        rank = min(ranks[node], len(RANK_RATES) - 1)
        found[node] = found[parents[node]] * RANK_RATES[rank]
    return found
