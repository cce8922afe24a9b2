"""`SlotCache`: keys and values of a batch whose requests have different lengths, without holes."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..speculation import verify_op as _verify_op  # noqa: F401  (defines compact_kv_)

ALIGNED = 8  # a pass sees a multiple of so many slots, or fused attention pads its mask per layer


class SlotCache:
    """Committed tokens of request b fill its slots below ``lengths[b]``; a pass writes behind them.

    Node i of a pass goes to slot ``lengths[b] + i``. `commit` moves the accepted nodes together, so
    that no hole is left and nothing has to be masked but other branches. A model's attention calls
    `update` in the place of its own cache.
    """

    def __init__(self, batch: int, device: torch.device) -> None:
        self.lengths = torch.zeros(batch, dtype=torch.int64, device=device)
        self._layers: list[list[Tensor]] = []  # [key, value], (B, slots, H, D), any D each
        self._capacity = self._used = 0
        self._every = self.lengths[:0]  # 0, 1, … of all slots of a request
        self._first = self.lengths[:, None]  # slot 0 of each request among those of all
        self._rows = self.lengths  # where the pass writes, in units of a slot of all requests

    def open(self, nodes: int, longest: int) -> tuple[Tensor, Tensor]:
        """Makes room for a pass of ``nodes`` nodes; ``longest`` is the largest of ``lengths``.

        Returns:
            The slots (B, nodes) of the nodes, and all slots (S,) that the pass sees.
        """
        used = longest + nodes
        self._used = used + -used % ALIGNED
        if self._used > self._capacity:
            self._grow(max(self._used, 2 * self._capacity))
        slots = self.lengths[:, None] + self._every[:nodes]
        self._rows = (self._first + slots).flatten()
        return slots, self._every[: self._used]

    def _grow(self, capacity: int) -> None:
        for layer in self._layers:
            for index, old in enumerate(layer):
                # Zeros, since 0 times a stray NaN behind the mask would be NaN.
                layer[index] = old.new_zeros(len(old), capacity, *old.shape[2:])
                layer[index][:, : old.shape[1]] = old
        self._capacity = capacity
        self._every = torch.arange(capacity, device=self.lengths.device)
        self._number()

    def _number(self) -> None:
        requests = torch.arange(len(self.lengths), device=self.lengths.device)
        self._first = requests[:, None] * self._capacity

    def update(
        self, key: Tensor, value: Tensor, layer: int, *_: Any, **__: Any
    ) -> tuple[Tensor, Tensor]:
        """Stores what the nodes' keys and values (B, H, N, D) are; returns those of all slots."""
        if layer == len(self._layers):
            self._layers.append([self._storage(key), self._storage(value)])
        for stored, new in zip(self._layers[layer], (key, value), strict=True):
            # Whole rows of (H, D): a copy of memory per node.
            stored.flatten(0, 1).index_copy_(0, self._rows, new.transpose(1, 2).flatten(0, 1))
        first, second = (x[:, : self._used].transpose(1, 2) for x in self._layers[layer])
        return first, second

    def _storage(self, new: Tensor) -> Tensor:
        batch, heads, _, width = new.shape
        return new.new_zeros(batch, self._capacity, heads, width)

    def commit(self, path: Tensor, accepted: Tensor, moves: bool = True) -> None:
        """Keeps the first ``accepted`` (B,) nodes of ``path`` (B, P) and forgets the others.

        ``moves`` False: the caller knows that the path is 0, 1, 2, … where it is accepted.
        """
        for key, value in self._layers if moves else ():
            # The engine's own tensors: the checks of the public function have nothing to find.
            torch.ops.reasonkern.compact_kv_(
                key.transpose(1, 2), value.transpose(1, 2), self.lengths, path, accepted,
                self.lengths, None,
            )  # fmt: skip
        self.lengths = self.lengths + accepted

    def take(self, rows: Tensor) -> None:
        """Makes the batch consist of these requests, (R,); one may be taken several times."""
        self.lengths = self.lengths[rows]
        self._number()
        for layer in self._layers:
            layer[:] = [x[rows] for x in layer]

    def get_seq_length(self, layer: int = 0) -> int:
        """Of the longest request: models ask, but are given positions and masks."""
        return int(self.lengths.max()) if layer < len(self._layers) else 0
