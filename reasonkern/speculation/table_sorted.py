"""The update on devices: rows to keys, torch sorts, one worker per set merges. No synchronisation.

`keys_step` and `merge_step` are the two kernels of CUDA C++, Triton or the simulator.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

PAIR_ID_BITS = 27  # all ones: no candidate
NO_CANDIDATE = (1 << PAIR_ID_BITS) - 1


def sort_pairs(items: Tensor, values: Tensor, ids: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Unsorted keys -> sorted keys, sorted (rank of the key, id) pairs, and the pairs' values.

    The candidates of the sorted items [a, b) of one key are the pairs [a k, b k).
    """
    items, order = items.sort()
    changes = torch.zeros_like(items)
    changes[1:] = items[1:] != items[:-1]
    rank = changes.cumsum(0)
    row = order // max(1, items.numel() // max(1, len(ids)))
    value = values[row].to(torch.int64)
    token = torch.where(value > 0, ids[row], NO_CANDIDATE)
    pairs, place = (rank[:, None] << PAIR_ID_BITS | token).reshape(-1).sort()
    return items, pairs, value.reshape(-1)[place]


def update(
    keys_step: Callable[..., tuple[Tensor, Tensor]], merge_step: Callable[..., None], *args: Any
) -> None:
    """`table_update_` with the arguments of the operator."""
    ids = args[12]
    items, values = keys_step(*args)
    if items.numel():
        merge_step(*args, *sort_pairs(items, values, ids))
