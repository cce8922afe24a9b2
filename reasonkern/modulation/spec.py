"""What is done to a request's logits: `Modulation`, its parts and what they ask of each other."""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Any

from .. import _checks
from .parts import (
    TIP,
    Ban,
    Budget,
    Constant,
    Cyclic,
    DeepConf,
    EntropyTrigger,
    MinThink,
    Schedule,
    check_id,
    check_part,
)


@dataclass(frozen=True)
class Modulation:
    """What is done to the logits of one request; every part is off where it is None.

    Everything but ``deepconf`` and ``entropy_trigger`` acts in the thinking phase only: from
    ``think_start`` until ``think_end``, then off for good; the phrase of a spent budget that holds
    think_end goes on to its own end. In a prompt the last of the two decides, and the tokens after
    an open start count as thinking tokens.

    Args:
        cyclic: a `Cyclic`.
        tip: a `TIP`.
        constant: a `Constant`.
        ban: a `Ban`.
        schedule: a `Schedule`.
        budget: a `Budget`.
        min_think: a `MinThink`; needs think_end.
        deepconf: a `DeepConf`.
        entropy_trigger: an `EntropyTrigger`.
        think_start: id that begins the thinking phase. None = it begins with the first generated
            token.
        think_end: id that ends it. None = it never ends (many tokenizers give None, or the id of
            the unknown token, for a marker that they do not have).

    Raises:
        ValueError: an argument of another type, or parts that contradict each other.

    Example:
        >>> import reasonkern as rk
        >>> spec = rk.Modulation(cyclic=rk.Cyclic(5.0, 1200), think_end=9)
        >>> spec.cyclic.period
        1200
    """

    cyclic: Cyclic | None = None
    tip: TIP | None = None
    constant: Constant | None = None
    ban: Ban | None = None
    schedule: Schedule | None = None
    budget: Budget | None = None
    min_think: MinThink | None = None
    deepconf: DeepConf | None = None
    entropy_trigger: EntropyTrigger | None = None
    think_start: int | None = None
    think_end: int | None = None

    def __post_init__(self) -> None:
        """Refuses parts that contradict each other."""
        for field in fields(self):
            if field.name in PARTS:
                check_part(field.name, getattr(self, field.name), PARTS[field.name])
        check_id("think_start", self.think_start)
        check_id("think_end", self.think_end)
        if self.think_end is None:
            if self.min_think is not None:
                _checks.fail("think_end", "an id, which min_think replaces", None)
            return
        if self.think_start == self.think_end:
            _checks.fail("think_end", "another id than think_start", self.think_end)
        if self.budget is not None and self.think_end not in self.budget.end:
            _checks.fail("budget.end", f"think_end = {self.think_end} in it", self.budget.end)
        if self.min_think is not None:
            if self.think_end in self.min_think.wait:
                _checks.fail("min_think.wait", "ids other than think_end", self.min_think.wait)
            if self.budget is not None and self.min_think.tokens > self.budget.tokens:
                limit = f"at most budget.tokens = {self.budget.tokens}"
                _checks.fail("min_think.tokens", limit, self.min_think.tokens)

    @property
    def parts(self) -> dict[str, Any]:
        """The parts that are not None, by name."""
        return {name: part for name in PARTS if (part := getattr(self, name)) is not None}


PARTS: dict[str, type] = {
    "cyclic": Cyclic,
    "tip": TIP,
    "constant": Constant,
    "schedule": Schedule,
    "ban": Ban,
    "budget": Budget,
    "min_think": MinThink,
    "deepconf": DeepConf,
    "entropy_trigger": EntropyTrigger,
}
