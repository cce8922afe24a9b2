"""Traces → fixed-length windows of tokens with shifted targets."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import zip_longest
from random import Random

import torch
from torch import Tensor

from .tokenizer import BOS, EOS, PAD, Tokenizer
from .traces import Trace, group_advantages


@dataclass(frozen=True)
class Batch:
    """Full-length rows: the last position of a window has no target and mask False.

    Slicing the logits instead would make their backward allocate the full tensor again.
    """

    ids: Tensor  # (B, T) int64
    targets: Tensor  # (B, T) int64, ids shifted by one
    mask: Tensor  # (B, T) bool, the positions whose target counts
    advantage: Tensor  # (B,) float32

    def to(self, device: torch.device) -> Batch:
        """The same batch on `device`."""
        fields = (self.ids, self.targets, self.mask, self.advantage)
        return Batch(*(field.to(device) for field in fields))


@dataclass(frozen=True)
class Encoded:
    """One encoded trace: BOS prompt text EOS."""

    ids: list[int]
    prompt_length: int  # with BOS
    problem: int | str
    advantage: float | None  # None: its group has one outcome only

    def starts(self, window: int) -> list[int]:
        """Evenly spaced windows that cover the text; the last one ends with the trace."""
        first = max(0, self.prompt_length - window + 1)
        last = max(first, len(self.ids) - window)
        gaps = -(-(last - first) // (window - 1))
        return [first + (last - first) * index // max(1, gaps) for index in range(gaps + 1)]


def encode(traces: Sequence[Trace], tokenizer: Tokenizer) -> list[Encoded]:
    """Tokenize the traces and give each its group-normalised advantage."""
    advantages = group_advantages(traces)
    sequences = []
    for index, trace in enumerate(traces):
        prompt = [BOS, *tokenizer.encode(trace.prompt)]
        ids = [*prompt, *tokenizer.encode(trace.text), EOS]
        sequences.append(Encoded(ids, len(prompt), trace.problem_id, advantages.get(index)))
    return sequences


def random_batch(sequences: list[Encoded], size: int, window: int, rng: Random) -> Batch:
    """Windows for fine-tuning: long traces in proportion to their length."""
    weights = [len(sequence.starts(window)) for sequence in sequences]
    rows = []
    for sequence in rng.choices(sequences, weights, k=size):
        first = sequence.starts(window)[0]
        rows.append((sequence, rng.randint(first, max(first, len(sequence.ids) - window))))
    return _batch(rows, window)


def logged_batches(
    sequences: list[Encoded], count: int, size: int, window: int, rng: Random
) -> list[Batch]:
    """About `count` fixed batches of whole mixed groups; a trace gives evenly spread windows.

    Fixed, because the same rows in the same batch give the same logits bit for bit: the ratio to
    the snapshot is then exactly 1 at the first step.
    """
    chosen = _whole_groups(sequences, count * size)
    rng.shuffle(chosen)
    chosen = _alternating(chosen)
    share = max(1, count * size // len(chosen))
    starts = [_spread(sequence.starts(window), share) for sequence in chosen]
    rows = [
        (sequence, own[turn])
        for turn in range(share)
        for sequence, own in zip(chosen, starts, strict=True)
        if turn < len(own)
    ]
    return [_batch(rows[at : at + size], window) for at in range(0, len(rows), size)]


def _whole_groups(sequences: list[Encoded], most: int) -> list[Encoded]:
    """The first groups that fit; a group larger than `most` is cut, both outcomes kept."""
    groups: dict[int | str, list[Encoded]] = {}
    for sequence in sequences:
        if sequence.advantage is not None:
            groups.setdefault(sequence.problem, []).append(sequence)
    chosen: list[Encoded] = []
    for group in groups.values():
        if chosen and len(chosen) + len(group) > most:
            break
        chosen += _alternating(group)[: max(2, most)]
    return chosen


def _alternating(sequences: list[Encoded]) -> list[Encoded]:
    """Right and wrong in turn while there are both: then batches and cut groups hold both."""
    right = [sequence for sequence in sequences if (sequence.advantage or 0) > 0]
    wrong = [sequence for sequence in sequences if (sequence.advantage or 0) < 0]
    return [one for pair in zip_longest(right, wrong) for one in pair if one is not None]


def _spread(starts: list[int], share: int) -> list[int]:
    if len(starts) <= share:
        return starts
    if share == 1:
        return starts[-1:]  # the end of a trace holds its answer
    return [starts[index * (len(starts) - 1) // (share - 1)] for index in range(share)]


def _batch(rows: list[tuple[Encoded, int]], window: int) -> Batch:
    ids = torch.full((len(rows), window), PAD)
    targets = torch.full((len(rows), window), PAD)
    mask = torch.zeros(len(rows), window, dtype=torch.bool)
    for row, (sequence, start) in enumerate(rows):
        piece = torch.tensor(sequence.ids[start : start + window])
        length = len(piece) - 1
        ids[row, : len(piece)] = piece
        targets[row, :length] = piece[1:]
        first = max(0, sequence.prompt_length - 1 - start)
        mask[row, first:length] = True
    advantage = torch.tensor([sequence.advantage or 0.0 for sequence, _ in rows])
    return Batch(ids, targets, mask, advantage)
