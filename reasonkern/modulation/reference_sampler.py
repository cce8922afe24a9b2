"""The sampler under control: rows of reference.py in the walk of speculation/reference_verify."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..speculation import reference_verify
from ..speculation.reference_row import Law
from . import layout as at
from . import reference, reference_fold


class Slots:
    """The slots of B requests; tokens of a walk are committed to a copy of them."""

    def __init__(self, slot: Tensor, state: list[Tensor]) -> None:
        storage = at.Storage(*state)
        self.where, kept = reference.controlled(storage.spec, slot)
        self.copy = storage._replace(
            **{name: getattr(storage, name)[kept] for name in PER_SLOT}  # copies
        )
        self.sets = reference_fold.Sets(storage.set_offsets, storage.set_ids, storage.set_member)
        self.rows = torch.where(self.where, torch.arange(len(slot), device=slot.device), -1)

    def apply(self, logits: Tensor, temperature: Tensor) -> Tensor:
        every = torch.arange(len(logits), device=logits.device)
        progress = reference_fold.load(self.copy.progress, every)
        control = reference.control_of(self.copy.spec, self.copy.numbers, progress)
        out = logits.clone()
        reference.apply(out, control, self.sets, temperature, True, self.where)
        return out

    def trigger(self, entropy: Tensor) -> Tensor:
        c = self.copy
        pushed = c.progress[:, at.ENTROPY_PUSHED]
        threshold = reference.entropy_threshold(c.spec, c.numbers, c.entropy, pushed)
        return self.where & reference_fold.has(c.spec, at.TRIGGER) & (entropy.double() > threshold)

    def advance(self, token: Tensor, law: Law | None, taken: Tensor) -> None:
        c = self.copy
        entropy = None if law is None else law.entropy.unsqueeze(-1)
        confidence = None if law is None else law.confidence.unsqueeze(-1)
        reference.commit_(self.rows, token.unsqueeze(-1), taken.long(), entropy, confidence, *c)


PER_SLOT = ("spec", "numbers", "progress", "confidence", "entropy", "confidence_sum")


def sample_controlled(*args: Any) -> tuple[Tensor, ...]:
    *rows, slot, state = args
    return reference_verify.sample_controlled(_control(slot, state), *rows)


def verify_controlled(*args: Any) -> tuple[Tensor, ...]:
    *rows, slot, state, stats = args
    return reference_verify.walk(_control(slot, state), stats, *rows)


def _control(slot: Tensor | None, state: list[Tensor]) -> Slots | None:
    return None if slot is None else Slots(slot, state)
