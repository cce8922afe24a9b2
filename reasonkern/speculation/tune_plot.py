"""The picture of ``python -m reasonkern tune``; imported only when matplotlib is installed."""

from __future__ import annotations

from pathlib import Path

import matplotlib

matplotlib.use("Agg")  # before pyplot: no display is needed

from matplotlib import pyplot as plt  # noqa: E402
from matplotlib.axes import Axes  # noqa: E402

from .cli import Findings  # noqa: E402
from .tree import DraftTree  # noqa: E402


def draw(findings: Findings, path: Path) -> None:
    """The tuned tree and what it brings by size and by trajectory."""
    grid = {"height_ratios": (2, 1)}
    figure, axes = plt.subplot_mosaic([["tree", "tree"], ["nodes", "traces"]],
                                      figsize=(10, 8), gridspec_kw=grid)  # fmt: skip
    tuned = findings.tuned
    rates = tuned.accepted / max(1, tuned.accepted[0])
    _draw_tree(axes["tree"], findings.tree, rates.tolist())
    axes["tree"].set_title(
        f"{findings.tree.nodes} nodes, {tuned.tokens_per_step:.2f} tokens per step; "
        "area: how often a node is accepted"
    )
    sizes = sorted(findings.by_nodes)
    axes["nodes"].plot(sizes, [findings.by_nodes[n].tokens_per_step for n in sizes], "o-")
    axes["nodes"].set(xlabel="nodes", ylabel="tokens per step", xscale="log")
    order = range(1, len(tuned.steps) + 1)
    axes["traces"].bar(order, tuned.tokens / tuned.steps)
    axes["traces"].set(xlabel="trajectory of the problem", ylabel="tokens per step")
    axes["traces"].set_xticks(list(order)[:: max(1, len(tuned.steps) // 10)])
    figure.tight_layout()
    figure.savefig(path, dpi=120)
    plt.close(figure)


def _draw_tree(axes: Axes, tree: DraftTree, rates: list[float]) -> None:
    place = _places(tree)
    parents, depths = tree.parents.tolist(), tree.depths.tolist()
    for node in range(1, tree.nodes):
        above = parents[node]
        axes.plot(
            [place[above], place[node]], [-depths[above], -depths[node]], color="0.75", zorder=1
        )
    areas = [4 + 300 * rate for rate in rates]
    axes.scatter(place, [-d for d in depths], s=areas, zorder=2)
    axes.set_ylabel("depth")
    axes.set_yticks([-d for d in range(tree.depth + 1)], [str(d) for d in range(tree.depth + 1)])
    axes.set_xticks([])


def _places(tree: DraftTree) -> list[float]:
    """X of each node: leaves side by side in rank order, a parent above its first child."""
    pointers, index = (t.tolist() for t in tree.children)
    place = [0.0] * tree.nodes
    stack, leaves = [0], 0
    while stack:
        node = stack.pop()
        below = index[pointers[node] : pointers[node + 1]]
        place[node] = leaves
        leaves += not below
        stack += reversed(below)
    return place
