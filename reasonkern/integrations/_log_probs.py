"""An objective for a trainer that gives its loss log-probabilities instead of logits."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from .. import _checks
from ..policy_loss import Objective, PolicyMetrics
from ..policy_loss.adaptive import EntropyFilter, HighEntropySelection
from ..policy_loss.inputs import check_objective, row_context
from ..policy_loss.metrics import loss_metrics
from ..policy_loss.paths import loss_of_statistics
from ..policy_loss.sequence import Segments


def check_terms(objective: Objective, instead: Mapping[str, str], trainer: str) -> None:
    """ValueError for terms that are the trainer's business, ``instead``, or need entropies."""
    for term, other in instead.items():
        if given := getattr(objective, term):
            _checks.fail(f"objective.{term}", f"not set (but {other})", given)
    if isinstance(objective.rule, (EntropyFilter, HighEntropySelection)):
        expected = f"one that needs no entropies, which {trainer} keeps"
        _checks.fail("objective", expected, objective.name)


def log_prob_loss(
    objective: Objective,
    logprob: Tensor,
    mask: Tensor,
    *,
    old_logprob: Tensor,
    advantage: Tensor,
    weight: Tensor,
    importance: Tensor | None = None,
    rollout_logprob: Tensor | None = None,
) -> tuple[Tensor, PolicyMetrics]:
    """The O(N) map of the family on (B, T) tensors; masked tokens may hold anything.

    Raises:
        ValueError: advantages that differ within a sequence, for a sequence-level objective; a
            missing ``rollout_logprob``.
    """
    context = row_context(
        objective,
        logprob.unsqueeze(-1),
        Segments(),
        old_logprob=old_logprob,
        advantage=_per_sequence(advantage, mask) if objective.level == "sequence" else advantage,
        weight=weight,
        ref_logprob=None,
        rollout_logprob=rollout_logprob,
        entropy_weight=None,
        importance=importance,
    )
    check_objective(objective, context, packed=False)
    known = torch.where(mask, logprob, 0.0).to(context.weight)
    out = loss_of_statistics(objective, known, torch.zeros_like(known), context)
    return out.loss, loss_metrics(context, *out[2:])


def _per_sequence(advantages: Tensor, mask: Tensor) -> Tensor:
    """A sequence's advantage, spread over its tokens; ValueError where they differ."""
    kept = torch.where(mask, advantages, 0.0)
    mean = kept.sum(-1, keepdim=True) / mask.sum(-1, keepdim=True).clamp_min(1)
    apart = torch.where(mask, (advantages - mean).abs(), 0.0)
    if (apart > 1e-5 * mean.abs().clamp_min(1e-6)).any():
        _checks.fail("advantages", "one value per sequence for a sequence-level objective", "more")
    return mean.squeeze(-1)
