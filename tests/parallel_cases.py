"""What the checks of every rank share: groups, shards, and a loss to compare."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import cache
from typing import Any

import torch
import torch.distributed as dist
from policy_loss_literal import Batch
from torch import Tensor
from torch.testing import assert_close

import reasonkern as rk
from reasonkern import Objective, Parallel
from reasonkern.policy_loss import parallel as ranks

OBJECTIVES: dict[str, Any] = {
    "dapo_entropy": Objective.dapo(0.8, 1.28, entropy_coef=0.1),
    "grpo_kl": Objective.grpo(kl=("k3", 0.1)),
    "cispo": Objective.cispo(1.2),
    "sapo": Objective.sapo(),
    "gspo": Objective.gspo(0.9, 1.1, entropy_coef=0.1),
    "gmpo": Objective.gmpo(),
    "vespo": Objective.vespo(),
    "opsm": Objective.ppo(opsm=0.05),
    "gtpo": Objective.gtpo(max_entropy=1.6),
    "sequence_importance": Objective.ppo(importance=("sequence", "truncate", 0.5, 2.0)),
    "custom": lambda logprob, entropy, ctx: (
        -(
            ctx.sequence_sum(torch.where(ctx.active, logprob, 0.0)).to(logprob) * ctx.advantage
            + 0.1 * entropy
        )
    ),
}
ROWS = ("ref_logprob", "rollout_logprob", "entropy_weight")


# ---- the group and its shards


def rank() -> int:
    return dist.get_rank()


def size() -> int:
    return dist.get_world_size()


def bounds(vocab: int) -> tuple[int, ...]:
    """Uneven shards; with four ranks one of them has no columns."""
    shares = (0.6,) if size() == 2 else (0.5, 0.5, 0.8)
    return (0, *(round(share * vocab) for share in shares), vocab)


def own(x: Tensor, at: Sequence[int] | None = None, r: int | None = None) -> Tensor:
    """This rank's columns of x."""
    at, r = bounds(x.shape[-1]) if at is None else at, rank() if r is None else r
    return x[..., at[r] : at[r + 1]]


@cache
def world() -> Any:
    return dist.new_group(list(range(size())))


@cache
def grid() -> tuple[Any, Any]:
    """The (row, column) groups of this rank in a 2 x 2 grid; every rank creates all of them."""
    rows = [dist.new_group(list(pair)) for pair in ((0, 1), (2, 3))]
    columns = [dist.new_group(list(pair)) for pair in ((0, 2), (1, 3))]
    return rows[rank() // 2], columns[rank() % 2]


@contextmanager
def gathered() -> Iterator[list[Tensor]]:
    """What `all_gather` is given; NCCL refuses strides that gloo takes."""
    found: list[Tensor] = []
    gather = dist.all_gather

    def watched(parts: list[Tensor], x: Tensor, **options: Any) -> Any:
        assert x.is_contiguous()
        found.append(x)
        return gather(parts, x, **options)

    dist.all_gather = watched
    try:
        yield found
    finally:
        dist.all_gather = gather


def same_on_all_ranks(*tensors: Tensor) -> None:
    for x in tensors:
        flat = x.detach().double().nan_to_num(-77.0).reshape(-1)
        for other in ranks.gather(flat, world()):
            assert torch.equal(other, flat)


def run_loss(
    b: Batch, logits: Tensor, objective: Any, parallel: Parallel | None, **options: Any
) -> tuple[rk.PolicyLossOutput, Tensor]:
    """The output and the gradient of 3 times the loss."""
    leaf = logits.clone().requires_grad_()
    out = rk.policy_loss(
        leaf * 1.0, b.targets, objective=objective, parallel=parallel, **b.given(*ROWS), **options
    )
    (gradient,) = torch.autograd.grad(3 * out.loss, leaf)
    return out, gradient


def compare(got: rk.PolicyLossOutput, expected: rk.PolicyLossOutput, **tolerance: float) -> None:
    for name in ("loss", "token_loss", "logprob", "entropy"):
        assert_close(getattr(got, name), getattr(expected, name), **tolerance)
    values, whole = got.metrics.compute(), expected.metrics.compute()
    for name, value in whole.items():
        assert_close(values[name], value, **tolerance, msg=lambda m, n=name: f"{n}: {m}")


EXACT = {"rtol": 1e-10, "atol": 1e-12}
ROUNDED = {"rtol": 1e-5, "atol": 3e-6}


def refused(error: type[Exception], message: str, call: Callable[[], Any]) -> None:
    import pytest

    with pytest.raises(error, match=message):
        call()
