"""The settings of a table, checked, and the tensors that they ask for."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

import torch
from torch import Tensor

from .. import _checks
from .reference_table import COUNTERS, ID_BITS, WAYS, Storage

MAX_TOPK, MAX_ORDERS, MAX_ORDER = 16, 4, 8
STORAGES = ("packed", "exact")


def check_settings(
    capacity: int, vocab: int, orders: Sequence[int], topk: int, max_count: int, max_scopes: int,
    storage: str,
) -> None:  # fmt: skip
    """Refuses arguments of `NgramTable` out of their range."""
    if not _is_integer(capacity, WAYS, 1 << 31) or capacity % WAYS:
        _checks.fail("capacity", "a positive multiple of 8, at most 2^31", capacity)
    _checks.check_integer("vocab_size", vocab, 1, 1 << 26)
    _checks.check_integer("topk", topk, 1, MAX_TOPK)
    _checks.check_integer("max_count", max_count, 1, (1 << 15) - 1)
    _checks.check_integer("max_scopes", max_scopes, 1, 1 << 31)
    if not isinstance(orders, Sequence):
        _checks.fail("orders", "a sequence of 1 to 4 descending integers in [1, 8]", repr(orders))
    descending = all(_is_integer(o, 1, MAX_ORDER) for o in orders)
    descending = descending and all(a > b for a, b in pairwise(orders))
    if not 1 <= len(orders) <= MAX_ORDERS or not descending:
        _checks.fail("orders", "a sequence of 1 to 4 descending integers in [1, 8]", tuple(orders))
    _checks.check_choice("storage", storage, STORAGES)


def _is_integer(value: object, low: int, high: int) -> bool:
    return _checks.is_integer(value) and low <= value <= high


@torch.inference_mode(False)  # else they could not be written to after it
def allocate(
    capacity: int, vocab: int, topk: int, max_scopes: int, storage: str, device: torch.device
) -> Storage:
    """The tensors of an empty table."""

    def zeros(*shape: int, dtype: torch.dtype) -> Tensor:
        return torch.zeros(shape, dtype=dtype, device=device)

    wide = (capacity, topk) if vocab > 1 << ID_BITS else (0,)
    packed = storage == "packed"
    return Storage(
        keys=zeros(capacity // WAYS, WAYS, dtype=torch.int64),
        slots=zeros(capacity, topk, dtype=torch.int32),
        extra=zeros(*wide, dtype=torch.uint8)
        if packed
        else zeros(capacity, topk, dtype=torch.int64),
        counts=zeros(capacity, dtype=torch.int16),
        ages=zeros(capacity, dtype=torch.int32),
        clock=zeros(dtype=torch.int64),
        epochs=zeros(max_scopes, dtype=torch.int32),
        counters=zeros(COUNTERS, dtype=torch.int64),
    )
