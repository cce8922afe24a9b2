"""Objectives that look at the whole batch: BAPO, Clip-Cov, KL-Cov, 80/20, GTPO.

A rule runs between the two passes over the logits, on this pass's log-probabilities and entropies,
and turns its objective into one that maps each row by itself. What it chooses is detached. The
batch is that of the call, over the data and segment groups of its `Parallel`.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, ClassVar, NamedTuple

import torch
from torch import Tensor

from .. import _checks
from .bapo import PUBLISHED, Range, grid, search
from .conflict import check_filter, filter_keeps, shape_advantage
from .parallel import batch_groups
from .reference_objective import Hyper, clamped_exp
from .selection import check_seed, covariance, draw_between, select_high, select_top

if TYPE_CHECKING:
    from .inputs import RowContext
    from .objective import Objective


class Rows(NamedTuple):
    """What a rule sees, (B, T) each: detached statistics, and the rows that train."""

    logprob: Tensor
    entropy: Tensor
    used: Tensor

    def ratio(self, context: RowContext, h: Hyper) -> Tensor:
        """The ratio to the old policy, 1 on-policy."""
        old = self.logprob if context.old_logprob is None else context.old_logprob
        return clamped_exp(self.logprob - old, h.log_ratio_clamp)[0]


class Rule:
    """Chooses an objective's bounds, selection, penalty or advantages for one batch."""

    needs_rollout: bool = False
    by_sequence: ClassVar[bool] = False

    def apply(
        self, o: Objective, rows: Rows, context: RowContext, h: Hyper
    ) -> tuple[Objective, RowContext]:
        """The objective without a rule, and the rows it is for."""
        raise NotImplementedError


@dataclass(frozen=True, eq=False)
class BalancedBounds(Rule):
    """`bapo_bounds` of the batch."""

    variant: str
    low: Range | None
    high: Range | None
    target: float | None

    def __post_init__(self) -> None:
        """Refuses what `bapo_bounds` refuses."""
        _checks.check_choice("variant", self.variant, PUBLISHED)
        self.grids()
        if self.target is not None:
            _checks.check_number("target", self.target)

    @property
    def needs_rollout(self) -> bool:  # type: ignore[override]
        """The paper weighs tokens by the probability they were sampled with."""
        return self.variant == "paper"

    def grids(self) -> tuple[tuple[float, ...], tuple[float, ...]]:
        """Grid points of both bounds."""
        published = PUBLISHED[self.variant]
        return grid("low", self.low or published.low), grid("high", self.high or published.high)

    def apply(
        self, o: Objective, rows: Rows, context: RowContext, h: Hyper
    ) -> tuple[Objective, RowContext]:
        """Both bounds become 0-dim tensors."""
        target = PUBLISHED[self.variant].target if self.target is None else self.target
        rollout = context.rollout_logprob if self.needs_rollout else None
        bounds = search(
            rows.ratio(context, h), context.advantage, rows.used, rollout, self.variant,
            self.grids(), target, batch_groups(context.parallel),
        )  # fmt: skip
        return replace(o, rule=None, ratio_min=bounds[0], ratio_max=bounds[1]), context


@dataclass(frozen=True, eq=False)
class CovarianceSelection(Rule):
    """Clip-Cov drops a few tokens of high covariance, KL-Cov penalises them."""

    mode: str
    fraction: float
    low: float
    high: float
    coef: float
    seed: int | Tensor

    def __post_init__(self) -> None:
        """Refuses what `covariance_mask` refuses."""
        _checks.check_number("fraction", self.fraction, 0, 1, exclusive=True)
        _checks.check_number("high", self.high, self.low)
        _checks.check_number("coef", self.coef, 0)
        check_seed(self.seed)

    def apply(
        self, o: Objective, rows: Rows, context: RowContext, h: Hyper
    ) -> tuple[Objective, RowContext]:
        """A selection for Clip-Cov, a penalty for KL-Cov."""
        a, groups = context.advantage, batch_groups(context.parallel)
        cov, count = covariance(rows.logprob, a, rows.used, groups)
        if self.mode == "kl":
            chosen = select_top(cov, rows.used, count, self.fraction, groups)
            penalty = self.coef * chosen.to(rows.logprob.dtype)
            return replace(o, rule=None, log_ratio_penalty=penalty), context
        r = rows.ratio(context, h)
        clipped = ((a > 0) & (r > h.ratio_max)) | ((a < 0) & (r < h.ratio_min))
        dropped = draw_between(
            cov, rows.used & ~clipped, count, self.fraction, self.low, self.high, self.seed, groups
        )
        return replace(o, rule=None, selection=_both(o, ~dropped, context)), context


@dataclass(frozen=True, eq=False)
class HighEntropySelection(Rule):
    """`high_entropy_mask` of the batch."""

    rho: float

    def __post_init__(self) -> None:
        """Refuses what `high_entropy_mask` refuses."""
        _checks.check_number("rho", self.rho, 0, 1, exclusive=True)

    def apply(
        self, o: Objective, rows: Rows, context: RowContext, h: Hyper
    ) -> tuple[Objective, RowContext]:
        """The others are left out of the policy term; the weights stay."""
        kept = select_high(rows.entropy, rows.used, self.rho, batch_groups(context.parallel))
        return replace(o, rule=None, selection=_both(o, kept, context)), context


@dataclass(frozen=True, eq=False)
class EntropyFilter(Rule):
    """`entropy_filter` of the sequences."""

    by_sequence: ClassVar[bool] = True

    max_entropy: float
    coef: float
    initial_entropy: float | Tensor | None

    def __post_init__(self) -> None:
        """Refuses what `entropy_filter` refuses."""
        check_filter(self.max_entropy, self.coef, self.initial_entropy)

    def apply(
        self, o: Objective, rows: Rows, context: RowContext, h: Hyper
    ) -> tuple[Objective, RowContext]:
        """The advantages change; metrics count dropped sequences by the selection."""
        total = context.sequence_sum(torch.where(rows.used, rows.entropy, 0.0))
        mean = total / context.sequence_sum(rows.used).clamp_min(1)
        kept = filter_keeps(mean, self.max_entropy, self.initial_entropy)
        shaped = shape_advantage(context.advantage, mean, self.coef, kept)
        o = replace(o, rule=None, selection=_both(o, kept, context))
        return o, replace(context, advantage=shaped)


def drawn_anew(o: Objective, seed: int) -> Objective:
    """With another seed, where its rule draws tokens: trainers give one each time they ask."""
    if not isinstance(o.rule, CovarianceSelection):
        return o
    return replace(o, rule=replace(o.rule, seed=seed))


def adapt(
    o: Objective, logprob: Tensor, entropy: Tensor, finite: Tensor, context: RowContext, h: Hyper
) -> tuple[Objective, RowContext]:
    """The objective and the rows after its rule, if it has one."""
    if o.rule is None:
        return o, context
    with torch.no_grad():
        used = finite & (context.weight != 0)
        rows = Rows(logprob.detach(), entropy.detach(), used)
        return o.rule.apply(o, rows, context, h)


def _both(o: Objective, kept: Tensor, context: RowContext) -> Tensor:
    """The rule's selection times the caller's."""
    kept = kept.to(context.weight.dtype)
    given = o.selection_rows(context.weight)
    return kept if given is None else kept * given
