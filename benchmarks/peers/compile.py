"""torch.compile of the eager formulation."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch

from benchmarks.case import Case, Runner, Skip
from benchmarks.peers import eager, loss_and_gradient, statistics

if TYPE_CHECKING:
    from benchmarks.policy_loss import Batch


def compiled(function: Callable[..., Any], case: Case) -> Callable[..., Any]:
    """Static shapes, one graph; the thread count of the case is baked into the C++ code."""
    import torch._inductor.config as inductor

    if case.device == "cuda" and torch.version.cuda is None:
        raise Skip("this torch has no CUDA")
    inductor.cpp.threads = case.threads or -1
    torch._dynamo.reset()
    return torch.compile(function, fullgraph=True, dynamic=False)


def token_stats_runner(case: Case, batch: Batch) -> Runner:
    function = compiled(eager.row_statistics, case)
    return statistics(batch.logits, lambda x: function(x, batch.targets))


def policy_loss_runner(case: Case, batch: Batch) -> Runner:
    function = compiled(lambda x: eager.policy_loss(x, batch, case.spec), case)
    return loss_and_gradient(batch.logits.detach().requires_grad_(), function)
