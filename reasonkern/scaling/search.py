"""`AStarFrontier`: the open list of A* decoding, as a heap on the host."""

from __future__ import annotations

import heapq
from collections.abc import Sequence
from itertools import islice
from typing import Any, NamedTuple

from .. import _checks
from .._fields import documented


@documented
class Node(NamedTuple):
    """A partial solution.

    Attributes:
        state: what the caller pushed: text, token ids, a cache handle.
        reward: process reward r in [0, 1].
        cost: g, what the increases of h on the way have added up to.
        priority: f = g + h, h = 1 - r.
    """

    state: Any
    reward: float
    cost: float
    priority: float


class AStarFrontier:
    """Best-first search over partial solutions: A*-Decoding (arXiv 2505.13672).

    f = g + h with h = 1 - r of a process reward model; g grows by the increases of h along a path,
    ``g' = g + max(0, h' - h)``. The node with the smallest f comes first; among equals the one
    pushed first. Costs O(log n) per node in Python: the frontier holds at most ``budget`` nodes.

    Args:
        budget: nodes that may be pushed in all; None = no limit.

    Raises:
        ValueError: a budget below 1, or (push) no lists, rewards outside [0, 1] or of another
            number than the states, or a parent that is no node.

    Example:
        >>> from reasonkern.scaling import AStarFrontier
        >>> frontier = AStarFrontier(budget=8)
        >>> frontier.push(["a", "b"], [0.25, 0.5])
        2
        >>> [node.state for node in frontier.pop(1)]
        ['b']
    """

    def __init__(self, budget: int | None = None) -> None:
        if budget is not None:
            _checks.check_integer("budget", budget, 1, or_none=" or None")
        self._left = budget
        self._heap: list[tuple[float, int, Node]] = []
        self._pushed = 0

    def push(
        self, states: Sequence[Any], rewards: Sequence[float], parent: Node | None = None
    ) -> int:
        """Adds continuations of a node, or roots.

        Args:
            states: partial solutions, any objects.
            rewards: process reward of each, in [0, 1].
            parent: the node, from `pop`, that all of them continue; None = they are roots.

        Returns:
            How many of them, the first ones, the budget admitted.
        """
        _checks.check_list("states", states, "states")
        _checks.check_list("rewards", rewards, "numbers, one per state")
        if len(rewards) != len(states):
            _checks.fail("rewards", f"{len(states)} numbers, one per state", len(rewards))
        for i, reward in enumerate(rewards):
            _checks.check_number(f"rewards[{i}]", reward, 0, 1)
        if parent is not None and not isinstance(parent, Node):
            _checks.fail("parent", "a Node from pop, or None", type(parent).__name__)
        admitted = len(states) if self._left is None else min(len(states), self._left)
        for state, reward in zip(islice(states, admitted), rewards, strict=False):
            node = self._node(state, float(reward), parent)
            heapq.heappush(self._heap, (node.priority, self._pushed, node))
            self._pushed += 1
        if self._left is not None:
            self._left -= admitted
        return admitted

    @staticmethod
    def _node(state: Any, reward: float, parent: Node | None) -> Node:
        cost = 0.0 if parent is None else parent.cost + max(0.0, parent.reward - reward)
        return Node(state, reward, cost, cost + 1 - reward)

    def pop(self, count: int = 1) -> list[Node]:
        """Removes and returns the best ``count`` nodes (1 or more), or all if there are fewer."""
        _checks.check_integer("count", count, 1)
        taken = min(count, len(self._heap))
        return [heapq.heappop(self._heap)[2] for _ in range(taken)]

    def __len__(self) -> int:
        """Number of open nodes."""
        return len(self._heap)

    @property
    def exhausted(self) -> bool:
        """Whether the budget is spent: further pushes admit nothing."""
        return self._left == 0
