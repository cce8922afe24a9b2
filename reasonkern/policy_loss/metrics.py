"""`PolicyMetrics`: what the clipping did, as a mergeable accumulator on the device, without a sync.

`Metrics` is what it shares with `MismatchMetrics`.

Counts and sums add; minima and maxima combine; variances and covariances merge as centred moments
(Chan, Golub & LeVeque 1979), so splitting a batch changes the result by rounding only.
"""

from __future__ import annotations

import operator
from dataclasses import dataclass, field, replace
from functools import reduce
from typing import Any, Literal, TypeVar

import torch
from torch import Tensor

from .. import _checks
from .inputs import RowContext
from .objective import Objective
from .parallel import Parallel, gather
from .reference_objective import (
    DPPO_KL,
    DPPO_TV,
    Hyper,
    active_rows,
    clamped_exp,
    dppo_keeps,
    unpack_hyper,
)

SUMS = (
    "rows_active",
    "rows_skipped",
    "rows_nonfinite",
    "rows_pos",
    "rows_neg",
    "clip_pos_low",
    "clip_pos_high",
    "clip_neg_low",
    "clip_neg_high",
    "dual_or_cap",
    "dropped",
    "kl_old_k1",
    "kl_old_k2",
    "kl_old_k3",
    "kl_ref_k1",
    "kl_ref_k2",
    "kl_ref_k3",
    "entropy",
    "entropy_pos",
    "entropy_neg",
    "contribution_pos",
    "contribution_neg",
)
# Rows of `moments`: (n, mean_x, mean_y, sum of (x - mean_x)(y - mean_y)) of these pairs.
PAIRS = ("ratio_ratio", "logp_adv", "logp_adv_unclipped")


M = TypeVar("M", bound="Metrics")


@dataclass(frozen=True, eq=False)
class Metrics:
    """Statistics of a set of rows: one float64 vector on their device, cut where it is looked at.

    ``a + b`` merges micro-batches, ``all_reduce`` merges ranks, ``compute`` gives the values.
    Pickling leaves process groups behind: ``all_reduce`` of a copy is given one, unless it is added
    to metrics that have theirs.
    """

    flat: Tensor
    # What `all_reduce` merges over by default; False: groups that stayed in another process.
    parallel: Parallel | Literal[False] | None = None

    def __getstate__(self) -> dict[str, Any]:
        """Without process groups, which cannot be pickled."""
        return vars(self) | {"parallel": None if self.parallel is None else False}

    def __add__(self: M, other: M) -> M:
        """Merges the statistics of two disjoint sets of rows."""
        if type(other) is not type(self):
            return NotImplemented
        parallel = other.parallel if self.parallel is False else self.parallel
        return replace(self, flat=self._merged(other), parallel=parallel)

    def __radd__(self: M, other: int) -> M:
        """0, which ``sum(metrics)`` starts from, adds nothing."""
        return self if isinstance(other, int) and other == 0 else NotImplemented

    def _merged(self: M, other: M) -> Tensor:
        """`flat` of both sets of rows."""
        raise NotImplementedError

    def all_reduce(self: M, group: Any = None) -> M:
        """Merges the ranks of a process group in rank order, so every rank gets the same bits.

        Default: the ``segment_group`` and ``data_group`` of the call's `Parallel`, whose
        ``vocab_group`` holds the same rows and has nothing to add; without one, all ranks. Give a
        loss of DTensors a `Parallel`, for the ranks of its columns would each count its rows.
        """
        if group is None and self.parallel is False:
            _checks.fail("group", "a process group: pickling left those of the call behind", None)
        if group is None and self.parallel:
            groups = [self.parallel.segment_group, self.parallel.data_group]
        else:
            groups = [group or torch.distributed.group.WORLD]
        merged = self
        for ranks in groups:
            if ranks is not None:
                parts = [replace(self, flat=flat) for flat in gather(merged.flat, ranks)]
                merged = reduce(operator.add, parts)
        return merged


@dataclass(frozen=True, eq=False)
class PolicyMetrics(Metrics):
    """Statistics over the rows with weight != 0, in float64 on the loss's device.

    ``a + b`` merges micro-batches, `all_reduce` merges ranks, `compute` gives the values. Pickling
    leaves the loss's process groups behind: `all_reduce` of a copy is given one, unless it is added
    to metrics that have theirs.
    """

    # `flat` is (len(SUMS) + 2 + 4 * len(PAIRS),), as the operator gives it.
    has_ref: bool = field(default=False, kw_only=True)

    @property
    def sums(self) -> Tensor:
        """(len(SUMS),)."""
        return self.flat[: len(SUMS)]

    @property
    def ratio_range(self) -> Tensor:
        """(2,) minimum, maximum."""
        return self.flat[len(SUMS) : len(SUMS) + 2]

    @property
    def moments(self) -> Tensor:
        """(len(PAIRS), 4)."""
        return self.flat[len(SUMS) + 2 :].view(len(PAIRS), 4)

    def _merged(self, other: PolicyMetrics) -> Tensor:
        if self.has_ref != other.has_ref:
            raise ValueError("metrics: expected ref_logprob in both or in neither, got it in one")
        n_a, x_a, y_a, c_a = self.moments.unbind(-1)
        n_b, x_b, y_b, c_b = other.moments.unbind(-1)
        n = n_a + n_b
        share = n_b / n.clamp_min(1)
        dx, dy = x_b - x_a, y_b - y_a
        moments = (n, x_a + dx * share, y_a + dy * share, c_a + c_b + dx * dy * n_a * share)
        low = torch.minimum(self.ratio_range[:1], other.ratio_range[:1])
        high = torch.maximum(self.ratio_range[1:], other.ratio_range[1:])
        rest = torch.stack(moments, -1).flatten()
        return torch.cat((self.sums + other.sums, low, high, rest))

    def compute(self) -> dict[str, Tensor]:
        """0-dim float64 tensors by name; a mean over no rows is 0 (see ``rows_active``).

        * ``rows_active``, ``rows_skipped`` (weight 0), ``rows_nonfinite`` (excluded from the loss)
        * ``clip_frac``: tokens whose gradient was clipped (A > 0 above, A < 0 below the bounds)
        * ``clip_frac_{pos,neg}_{low,high}``: ratio outside a bound, by the sign of A
        * ``dual_clip_frac``: beyond the dual clip (A < 0) or the ratio cap
        * ``dropped_frac``: tokens without a policy term, by a selection (of GTPO, 80/20, Clip-Cov,
          OPSM or the caller) or an importance weight that is 0; 1 = only KL and entropy train
        * ``ratio_mean``, ``ratio_min``, ``ratio_max``, ``ratio_var`` (population)
        * ``kl_old_k1``, ``_k2``, ``_k3`` (to ``old_logprob``) and ``kl_ref_*`` when given, nats
        * ``entropy``, ``entropy_pos`` (A > 0), ``entropy_neg`` (A < 0), nats per token
        * ``ess`` = (sum r)^2 / sum r^2 and ``ess_frac`` = ess / rows
        * ``contribution_pos``, ``contribution_neg``: sums of max(+-r_eff A, 0), r_eff = min(r,
          ratio_max) for A >= 0 and max(r, ratio_min) for A < 0 (BAPO's two sides)
        * ``cov_logp_adv``, ``cov_logp_adv_unclipped``: cov(logp, A) and BAPO's entropy-clip
          covariance cov(logp, A X), X = 1 for unclipped tokens
        """
        s = dict(zip(SUMS, self.sums.unbind(), strict=True))
        n = s["rows_active"]
        per_row = 1 / n.clamp_min(1)
        out = {name: s[name] for name in ("rows_active", "rows_skipped", "rows_nonfinite")}
        out["clip_frac"] = (s["clip_pos_high"] + s["clip_neg_low"]) * per_row
        for region in ("pos_low", "pos_high", "neg_low", "neg_high"):
            out[f"clip_frac_{region}"] = s[f"clip_{region}"] * per_row
        out["dual_clip_frac"] = s["dual_or_cap"] * per_row
        out["dropped_frac"] = s["dropped"] * per_row
        _, mean, _, square = self.moments[0].unbind()
        out["ratio_mean"] = mean
        out["ratio_min"], out["ratio_max"] = torch.where(n > 0, self.ratio_range, 0.0).unbind()
        out["ratio_var"] = square * per_row
        for name in (n for n in SUMS if n.startswith("kl_") or n == "entropy"):
            if self.has_ref or not name.startswith("kl_ref"):
                out[name] = s[name] * per_row
        for sign in ("pos", "neg"):
            out[f"entropy_{sign}"] = s[f"entropy_{sign}"] / s[f"rows_{sign}"].clamp_min(1)
        sum_squares = square + n * mean * mean
        out["ess"] = torch.where(n > 0, (n * mean) ** 2 / sum_squares, 0.0)
        out["ess_frac"] = out["ess"] * per_row
        for name in ("contribution_pos", "contribution_neg"):
            out[name] = s[name]
        for i, name in ((1, "cov_logp_adv"), (2, "cov_logp_adv_unclipped")):
            out[name] = self.moments[i, 3] * per_row
        return out


def loss_metrics(
    context: RowContext,
    logprob: Tensor,
    entropy: Tensor,
    finite: Tensor | None,
    factor: Tensor | None,
    objective: Objective,
    values: list[float],
    hyper: Tensor | None,
    log_ratio: Tensor | None = None,
) -> PolicyMetrics:
    """Metrics of one call, of the fields of its `paths.PathOutput` after the losses."""
    flat = torch.ops.reasonkern.policy_metrics(
        logprob, entropy, context.old_logprob, context.advantage, context.weight,
        context.entropy_weight, factor, context.ref_logprob, log_ratio, finite, hyper, values,
        objective.kind, not objective.leaves_out_ratio, objective.kl is not None,
    )  # fmt: skip
    return PolicyMetrics(flat, context.parallel, has_ref=context.ref_logprob is not None)


# ---- the definition of the operator; csrc/policy_loss/metrics.h computes the same in one pass


def _moments(x: Tensor, y: Tensor, used: Tensor, n: Tensor) -> Tensor:
    mean_x = torch.where(used, x, 0.0).sum() / n.clamp_min(1)
    mean_y = torch.where(used, y, 0.0).sum() / n.clamp_min(1)
    centred = torch.where(used, (x - mean_x) * (y - mean_y), 0.0).sum()
    return torch.stack((n, mean_x, mean_y, centred))


def estimators(d: Tensor, clamp: float | Tensor) -> list[Tensor]:
    """k1, k2, k3 of d = log of (other / policy)."""
    within = torch.clamp_max(torch.clamp_min(d, -clamp), clamp)
    return [-d, 0.5 * d * d, torch.expm1(within) - d]


def _beyond_bounds(
    r: Tensor, logp: Tensor, old_logprob: Tensor | None, a: Tensor, h: Hyper, kind: int, clips: bool
) -> tuple[Tensor, Tensor]:
    """Rows beyond the lower and the upper bound."""
    if not clips:
        none = torch.zeros_like(r, dtype=torch.bool)
        return none, none
    if kind not in (DPPO_TV, DPPO_KL):
        return r < h.ratio_min, r > h.ratio_max
    old = logp if old_logprob is None else old_logprob.double()
    dropped = ~dppo_keeps(kind, logp, old, a, h)
    return dropped & (a <= 0), dropped & (a > 0)  # the side each sign is limited on


def _taken_in(finite: Tensor | None, first: Tensor, *others: Tensor | None) -> Tensor:
    """Rows that the loss did not leave out and whose inputs are finite; None = not given."""
    good = torch.isfinite(first) if finite is None else torch.isfinite(first) & finite
    for x in others:
        if x is not None:
            good = good & torch.isfinite(x)
    return good


def extent(x: Tensor, used: Tensor) -> Tensor:
    """(minimum, maximum); (inf, -inf) of nothing."""
    low, high = (
        torch.cat((x.new_full((1,), end), torch.where(used, x, end).flatten()))
        for end in (torch.inf, -torch.inf)
    )
    return torch.stack((low.amin(), high.amax()))


def metric_rows(
    logprob: Tensor,
    entropy: Tensor,
    old_logprob: Tensor | None,
    advantage: Tensor,
    weight: Tensor,
    entropy_weight: Tensor | None,
    importance: Tensor | None,
    ref_logprob: Tensor | None,
    log_ratio: Tensor | None,
    finite: Tensor | None,
    hyper: Tensor | None,
    values: list[float],
    kind: int,
    clips: bool,
    needs_ref: bool,
) -> Tensor:
    """(sums, ratio_range, moments) of rows (B, T) as one float64 vector.

    ``log_ratio`` is the one the objective clips; None = logprob - old_logprob. Rows where
    ``finite`` is False or an input is not finite were left out of the loss. ``kind`` matters for
    DPPO, whose dropped tokens count as clipped; with ``clips`` False none does.
    """
    h = unpack_hyper(values, hyper, logprob.shape)
    if log_ratio is None:
        log_ratio = torch.zeros_like(logprob) if old_logprob is None else logprob - old_logprob
    logp, a = logprob.double(), advantage.double()
    r = clamped_exp(log_ratio.double(), h.log_ratio_clamp)[0]
    needed = (logp, entropy, r, a, importance, ref_logprob if needs_ref else None)
    good = _taken_in(finite, *needed)
    active = weight != 0
    used = active & good
    read = active_rows(weight, entropy_weight)
    low, high = _beyond_bounds(r, logp, old_logprob, a, h, kind, clips)
    pos, neg = a > 0, a < 0
    clipped = (pos & high) | (neg & low)
    r_eff = torch.where(neg, torch.clamp_min(r, h.ratio_min), torch.clamp_max(r, h.ratio_max))
    beyond_cap = (r > h.ratio_cap) | (neg & (r > h.dual_clip))
    dropped = torch.zeros_like(active) if importance is None else importance == 0
    old_d, ref_d = (
        torch.zeros_like(logp) if other is None else other.double() - logp
        for other in (old_logprob, ref_logprob)
    )
    entropy = entropy.double()
    columns = [
        torch.ones_like(logp), pos, neg, pos & low, pos & high, neg & low, neg & high,
        beyond_cap, dropped,
        *estimators(old_d, h.log_ratio_clamp), *estimators(ref_d, h.log_ratio_clamp),
        entropy, torch.where(pos, entropy, 0.0), torch.where(neg, entropy, 0.0),
        torch.clamp_min(r_eff * a, 0), torch.clamp_min(-r_eff * a, 0),
    ]  # fmt: skip
    rows = torch.stack([torch.where(used, c.double(), 0.0) for c in columns]).flatten(1).sum(-1)
    counts = torch.stack(((~active).sum().double(), (read & ~good).sum().double()))
    pairs = ((r, r), (logp, a), (logp, torch.where(clipped, 0.0, a)))
    moments = [_moments(x, y, used, rows[0]) for x, y in pairs]
    return torch.cat((rows[:1], counts, rows[1:], extent(r, used), *moments))
