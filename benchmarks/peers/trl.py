"""TRL: `selective_log_softmax` and `entropy_from_logits`, then the trainer's loss lines in torch.

On CUDA the two are one Triton kernel per direction (`selective_log_softmax_and_entropy` chooses).
TRL computes in the dtype of the logits on CPU.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from torch import Tensor

from benchmarks.case import Case, Runner, Skip
from benchmarks.peers import Terms, eager, loss_and_gradient, loss_and_head_gradients, statistics

if TYPE_CHECKING:
    from benchmarks.linear_policy_loss import HeadBatch
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


def linear_policy_loss_runner(case: Case, batch: HeadBatch) -> Runner:
    """`ChunkedLogProbFunction` with the chunk of the trainer, then the loss lines in torch."""
    utils, spec = library(), case.spec
    chunked, chunk = utils._ChunkedLogProbFunction, utils._CHUNKED_LOGPROB_CHUNK_SIZE
    wanted = ("entropy",) if spec.entropy_coef else ()

    def compute(hidden: Tensor, head: Tensor) -> Terms:
        rows, ids = hidden.flatten(0, 1), batch.targets.flatten()
        out = chunked.apply(rows, head, None, ids, 1.0, chunk, None, 1.0, wanted)
        logprob = out[0].view(batch.targets.shape)
        loss = eager.clipped_loss(logprob, batch, spec)
        if not wanted:
            return Terms(loss, logprob, None)
        entropy = out[1].view(batch.targets.shape)
        return Terms(loss - spec.entropy_coef * (batch.weight * entropy).sum(), logprob, entropy)

    return loss_and_head_gradients(batch.hidden, batch.head, compute)
