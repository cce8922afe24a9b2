"""linear_token_stats and linear_policy_loss: autograd and dtypes."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from contract import assert_same_bits
from policy_loss_linear_cases import (
    BF16,
    EACH_PATH,
    F16,
    F32,
    OBJECTIVES,
    gradients,
    linear,
    operands,
    whole,
)
from policy_loss_literal import make_batch
from tolerance import randn
from torch import Tensor
from torch.testing import assert_close

import reasonkern as rk
from reasonkern import Objective, linear_policy_loss

pytestmark = pytest.mark.usefixtures("poisoned_empty")


# ---- autograd


@pytest.mark.parametrize("wanted", range(8))
@EACH_PATH
def test_only_wanted_gradients_are_formed(name: str, wanted: int) -> None:
    b = make_batch()
    x = operands(b)
    expected = gradients(linear(x, b, OBJECTIVES[name]), x)
    leaves = [t.detach().requires_grad_(bool(wanted >> i & 1)) for i, t in enumerate(x)]
    out = linear(leaves, b, OBJECTIVES[name])
    assert out.loss.requires_grad == (wanted > 0)
    if wanted:
        out.loss.backward()
    for leaf, gradient in zip(leaves, expected, strict=True):
        if leaf.requires_grad:
            assert_close(leaf.grad, gradient, rtol=1e-12, atol=1e-14)
        else:
            assert leaf.grad is None


@EACH_PATH
@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_without_gradient(name: str, mode: Callable[[], Any]) -> None:
    b = make_batch()
    x = operands(b)
    expected = linear(x, b, OBJECTIVES[name])
    with mode():
        out = linear(x, b, OBJECTIVES[name])
        values = out.metrics.compute()
    assert not out.loss.requires_grad
    assert_close(out[:4], expected[:4], rtol=1e-12, atol=0)
    assert_close(values, expected.metrics.compute())


def test_second_backward() -> None:
    """The fused form consumed its gradients; the two-phase one gives the same again."""
    b = make_batch()
    x = operands(b)
    loss = linear(x, b, OBJECTIVES["every term"]).loss
    first = torch.autograd.grad(2 * loss, x, retain_graph=True)
    kept = [g.clone() for g in first]
    with pytest.raises(RuntimeError, match="differentiated before"):
        torch.autograd.grad(loss, x)
    assert_same_bits(first, kept)
    loss = linear(x, b, OBJECTIVES["gspo"]).loss
    assert_same_bits(*(torch.autograd.grad(loss, x, retain_graph=True) for _ in range(2)))


@EACH_PATH
def test_second_order_gradients_are_refused(name: str) -> None:
    b = make_batch()
    x = operands(b)
    others = sum(y.pow(3).sum() for y in x)  # have second derivatives
    grad = torch.autograd.grad(linear(x, b, OBJECTIVES[name]).loss + others, x, create_graph=True)
    for g in grad:
        with pytest.raises(RuntimeError, match="no second derivatives"):
            g.square().sum().backward(retain_graph=True)


@EACH_PATH
@pytest.mark.parametrize("reentrant", [False, True])
def test_under_gradient_checkpointing(name: str, reentrant: bool) -> None:
    b = make_batch()
    x = operands(b)
    expected = gradients(linear(x, b, OBJECTIVES[name]), x)

    def block(*x: Tensor) -> Tensor:
        return linear([x[0] * 1, *x[1:]], b, OBJECTIVES[name]).loss

    loss = torch.utils.checkpoint.checkpoint(block, *x, use_reentrant=reentrant)
    loss.backward()
    assert_same_bits([t.grad for t in x], expected)


def test_tied_embeddings_get_both_gradients() -> None:
    b = make_batch()
    hidden, weight = operands(b, with_bias=False)
    (linear([hidden, weight], b, Objective.ppo()).loss + weight.square().sum()).backward()
    alone = gradients(linear([hidden, weight], b, Objective.ppo()), [weight])[0]
    assert_close(weight.grad, alone + 2 * weight.detach())


# ---- dtypes


@EACH_PATH
@pytest.mark.parametrize("given_dtypes", [(F32, F32), (BF16, F32), (F32, BF16)], ids=str)
def test_autocast_casts_like_f_linear(
    name: str, given_dtypes: tuple[torch.dtype, torch.dtype]
) -> None:
    b = make_batch(F32)
    x = operands(b, F32)
    x = [t.detach().to(d).requires_grad_() for t, d in zip(x, (*given_dtypes, F32), strict=True)]
    with torch.autocast("cpu", BF16):
        out, expected = linear(x, b, OBJECTIVES[name]), whole(x, b, OBJECTIVES[name])
    assert_close(out[:4], expected[:4], rtol=1e-2, atol=1e-2)
    found, rounded = gradients(out, x), gradients(expected, x)
    assert [g.dtype for g in found] == [t.dtype for t in x]
    assert_close(found, rounded, rtol=2e-2, atol=2e-2)
    if given_dtypes[1] == F32:  # F.linear's is bfloat16 inside
        assert (rounded[1] == rounded[1].bfloat16()).all()
        assert (found[1] != found[1].bfloat16()).any()


def test_autocast_leaves_float64_alone() -> None:
    b = make_batch()
    x = operands(b)
    expected = linear(x, b, Objective.ppo())
    with torch.autocast("cpu", BF16):
        out = linear(x, b, Objective.ppo())
    assert_same_bits(out[:4], [t.detach() for t in expected[:4]])


@pytest.mark.parametrize("compact", [False, True])
@EACH_PATH
def test_backward_inside_autocast(name: str, compact: bool) -> None:
    b = make_batch(F32)
    x = operands(b, F32)
    expected = gradients(linear(x, b, OBJECTIVES[name], compact=compact), x)
    out = linear(x, b, OBJECTIVES[name], compact=compact)
    with torch.autocast("cpu", BF16):
        found = gradients(out, x)
    assert_same_bits(found, expected)


@pytest.mark.parametrize("how", ["two-phase", "loss_scale", "autocast", "autocast loss_scale"])
def test_float16_gradient_survives_with_grad_scaler(how: str) -> None:
    """Formed before the factor 65536, a float16 gradient loses most of its mass at large V."""
    rows, width, vocab = 8, 16, 32768
    x = [randn(rows, width, seed=1), randn(vocab, width, seed=2) / 2]
    y = torch.randint(vocab, (rows,), generator=torch.Generator().manual_seed(0))
    given = {
        "advantage": torch.linspace(-1, 1, rows),
        "weight": torch.full((rows,), 1 / 65536),
        "objective": Objective.ppo(),
    }
    x = [t.half() for t in x]
    exact = [t.double().requires_grad_() for t in x]
    rk.policy_loss(exact[0] @ exact[1].T, y, **given).loss.backward()
    early = [t.clone().requires_grad_() for t in x]
    lost = {"loss_scale": torch.tensor(1.0)}
    linear_policy_loss(*early, y, **given, **lost).loss.backward()
    far = (early[1].grad.double() - exact[1].grad).abs().sum()
    assert far > 0.3 * exact[1].grad.abs().sum()  # hard enough to notice
    factor = torch.tensor(65536.0)
    leaves = [t.to(F32 if "autocast" in how else F16).requires_grad_() for t in x]
    options = {"loss_scale": factor} if "loss_scale" in how else {}
    with torch.autocast("cpu", F16, enabled="autocast" in how):
        out = linear_policy_loss(*leaves, y, **given, **options)
    (out.loss * factor).backward()
    for leaf, truth in zip(leaves, exact, strict=True):
        error = (leaf.grad.double() / 65536 - truth.grad).abs().sum()
        assert error < 2e-3 * truth.grad.abs().sum()
