"""Whole-sequence quantities: segments, importance weights, OPSM, and GSPO, GMPO, VESPO.

These need every token of a sequence, so their losses take two passes over the logits: statistics,
the O(N) map below, gradient. Sums run in float64.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from .objective_fields import Importance
from .parallel import Parallel, group_total
from .reference_objective import (
    Hyper,
    RowLoss,
    Term,
    clamped_exp,
    clip_term,
    combine,
    kl_term,
)

GSPO, GMPO, VESPO = range(3)
KINDS = {"gspo": GSPO, "gmpo": GMPO, "vespo": VESPO}
LOG_W_MIN, LOG_W_MAX = math.log(1e-8), 20.0  # VESPO's limits on ln w


@dataclass(frozen=True)
class Segments:
    """Which rows form a sequence: batch rows of (B, T), or ``cu_seqlens`` (S + 1) over (1, N).

    With a ``segment_group`` they form the piece of a sequence that this rank has.
    """

    cu_seqlens: Tensor | None = None
    ids: Tensor | None = None  # (1, N) sequence of each packed row
    parallel: Parallel | None = None

    @classmethod
    def of(
        cls, rows: Tensor, cu_seqlens: Tensor | None, parallel: Parallel | None = None
    ) -> Segments:
        if cu_seqlens is None:
            return cls(parallel=parallel)
        index = torch.arange(rows.shape[-1], dtype=cu_seqlens.dtype, device=rows.device)
        ids = torch.searchsorted(cu_seqlens[1:].contiguous(), index, right=True)
        return cls(cu_seqlens, ids.clamp_max(cu_seqlens.numel() - 2).unsqueeze(0), parallel)

    @property
    def is_pieces(self) -> bool:
        """Whether other ranks have other pieces of these sequences."""
        return self.parallel is not None and self.parallel.segment_group is not None

    @property
    def offsets(self) -> Tensor | None:
        """``cu_seqlens`` as the operators take them."""
        return None if self.cu_seqlens is None else self.cu_seqlens.to(torch.int64).contiguous()

    def count(self, rows: Tensor) -> int:
        """Number of sequences among rows (B, T)."""
        return rows.shape[0] if self.cu_seqlens is None else self.cu_seqlens.numel() - 1

    def sum(self, x: Tensor) -> Tensor:
        """Sum over each sequence, in float64, given back to each of its rows (B, T).

        One all-gather of a number per sequence with a ``segment_group``.
        """
        x = x.double()
        group = self.parallel.segment_group if self.parallel is not None else None
        if self.cu_seqlens is None or self.ids is None:
            return group_total(x.sum(-1, keepdim=True), group).expand_as(x)
        # Each segment is summed by one thread in order: deterministic, unlike index_add on CUDA.
        sums = torch.segment_reduce(x.reshape(-1), "sum", offsets=self.offsets, unsafe=True)
        return group_total(sums, group)[self.ids]


def importance_weights(
    term: Importance,
    old_logprob: Tensor,
    rollout_logprob: Tensor,
    weight: Tensor,
    segments: Segments,
    log_ratio_clamp: float | Tensor,
) -> Tensor:
    """Detached correction w of each row (B, T): truncated to, or zeroed outside, [lo, hi]."""
    active = weight != 0
    log_w = torch.where(active, old_logprob - rollout_logprob, 0.0)
    if term.level == "sequence":
        total = segments.sum(log_w)
        if term.geometric_mean:
            total = total / segments.sum(active).clamp_min(1)
        log_w = total.to(weight.dtype)
    w, _ = clamped_exp(log_w, log_ratio_clamp)
    lo = 0.0 if term.lo is None else term.lo
    hi = math.inf if term.hi is None else term.hi
    if term.mode == "truncate":
        return torch.clamp_max(torch.clamp_min(w, lo), hi)
    return torch.where((w < lo) | (w > hi), 0.0, w)  # NaN stays NaN, and its row is counted


def opsm_keeps(
    delta: float | Tensor,
    logprob: Tensor,
    rollout_logprob: Tensor,
    advantage: Tensor,
    active: Tensor,
    segments: Segments,
) -> Tensor:
    """0 for tokens with A < 0 of sequences the policy moved away from by more than delta, else 1.

    NaN for the tokens of a sequence whose drift is NaN.
    """
    drift = segments.sum(torch.where(active, rollout_logprob - logprob, 0.0))
    mean = drift / segments.sum(active).clamp_min(1)
    keeps = torch.where((advantage < 0) & (mean > delta), 0.0, torch.ones_like(logprob))
    return torch.where(mean.isnan(), torch.nan, keeps)


class SequenceTerm(NamedTuple):
    """Loss of each row's sequence, and the derivative of the *weighted* policy loss by logp."""

    value: Tensor
    dlogp: Tensor
    log_ratio: Tensor  # logarithm of the sequence's ratio, on each of its rows


def sequence_term(
    kind: int,
    logp: Tensor,
    old: Tensor,
    advantage: Tensor,
    policy_weight: Tensor,
    active: Tensor,
    segments: Segments,
    h: Hyper,
) -> SequenceTerm:
    """``policy_weight`` is weight * selection * importance; the means run over active rows."""
    log_r = torch.where(active, logp - old, 0.0).double()
    a = advantage.double()
    if kind == VESPO:
        k_pos, lam_pos, k_neg, lam_neg = (_like(a, x) for x in h[:4])
        k, lam = torch.where(a < 0, k_neg, k_pos), torch.where(a < 0, lam_neg, lam_pos)
        log_w = segments.sum(log_r).clamp(LOG_W_MIN, LOG_W_MAX)
        factor = a * torch.exp(lam + k * log_w - lam * torch.exp(log_w))
        return SequenceTerm(-factor * logp, -policy_weight * factor, log_w)
    length = segments.sum(active).clamp_min(1)
    if kind == GSPO:
        mean = segments.sum(log_r) / length
        ratio, slope = clamped_exp(mean, h.log_ratio_clamp)
        value, ds = clip_term(ratio, slope, a, h)
        moved = active
    else:
        at_most = torch.clamp_max(log_r, _log(h.ratio_max))
        at_least = torch.clamp_min(log_r, _log(h.ratio_min))
        clipped = torch.where(a > 0, at_most, at_least)
        moved = active & (clipped == log_r)
        mean = segments.sum(torch.where(active, clipped, 0.0)) / length
        ratio = torch.exp(mean)
        value = ds = -ratio * a
    # A = 0 gives 0 whatever the ratio, as long as there is one.
    value = torch.where((a == 0) & ~ratio.isnan(), 0.0, value)
    ds = torch.where(a != 0, ds, 0.0)
    share = torch.where(active, policy_weight * ds, 0.0)
    dlogp = torch.where(moved, segments.sum(share) / length, 0.0)
    return SequenceTerm(value, dlogp, mean)


def sequence_rows(
    kind: int,
    kl_kind: int,
    kl_unbiased: bool,
    logprob: Tensor,
    entropy: Tensor,
    old_logprob: Tensor | None,
    advantage: Tensor,
    weight: Tensor,
    entropy_weight: Tensor | None,
    importance: Tensor | None,
    ref_logprob: Tensor | None,
    segments: Segments,
    h: Hyper,
) -> tuple[RowLoss, Tensor]:
    """The rows of sequence-level objectives, and the log-ratio of each row's sequence.

    Rows whose statistics are not finite take no part. For VESPO the first four numbers of ``h`` are
    k and lambda for A >= 0, then for A < 0.
    """
    stated = torch.isfinite(logprob) & torch.isfinite(entropy)
    lp, ent, weight = (torch.where(stated, x, 0.0) for x in (logprob, entropy, weight))
    if entropy_weight is not None:
        entropy_weight = torch.where(stated, entropy_weight, 0.0)
    old = lp if old_logprob is None else old_logprob
    policy_weight = weight if importance is None else weight * importance
    term = sequence_term(kind, lp, old, advantage, policy_weight, weight != 0, segments, h)
    value, dlogp, log_ratio = (x.to(lp.dtype) for x in term)
    if importance is not None:
        value = importance * value
    if kl_kind and ref_logprob is not None:
        k = kl_term(kl_kind, kl_unbiased, lp, ref_logprob, old, h)
        value, dlogp = value + h.kl_coef * k.value, dlogp + weight * h.kl_coef * k.dlogp
    rows = combine(Term(value, dlogp), lp, ent, weight, entropy_weight, h)
    # Not `_replace`: Dynamo of torch 2.11 fails at it after a graph break.
    rows = RowLoss(*rows[:-1], finite=rows.finite & stated)
    return rows, log_ratio.contiguous()


def _like(x: Tensor, number: float | Tensor) -> Tensor:
    return number.to(x) if isinstance(number, Tensor) else x.new_full((), number)


def _log(x: float | Tensor) -> float | Tensor:
    if isinstance(x, Tensor):
        return torch.log(x.double())
    return math.log(x) if x > 0 else -math.inf
