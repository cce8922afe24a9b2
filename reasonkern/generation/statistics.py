"""`Statistics`: what a run of the decoding loop did, and where its time went."""

from __future__ import annotations

import time
from collections import Counter, deque
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch

PHASES = ("prompt", "draft", "forward", "verify", "update")


@dataclass
class Statistics:
    """Counts and times of generation; runs add up.

    Attributes:
        accepted: how many steps of a request emitted how many tokens, the one after the draft
            included.
        sizes: how many passes of the model had how many nodes per request.
        hits: look-ups in the table that an order of it answered, by order; with ``tree="auto"``
            including those that only tell what larger trees would be worth.
        misses: look-ups that no order answered.
        seconds: time by phase: prompt, draft, forward (the model), verify, update (table and
            cache).
    """

    accepted: Counter[int] = field(default_factory=Counter)
    sizes: Counter[int] = field(default_factory=Counter)
    hits: Counter[int] = field(default_factory=Counter)
    misses: int = 0
    seconds: dict[str, float] = field(default_factory=lambda: dict.fromkeys(PHASES, 0.0))

    @property
    def tokens(self) -> int:
        """Tokens emitted."""
        return sum(length * steps for length, steps in self.accepted.items())

    @property
    def steps(self) -> int:
        """Steps of requests: a pass over B requests that are not finished counts B."""
        return self.accepted.total()

    @property
    def passes(self) -> int:
        """Forward passes of the model, those over the prompt not counted."""
        return self.sizes.total()

    @property
    def mean_accepted(self) -> float:
        """Tokens per step of a request; 1 without speculation."""
        return self.tokens / max(1, self.steps)

    @property
    def hit_rates(self) -> dict[int, float]:
        """Share of the table's look-ups by the order that answered."""
        total = max(1, self.hits.total() + self.misses)
        return {order: hits / total for order, hits in sorted(self.hits.items(), reverse=True)}

    @property
    def tokens_per_second(self) -> float:
        """Tokens by the time of all phases but the prompt's."""
        seconds = sum(self.seconds.values()) - self.seconds["prompt"]
        return self.tokens / seconds if seconds > 0 else 0.0

    def __str__(self) -> str:
        """Two lines for a person."""
        parts = ", ".join(f"{name} {self.seconds[name]:.2f} s" for name in PHASES)
        rates = ", ".join(f"order {order} {rate:.0%}" for order, rate in self.hit_rates.items())
        return (
            f"{self.tokens} tokens in {self.passes} passes, {self.mean_accepted:.2f} per step of a "
            f"request, {self.tokens_per_second:.1f} tokens/s ({parts})\n"
            f"table: {rates or 'not used'}; nodes per pass: {dict(sorted(self.sizes.items()))}"
        )


class Clock:
    """Adds the time of phases to a `Statistics`; on a GPU by events, which no step waits for."""

    def __init__(self, statistics: Statistics, device: torch.device) -> None:
        self._seconds = statistics.seconds
        self._stream = torch.cuda.current_stream(device) if device.type == "cuda" else None
        self._open: deque[tuple[str, torch.cuda.Event, torch.cuda.Event]] = deque()

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Times the body."""
        if self._stream is None:
            begin = time.perf_counter()
            yield
            self._seconds[name] += time.perf_counter() - begin
            return
        first, last = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        first.record(self._stream)
        yield
        last.record(self._stream)
        self._open.append((name, first, last))

    def read(self, wait: bool = False) -> None:
        """Collects the events that the device has come to; with ``wait`` all of them."""
        if wait and self._open:
            self._open[-1][2].synchronize()
        while self._open and (wait or self._open[0][2].query()):
            name, first, last = self._open.popleft()
            self._seconds[name] += first.elapsed_time(last) / 1e3
