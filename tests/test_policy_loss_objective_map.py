"""The operator `objective_map`: the fused loss's map on statistics from elsewhere."""

from __future__ import annotations

from typing import Any

import policy_loss_cases as cases
import pytest
import torch
from conftest import Backend
from contract import assert_same_bits
from policy_loss_cases import INF, NAN, LossArgs
from policy_loss_checks import simple_loss
from tolerance import acc
from torch import Tensor

from reasonkern.policy_loss import reference as ref
from reasonkern.policy_loss import reference_objective as formulas


def loss_args(dtype: torch.dtype, kind: int) -> LossArgs:
    """Hard rows with every optional input; one skipped, four nonfinite, one finite with A = 0."""
    x, y = cases.hard_logits(37, dtype, seed=3)
    bounds = (0.97, 1.02, 1.5, INF, 0.5, 0.4, 0.1, 0.1, 20.0)
    a = simple_loss(x, y, values=bounds, kind=kind, kl_kind=3, kl_unbiased=True)
    optional = {
        "ref_logprob": a.old_logprob - 0.1,
        "importance": a.weight.flip(0).contiguous(),
        "entropy_weight": a.weight.flip(1).contiguous(),
    }
    a = LossArgs(**{**vars(a), **optional})
    a.weight[0, 1] = a.entropy_weight[0, 1] = a.advantage[1, 1] = 0
    a.logits[0, 0, 0], a.old_logprob[1, 0], a.importance[2, 0] = NAN, NAN, INF
    a.importance[2, 1], a.advantage[2, 1] = NAN, 0  # A = 0 hides a ratio, not an importance
    return a


def map_args(a: LossArgs, logprob: Tensor, entropy: Tensor) -> list[Any]:
    rows = (a.old_logprob, a.advantage, a.weight, a.entropy_weight, a.importance, a.ref_logprob)
    return [logprob, entropy, *rows, a.hyper, list(a.values), a.kind, a.kl_kind, a.kl_unbiased]


@pytest.mark.parametrize("kind", range(7))
def test_equals_the_fused_loss(backend: Backend, dtype: torch.dtype, kind: int) -> None:
    """Bit for bit: both evaluate one function, on the statistics that the fused loss returns."""
    a = loss_args(dtype, kind).map(backend.to)
    loss, token_loss, logprob, entropy, _ = backend("policy_loss", *a.args(), False)
    found = backend("objective_map", *map_args(a, logprob, entropy))
    assert_same_bits(found[:2], (loss, token_loss))
    expected = torch.ones_like(a.targets, dtype=torch.bool)
    expected[0, 0] = expected[1, 0] = expected[2, 0] = expected[2, 1] = False
    assert torch.equal(found[4], expected)
    assert all((x[~expected] == 0).all() and x[0, 1] == 0 for x in found[:4])


@pytest.mark.parametrize("kind", range(7))
def test_derivatives_are_those_of_the_definition(backend: Backend, kind: int) -> None:
    a = loss_args(torch.float32, kind)
    stats = ref.token_stats(a.logits, a.targets, None, None, 1.0, 0.0)
    args = map_args(a, stats[0], stats[1])
    found = backend("objective_map", *(backend.to(x) for x in args))
    wide = [x.double() if isinstance(x, Tensor) else x for x in args]
    *rows, hyper, values, kind, kl_kind, unbiased = wide[2:]
    h = formulas.unpack_hyper(values, hyper, a.targets.shape)
    expected = formulas.objective_rows(kind, kl_kind, unbiased, *wide[:2], *rows, h)
    for name, x, y in zip(expected._fields, found, expected, strict=True):
        if name == "finite":
            assert torch.equal(x.cpu(), y)
        else:
            size = y.abs().clamp_min(1)
            assert ((x.cpu() - y).abs() <= 2e-5 * size).all(), name


def test_gradient_through_the_operator() -> None:
    """The derivatives times the incoming gradient; 0 for rows left out; kept for a second call."""
    a = loss_args(torch.float64, formulas.GPPO)
    stats = ref.token_stats(a.logits, a.targets, None, None, 1.0, 0.0)
    leaves = [s.clone().requires_grad_() for s in stats[:2]]
    out = torch.ops.reasonkern.objective_map(*map_args(a, *leaves))
    assert [x.requires_grad for x in out] == [True] + [False] * 4
    g = torch.linspace(-1, 1, a.targets.numel(), dtype=acc(torch.float64)).view(a.targets.shape)
    for _ in range(2):
        found = torch.autograd.grad(out[0], leaves, g, retain_graph=True)
        assert_same_bits(found, (g * out[2], g * out[3]))
