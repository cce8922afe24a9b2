"""`DraftTree`: the static shape of a draft, as an array of parents."""

from __future__ import annotations

import heapq
import json
import math
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from .. import _checks
from .._fields import documented

MAX_NODES = 4096
# Chance that the child of rank r is accepted, given that its parent was. Rounded up from replayed
# traces, where deep nodes do better than the average; see the README. Further ranks halve.
RANK_RATES = (0.62, 0.10, 0.045, 0.026, 0.017, 0.012, 0.009, 0.007)


@documented
class TreeTensors(NamedTuple):
    """int32 tensors of a tree on one device; what the operators take.

    Attributes:
        parents: (N,) index of the parent; -1 at the root.
        ranks: (N,) rank among the siblings, 0 first; 0 at the root.
        depths: (N,) distance from the root.
        child_ptr: (N + 1,) the children of node i are child_index[child_ptr[i] : child_ptr[i + 1]],
            by rank.
        child_index: (N - 1,) see child_ptr.
        level_ptr: (D + 1,) the nodes of depth d that have children are level_nodes[level_ptr[d] :
            …[d + 1]].
        level_nodes: (nodes with children,) by depth, then by index.
    """

    parents: Tensor
    ranks: Tensor
    depths: Tensor
    child_ptr: Tensor
    child_index: Tensor
    level_ptr: Tensor
    level_nodes: Tensor


class DraftTree:
    """A static tree of draft tokens.

    Node 0 is the root and stands for the last committed token; every other node is a drafted
    continuation of its parent. Siblings are ranked by index: rank r holds the r-th best (or r-th
    drawn) candidate of its parent's context. Since parents come before children, the first n nodes
    of a tree are a tree. Trees compare and hash by their parents.

    Args:
        parents: one integer per node (a sequence or a 1-dim tensor); ``parents[0] == -1`` and
            ``0 <= parents[i] < i`` for the others. At most 4096 nodes, the root included.

    Raises:
        ValueError: empty, too long, or a parent that does not come before its child.

    Example:
        >>> import reasonkern as rk
        >>> tree = rk.DraftTree([-1, 0, 0, 1])
        >>> tree.nodes, tree.depth, tree.ranks.tolist()
        (4, 2, [0, 0, 1, 0])
    """

    def __init__(self, parents: Sequence[int] | Tensor) -> None:
        if isinstance(parents, Tensor) and _checks.check_values("parents", parents).ndim != 1:
            _checks.fail("parents", "shape (nodes,)", tuple(parents.shape))
        if isinstance(parents, str) or not isinstance(parents, Iterable):
            _checks.fail("parents", "a sequence of integers", repr(parents))
        given = parents.tolist() if isinstance(parents, Tensor) else list(parents)
        self._parents = _checked_parents(given)
        self._tensors: dict[torch.device, TreeTensors] = {}
        self._windows: dict[tuple[int, torch.device], Tensor] = {}
        cpu = torch.device("cpu")
        self._tensors[cpu] = _tree_tensors(self._parents)
        self._depth = int(self._tensors[cpu].depths.max())
        self._max_children = int(self._tensors[cpu].ranks.max()) + 1 if self.nodes > 1 else 0

    @classmethod
    def default(cls, nodes: int = 80) -> DraftTree:
        """The most likely ``nodes`` nodes under fixed rates by rank, typical of reasoning traces.

        Nodes are ordered by their likelihood, so ``default(m)`` is the prefix of ``default(n)``.
        `reasonkern.tune_tree` fits a tree to your own traces instead.

        Args:
            nodes: number of nodes, the root included, 1 to 4096.

        Raises:
            ValueError: a number out of its range.
        """
        return cls.grow(nodes)

    @classmethod
    def grow(
        cls, nodes: int, *, rates: Sequence[float] = RANK_RATES, depth: int | None = None
    ) -> DraftTree:
        """The ``nodes`` most likely nodes, most likely first.

        Args:
            nodes: number of nodes, the root included.
            rates: rates[r] is the chance that the child of rank r is accepted, given that its
                parent was; beyond the last one they halve.
            depth: largest depth; None = no limit.

        Raises:
            ValueError: a number out of its range.
        """
        _checks.check_integer("nodes", nodes, 1, MAX_NODES)
        if depth is not None:
            _checks.check_integer("depth", depth, 1, or_none=" or None")
        numbers = isinstance(rates, Sequence) and all(isinstance(r, (int, float)) for r in rates)
        if not numbers or not rates or not all(0 < rate <= 1 for rate in rates):
            _checks.fail("rates", "a sequence of numbers in (0, 1]", repr(rates))
        parents, depths = [-1], [0]
        # (-likelihood, parent, rank): the next child of a parent; ties go to the older parent.
        queue = [(-_rank_rate(rates, 0), 0, 0)]
        while len(parents) < nodes:
            score, parent, rank = heapq.heappop(queue)
            parents.append(parent)
            depths.append(depths[parent] + 1)
            rate = _rank_rate(rates, rank)  # 0 where halving has gone below all numbers
            sibling = score / rate * _rank_rate(rates, rank + 1) if rate else score
            heapq.heappush(queue, (sibling, parent, rank + 1))
            if depth is None or depths[-1] < depth:
                heapq.heappush(queue, (score * _rank_rate(rates, 0), len(parents) - 1, 0))
        return cls(parents)

    @classmethod
    def chain(cls, nodes: int) -> DraftTree:
        """A tree without branches: the root and ``nodes - 1`` successive tokens.

        Raises:
            ValueError: ``nodes`` outside [1, 4096].
        """
        _checks.check_integer("nodes", nodes, 1, MAX_NODES)
        return cls(range(-1, nodes - 1))

    @classmethod
    def load(cls, path: str | Path) -> DraftTree:
        """Reads what `save` or ``python -m reasonkern tune -o`` wrote.

        Raises:
            ValueError: the file holds no tree; the message names it.
            OSError: it cannot be read.
        """
        try:
            parents = json.loads(Path(path).read_text(encoding="utf-8"))["parents"]
            return cls([_integer(p) for p in parents])
        except (KeyError, TypeError, ValueError) as error:
            message = f'{path}: expected a JSON object {{"parents": [-1, 0, …]}} ({error})'
            raise ValueError(message) from error

    def save(self, path: str | Path) -> None:
        """Writes the tree as JSON: ``{"parents": [-1, 0, …]}``."""
        Path(path).write_text(json.dumps({"parents": list(self._parents)}) + "\n")

    @property
    def parents(self) -> Tensor:
        """(N,) int32, -1 at the root."""
        return self.tensors().parents

    @property
    def ranks(self) -> Tensor:
        """(N,) int32: rank of each node among its siblings, 0 first."""
        return self.tensors().ranks

    @property
    def depths(self) -> Tensor:
        """(N,) int32: distance of each node from the root."""
        return self.tensors().depths

    @property
    def children(self) -> tuple[Tensor, Tensor]:
        """Compressed rows, int32: node i has children ``index[ptr[i] : ptr[i + 1]]``, by rank."""
        return self.tensors().child_ptr, self.tensors().child_index

    @property
    def nodes(self) -> int:
        """Number of nodes N, the root included: rows of one forward pass per request."""
        return len(self._parents)

    @property
    def depth(self) -> int:
        """Largest depth D: at most D + 1 tokens are emitted per step."""
        return self._depth

    @property
    def max_children(self) -> int:
        """Largest number of children of one node."""
        return self._max_children

    def tensors(self, device: torch.device | str = "cpu") -> TreeTensors:
        """The tree's arrays on a device; copied there once."""
        device = torch.device(device)
        if device not in self._tensors:
            here = self.tensors()
            self._tensors[device] = TreeTensors(*(t.to(device) for t in here))
        return self._tensors[device]

    def windows(self, width: int, device: torch.device) -> Tensor:
        """(N, width) int64: where the last tokens up to each node are; copied to a device once.

        Of (width,) tokens that end with the root's, followed by those of nodes 1, 2, ….
        """
        if (width, device) not in self._windows:
            rows = [list(range(width))]
            for node, parent in enumerate(self._parents[1:], start=width):
                rows.append([*rows[parent][1:], node])
            self._windows[width, device] = torch.tensor(rows, device=device)
        return self._windows[width, device]

    def prefix(self, nodes: int) -> DraftTree:
        """The tree of the first ``nodes`` nodes.

        Raises:
            ValueError: ``nodes`` outside [1, N].
        """
        _checks.check_integer("nodes", nodes, 1, self.nodes)
        return DraftTree(self._parents[:nodes])

    def attention_mask(self, device: torch.device | str = "cpu") -> Tensor:
        """(N, N) bool: [i, j] is True when node i attends to node j, its ancestor or itself.

        Made anew in every call: a loop keeps it.
        """
        mask = torch.eye(self.nodes, dtype=torch.bool, device="cpu")
        for node, parent in enumerate(self._parents[1:], start=1):
            mask[node] |= mask[parent]
        return mask.to(device)

    def positions(self, length: Tensor) -> Tensor:
        """(B, N) position ids: ``length[:, None] + depths``.

        Args:
            length: (B,) integers: tokens in the KV cache before the root, which is its position.

        Raises:
            ValueError: wrong shape or dtype.
        """
        if _checks.check_tensor("length", length).ndim != 1:
            _checks.fail("length", "shape (batch,)", tuple(length.shape))
        _checks.check_dtype("length", length, torch.int64, torch.int32)
        return length[:, None] + self.tensors(length.device).depths

    def draw(self) -> str:
        """The tree as text: nodes per depth, then one line per node with its rank path."""
        counts = torch.bincount(self.depths).tolist()
        lines = [f"{self.nodes} nodes, depth {self.depth}; nodes per depth: {counts}", "0"]
        pointers, index = (t.tolist() for t in self.children)
        stack = [(child, "") for child in reversed(index[pointers[0] : pointers[1]])]
        while stack:
            node, indent = stack.pop()
            parent = self._parents[node]
            last = index[pointers[parent + 1] - 1] == node
            lines.append(f"{indent}{'└' if last else '├'}─{node}")
            inner = indent + ("  " if last else "│ ")
            below = index[pointers[node] : pointers[node + 1]]
            stack += [(child, inner) for child in reversed(below)]
        return "\n".join(lines)

    def __len__(self) -> int:
        """The number of nodes."""
        return self.nodes

    def __eq__(self, other: object) -> bool:
        """Same parents."""
        return isinstance(other, DraftTree) and self._parents == other._parents

    def __hash__(self) -> int:
        """Of the parents."""
        return hash(self._parents)

    def __repr__(self) -> str:
        """Nodes and depth."""
        return f"DraftTree(nodes={self.nodes}, depth={self.depth})"


def _integer(value: object) -> int:
    if not isinstance(value, int) or isinstance(value, bool):
        raise ValueError(f"a parent is {value!r}")
    return value


def check_rows(logits: Tensor) -> None:
    """Refuses (B, N, V) logits of more nodes than a tree has, as verifying operators do."""
    if logits.shape[1] > MAX_NODES:
        _checks.fail("logits", f"rows of at most {MAX_NODES} nodes", logits.shape[1])


def _checked_parents(parents: Sequence[int]) -> tuple[int, ...]:
    if not 1 <= len(parents) <= MAX_NODES:
        _checks.fail("parents", f"1 to {MAX_NODES} nodes", len(parents))
    if not isinstance(parents[0], int) or parents[0] != -1:
        _checks.fail("parents[0]", "-1, the mark of the root", repr(parents[0]))
    for node, parent in enumerate(parents[1:], start=1):
        if not isinstance(parent, int) or isinstance(parent, bool) or not 0 <= parent < node:
            _checks.fail(f"parents[{node}]", f"an integer in [0, {node})", repr(parent))
    return tuple(parents)


def _rank_rate(rates: Sequence[float], rank: int) -> float:
    beyond = rank - len(rates) + 1
    return rates[rank] if beyond <= 0 else math.ldexp(rates[-1], -beyond)


def _tree_tensors(parents: tuple[int, ...]) -> TreeTensors:
    children: list[list[int]] = [[] for _ in parents]
    ranks, depths = [0], [0]
    for node, parent in enumerate(parents[1:], start=1):
        ranks.append(len(children[parent]))
        depths.append(depths[parent] + 1)
        children[parent].append(node)
    child_ptr, level_nodes = [0], []
    for row in children:
        child_ptr.append(child_ptr[-1] + len(row))
    levels: list[list[int]] = [[] for _ in range(max(depths) + 1)]
    for node, row in enumerate(children):
        if row:
            levels[depths[node]].append(node)
    level_ptr = [0]
    for level in levels[:-1]:
        level_nodes += level
        level_ptr.append(len(level_nodes))
    child_index = [node for row in children for node in row]
    arrays = (parents, ranks, depths, child_ptr, child_index, level_ptr, level_nodes)
    return TreeTensors(*(torch.tensor(a, dtype=torch.int32, device="cpu") for a in arrays))
