"""The definition of `compact_kv_`: accepted nodes move to the end of their request's cache."""

from __future__ import annotations

import torch
from torch import Tensor


def compact_kv_(
    key: Tensor, value: Tensor, lengths: Tensor, path: Tensor, accepted: Tensor, start: Tensor,
    block_table: Tensor | None,
) -> None:  # fmt: skip
    """Node path[b, j] moves from slot start[b] + path[b, j] to lengths[b] + j, for j < accepted[b].

    A destination never lies behind its source, and both ascend, so reading everything before
    writing gives what moving one by one gives.
    """
    steps = torch.arange(path.shape[1], device=path.device)
    batch, step = (steps < accepted.unsqueeze(-1)).nonzero(as_tuple=True)
    source, target = start[batch] + path[batch, step], lengths[batch] + step
    if block_table is None:
        for cache in (key, value):  # (B, H, S, D)
            cache[batch, :, target] = cache[batch, :, source]
        return
    size = key.shape[1]
    from_block = block_table[batch, source // size].long()
    to_block = block_table[batch, target // size].long()
    for cache in (key, value):  # (blocks, block_size, H, D)
        cache[to_block, target % size] = cache[from_block, source % size]
