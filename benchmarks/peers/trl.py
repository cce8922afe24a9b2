"""TRL: `selective_log_softmax` and `entropy_from_logits`, then the trainer's loss lines in torch.

On CUDA the two are one Triton kernel per direction (`selective_log_softmax_and_entropy` chooses).
TRL computes in the dtype of the logits on CPU.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from torch import Tensor

from benchmarks.case import Case, Runner, Skip
from benchmarks.peers import Terms, eager, loss_and_gradient, statistics

if TYPE_CHECKING:
    from benchmarks.policy_loss import Batch, Spec


def library() -> Any:
    try:
        import trl.trainer.utils as utils
    except ImportError as missing:
        raise Skip(f"trl is not installed ({missing})") from None
    return utils


def token_stats_runner(case: Case, batch: Batch) -> Runner:
    utils = library()

    def compute(logits: Tensor) -> dict[str, Tensor]:
        logprob, entropy = utils.selective_log_softmax_and_entropy(logits, batch.targets)
        return {"logprob": logprob, "entropy": entropy}

    return statistics(batch.logits, compute)


def policy_loss_runner(case: Case, batch: Batch) -> Runner:
    utils, spec = library(), case.spec
    leaf = batch.logits.detach().requires_grad_()
    return loss_and_gradient(leaf, lambda x: policy_loss(utils, x, batch, spec))


def policy_loss(utils: Any, logits: Tensor, batch: Batch, spec: Spec) -> Terms:
    if spec.entropy_coef == 0:
        logprob = utils.selective_log_softmax(logits, batch.targets)
        return Terms(eager.clipped_loss(logprob, batch, spec), logprob, None)
    logprob, entropy = utils.selective_log_softmax_and_entropy(logits, batch.targets)
    bonus = spec.entropy_coef * (batch.weight * entropy).sum()
    return Terms(eager.clipped_loss(logprob, batch, spec) - bonus, logprob, entropy)
