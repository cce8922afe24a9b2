"""What the table's operators refuse past their fronts: nothing is read or written out of bounds."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from test_speculation_table_api import draft_sample, filled, update_sample
from torch import Tensor

from reasonkern import DraftTree, _load
from reasonkern.speculation.tree import TreeTensors

pytestmark = pytest.mark.skipif(not _load.available("cpu"), reason="library _C is not built")


@pytest.mark.parametrize(
    ("field", "place", "value"),
    [
        ("parents", 3, 4),
        ("parents", 3, -1),
        ("child_ptr", 0, 1),
        ("child_ptr", 2, 1),
        ("child_ptr", 4, 9),
        ("child_index", 1, 0),
        ("child_index", 1, 4),
        ("level_ptr", 1, 9),
        ("level_nodes", 1, 4),
        ("level_nodes", 1, -1),
    ],
)
def test_raw_drafts_stay_inside_the_tree(field: str, place: int, value: int) -> None:
    sample = list(draft_sample(filled(), 7, 1, DraftTree([-1, 0, 0, 1])))
    torch.ops.reasonkern.table_draft(*sample)
    broken = sample[8 + TreeTensors._fields.index(field)].clone()
    broken[place] = value
    sample[8 + TreeTensors._fields.index(field)] = broken
    with pytest.raises(RuntimeError, match="parents to level_nodes: expected those of a tree of 4"):
        torch.ops.reasonkern.table_draft(*sample)


def replaced(value: int) -> Callable[[Tensor], Tensor]:
    """The last number of a tensor is another."""
    return lambda x: x.flatten().index_fill(0, torch.tensor([x.numel() - 1]), value).view_as(x)


# Place of an argument, what is made of it, what the message begins with.
TABLE: list[tuple[int, Callable[[Any], Any], str]] = [
    (0, lambda x: x[:, 1:], r"context: expected shape \(rows, 3\)"),
    (0, lambda x: x.int(), "context: expected dtype"),
    (0, lambda x: x.T.contiguous().T, "context: expected a contiguous last dimension"),
    (1, lambda x: x[:, 1:].contiguous(), "keys: expected shape"),
    (1, lambda x: x[:0], "keys: expected sets"),
    (2, lambda x: x[1:], "slots: expected shape"),
    (2, lambda x: x[:, :0], "slots: expected 1 to 16 columns, got 0"),
    (2, lambda x: x.repeat(1, 5), "slots: expected 1 to 16 columns, got 20"),
    (3, lambda x: torch.zeros(3, dtype=torch.uint8), "extra: expected shape"),
    (3, lambda x: torch.zeros(3, dtype=torch.int64), "extra: expected shape"),
    (4, lambda x: x[1:], "counts: expected shape"),
]
DRAFTS: list[tuple[int, Callable[[Any], Any], str]] = [
    *TABLE,
    (5, lambda x: x.long(), "epochs: expected dtype"),
    (6, lambda x: x[1:], "counters: expected shape"),
    (7, lambda x: [], "orders: expected 1 to 4 of them, got 0"),
    (7, lambda x: [5, 4, 3, 2, 1], "orders: expected 1 to 4 of them, got 5"),
    (7, lambda x: [9, 2], "orders: expected descending numbers"),
    (7, lambda x: [3, 3], "orders: expected descending numbers"),
    (7, lambda x: [3, 0], "orders: expected descending numbers"),
    (8, lambda x: x[:0], "parents: expected at least a root"),
    (9, lambda x: x.long(), "ranks: expected dtype"),
    (10, lambda x: x[1:], "depths: expected shape"),
    (13, lambda x: x[:0], "parents: expected at least a root"),
    (14, lambda x: x.repeat(9), "level_nodes: expected at most 4 nodes"),
    (15, lambda x: x[1:], "scope: expected shape"),
    (16, lambda x: x[1:], "temperature: expected shape"),
    (17, lambda x: x[1:], "seed: expected shape"),
    (18, lambda x: x[1:], "position: expected shape"),
    (0, replaced(50), "table_draft: context or scope of row 6"),
    (0, replaced(-2), "table_draft: context or scope of row 6"),
    (15, replaced(4), "table_draft: context or scope of row 6"),
    (15, replaced(-1), "table_draft: context or scope of row 6"),
]
UPDATES: list[tuple[int, Callable[[Any], Any], str]] = [
    *TABLE,
    (5, lambda x: x[1:], "ages: expected shape"),
    (6, lambda x: x[None], "clock: expected shape"),
    (10, lambda x: 0, "max_count: got 0"),
    (10, lambda x: 1 << 15, "max_count: got 32768"),
    (12, lambda x: x[1:], "ids: expected shape"),
    (12, lambda x: x[:, :0], "ids: expected 1 to 4 columns"),
    (12, lambda x: x.repeat(1, 2), "ids: expected 1 to 4 columns"),
    (13, lambda x: x.double(), "logits: expected dtype"),
    (14, lambda x: x[1:], "lse: expected shape"),
    (15, lambda x: x[1:], "scope: expected shape"),
]


@pytest.mark.parametrize("update", [False, True])
def test_raw_calls_are_checked(update: bool) -> None:
    for place, change, message in UPDATES if update else DRAFTS:
        if update:
            op, sample = torch.ops.reasonkern.table_update_, list(update_sample(filled(), 20, True))
        else:
            op, tree = torch.ops.reasonkern.table_draft, DraftTree([-1, 0, 0, 1])
            sample = list(draft_sample(filled(), 7, 2, tree))
        sample[place] = change(sample[place])
        with pytest.raises(RuntimeError, match=message):
            op(*sample)
