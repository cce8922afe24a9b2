"""Liger: `triton_grpo_loss` on CUDA; on CPU the loss part of its chunked GRPO.

Liger's CPU path is a fused linear layer. Logits in, its loss mathematics (`ppo_loss_fn`) is
applied to log-probabilities from torch's log_softmax, with the entropy bonus in torch beside it.
Its Triton loss has no entropy bonus, so on CUDA it takes part in the cases without one.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from benchmarks.case import Case, Runner, Skip
from benchmarks.peers import Terms, loss_and_gradient, loss_and_head_gradients, statistics

if TYPE_CHECKING:
    from benchmarks.linear_policy_loss import HeadBatch
    from benchmarks.policy_loss import Batch, Spec


def token_stats_runner(case: Case, batch: Batch) -> Runner:
    if case.device != "cuda":
        raise Skip("Liger has no row statistics on CPU")
    try:
        from liger_kernel.ops.grpo_loss import fused_selective_log_softmax
    except ImportError as missing:
        raise Skip(f"liger-kernel is not installed ({missing})") from None
    padded = one_more_position(batch.logits)

    def compute(logits: Tensor) -> dict[str, Tensor]:
        return {"logprob": fused_selective_log_softmax(logits, batch.targets, 1.0)}

    return statistics(padded, compute)


def policy_loss_runner(case: Case, batch: Batch) -> Runner:
    return _triton(case, batch) if case.device == "cuda" else _torch(case, batch)


def _bounds(spec: Spec) -> dict[str, float]:
    return {"epsilon_low": 1 - spec.ratio_min, "epsilon_high": spec.ratio_max - 1}


def _options(spec: Spec) -> dict[str, Any]:
    """`dapo` divides by the number of active tokens, which is what the weights of the batch do."""
    return {
        "loss_type": "dapo",
        "importance_sampling_level": "sequence" if spec.sequence_level else "token",
        "beta": 0.0,
    }


def _torch(case: Case, batch: Batch) -> Runner:
    try:
        from liger_kernel.chunked_loss.grpo_loss import LigerFusedLinearGRPOFunction
    except ImportError as missing:
        raise Skip(f"liger-kernel is not installed ({missing})") from None
    spec, mask = case.spec, torch.ones_like(batch.weight)

    def compute(logits: Tensor) -> Terms:
        logp = torch.log_softmax(logits.float(), dim=-1)
        logprob = logp.gather(-1, batch.targets.unsqueeze(-1)).squeeze(-1)
        loss, _ = LigerFusedLinearGRPOFunction.ppo_loss_fn(
            logprob,
            mask,
            batch.advantage,
            mask,
            old_per_token_logps=batch.old_logprob,
            **_bounds(spec),
            **_options(spec),
        )
        if spec.entropy_coef == 0:
            return Terms(loss, logprob, None)
        entropy = -(logp.exp() * logp).sum(-1)
        return Terms(loss - spec.entropy_coef * (batch.weight * entropy).sum(), logprob, entropy)

    return loss_and_gradient(batch.logits.detach().requires_grad_(), compute)


def _triton(case: Case, batch: Batch) -> Runner:
    if case.spec.entropy_coef != 0:
        raise Skip("triton_grpo_loss has no entropy bonus")
    try:
        from liger_kernel.transformers.grpo_loss import triton_grpo_loss
    except ImportError as missing:
        raise Skip(f"liger-kernel is not installed ({missing})") from None
    spec, tokens = case.spec, batch.targets.shape[1]
    padded = one_more_position(batch.logits).requires_grad_()

    def compute(logits: Tensor) -> Terms:
        loss, _ = triton_grpo_loss(
            logits,
            batch.old_logprob,
            None,
            batch.targets,
            batch.advantage,
            temperature=1.0,
            eps_low=1 - spec.ratio_min,
            eps_high=spec.ratio_max - 1,
            inplace=spec.inplace,
            reduce=True,
            **_options(spec),
        )
        return Terms(loss, None, None)

    def refill() -> None:
        padded.detach()[:, :tokens].copy_(batch.logits)

    return loss_and_gradient(
        padded, compute, refill if spec.inplace else None, valid=lambda grad: grad[:, :tokens]
    )


def one_more_position(logits: Tensor) -> Tensor:
    """Liger's kernels want (B, T+1, V) and ignore the last position."""
    padded = logits.new_zeros(logits.shape[0], logits.shape[1] + 1, logits.shape[2])
    padded[:, :-1].copy_(logits)
    return padded


def linear_policy_loss_runner(case: Case, batch: HeadBatch) -> Runner:
    """`LigerFusedLinearGRPOLoss` as it comes, a sequence a chunk, without torch.compile."""
    if case.spec.entropy_coef != 0:
        raise Skip("Liger's chunked loss has no entropy bonus")
    try:
        from liger_kernel.chunked_loss import LigerFusedLinearGRPOLoss
    except ImportError as missing:
        raise Skip(f"liger-kernel is not installed ({missing})") from None
    spec, mask = case.spec, torch.ones_like(batch.weight)
    loss = LigerFusedLinearGRPOLoss(
        compiled=False, use_ref_model=False, **_bounds(spec), **_options(spec)
    )

    def compute(hidden: Tensor, head: Tensor) -> Terms:
        value, _ = loss(
            hidden, head, batch.targets, mask, batch.advantage,
            old_per_token_logps=batch.old_logprob,
        )  # fmt: skip
        return Terms(value, None, None)

    return loss_and_head_gradients(batch.hidden, batch.head, compute)
