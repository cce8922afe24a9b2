"""What the public functions return."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor

from .metrics import PolicyMetrics


class TokenStats(NamedTuple):
    """Statistics of each row of logits, shaped like ``targets``; float32 (float64 for float64)."""

    logprob: Tensor
    """log p[target], nats; -inf where the target's logit is -inf."""
    entropy: Tensor
    """-sum p ln p, nats."""
    lse: Tensor
    """ln sum exp of the scaled logits."""
    collision: Tensor
    """sum p^2."""
    varentropy: Tensor
    """Variance of ln p under p, nats^2."""
    max_prob: Tensor
    """Largest probability."""
    is_top1: Tensor
    """bool: the target is the argmax (the first one among ties)."""


class PolicyLossOutput(NamedTuple):
    """What `policy_loss` returns; everything but ``loss`` is detached."""

    loss: Tensor
    """0-dim, with autograd: the sum over rows of the weighted token losses and added terms."""
    token_loss: Tensor
    """Loss per token before its weight, without the entropy bonus, shaped like ``targets``."""
    logprob: Tensor
    """log p[target] of this pass."""
    entropy: Tensor
    """Entropy of this pass, nats."""
    metrics: PolicyMetrics
    """What the clipping did: ``metrics.compute()``; ``a + b`` merges micro-batches."""
