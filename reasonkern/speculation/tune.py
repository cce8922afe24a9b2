"""`tune_tree`: the tree of the nodes that are accepted most often."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from .. import _checks
from .tree import DraftTree

BIG_NODES, BIG_DEPTH = 625, 20


def big_tree(nodes: int = BIG_NODES, depth: int = BIG_DEPTH) -> DraftTree:
    """A wide and deep tree to count acceptances in."""
    rates = (0.8, 0.25, 0.12, 0.08, 0.06, 0.045, 0.035, 0.03)
    return DraftTree.grow(nodes, rates=rates, depth=depth)


def tune_tree(
    source: Tensor | Sequence[Any],
    nodes: int = 80,
    *,
    tree: DraftTree | None = None,
    vocab_size: int | None = None,
    orders: Sequence[int] = (4, 3, 2),
) -> DraftTree:
    """Cuts a big tree down to the ``nodes`` nodes that are accepted most often.

    The result is ordered by acceptance, so its first n nodes are the tuned tree of n nodes. A node
    counts at least as much as its later siblings and its children, which keeps every prefix a
    tree; ties go to the smaller depth, then to the lower index of the big tree.

    Args:
        source: (N,) acceptances by node of ``tree`` (how often ``Verified.path`` visited each,
            over all steps), or recorded sequences of token ids, which are replayed through a table
            (see ``python -m reasonkern tune``): a list of sequences of integers.
        nodes: nodes of the result, the root included.
        tree: the tree that was counted; None = 625 nodes, depth 20.
        vocab_size: for sequences: ids are below it; None = the largest id + 1.
        orders: for sequences: the orders of the table.

    Returns:
        `DraftTree`.

    Raises:
        ValueError: counts that are negative, not finite or not one per node of ``tree``; more nodes
            than ``tree`` has; no sequences.

    Example:
        >>> import torch, reasonkern as rk
        >>> counts = torch.tensor([10, 6, 3, 5, 0])
        >>> rk.tune_tree(counts, 4, tree=rk.DraftTree([-1, 0, 0, 1, 1])).parents.tolist()
        [-1, 0, 1, 0]
    """
    tree = big_tree() if tree is None else tree
    if not isinstance(tree, DraftTree):
        _checks.fail("tree", "a DraftTree or None", type(tree).__name__)
    _checks.check_integer("nodes", nodes, 1, tree.nodes, ", the nodes of the tree")
    if vocab_size is not None:
        _checks.check_integer("vocab_size", vocab_size, 1, or_none=" or None")
    if isinstance(source, Tensor):
        _checks.check_values("source", source)
    elif isinstance(source, str) or not isinstance(source, Sequence):
        expected = "counts, or a list of sequences of token ids"
        _checks.fail("source", expected, repr(source))
    if isinstance(source, Tensor) or (len(source) and isinstance(source[0], int | float)):
        counts = torch.as_tensor(source, dtype=torch.float64, device="cpu")
    else:
        from .replay import replay, token_traces  # numpy

        traces = token_traces(source)
        largest = max(int(trace.tokens.max()) for trace in traces)
        vocab = 1 + largest if vocab_size is None else vocab_size
        if vocab <= largest:
            _checks.fail("vocab_size", f"an integer above the largest id, {largest}", vocab)
        replayed = replay(traces, tree, vocab_size=vocab, orders=orders)
        counts = torch.from_numpy(replayed.accepted).double()
    _checks.check_shape("source", counts, (tree.nodes,), "(nodes of the tree,)")
    if not bool(((counts >= 0) & counts.isfinite()).all()):
        _checks.fail("source", "finite counts >= 0", counts.tolist())
    return _most_accepted(counts.tolist(), tree, nodes)


def _most_accepted(counts: list[float], tree: DraftTree, nodes: int) -> DraftTree:
    parents, depths = tree.parents.tolist(), tree.depths.tolist()
    last_sibling: dict[int, int] = {}
    for node in range(tree.nodes - 1, 0, -1):  # children and later siblings have larger indices
        parent = parents[node]
        if parent in last_sibling:
            counts[node] = max(counts[node], counts[last_sibling[parent]])
        last_sibling[parent] = node
        counts[parent] = max(counts[parent], counts[node])
    order = sorted(range(tree.nodes), key=lambda node: (-counts[node], depths[node], node))
    place = {node: index for index, node in enumerate(order)}
    return DraftTree([-1] + [place[parents[node]] for node in order[1:nodes]])
