"""Laws of a verification step: G-tests, total variation, and `LawReport`."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

REJECT = 1e-6  # a true law fails once in a million checks
EXACT = 1e-12  # total variation that double arithmetic explains
SMALL = 5.0  # cells expected to hold fewer draws are added up before the test


@dataclass(frozen=True)
class Law:
    """One law: whether it holds, and by what evidence.

    Attributes:
        name: "marginal", "pair", "joint", or "length > j": the j-th token, given that it was
            emitted.
        holds: whether it is the target's law, as far as the test can tell.
        total_variation: distance to the target's law: exact, or estimated from the draws (then
            never quite 0).
        p_value: of the G-test; None for exact laws.
        draws: on which the test is based; 0 for exact laws.
        tested: whether the draws were enough to tell two cells apart; without them a law `holds`
            unless something impossible was drawn.
    """

    name: str
    holds: bool
    total_variation: float
    p_value: float | None = None
    draws: int = 0
    tested: bool = True

    def __str__(self) -> str:
        """One line."""
        if self.holds and not self.tested:
            return f"{self.name:12} not tested (too few draws, n = {self.draws})"
        verdict = "holds" if self.holds else "BROKEN"
        evidence = "exact" if self.p_value is None else f"p = {self.p_value:.2g}, n = {self.draws}"
        total = f"total variation {self.total_variation:.3g}"
        return f"{self.name:12} {verdict:10} {total} ({evidence})"


@dataclass(frozen=True)
class LawReport:
    """What `check_verifier` found; true when every law that could be tested holds, and one could.

    Attributes:
        laws: a `Law` for each.
    """

    laws: tuple[Law, ...]

    @property
    def broken(self) -> tuple[str, ...]:
        """Names of the laws that do not hold."""
        return tuple(law.name for law in self.laws if not law.holds)

    @property
    def untested(self) -> tuple[str, ...]:
        """Names of the laws for which there were too few draws."""
        return tuple(law.name for law in self.laws if not law.tested)

    def __bool__(self) -> bool:
        """Whether no law is broken and not all are untested."""
        return not self.broken and len(self.untested) < len(self.laws)

    def __str__(self) -> str:
        """A line per law."""
        return "\n".join(str(law) for law in self.laws)


def g_test(name: str, observed: Tensor, law: Tensor) -> Law:
    """G-test of counts (groups, cells) against laws (groups, cells), one multinomial per group."""
    observed, law = observed.double(), law.double()
    total = observed.sum(-1, keepdim=True)
    expected = total * law
    distance = (observed - expected).abs().sum() / (2 * total.sum()).clamp_min(1)
    impossible = bool(((expected == 0) & (observed > 0)).any())
    small = expected < SMALL
    pooled = [torch.where(small, x, 0).sum(-1, keepdim=True) for x in (observed, expected)]
    o = torch.cat([torch.where(small, 0, observed), pooled[0]], -1)
    e = torch.cat([torch.where(small, 0, expected), pooled[1]], -1)
    # A pool that is itself small has no test: its draws are left out of its group.
    used = e >= SMALL
    o, e = torch.where(used, o, 0), torch.where(used, e, 0)
    e = e * (o.sum(-1, keepdim=True) / e.sum(-1, keepdim=True).clamp_min(1e-300))
    ratio = torch.where(o > 0, o / torch.where(e > 0, e, 1), 1)
    g = 2 * (o * ratio.log()).sum()
    freedom = (used.sum(-1) - 1).clamp_min(0).sum().double()
    p = 0.0 if impossible else 1.0 if freedom == 0 else float(
        torch.special.gammaincc(freedom / 2, (g / 2).clamp_min(0))
    )  # fmt: skip
    tested = impossible or bool(freedom)
    return Law(name, p >= REJECT, float(distance), p, int(total.sum()), tested)


def exact_law(name: str, got: Tensor, law: Tensor) -> Law:
    """Total variation of two laws over the same cells."""
    distance = float((got.double() - law.double()).abs().sum()) / 2
    return Law(name, distance <= EXACT, distance)
