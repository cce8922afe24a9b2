"""The sampler under control: rows of reference.py in the walk of speculation/reference_verify."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ..speculation.reference_row import Filters
from ..speculation.reference_verify import Rows, Told, nothing_told, rows_of, walk
from . import layout as at
from . import reference, reference_fold


class Slots:
    """The slots of B requests; tokens of a walk are committed to a copy of them."""

    modulate: Callable[..., None] = staticmethod(reference.modulate_logits_)
    commit: Callable[..., None] = staticmethod(reference.commit_)

    def __init__(self, slot: Tensor, state: list[Tensor]) -> None:
        records, sets = state
        where, kept = reference.controlled(records, slot)
        self.own = at.Storage(records[kept], sets)  # a copy
        self.rows = torch.where(where, torch.arange(len(slot), device=slot.device), -1)

    def apply(self, logits: Tensor, temperature: Tensor) -> Tensor:
        out = logits.clone()
        self.modulate(out, self.rows, None, None, None, temperature, *self.own, True)
        return out

    def trigger(self, entropy: Tensor) -> Tensor:
        watches = (self.rows >= 0) & reference_fold.has(self.own.records, at.TRIGGER)
        return watches & (entropy.double() > reference.entropy_threshold(self.own))

    def advance(self, token: Tensor, told: Told | None, taken: Tensor) -> None:
        entropy = None if told is None else told.entropy.unsqueeze(-1)
        confidence = None if told is None else told.confidence.unsqueeze(-1)
        self.commit(self.rows, token.unsqueeze(-1), taken.long(), entropy, confidence, *self.own)


def sample_controlled(
    *args: Any, rows: type[Rows] = Rows, slots: type[Slots] = Slots
) -> tuple[Tensor, ...]:
    logits, mask, *filters, seed, position, slot, state = args
    control = None if slot is None else slots(slot, state)
    token, _, told = rows(Filters(*filters), seed, position, control, True).choose(logits, mask)
    assert told is not None
    return token, *told


def verify_controlled(
    *args: Any, rows: type[Rows] = Rows, slots: type[Slots] = Slots
) -> tuple[Tensor, ...]:
    *plain, slot, state, stats = args
    control = None if slot is None else slots(slot, state)
    out = walk(rows_of(plain, control, stats, kind=rows), *plain)
    return out if stats else (*out, *nothing_told(plain[0], 0))
