"""`DraftTree`: its arrays, its files, its errors."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from reasonkern import DraftTree


@st.composite
def parent_lists(draw: st.DrawFn) -> list[int]:
    nodes = draw(st.integers(1, 40))
    return [-1, *(draw(st.integers(0, i - 1)) for i in range(1, nodes))]


def ancestors(parents: list[int], node: int) -> list[int]:
    path = [node]
    while parents[path[-1]] >= 0:
        path.append(parents[path[-1]])
    return path


@given(parent_lists())
def test_arrays_agree_with_the_parents(parents: list[int]) -> None:
    tree = DraftTree(parents)
    assert (tree.nodes, tree.parents.tolist()) == (len(parents), parents)
    assert tree.depths.tolist() == [len(ancestors(parents, i)) - 1 for i in range(len(parents))]
    assert tree.depth == max(tree.depths.tolist())
    pointers, index = (t.tolist() for t in tree.children)
    for node in range(len(parents)):
        expected = [c for c, p in enumerate(parents) if p == node]
        assert index[pointers[node] : pointers[node + 1]] == expected
        assert [tree.ranks.tolist()[c] for c in expected] == list(range(len(expected)))
    internal = [n for n in range(len(parents)) if pointers[n] < pointers[n + 1]]
    level_ptr, level_nodes = tree.tensors().level_ptr.tolist(), tree.tensors().level_nodes.tolist()
    assert sorted(level_nodes) == internal and len(level_ptr) == tree.depth + 1
    for depth in range(tree.depth):
        level = level_nodes[level_ptr[depth] : level_ptr[depth + 1]]
        assert level == [n for n in internal if tree.depths[n] == depth]


@given(parent_lists())
def test_mask_and_positions(parents: list[int]) -> None:
    tree = DraftTree(parents)
    mask = tree.attention_mask()
    for node in range(len(parents)):
        assert mask[node].nonzero().flatten().tolist() == sorted(ancestors(parents, node))
    positions = tree.positions(torch.tensor([7, 100]))
    assert positions.tolist() == [[n + d for d in tree.depths.tolist()] for n in (7, 100)]


@given(parent_lists())
def test_every_prefix_is_a_tree(parents: list[int]) -> None:
    tree = DraftTree(parents)
    for nodes in (1, (len(parents) + 1) // 2, len(parents)):
        assert tree.prefix(nodes).parents.tolist() == parents[:nodes]


@given(parent_lists())
def test_drawing_has_one_line_per_node(parents: list[int]) -> None:
    head, *lines = DraftTree(parents).draw().splitlines()
    assert head.startswith(f"{len(parents)} nodes")
    assert sorted(int(line.lstrip("│└├─ ")) for line in lines) == list(range(len(parents)))


@given(parent_lists(), st.integers(1, 5))
def test_windows_are_the_last_tokens_up_to_a_node(parents: list[int], width: int) -> None:
    paths = [list(range(-width, 1))]  # negative: of the context
    for node, parent in enumerate(parents[1:], start=1):
        paths.append([*paths[parent], node])
    seen = torch.tensor([*range(1 - width, 1), *range(1, len(parents))])
    found = seen[DraftTree(parents).windows(width, torch.device("cpu"))]
    assert found.tolist() == [path[-width:] for path in paths]


def test_default_trees_are_nested() -> None:
    big = DraftTree.default(625)
    for nodes in (1, 2, 16, 80):
        assert DraftTree.default(nodes) == big.prefix(nodes)
    assert DraftTree.default().nodes == 80 and DraftTree.default().max_children <= 12


@pytest.mark.parametrize("options", [{"depth": 1}, {"rates": (1e-310, 1e-320)}])
def test_trees_grow_where_likelihoods_are_none(options: dict[str, Any]) -> None:
    """Halved 4,000 times, or multiplied a few, a rate is 0; every node has its parent before it."""
    tree = DraftTree.grow(4096, **options)
    assert tree.nodes == 4096 and tree.depth <= options.get("depth", 4095)


def test_numbers_of_numpy() -> None:
    nodes = np.int64(7)
    assert DraftTree.default(nodes) == DraftTree.default(7)
    assert DraftTree.chain(nodes).prefix(np.int32(3)) == DraftTree.chain(3)


def test_chain() -> None:
    tree = DraftTree.chain(5)
    assert tree.parents.tolist() == [-1, 0, 1, 2, 3] and (tree.nodes, tree.depth) == (5, 4)
    assert DraftTree.chain(1).max_children == 0


def test_saved_trees_load_equal(tmp_path: Path) -> None:
    tree = DraftTree.default(30)
    tree.save(tmp_path / "tree.json")
    loaded = DraftTree.load(tmp_path / "tree.json")
    assert loaded == tree and hash(loaded) == hash(tree) and loaded != DraftTree.chain(30)


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"parents": [0]}', '{"parents": [-1, true]}'])
def test_a_file_without_a_tree_is_named(tmp_path: Path, text: str) -> None:
    path = tmp_path / "tree.json"
    path.write_text(text)
    with pytest.raises(ValueError, match=r"tree\.json: expected a JSON object"):
        DraftTree.load(path)
    path.write_bytes(b"\x89PNG")
    with pytest.raises(ValueError, match=r"tree\.json: expected a JSON object"):
        DraftTree.load(path)


@pytest.mark.parametrize(
    ("parents", "message"),
    [
        ([], "parents: expected 1 to 4096 nodes, got 0"),
        ([0], r"parents\[0\]: expected -1, the mark of the root, got 0"),
        ([-1, 1], r"parents\[1\]: expected an integer in \[0, 1\), got 1"),
        ([-1, 0, -1], r"parents\[2\]: expected an integer in \[0, 2\), got -1"),
        ([-1.0, 0], r"parents\[0\]: expected -1, the mark of the root, got -1.0"),
        ([-1, 0.0], r"parents\[1\]: expected an integer"),
        ([-1, 0, True], r"parents\[2\]: expected an integer in \[0, 2\), got True"),
        (5, "parents: expected a sequence of integers, got 5"),
    ],
)
def test_bad_parents(parents: list[int], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        DraftTree(parents)


def test_bad_arguments() -> None:
    for make in (DraftTree.default, DraftTree.chain):
        with pytest.raises(ValueError, match=r"nodes: expected an integer in \[1, 4096\], got 0"):
            make(0)
    with pytest.raises(ValueError, match=r"nodes: expected an integer in \[1, 3\], got 4"):
        DraftTree.chain(3).prefix(4)
    with pytest.raises(ValueError, match=r"nodes: expected an integer in \[1, 3\], got True"):
        DraftTree.chain(3).prefix(True)
    for rates in (0.5, (), "ab", ("a",), (2.0,)):
        with pytest.raises(ValueError, match="rates: expected a"):
            DraftTree.grow(8, rates=rates)
    with pytest.raises(ValueError, match="length: expected dtype torch.int64 or torch.int32"):
        DraftTree.chain(3).positions(torch.tensor([3.0]))
    with pytest.raises(ValueError, match=r"length: expected shape \(batch,\), got \(\)"):
        DraftTree.chain(3).positions(torch.tensor(3))
