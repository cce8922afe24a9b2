"""Advantages by group: baselines and scales, entropy reshaping, which samples to keep or replay."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from .. import _checks
from .._fields import documented
from ..policy_loss.selection import uniform
from .groups import Groups, check_flags, check_length, check_vector, narrow, wide

BASELINES = ("group-mean", "batch-mean", "leave-one-out", "length-weighted", "none")
SCALES = ("std", "none", "batch-std")
# Parameters of another dtype than the anchor's are copied, not all of a model at a time: 256 MB.
COPIED = 1 << 26


def group_advantages(
    reward: Tensor,
    group: Tensor,
    *,
    length: Tensor | None = None,
    baseline: str = "group-mean",
    scale: str = "std",
    eps: float = 1e-4,
) -> Tensor:
    """Advantages ``(r - b) / (σ + eps)`` of sequences by group.

    ==============================  =====================  =============
    method                          baseline               scale
    ==============================  =====================  =============
    GRPO (2402.03300)               ``group-mean``         ``std``
    Dr.GRPO (2503.20783), GTPO      ``group-mean``         ``none``
    RLOO (2402.14740), T1           ``leave-one-out``      ``none``
    OPO (2505.23585)                ``length-weighted``    ``none``
    REINFORCE++ (2501.03262)        ``batch-mean``         ``batch-std``
    REINFORCE++-baseline            ``group-mean``         ``batch-std``
    ==============================  =====================  =============

    verl's REINFORCE++ takes mean and std over tokens, where a long answer counts more; TRL's
    ``scale_rewards="batch"`` is the std of r over the batch, not that of r - b.

    Equivalent to, for equal groups of G consecutive sequences and the defaults::

        r = reward.view(-1, G)
        advantage = ((r - r.mean(1, True)) / (r.std(1, keepdim=True) + 1e-4)).view(-1)

    Args:
        reward: (N,), one per sequence, any dtype.
        group: (N,) int64 ids, in any order; groups may differ in size.
        length: (N,) tokens of each sequence, for ``length-weighted``: b = Σ L r / Σ L. A group
            whose lengths are all 0 takes its plain mean. None = not needed.
        baseline: b, one of the table, or "none" for 0.
        scale: σ: Bessel-corrected standard deviation of the group ("std"), 1 with no eps ("none"),
            or that of r - b over the batch ("batch-std").
        eps: added to σ. TRL: 1e-4, verl: 1e-6.

    Returns:
        (N,) float32 (float64 for float64 rewards), without a gradient. Where b is of the group,
        equal rewards give exactly 0. A group of one gives 0 where baseline or scale is taken over
        the group (verl gives r there). NaN spreads over its group (TRL leaves out answers without
        a score).

    Raises:
        ValueError: wrong shape, dtype or device, unknown baseline or scale, missing lengths; on CPU
            also a length that is negative or not finite.

    Example:
        >>> import torch
        >>> from reasonkern.shaping import group_advantages
        >>> group_advantages(torch.tensor([1.0, 0, 0, 1]), torch.tensor([7, 7, 3, 7]), scale="none")
        tensor([ 0.3333, -0.6667,  0.0000,  0.3333])
    """
    _checks.check_choice("baseline", baseline, BASELINES)
    _checks.check_choice("scale", scale, SCALES)
    _checks.check_number("eps", eps, 0.0)
    check_vector("reward", reward)
    groups = Groups(group, reward, "reward")
    if baseline == "length-weighted":
        if length is None:
            _checks.fail("length", "a tensor for baseline='length-weighted'", None)
        check_length(length, reward, "reward")
    centred = _minus_baseline(wide(reward), groups, baseline, length)
    out = centred
    if scale != "none":
        sigma = groups.std(reward) if scale == "std" else groups.batch().std(centred)
        out = over_sigma(centred, sigma + eps)
    if scale == "std" or baseline in ("group-mean", "leave-one-out", "length-weighted"):
        out = torch.where(groups.size() > 1, out, 0.0)
    return narrow(out, reward)


def over_sigma(centred: Tensor, sigma: Tensor) -> Tensor:
    """The quotient; 0 for 0 / 0, which an eps of 0 leaves in groups of equal rewards."""
    return torch.where((centred == 0) & (sigma == 0), 0.0, centred / sigma)


def _minus_baseline(r: Tensor, groups: Groups, baseline: str, length: Tensor | None) -> Tensor:
    if baseline == "none":
        return r
    if baseline == "batch-mean":
        return r - groups.batch().mean(r)
    centred = r - groups.mean(r)
    if baseline == "leave-one-out":
        # r - (S - r) / (n - 1) = n / (n - 1) (r - mean)
        n = groups.size()
        return centred * n / (n - 1).clamp_min(1)
    if baseline == "length-weighted" and length is not None:
        has_length = groups.sum(length) > 0
        return torch.where(has_length, r - groups.mean(r, wide(length)), centred)
    return centred


def entropy_reshape(
    advantage: Tensor, entropy_mean: Tensor, group: Tensor, *, active: Tensor | None = None
) -> Tensor:
    """Advantages weighed by relative entropy: ``A_i max(0, 2 - H_i / mean H)`` (ETTRL, 2508.11356).

    Equivalent to, for one group: ``advantage * (2 - h / h.mean()).clamp(min=0)``. The paper
    does not floor the factor: there an H_i above twice the mean turns the advantage's sign.

    Args:
        advantage: (N,), one per sequence.
        entropy_mean: (N,), mean token entropy of each response, nats.
        group: (N,) int64 ids; the mean is taken over the group.
        active: (N,) bool, False for an empty response: it counts for no mean and keeps its
            advantage. None = all.

    Returns:
        (N,) in float32 (float64 for float64 advantages), without a gradient. Where mean H is 0 the
        factor is 1.

    Raises:
        ValueError: wrong shape, dtype or device; on CPU also an entropy of an active response that
            is not finite (on CUDA its group is NaN).

    Example:
        >>> import torch
        >>> from reasonkern.shaping import entropy_reshape
        >>> entropy_reshape(torch.ones(2), torch.tensor([0.5, 1.5]), torch.tensor([0, 0]))
        tensor([1.5000, 0.5000])
    """
    check_vector("advantage", advantage)
    check_vector("entropy_mean", entropy_mean, advantage, "advantage")
    groups = Groups(group, advantage, "advantage")
    counted = torch.ones_like(advantage, dtype=torch.bool) if active is None else active
    check_flags("active", counted, advantage, "advantage")
    _checks.check_finite("entropy_mean", entropy_mean, counted, "finite numbers")
    mean = groups.mean(entropy_mean, counted)
    usable = counted & (mean != 0)
    factor = torch.where(usable, (2 - wide(entropy_mean) / mean).clamp_min(0), 1.0)
    return narrow(wide(advantage) * factor, advantage)


def dynamic_sampling_mask(reward: Tensor, group: Tensor) -> Tensor:
    """Keeps the groups that have something to tell apart (DAPO, 2503.14476; ConciseR, 2505.21178).

    Equivalent to, for one group: ``reward.max() > reward.min()``.

    Args:
        reward: (N,), one per sequence.
        group: (N,) int64 ids.

    Returns:
        (N,) bool, False for every member of a group whose rewards are all equal, a group of one
        among them (verl's recipe keeps those of one).

    Raises:
        ValueError: wrong shape, dtype or device; on CPU also a reward that is not finite.

    Example:
        >>> import torch
        >>> from reasonkern.shaping import dynamic_sampling_mask
        >>> dynamic_sampling_mask(torch.tensor([1.0, 1, 0, 1]), torch.tensor([0, 0, 1, 1]))
        tensor([False, False,  True,  True])
    """
    check_vector("reward", reward)
    groups = Groups(group, reward, "reward")
    _checks.check_finite("reward", reward, expected="finite numbers")
    return groups.max(reward) > groups.min(reward)


@documented
class ReplaySample(NamedTuple):
    """What `prioritised_sample` returns.

    Attributes:
        indices: (k,) int64, distinct positions in the batch.
        valid: (k,) bool, False where fewer than k advantages are not 0: such an entry is no sample.
    """

    indices: Tensor
    valid: Tensor


def prioritised_sample(
    advantage: Tensor, k: int, *, alpha: float = 1.0, seed: int = 0
) -> ReplaySample:
    """Draws k samples without replacement, p ∝ abs(A)^alpha over those with A ≠ 0.

    The selective sample buffer of Skywork R1V2 (arXiv 2504.16656), whose text says "weighted by the
    absolute advantage" and no more: the exponent is ours. Equivalent in law, for alpha > 0, to
    ``torch.multinomial(advantage.abs() ** alpha, k)``, by one top-k of exponential keys.

    Args:
        advantage: (N,), one per sequence.
        k: number of samples, 0 to N.
        alpha: exponent >= 0; 0 draws uniformly among the non-zero ones.
        seed: of the draw; the same seed gives the same samples.

    Returns:
        `ReplaySample`, the samples in the order drawn.

    Raises:
        ValueError: wrong shape, k outside [0, N], or a negative alpha; on CPU also an advantage
            that is not finite.

    Example:
        >>> import torch
        >>> from reasonkern.shaping import prioritised_sample
        >>> prioritised_sample(torch.tensor([0.0, 1.5, 0.0, -0.5]), k=3).valid
        tensor([ True,  True, False])
    """
    _checks.check_values("advantage", check_vector("advantage", advantage))
    _checks.check_number("alpha", alpha, 0.0)
    _checks.check_integer("k", k, 0, len(advantage))
    seed = _checks.check_seed("seed", seed)
    _checks.check_finite("advantage", advantage, expected="finite numbers")
    noise = -uniform(len(advantage), seed, advantage.device).log()
    # The k smallest of E_i / w_i, E exponential, are a weighted sample without replacement.
    log_weight = alpha * wide(advantage).abs().log()
    live = advantage != 0
    key = torch.where(live, log_weight - noise.log(), -torch.inf)
    indices = key.topk(k).indices
    return ReplaySample(indices, live[indices])


@torch.no_grad()
def anchor_update_(ema_params: Sequence[Tensor], params: Sequence[Tensor], decay: float) -> None:
    """Moves a reference policy towards the policy, in place: ``ema = decay ema + (1 - decay) p``.

    The dynamic anchor of T1 (arXiv 2501.11651; its decay is not published), as foreach kernels.
    Equivalent to ``for e, p in zip(ema_params, params): e.lerp_(p.to(e.dtype), 1 - decay)``.

    Args:
        ema_params: the anchor's parameters, float32 or float64: in bfloat16 a step below 2^-9 of
            the value would be lost every time. Tied ones once, as ``parameters()`` gives them.
        params: the policy's parameters, same shapes and devices, any floating dtype.
        decay: in [0, 1]; 1 leaves the anchor where it is.

    Raises:
        ValueError: lists of different length, a shape or device that differs, an anchor in half
            precision, or a decay outside [0, 1].

    Example:
        >>> import torch
        >>> from reasonkern.shaping import anchor_update_
        >>> anchor, policy = torch.nn.Linear(4, 4), torch.nn.Linear(4, 4)
        >>> anchor_update_(anchor.parameters(), policy.parameters(), decay=0.99)
    """
    _checks.check_number("decay", decay, 0, 1)
    ema, new = list(ema_params), list(params)
    if len(ema) != len(new):
        _checks.fail("params", f"{len(ema)} tensors, as ema_params has", len(new))
    for i, (e, p) in enumerate(zip(ema, new, strict=True)):
        _checks.check_dtype(f"ema_params[{i}]", e, torch.float32, torch.float64)
        _checks.check_shape(f"params[{i}]", p, e.shape, f"ema_params[{i}].shape")
        _checks.check_device(f"params[{i}]", p, e, f"ema_params[{i}]")
    for start, stop in _portions([e.numel() for e in ema]):
        anchors = ema[start:stop]
        target = [p.to(e.dtype) for e, p in zip(anchors, new[start:stop], strict=True)]
        torch._foreach_lerp_(anchors, target, 1.0 - decay)


def _portions(sizes: Sequence[int]) -> Iterator[tuple[int, int]]:
    """Ranges of tensors that have COPIED elements in all, or are one larger tensor."""
    start = total = 0
    for stop, size in enumerate(sizes):
        if stop > start and total + size > COPIED:
            yield start, stop
            start, total = stop, 0
        total += size
    if sizes:
        yield start, len(sizes)
