"""Plain torch: the formulation trainers use (log_softmax, gather, entropy, autograd).

Half-precision logits are upcast first, as trainers do that care: log_softmax in bfloat16 is off by
up to 0.07 nat. The same functions in float64 are the truth of every check.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from benchmarks.case import Case, Runner
from benchmarks.peers import Terms, loss_and_gradient, loss_and_head_gradients, statistics

if TYPE_CHECKING:
    from benchmarks.linear_policy_loss import HeadBatch
    from benchmarks.policy_loss import Batch, Spec


LogSoftmax = Callable[[Tensor], Tensor]


def log_softmax(logits: Tensor) -> Tensor:
    return torch.log_softmax(logits, dim=-1)


def minus_logsumexp(logits: Tensor) -> Tensor:
    """The other textbook form; its intermediate is as large as the logits, and so is its error."""
    return logits - torch.logsumexp(logits, dim=-1, keepdim=True)


def row_statistics(
    logits: Tensor, targets: Tensor, normalise: LogSoftmax = log_softmax
) -> dict[str, Tensor]:
    """logprob and entropy of every row."""
    logp = normalise(_wide(logits))
    return {
        "logprob": logp.gather(-1, targets.unsqueeze(-1)).squeeze(-1),
        "entropy": -(logp.exp() * logp).sum(-1),
    }


def clipped_loss(logprob: Tensor, batch: Batch | HeadBatch, spec: Spec) -> Tensor:
    """Σ w·(−min(rA, clip(r)A)), with the ratio of a token or of its sequence."""
    log_ratio = logprob - batch.old_logprob
    if spec.sequence_level:
        active = (batch.weight != 0).to(log_ratio.dtype)
        log_ratio = (log_ratio * active).sum(1, True) / active.sum(1, True).clamp(min=1.0)
    ratio, advantage = log_ratio.exp(), batch.advantage.unsqueeze(1)
    clipped = ratio.clamp(spec.ratio_min, spec.ratio_max)
    return -(batch.weight * torch.min(ratio * advantage, clipped * advantage)).sum()


def policy_loss(
    logits: Tensor, batch: Batch | HeadBatch, spec: Spec, normalise: LogSoftmax = log_softmax
) -> Terms:
    """The loss; without an entropy bonus the entropy is not computed at all."""
    logp = normalise(_wide(logits))
    logprob = logp.gather(-1, batch.targets.unsqueeze(-1)).squeeze(-1)
    loss = clipped_loss(logprob, batch, spec)
    if spec.entropy_coef == 0:
        return Terms(loss, logprob, None)
    entropy = -(logp.exp() * logp).sum(-1)
    return Terms(loss - spec.entropy_coef * (batch.weight * entropy).sum(), logprob, entropy)


def _wide(logits: Tensor) -> Tensor:
    return logits.float() if logits.dtype in (torch.bfloat16, torch.float16) else logits


def token_stats_runner(case: Case, batch: Batch) -> Runner:
    return statistics(batch.logits, lambda x: row_statistics(x, batch.targets))


def policy_loss_runner(case: Case, batch: Batch) -> Runner:
    leaf = batch.logits.detach().requires_grad_()
    return loss_and_gradient(leaf, lambda x: policy_loss(x, batch, case.spec))


def linear_policy_loss_runner(case: Case, batch: HeadBatch) -> Runner:
    """The logits of all rows exist, and their gradient."""

    def compute(hidden: Tensor, head: Tensor) -> Terms:
        return policy_loss(torch.nn.functional.linear(hidden, head), batch, case.spec)

    return loss_and_head_gradients(batch.hidden, batch.head, compute)


def gemms_runner(case: Case, batch: HeadBatch) -> Runner:
    """The three matrix products over all rows at once, into buffers that are already mapped."""
    hidden, head = batch.hidden.flatten(0, 1), batch.head
    logits = torch.zeros(hidden.shape[0], head.shape[0], dtype=head.dtype, device=head.device)
    grad_hidden, grad_head = torch.zeros_like(hidden), torch.zeros_like(head)

    def call() -> None:
        torch.mm(hidden, head.T, out=logits)
        torch.mm(logits, head, out=grad_hidden)
        torch.mm(logits.T, hidden, out=grad_head)

    return Runner(call)


def logsumexp_runner(case: Case, batch: Batch) -> Runner:
    """The cheapest statistic torch has, as a yardstick."""
    return statistics(batch.logits, lambda x: {"lse": torch.logsumexp(x, dim=-1)})


def copy_runner(case: Case, batch: Batch) -> Runner:
    """`tensor.copy_` into a buffer that is already mapped: the bandwidth ceiling of the run.

    Its source is refilled before each call like the in-place input of the op beside it, so both
    find the caches in the same state.
    """
    source, destination = batch.logits.clone(), torch.zeros_like(batch.logits)

    def refill() -> None:
        if case.op == "policy_loss" and case.spec.inplace:
            source.copy_(batch.logits)

    return Runner(lambda: destination.copy_(source), reset=refill)
