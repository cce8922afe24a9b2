"""What the public functions return."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor

from .._fields import documented
from .metrics import PolicyMetrics


@documented
class TokenStats(NamedTuple):
    """Statistics of each row of logits, shaped like ``targets``; float32 (float64 for float64).

    Attributes:
        logprob: log p[target], nats; -inf where the target's logit is -inf.
        entropy: -sum p ln p, nats.
        lse: ln sum exp of the scaled logits.
        collision: sum p^2.
        varentropy: variance of ln p under p, nats^2.
        max_prob: largest probability.
        is_top1: bool: the target is the argmax of the logits as they come (the first one among
            ties). Different logits that a soft-cap rounds to one value are ties in the Triton
            kernel, and where they are on different ranks.
    """

    logprob: Tensor
    entropy: Tensor
    lse: Tensor
    collision: Tensor
    varentropy: Tensor
    max_prob: Tensor
    is_top1: Tensor


@documented
class PolicyLossOutput(NamedTuple):
    """What `policy_loss` returns; everything but ``loss`` is detached.

    Attributes:
        loss: 0-dim, with autograd: the sum over rows of the weighted token losses and added terms.
        token_loss: loss per token before its weight, without the entropy bonus, shaped like
            ``targets``.
        logprob: log p[target] of this pass.
        entropy: entropy of this pass, nats.
        metrics: what the clipping did: ``metrics.compute()``; ``a + b`` merges micro-batches.
    """

    loss: Tensor
    token_loss: Tensor
    logprob: Tensor
    entropy: Tensor
    metrics: PolicyMetrics
