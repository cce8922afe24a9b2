"""The operator contract (contract.py) on every operator of policy_loss."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from contract import run_contract
from torch import Tensor

import reasonkern as rk
from reasonkern.policy_loss import op

B, T, V = 2, 3, 37
DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
OPS = torch.ops.reasonkern


def acc(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32


def rows(dtype: torch.dtype, seed: int, spread: float = 0.3) -> Tensor:
    g = torch.Generator().manual_seed(seed)
    return spread * torch.randn(B, T, generator=g, dtype=acc(dtype))


def logits(dtype: torch.dtype, shape: tuple[int, int, int] = (B, T, V)) -> Tensor:
    g = torch.Generator().manual_seed(1)
    x = 3 * torch.randn(shape, generator=g)
    if x.numel():
        x[0, 0, : shape[-1] // 2] = -torch.inf
    return x.to(dtype)


def targets(shape: tuple[int, int] = (B, T), vocab: int = V) -> Tensor:
    return torch.full(shape, vocab - 1, dtype=torch.int64)


def stats_samples(dtype: torch.dtype) -> list[tuple[Any, ...]]:
    mask = torch.tensor([[True, True, False], [True, False, True]])
    temperature = rows(dtype, 5).exp()
    return [
        (logits(dtype), targets(), None, None, 0.7, 0.0),
        (logits(dtype).requires_grad_(), targets(), mask, temperature, 1.0, 0.0),
        (logits(dtype).requires_grad_(), targets(), None, None, 1.0, 20.0),
        (logits(dtype, (1, 1, 1)), targets((1, 1), 1), None, None, 1.0, 0.0),
        (logits(dtype, (0, T, V)), targets((0, T)), None, None, 1.0, 0.0),
    ]


def backward_samples(dtype: torch.dtype) -> list[tuple[Any, ...]]:
    out = []
    for x, y, mask, temperature, t, cap in stats_samples(dtype):
        x = x.detach()
        logprob, entropy, _, collision, _, max_prob, _, row_max = OPS.token_stats(
            x, y, mask, temperature, t, cap
        )
        saved = (logprob, entropy, collision, max_prob, row_max)
        g = torch.linspace(-1, 1, max(y.numel(), 1), dtype=logprob.dtype)[: y.numel()].view_as(y)
        out.append((x, y, temperature, t, cap, *saved, g, None, None, None))
        out.append((x, y, temperature, t, cap, *saved, g, 0.5 * g, -g, g))
    return out


def loss_samples(dtype: torch.dtype) -> list[tuple[Any, ...]]:
    def args(o: rk.Objective, x: Tensor, **given: Tensor | None) -> tuple[Any, ...]:
        weight = torch.ones(x.shape[:2], dtype=acc(dtype)) / 5
        weight[:, -1:] = 0
        values, hyper = o.pack(weight)
        names = ("entropy_weight", "importance", "ref_logprob", "row_temperature", "loss_scale")
        optional = [given.get(name) for name in names]
        kl = (3, False) if o.kl else (0, False)
        advantage = torch.linspace(-2, 1.5, weight.numel(), dtype=weight.dtype).view_as(weight)
        return (x, targets(x.shape[:2], x.shape[2]), given.get("old"), advantage, weight,
                *optional, hyper, values, 1.0, 0.0, o.kind, *kl)  # fmt: skip

    every = {
        "old": rows(dtype, 2) - 3,
        "entropy_weight": rows(dtype, 3).abs(),
        "importance": rows(dtype, 4).exp(),
        "ref_logprob": rows(dtype, 6) - 3,
        "row_temperature": rows(dtype, 7).exp(),
        "loss_scale": torch.tensor(4.0, dtype=acc(dtype)),
    }
    scheduled = rk.Objective.gppo(ratio_max=torch.tensor(1.3), entropy_coef=torch.rand(B, T))
    return [
        args(rk.Objective.ppo(), logits(dtype)),
        args(rk.Objective.cispo(kl=("k3", 0.1), entropy_coef=0.1), logits(dtype), **every),
        args(scheduled, logits(dtype), old=every["old"]),
        args(rk.Objective.dapo(), logits(dtype, (1, 2, 1))),
        args(rk.Objective.dapo(), logits(dtype, (0, T, V))),
    ]


@pytest.mark.parametrize("dtype", DTYPES)
def test_contract_token_stats(dtype: torch.dtype) -> None:
    run_contract(OPS.token_stats.default, stats_samples(dtype), differentiable_outputs=4)


@pytest.mark.parametrize("dtype", DTYPES)
def test_contract_token_stats_backward(dtype: torch.dtype) -> None:
    run_contract(OPS.token_stats_backward.default, backward_samples(dtype))
    run_contract(OPS.token_stats_backward_.default, backward_samples(dtype), mutable=(0,))


@pytest.mark.parametrize("dtype", DTYPES)
def test_contract_policy_loss(dtype: torch.dtype) -> None:
    samples = loss_samples(dtype)
    run_contract(OPS.policy_loss.default, [(*s, False) for s in samples])
    trained = [(s[0].requires_grad_(), *s[1:], True) for s in loss_samples(dtype)]
    run_contract(OPS.policy_loss.default, trained, differentiable_outputs=1, visible=4)
    run_contract(OPS.policy_loss_.default, samples, mutable=(0,))


@pytest.mark.parametrize("dtype", DTYPES)
def test_contract_scale_rows(dtype: torch.dtype) -> None:
    x = torch.where(logits(dtype).isinf(), 0.0, logits(dtype))
    scale = torch.tensor([[1.0, 0.0, -2.0], [0.5, 1.0, 3.0]], dtype=acc(dtype))
    empty = (logits(dtype, (0, T, V)), scale[:0])
    run_contract(OPS.scale_rows_.default, [(x, scale), empty], mutable=(0,))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_contract_policy_metrics(dtype: torch.dtype) -> None:
    r = [rows(dtype, seed) for seed in range(8)]
    values = [0.8, 1.2, 3.0, 3.0, 0.1, 0.1, 0.0, 0.0, 20.0]
    hyper = torch.tensor(values, dtype=dtype)[:, None].expand(9, B * T).contiguous()
    required = (r[0], r[1], r[2], r[3], r[4], None, None, None, None, None)
    samples = [
        (*required, None, values, 0, True, False),
        (*r[:6], r[6].exp(), r[7], r[0] - r[2], r[1] > 0, hyper, values, 4, True, True),
        (r[0][:0], r[1][:0], None, r[2][:0], r[3][:0], *required[5:], None, values, 0, True, False),
    ]
    run_contract(OPS.policy_metrics.default, samples, views=False)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_contract_objective_map(dtype: torch.dtype) -> None:
    samples = []
    for o in loss_samples(dtype):
        _, _, *given, _, _, hyper, values, _, _, kind, kl_kind, unbiased = o
        shape = given[1].shape
        logp = -3 + 0.1 * torch.linspace(-1, 1, shape.numel(), dtype=acc(dtype)).view(shape)
        leaves = logp.requires_grad_(), (0.5 - logp).detach().requires_grad_()
        samples.append((*leaves, *given, hyper, values, kind, kl_kind, unbiased))
    run_contract(OPS.objective_map.default, samples, differentiable_outputs=1, views=False)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_contract_sequence_map(dtype: torch.dtype) -> None:
    r = [rows(dtype, seed) for seed in range(8)]
    leaves = [x.detach().clone().requires_grad_() for x in r[:2]]
    values = [0.9, 1.1, 3.0, 3.0, 0.1, 0.1, 0.1, 0.1, 20.0]
    hyper = torch.tensor(values, dtype=dtype)[:, None]
    offsets = torch.tensor([0, 2, B * T])
    packed = [x.view(1, -1) for x in (*r[2:6], r[6].exp(), r[7])]
    flat = [x.detach().view(1, -1).requires_grad_() for x in leaves]
    none = (None, None, None, None)
    samples = [
        (*leaves, r[2], r[3], r[4], *none, None, values, 0, 0, False),
        (*flat, *packed, offsets, hyper, values, 1, 3, True),
        (*leaves, None, r[3], r[4], *none, None, values, 2, 0, False),
    ]
    run_contract(OPS.sequence_map.default, samples, differentiable_outputs=1, views=False)


def test_every_operator_has_a_contract_test() -> None:
    assert set(op.SCHEMAS) == {
        "token_stats",
        "token_stats_backward",
        "token_stats_backward_",
        "policy_loss",
        "policy_loss_",
        "scale_rows_",
        "objective_map",
        "sequence_map",
        "policy_metrics",
        "conflict_runs",  # test_policy_loss_conflict.py
    }


def test_gradcheck_token_stats() -> None:
    x = 2 * torch.randn(1, 3, 11, dtype=torch.float64)
    x[0, 0, :4] = -torch.inf
    finite = torch.isfinite(x)
    y = torch.tensor([[5, 0, 10]])

    def stats(values: Tensor) -> tuple[Tensor, ...]:
        z = x.masked_scatter(finite, values)
        return OPS.token_stats(z, y, None, None, 0.8, 5.0)[:4]

    torch.autograd.gradcheck(stats, x[finite].clone().requires_grad_())


def test_gradcheck_policy_loss() -> None:
    """Central differences; torch's gradcheck needs a second backward, which the op refuses."""
    torch.manual_seed(0)
    x = torch.randn(2, 3, 9, dtype=torch.float64)
    y = torch.randint(0, 9, (2, 3))
    old = x.log_softmax(-1).gather(-1, y[..., None])[..., 0] + 0.05
    given = {
        "old_logprob": old,
        "advantage": torch.randn(2, 3, dtype=torch.float64),
        "weight": torch.rand(2, 3),
        "ref_logprob": old - 0.1,
        "objective": rk.Objective.sapo(entropy_coef=0.3, kl=("k3", 0.2, True)),
    }
    leaf = x.clone().requires_grad_()
    rk.policy_loss(leaf, y, **given).loss.backward()
    assert leaf.grad is not None
    step = 1e-6
    for i in range(x.numel()):
        moved = torch.zeros_like(x)
        moved.view(-1)[i] = step
        up, down = (rk.policy_loss(x + s * moved, y, **given).loss for s in (1, -1))
        numeric = (up - down) / (2 * step)
        torch.testing.assert_close(leaf.grad.view(-1)[i], numeric, rtol=1e-6, atol=1e-8)
