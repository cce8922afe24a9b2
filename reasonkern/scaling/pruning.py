"""DeepPrune: cluster traces that will end alike, finish one cluster, train the judge."""

from __future__ import annotations

import math
import random
from collections.abc import Collection, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

from .. import _checks
from .._checks import check_tensor


def greedy_cluster(
    scores: Sequence[Sequence[float]] | Tensor,
    tau: float = 0.5,
    *,
    max_clusters: int | None = None,
    max_members: int | None = None,
    seed: int = 0,
) -> list[list[int]]:
    """Clusters of traces by a judge of pairs: DeepPrune (arXiv 2510.08483).

    Trace by trace: its score with a cluster is the mean judge score with (at most ``max_members``
    random) members; it joins the best cluster if that is above ``tau``, else opens a new one, or
    joins the best one after all when there are ``max_clusters``. Sequential by definition: a loop
    over the traces on the host; scores on a device are copied there once.

    Args:
        scores: (n, n), probability that two traces end in the same answer; the entry
            [later, earlier] is read.
        tau: paper: 0.5.
        max_clusters: K; None = no limit.
        max_members: K₁, members compared with; None = all.
        seed: of the random members.

    Returns:
        Clusters in the order opened, their members in the order of the traces. The best of equal
        clusters is the older one.

    Raises:
        ValueError: scores that are not square or, where they are read, not finite, or a number out
            of range.

    Example:
        >>> from reasonkern.scaling import greedy_cluster
        >>> greedy_cluster([[1, 0, 0], [0.9, 1, 0], [0.2, 0.4, 1]])
        [[0, 1], [2]]
    """
    if isinstance(scores, Tensor) and _checks.check_values("scores", scores).ndim != 2:
        _checks.fail("scores", "a square matrix", tuple(scores.shape))
    _checks.check_list("scores", scores, "rows of numbers")
    if not isinstance(scores, Tensor):
        for i, row in enumerate(scores):
            _checks.check_list(f"scores[{i}]", row, "numbers")
    rows = scores.tolist() if isinstance(scores, Tensor) else [list(row) for row in scores]
    if any(len(row) != len(rows) for row in rows):
        _checks.fail("scores", "a square matrix", f"{len(rows)} rows")
    for i, row in enumerate(rows):
        _check_scores(f"scores[{i}]", row[:i])
    _checks.check_number("tau", tau)
    for name, limit in (("max_clusters", max_clusters), ("max_members", max_members)):
        if limit is not None:
            _checks.check_integer(name, limit, 1, or_none=" or None")
    seed = _checks.check_seed("seed", seed)
    draw = random.Random(seed)
    clusters: list[list[int]] = []
    for i, row in enumerate(rows):
        means = []
        for members in clusters:
            some = max_members is not None and len(members) > max_members
            compared = draw.sample(members, max_members or 0) if some else members
            means.append(_mean([float(row[j]) for j in compared]))
        best = max(range(len(means)), key=means.__getitem__, default=None)
        full = max_clusters is not None and len(clusters) >= max_clusters
        if best is not None and (means[best] > tau or full):
            clusters[best].append(i)
        else:
            clusters.append([i])
    return clusters


def _mean(scores: list[float]) -> float:
    """Rounded once: equal scores are their own mean, and no decimal fraction is above itself."""
    try:
        mean = math.fsum(scores) / len(scores)
        rest = math.fsum([*scores, *[-mean] * len(scores)])  # what that left
    except OverflowError:  # near the largest double
        return 2.0**64 * _mean([score * 2.0**-64 for score in scores])
    return mean + rest / len(scores)


def _check_scores(name: str, scores: list[Any]) -> None:
    """Numbers, NumPy's among them: NaN would win or lose by its place in the row."""
    if _has_finite_sum(scores):  # so all are: most rows take one look
        return
    for j, score in enumerate(scores):
        if not _has_finite_sum([score]):
            _checks.fail(f"{name}[{j}]", "a finite number", repr(score))


def _has_finite_sum(scores: list[Any]) -> bool:
    try:
        return math.isfinite(sum(scores))
    except (TypeError, OverflowError):
        return False


def finish_plan(
    clusters: Sequence[Collection[int]], per_cluster: int, singletons: int, *, seed: int = 0
) -> list[int]:
    """Which traces to finish: some of the largest cluster, or of all when none agree.

    The second step of DeepPrune (arXiv 2510.08483).

    Args:
        clusters: from `greedy_cluster`.
        per_cluster: K₂, traces of the largest cluster (the older of equals) to finish at most, the
            first ones of it.
        singletons: K₃, random traces to finish when every cluster has one member.
        seed: of the random traces.

    Returns:
        Ascending trace indices; vote over their answers.

    Raises:
        ValueError: no lists, an empty cluster or a number below 1.

    Example:
        >>> from reasonkern.scaling import finish_plan
        >>> finish_plan([[0, 3, 4], [1], [2]], per_cluster=2, singletons=2)
        [0, 3]
    """
    for name, limit in (("per_cluster", per_cluster), ("singletons", singletons)):
        _checks.check_integer(name, limit, 1)
    seed = _checks.check_seed("seed", seed)
    _checks.check_list("clusters", clusters, "clusters")
    for i, cluster in enumerate(clusters):
        _checks.check_list(f"clusters[{i}]", cluster, "traces", ordered=False)
    if not all(len(cluster) for cluster in clusters):
        _checks.fail("clusters", "clusters with members", "an empty one")
    if not len(clusters):
        return []
    largest = max(clusters, key=len)
    if len(largest) > 1:
        return sorted(largest)[:per_cluster]
    every = [trace for cluster in clusters for trace in cluster]
    return sorted(random.Random(seed).sample(every, min(singletons, len(every))))


def focal_bce(
    logit: Tensor, target: Tensor, *, gamma: float = 2.0, alpha: float | None = None
) -> Tensor:
    """The judge's loss in DeepPrune: focal binary cross-entropy (arXiv 1708.02002), from logits.

    ``-α_t (1 - p_t)^γ ln p_t`` with ``p_t = σ(±logit)``; neither p nor 1 - p is formed, so large
    logits of either sign lose nothing. Differentiable.

    Args:
        logit: any shape.
        target: 0 or 1 (bool or numbers), the shape of ``logit``; same answer = 1.
        gamma: >= 0; 0 is plain cross-entropy. DeepPrune's value is not known to us; 2 is that of
            the focal-loss paper.
        alpha: weight of target 1, in [0, 1]; that of target 0 is 1 - alpha. None = no weights.

    Returns:
        Loss per element, shape and dtype of ``logit``.

    Raises:
        ValueError: wrong shape or a number out of range; on CPU also a target other than 0 and 1.

    Example:
        >>> import torch
        >>> from reasonkern.scaling import focal_bce
        >>> focal_bce(torch.tensor([0.0, 4.0]), torch.tensor([1, 1]))
        tensor([1.7329e-01, 5.8716e-06])
    """
    if not check_tensor("logit", logit).is_floating_point():
        _checks.fail("logit", "floating point", logit.dtype)
    _checks.check_shape("target", target, logit.shape, "logit.shape")
    _checks.check_device("target", target, logit, "logit")
    _checks.check_mask("target", target)
    _checks.check_number("gamma", gamma, 0.0)
    if alpha is not None:
        _checks.check_number("alpha", alpha, 0, 1)
    x = logit if logit.dtype == torch.float64 else logit.float()  # an exponent needs its digits
    signed = torch.where(target != 0, x, -x)
    loss = -logsigmoid(signed)
    if gamma > 0:  # 0 times the logarithm of 0 is NaN
        loss = torch.exp(gamma * logsigmoid(-signed)) * loss
    if alpha is not None:
        loss = torch.where(target != 0, alpha * loss, (1 - alpha) * loss)
    return loss.to(logit.dtype)
