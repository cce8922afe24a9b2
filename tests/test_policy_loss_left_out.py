"""Rows that a nonfinite value or weight 0 takes out: of the loss, its gradient, the metrics."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from policy_loss_literal import LENGTHS, T, V, batch, gradient, make_batch
from policy_loss_paths import head, paths
from test_policy_loss_sequence import SEQUENCE_LOSSES, padded_and_packed
from torch import Tensor
from torch.testing import assert_close

from reasonkern import Objective, policy_loss, token_stats

B = len(LENGTHS)


def _nan_at(rows: Tensor) -> Tensor:
    changed = rows.clone()
    changed[0, 2] = float("nan")
    return changed


@pytest.mark.parametrize("name", SEQUENCE_LOSSES)
def test_a_nonfinite_row_does_not_count_in_its_sequence(name: str) -> None:
    """Bad logits in one row: L and the means run over the others."""
    objective, _ = SEQUENCE_LOSSES[name]
    b = make_batch()
    without = b.weight.clone()
    without[0, 2] = 0
    expected = policy_loss(y := b.leaf(), b.targets, objective=objective, **b.given(weight=without))
    bad = b.logits.clone()
    bad[0, 2, 5] = float("nan")
    x = bad.requires_grad_()
    out = policy_loss(x, b.targets, objective=objective, **b.given())
    assert_close(out.loss, expected.loss, rtol=1e-13, atol=0)
    assert_close(gradient(out.loss, x), gradient(expected.loss, y), rtol=1e-12, atol=1e-15)


@pytest.mark.parametrize(
    ("objective", "name", "rows"),
    [
        (Objective.ppo(), "old_logprob", 1),
        (Objective.gspo(), "old_logprob", 5),
        (Objective.gmpo(), "old_logprob", 5),
        (Objective.vespo(), "old_logprob", 5),
        (Objective.ppo(kl=("k3", 0.1)), "ref_logprob", 1),
        (Objective.ppo(importance=("token", "truncate", None, 2.0)), "rollout_logprob", 1),
        (Objective.ppo(importance=("token", "mask", 0.5, 2.0)), "rollout_logprob", 1),
        (Objective.ppo(importance=("sequence", "truncate", None, 2.0)), "rollout_logprob", 5),
        (Objective.ppo(importance=("sequence", "mask", 0.1, 9.0)), "rollout_logprob", 5),
        (Objective.ppo(opsm=0.1), "rollout_logprob", 5),
        (Objective.gspo(opsm=0.1), "rollout_logprob", 5),
    ],
    ids=lambda x: x.name if isinstance(x, Objective) else str(x),
)
def test_rows_without_a_needed_logprob_are_counted(
    objective: Objective, name: str, rows: int
) -> None:
    """NaN takes out its row, or its sequence where a sum over it is needed; never another one."""
    b = make_batch()
    names = ("ref_logprob", "rollout_logprob")
    x, y = b.leaf(), b.leaf()
    changed = {name: _nan_at(getattr(b, name))}
    out = policy_loss(x, b.targets, objective=objective, **b.given(*names) | changed)
    values = out.metrics.compute()
    assert values["rows_nonfinite"] == rows and values["rows_active"] == 8 - rows
    without = b.weight.clone()
    without[(0, 2) if rows == 1 else 0] = 0
    expected = policy_loss(y, b.targets, objective=objective, **b.given(*names, weight=without))
    assert_close(out.loss, expected.loss, rtol=1e-12, atol=1e-15)
    assert_close(gradient(out.loss, x), gradient(expected.loss, y), rtol=1e-12, atol=1e-15)
    for key, value in expected.metrics.compute().items():
        if not key.startswith("rows"):
            assert_close(values[key], value)


@pytest.mark.parametrize(
    ("objective", "rows"),
    [
        (Objective.ppo(entropy_coef=0.1), 1),
        (Objective.kl_cov(entropy_coef=0.1), 1),
        (Objective.gspo(entropy_coef=0.1), 5),
        (Objective.gmpo(entropy_coef=0.1), 5),
        (Objective.vespo(entropy_coef=0.1), 5),
    ],
    ids=lambda x: x.name if isinstance(x, Objective) else str(x),
)
def test_zero_advantage_does_not_hide_a_nan_ratio(objective: Objective, rows: int) -> None:
    """Its row leaves the entropy term too, as the metrics count it."""
    b = make_batch()
    advantage = b.advantage.clone()
    advantage[0] = 0
    given = b.given(advantage=advantage, old_logprob=_nan_at(b.old_logprob))
    x = b.leaf()
    out = policy_loss(x, b.targets, objective=objective, **given)
    grad = gradient(out.loss, x)
    dropped = torch.zeros_like(b.mask)
    dropped[(0, 2) if rows == 1 else 0] = True
    assert not grad[dropped].any() and grad[b.mask & ~dropped].any(-1).all()
    assert out.metrics.compute()["rows_active"] == 8 - rows


def test_own_importance_leaves_out_nonfinite_rows() -> None:
    """On-policy sequence importance sums this pass's log-probabilities over the finite rows."""
    b = make_batch()
    o = Objective.gpg(importance=("sequence", "truncate", None, None))
    without = b.weight.clone()
    without[0, 2] = 0
    given = b.given("rollout_logprob", old_logprob=None)
    expected = policy_loss(b.logits, b.targets, objective=o, **given | {"weight": without})
    bad = b.logits.clone()
    bad[0, 2, b.targets[0, 2]] = -float("inf")
    out = policy_loss(bad, b.targets, objective=o, **given)
    assert_close(out.loss, expected.loss, rtol=1e-12, atol=0)


@pytest.mark.parametrize("geometric_mean", [False, True])
def test_importance_of_a_sequence_is_the_same_in_one_pass_and_in_two(geometric_mean: bool) -> None:
    """It is of given log-probabilities: a row left out for this pass's logits counts in it."""
    b = make_batch()
    bad = b.logits.clone()
    bad[0, 2, b.targets[0, 2]] = -float("inf")
    importance = ("sequence", "truncate", None, None, geometric_mean)
    one = Objective.ppo(importance=importance)
    two = Objective.ppo(importance=importance, opsm=1e9)  # which drops nothing
    assert (one.passes, two.passes) == (1, 2)
    given = b.given("rollout_logprob")
    losses = [policy_loss(bad, b.targets, objective=o, **given).loss for o in (one, two)]
    assert_close(*losses, rtol=1e-13, atol=0)


@padded_and_packed
@pytest.mark.parametrize("name", SEQUENCE_LOSSES)
def test_all_masked_sequences(name: str, form: str) -> None:
    b = batch(form)
    x = b.leaf()
    out = policy_loss(
        x, b.targets, objective=SEQUENCE_LOSSES[name][0],
        **b.given("ref_logprob", weight=torch.zeros(b.targets.shape)),
    )  # fmt: skip
    assert out.loss == 0 and not gradient(out.loss, x).any()
    assert all(torch.isfinite(v) for v in out.metrics.compute().values())


@pytest.mark.parametrize("inplace", [False, True])
@paths()
def test_what_the_objective_does_not_use_may_hold_anything(
    objective: Any, dtype: torch.dtype, inplace: bool
) -> None:
    b = make_batch(torch.float32)
    nan = torch.full((B, T), float("nan"))
    expected, x = head(b, dtype, inplace, objective)
    loss, y = head(b, dtype, inplace, objective, ref_logprob=nan, rollout_logprob=nan)
    assert torch.equal(loss, expected) and torch.equal(gradient(loss, y), gradient(expected, x))


ENTROPY = {
    "gspo": Objective.gspo(entropy_coef=0.1),
    "gmpo": Objective.gmpo(entropy_coef=0.1),
    "opsm": Objective.ppo(entropy_coef=0.1, opsm=0.1),
    "importance": Objective.ppo(
        entropy_coef=0.1, importance=("sequence", "truncate", None, None, True)
    ),
}


@padded_and_packed
@pytest.mark.parametrize("name", ENTROPY)
def test_sequences_of_weight_0_may_have_an_entropy_bonus(name: str, form: str) -> None:
    b = batch(form)
    weights = {"weight": torch.zeros(b.targets.shape), "entropy_weight": b.mask.double()}
    given = b.given("rollout_logprob", **weights)
    out = policy_loss(b.logits, b.targets, objective=ENTROPY[name], **given)
    assert_close(out.loss, -0.1 * out.entropy.sum(), rtol=1e-12, atol=0)
    assert out.loss < 0 and out.metrics.compute()["rows_nonfinite"] == 0


# ---- on each path through the logits


@pytest.mark.parametrize("inplace", [False, True])
@paths()
def test_all_masked_batch(objective: Any, dtype: torch.dtype, inplace: bool) -> None:
    b = make_batch(torch.float32)
    nothing = {"weight": torch.zeros(B, T), "ref_logprob": b.ref_logprob}
    loss, x = head(b, dtype, inplace, objective, **nothing)
    assert loss == 0 and not gradient(loss, x).any()
    out = policy_loss(x, b.targets, objective=objective, **b.given(**nothing))
    values = out.metrics.compute()
    assert values["rows_active"] == 0 and values["rows_skipped"] == B * T
    assert all(torch.isfinite(v) for v in values.values()), values


@pytest.mark.parametrize("shape", [(0, T), (B, 0), (0,)])
@pytest.mark.parametrize("make", [Objective.ppo, Objective.gspo, Objective.kl_cov])
@pytest.mark.parametrize("per_row", [False, True])
def test_no_rows_at_all(
    per_row: bool, make: Callable[..., Objective], shape: tuple[int, ...]
) -> None:
    x = torch.zeros(*shape, V, requires_grad=True)
    y = torch.zeros(shape, dtype=torch.int64)
    segments = torch.tensor([0, 0]) if len(shape) == 1 else None
    advantage = torch.zeros(1 if segments is not None else shape[0])
    objective = make(log_ratio_clamp=torch.ones(shape) if per_row else 20.0)
    out = policy_loss(
        x, y, advantage=advantage, weight=torch.zeros(shape), objective=objective, segments=segments
    )
    out.loss.backward()
    assert out.loss == 0 and x.grad.shape == x.shape
    assert all(torch.isfinite(v) for v in out.metrics.compute().values())
    assert token_stats(x, y).entropy.shape == shape


NOT_FINITE = {
    "NaN logit": lambda b: b.logits.__setitem__((0, 0, 3), float("nan")),
    "inf logit": lambda b: b.logits.__setitem__((0, 0, 3), float("inf")),
    "target at -inf": lambda b: b.logits.__setitem__((0, 0, int(b.targets[0, 0])), -float("inf")),
    "no finite logit": lambda b: b.logits[0, 0].fill_(-float("inf")),
}


@pytest.mark.parametrize("inplace", [False, True])
@paths()
@pytest.mark.parametrize("damage", NOT_FINITE)
def test_a_nonfinite_row_is_left_out_and_counted(
    damage: str, objective: Any, dtype: torch.dtype, inplace: bool
) -> None:
    b = make_batch(torch.float32)
    without = b.weight.clone()
    without[0, 0] = 0
    expected = gradient(*head(b, dtype, inplace, objective, weight=without))
    NOT_FINITE[damage](b)
    loss, x = head(b, dtype, inplace, objective)
    grad = gradient(loss, x)
    assert torch.isfinite(loss) and torch.equal(grad, expected)
    out = policy_loss(x, b.targets, objective=objective, **b.given())
    values = out.metrics.compute()
    assert values["rows_nonfinite"] == 1 and values["rows_active"] == int(b.mask.sum()) - 1
    assert not torch.isfinite(out.logprob[0, 0]) and out.token_loss[0, 0] == 0
    assert all(torch.isfinite(v) for v in values.values())
