"""Inputs of the tests of linear_*: objectives of every path, operands, their loss both ways."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from policy_loss_literal import LENGTHS, TOKEN_LOSSES, Batch, T, V
from tolerance import randn
from torch import Tensor

import reasonkern as rk
from reasonkern import Objective, RowContext, linear_policy_loss

F32, BF16, F16, F64 = torch.float32, torch.bfloat16, torch.float16, torch.float64
B = len(LENGTHS)
NAN = float("nan")


def custom(logp: Tensor, entropy: Tensor, ctx: RowContext) -> Tensor:
    mean = ctx.sequence_sum(ctx.weight * logp)
    return -ctx.advantage * (logp + 0.1 * mean) - 0.1 * entropy.square()


EVERY_TERM = {
    "kl": ("k3", 0.2, True),
    "entropy_coef": 0.1,
    "importance": ("token", "truncate", 0.8, 1.2),
}
OBJECTIVES: dict[str, Any] = {
    **{name: objective for name, (objective, _) in TOKEN_LOSSES.items()},
    "every term": Objective.ppo(dual_clip=2.0, **EVERY_TERM),
    "own importance": Objective.ppo(importance=("sequence", "mask", 0.1, 9.0, True)),
    "opsm": Objective.dapo(opsm=0.1),
    "gspo": Objective.gspo(0.9, 1.1, **EVERY_TERM),
    "gmpo": Objective.gmpo(),
    "vespo": Objective.vespo(),
    "custom": custom,
    "per row": Objective.ppo(ratio_max=1 + torch.rand(B, T, generator=torch.Generator())),
}
EACH_PATH = pytest.mark.parametrize("name", ["every term", "gspo", "custom"])


def head(dtype: torch.dtype = F64, vocab: int = V) -> Tensor:
    """Orthogonal, so that logits @ head are hidden states with these logits."""
    return torch.linalg.qr(randn(vocab, vocab, seed=7))[0].to(dtype)


def operands(b: Batch, dtype: torch.dtype = F64, with_bias: bool = True) -> list[Tensor]:
    """hidden, weight and bias whose logits are those of the batch, as leaves."""
    weight = head()
    bias = randn(V, seed=8) if with_bias else torch.zeros(V, dtype=F64)
    hidden = (b.logits.double() - bias) @ weight
    out = [hidden, weight, bias][: 3 if with_bias else 2]
    return [x.to(dtype).clone().requires_grad_() for x in out]


def linear(x: list[Tensor], b: Batch, objective: Any, **options: Any) -> rk.PolicyLossOutput:
    names = ("ref_logprob", "rollout_logprob", "entropy_weight")
    bias = x[2] if len(x) > 2 else None
    given = b.given(*names, **options)
    return linear_policy_loss(*x[:2], b.targets, bias=bias, objective=objective, **given)


def whole(x: list[Tensor], b: Batch, objective: Any, **options: Any) -> rk.PolicyLossOutput:
    names = ("ref_logprob", "rollout_logprob", "entropy_weight")
    given = b.given(*names, **options)
    return rk.policy_loss(F.linear(*x), b.targets, objective=objective, **given)


def gradients(out: rk.PolicyLossOutput, x: list[Tensor], factor: float = 1.0) -> list[Tensor]:
    return list(torch.autograd.grad(factor * out.loss, x))


SHAPES = [(64, 32, 128), (37, 13, 101), (33, 1, 7), (1, 5, 130), (16, 8, 1)]
DTYPES = [F32, BF16, F64]


def problem(
    n: int, d: int, vocab: int, dtype: torch.dtype, device: str = "cpu"
) -> tuple[list[Tensor], Tensor, Any]:
    """Operands, targets and the other arguments of a loss with ratios on both sides of 1."""
    x = [randn(n, d, seed=1), 2 * randn(vocab, d, seed=2) / d**0.5, randn(vocab, seed=3)]
    x = [t.to(dtype).requires_grad_() for t in x]
    y = torch.randint(vocab, (n,), generator=torch.Generator().manual_seed(4))
    old = rk.token_stats(F.linear(*(t.detach().double() for t in x)), y).logprob
    given = {
        "old_logprob": old + 0.3 * randn(n, seed=5),
        "advantage": randn(n, seed=6),
        "weight": randn(n, seed=9).abs() / n,
    }
    given["weight"][::7] = 0
    return move(x, y, given, device)


def move(x: list[Tensor], y: Tensor, given: Any, device: str) -> tuple[list[Tensor], Tensor, Any]:
    """The same problem on a device."""
    x = [t.detach().to(device).requires_grad_() for t in x]
    return x, y.to(device), {name: t.to(device) for name, t in given.items()}


def off_by(got: list[Tensor], truth: list[Tensor]) -> list[float]:
    return [(g.double().cpu() - t).abs().max().item() for g, t in zip(got, truth, strict=True)]
