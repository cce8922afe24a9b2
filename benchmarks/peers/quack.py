"""quack: the forward pass of its cross-entropy, which gives the log-probability alone."""

from __future__ import annotations

from typing import TYPE_CHECKING

from torch import Tensor

from benchmarks.case import Case, Runner, Skip
from benchmarks.peers import statistics

if TYPE_CHECKING:
    from benchmarks.policy_loss import Batch


def token_stats_runner(case: Case, batch: Batch) -> Runner:
    try:
        from quack.cross_entropy import cross_entropy_fwd
    except ImportError as missing:
        raise Skip(f"quack-kernels is not installed ({missing})") from None
    targets = batch.targets.flatten()

    def compute(logits: Tensor) -> dict[str, Tensor]:
        return {"logprob": -cross_entropy_fwd(logits.flatten(0, 1), targets)}

    return statistics(batch.logits, compute)
