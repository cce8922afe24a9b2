"""User-defined objectives: plain torch functions of log-probability, entropy and context."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from policy_loss_literal import LENGTHS, batch, check, gradient, make_batch, spread, total
from torch import Tensor
from torch.testing import assert_close

from reasonkern import Objective, RowContext, policy_loss

B = len(LENGTHS)
padded_and_packed = pytest.mark.parametrize("form", ["padded", "packed"])


def clipped(logp: Tensor, entropy: Tensor, ctx: RowContext) -> Tensor:
    assert ctx.old_logprob is not None
    r = (logp - ctx.old_logprob).exp()
    return -torch.minimum(r * ctx.advantage, r.clamp(0.8, 1.2) * ctx.advantage)


@padded_and_packed
@pytest.mark.parametrize("inplace", [False, True])
def test_plain_function_equals_the_built_in(form: str, inplace: bool) -> None:
    b = batch(form)
    found = []
    for objective in (clipped, Objective.ppo()):
        x = b.leaf()
        out = policy_loss(x * 1, b.targets, objective=objective, inplace_grad=inplace, **b.given())
        found.append((out.loss, out.token_loss, gradient(out.loss, x), out.entropy))
    assert_close(found[0], found[1], rtol=1e-12, atol=1e-15)


@padded_and_packed
@pytest.mark.parametrize(
    "terms",
    [
        {"kl": ("k3", 0.3)},
        {"kl": ("k2", 0.3, True)},
        {"entropy_coef": 0.2},
        {"importance": ("token", "truncate", 0.9, 1.1)},
        {"importance": ("sequence", "mask", 0.9, 1.1, True)},
        {"opsm": 0.0},
        {"kl": ("k1", 0.1), "entropy_coef": 0.1, "opsm": 0.05},
    ],
    ids=lambda t: "-".join(t),
)
def test_added_terms_of_a_custom_objective(terms: dict[str, Any], form: str) -> None:
    b = batch(form)
    names = ("ref_logprob", "rollout_logprob", "entropy_weight")
    found = []
    for objective in (Objective.custom(clipped, **terms), Objective.ppo(**terms)):
        x = b.leaf()
        out = policy_loss(x, b.targets, objective=objective, **b.given(*names))
        found.append((out.loss, out.token_loss, gradient(out.loss, x)))
    assert_close(found[0], found[1], rtol=1e-12, atol=1e-15)


def my_gspo(low: float, high: float) -> Callable[[Tensor, Tensor, RowContext], Tensor]:
    def loss(logp: Tensor, entropy: Tensor, ctx: RowContext) -> Tensor:
        log_r = torch.where(ctx.active, logp - ctx.old_logprob, 0.0)
        s = (ctx.sequence_sum(log_r) / ctx.sequence_sum(ctx.active).clamp_min(1)).exp()
        return -torch.minimum(s * ctx.advantage, s.clamp(low, high) * ctx.advantage)

    return loss


@padded_and_packed
def test_sequence_sum_reproduces_gspo(form: str) -> None:
    """Through ctx.sequence_sum, with its gradient; the result keeps the logits' precision."""
    for dtype in (torch.float64, torch.float32):
        b = batch(form).to(dtype)
        found = []
        for objective in (my_gspo(0.9, 1.1), Objective.gspo(0.9, 1.1)):
            x = b.leaf()
            out = policy_loss(x, b.targets, objective=objective, **b.given())
            found.append((out.loss, gradient(out.loss, x)))
        assert_close(found[0], found[1])
        assert out.loss.dtype == dtype


@pytest.mark.parametrize("names", [(), ("entropy_weight",)], ids=["", "entropy_weight"])
@pytest.mark.parametrize("value", [math.nan, -math.inf])
@padded_and_packed
def test_a_nonfinite_row_is_in_no_sequence_sum(form: str, value: float, names: Any) -> None:
    """A logit of NaN, or a target at -inf: as in the built-in GSPO, the row has no weight."""
    b = batch(form)
    logits = b.logits.clone()
    row = (0, 2) if form == "padded" else (2,)
    logits[(*row, int(b.targets[row]))] = value
    found = []
    for objective in (my_gspo(0.1, 10.0), Objective.gspo(0.1, 10.0)):
        x = logits.clone().requires_grad_()
        out = policy_loss(x, b.targets, objective=objective, **b.given(*names))
        assert out.metrics.compute()["rows_nonfinite"] == 1
        found.append((out.loss, out.token_loss, gradient(out.loss, x)))
    assert_close(found[0], found[1], rtol=1e-12, atol=1e-15)


def test_custom_objective_may_use_the_entropy() -> None:
    b = make_batch()
    c = b.clean()
    a = spread(c, c.advantage)
    check(
        b, lambda logp, entropy, ctx: -ctx.advantage * logp * entropy,
        lambda logp, entropy: total(c, -a * logp * entropy),
    )  # fmt: skip


def test_rows_that_are_not_read_have_no_custom_loss() -> None:
    b = make_batch()
    out = policy_loss(b.leaf(), b.targets, objective=lambda logp, *_: 1 - logp, **b.given())
    assert torch.equal(out.token_loss, torch.where(b.mask, 1 - out.logprob, 0.0))


@pytest.mark.parametrize("inplace", [False, True])
def test_a_custom_loss_without_gradient_would_train_nothing(inplace: bool) -> None:
    """It is refused where a gradient is wanted, and only there; 0 * logprob has one."""
    b = make_batch()

    def detached(logp: Tensor, entropy: Tensor, ctx: RowContext) -> Tensor:
        return clipped(logp.detach(), entropy, ctx)

    def loss(x: Tensor, objective: Any) -> Tensor:
        return policy_loss(
            x, b.targets, objective=objective, inplace_grad=inplace, **b.given()
        ).loss

    with pytest.raises(ValueError, match="objective: expected a token_loss with a gradient to"):
        loss(b.leaf() * 1, detached)
    assert_close(loss(b.logits.clone(), detached), loss(b.logits.clone(), clipped))
    x = b.leaf()
    assert not gradient(loss(x * 1, lambda logp, *_: 0 * logp), x).any()


def test_a_custom_loss_that_is_not_finite_is_left_out_with_a_clean_gradient() -> None:
    """1 / 0 in one row: its loss and gradient are 0, those of the others are unchanged."""
    b = make_batch()

    def broken(logp: Tensor, entropy: Tensor, ctx: RowContext) -> Tensor:
        others = torch.ones_like(logp)
        others[0, 0] = 0
        return -ctx.advantage * logp / others

    x, y = b.leaf(), b.leaf()
    out = policy_loss(x, b.targets, objective=broken, **b.given())
    without = b.weight.clone()
    without[0, 0] = 0
    expected = policy_loss(y, b.targets, objective=Objective.gpg(), **b.given(weight=without))
    assert torch.equal(out.loss, expected.loss)
    assert_close(gradient(out.loss, x), gradient(expected.loss, y), rtol=1e-12, atol=1e-15)
    assert out.metrics.compute()["rows_nonfinite"] == 1


def test_vmap_over_the_logits_is_a_loop() -> None:
    """With the gradient of a leaf outside of it, clean where the loss is not finite."""
    b = make_batch()

    def broken(logp: Tensor, entropy: Tensor, ctx: RowContext) -> Tensor:
        others = torch.ones_like(ctx.weight).index_fill(1, torch.tensor([1]), 0.0)
        return -ctx.advantage * logp / others

    def loss(x: Tensor) -> Tensor:
        return policy_loss(x, b.targets, objective=broken, **b.given()).loss

    x, y = (torch.stack((b.logits, b.logits.flip(-1))).requires_grad_() for _ in range(2))
    together, alone = torch.vmap(loss)(x), torch.stack([loss(one) for one in y])
    assert_close(together, alone, rtol=1e-12, atol=1e-15)
    assert_close(gradient(together.sum(), x), gradient(alone.sum(), y), rtol=1e-12, atol=1e-15)


@padded_and_packed
def test_what_a_custom_objective_sees(form: str) -> None:
    b = batch(form).to(torch.float32)
    seen: list[RowContext] = []

    def look(logp: Tensor, entropy: Tensor, ctx: RowContext) -> Tensor:
        assert logp.dtype == entropy.dtype == torch.float32
        seen.append(ctx)
        return -logp

    policy_loss(b.logits.bfloat16(), b.targets, objective=look, **b.given("entropy_weight"))
    shape = (B, 6) if form == "padded" else (1, sum(LENGTHS))
    (ctx,) = seen
    assert ctx.advantage.shape == ctx.weight.shape == shape and ctx.advantage_per_sequence
    assert torch.equal(ctx.active.view(b.mask.shape), b.mask) and ctx.ref_logprob is None
    counts = ctx.sequence_sum(ctx.weight != 0).view(b.targets.shape)
    assert torch.equal(counts, spread(b, torch.tensor([5.0, 0, 2, 1])).double())
