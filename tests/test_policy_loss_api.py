"""The public functions: shapes, the loss formula, autograd, memory and error messages."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from policy_loss_literal import (
    LENGTHS,
    TOKEN_LOSSES,
    Batch,
    T,
    V,
    batch,
    check,
    gradient,
    make_batch,
    sequences,
    spread,
    stats,
    total,
)
from torch import Tensor
from torch.testing import assert_close

import reasonkern as rk
from reasonkern import Objective, linear_token_stats, policy_loss, token_stats

B = len(LENGTHS)
FORMS = ("padded", "packed")
TWO_PHASE = {"opsm": 1e9}  # selects every token, but needs all of them first


def run(b: Batch, objective: Any, *names: str, **given: Any) -> tuple[rk.PolicyLossOutput, Tensor]:
    """Output and gradient of the loss."""
    x = b.leaf()
    out = policy_loss(x, b.targets, objective=objective, **b.given(*names, **given))
    return out, gradient(out.loss, x)


# ---- shapes


@pytest.mark.parametrize(
    "objective",
    [Objective.ppo(), Objective.gspo(kl=("k3", 0.1), entropy_coef=0.1), Objective.vespo()],
    ids=lambda o: o.name,
)
def test_packed_and_padded_agree(objective: Objective) -> None:
    padded = make_batch()
    packed = padded.pack()
    kept = torch.arange(T) < torch.tensor(LENGTHS)[:, None]
    names = ("ref_logprob", "entropy_weight")
    a, grad_a = run(padded, objective, *names)
    b, grad_b = run(packed, objective, *names)
    assert b.token_loss.shape == packed.targets.shape == (sum(LENGTHS),)
    assert_close(b.loss, a.loss, rtol=1e-12, atol=0)
    assert_close(grad_b, grad_a[kept], rtol=1e-12, atol=1e-15)
    for name in ("token_loss", "logprob", "entropy"):
        assert_close(getattr(b, name), getattr(a, name)[kept], rtol=1e-12, atol=0)


@pytest.mark.parametrize("form", FORMS)
def test_advantage_per_token_and_per_sequence(form: str) -> None:
    b = batch(form)
    per_token = spread(b, b.advantage).clone()
    expected, grad = run(b, Objective.ppo())
    shapes = [per_token] + ([b.advantage[:, None]] if form == "padded" else [])
    for advantage in shapes:
        out, other = run(b, Objective.ppo(), advantage=advantage)
        assert torch.equal(out.loss, expected.loss) and torch.equal(other, grad)
    for objective in (Objective.ppo(), Objective.gspo()):
        one, all_equal = torch.tensor(2.0), torch.full_like(b.advantage, 2.0)
        losses = [run(b, objective, advantage=a)[0].loss for a in (one, all_equal)]
        assert torch.equal(*losses)


def test_advantage_with_as_many_segments_as_tokens_is_per_segment_for_gspo() -> None:
    """Three tokens in the segments of 0, 2 and 1: a tensor of 3 is read per segment."""
    x, y = torch.randn(3, V), torch.tensor([1, 2, 3])
    a = torch.tensor([5.0, 1.0, -2.0])
    given = {"weight": torch.ones(3), "segments": torch.tensor([0, 0, 2, 3])}
    out = policy_loss(x, y, advantage=a, objective=Objective.gspo(), **given)
    assert out.token_loss.tolist() == [-1.0, -1.0, 2.0]
    out = policy_loss(x, y, advantage=a, objective=Objective.ppo(), **given)
    assert out.token_loss.tolist() == [-5.0, -1.0, 2.0]


@pytest.mark.parametrize("inplace", [False, True])
def test_sliced_logits_are_a_view(inplace: bool) -> None:
    b = make_batch()
    longer = torch.cat((b.logits, b.logits[:, :1]), 1)
    x = longer.clone().requires_grad_()
    hidden = x * 1.0
    out = policy_loss(
        hidden[:, :-1], b.targets, objective=Objective.ppo(), inplace_grad=inplace, **b.given()
    )
    expected, grad = run(b, Objective.ppo())
    assert torch.equal(out.loss, expected.loss)
    found = gradient(out.loss, x)
    assert torch.equal(found[:, :-1], grad) and not found[:, -1].any()


@pytest.mark.parametrize(
    ("form", "temperature"),
    [
        ("padded", 0.7),
        ("padded", torch.tensor(0.7)),
        ("padded", torch.tensor([0.7, 1.0, 1.4, 0.9])),
        ("padded", 0.5 + torch.rand(B, T, generator=torch.Generator().manual_seed(1))),
        ("packed", torch.tensor(0.7)),
        ("packed", torch.tensor([0.7, 1.0, 1.4, 0.9])),
        ("packed", 0.5 + torch.rand(sum(LENGTHS), generator=torch.Generator().manual_seed(1))),
    ],
    ids=["float", "0-dim", "sequence", "row", "packed 0-dim", "segment", "packed row"],
)
def test_temperature(form: str, temperature: float | Tensor) -> None:
    b = batch(form)
    c = b.clean()
    t = temperature.double() if isinstance(temperature, Tensor) else temperature
    literal_t = spread(b, t) if isinstance(t, Tensor) and t.shape == (B,) else t
    x, y = b.leaf(), b.leaf()
    out = policy_loss(x, b.targets, objective=Objective.dro(), temperature=t, **b.given())
    logp, _ = stats(y, b.targets, literal_t)
    loss = total(c, TOKEN_LOSSES["dro"][1](logp, c.old_logprob, spread(b, b.advantage)))
    assert_close(out.loss, loss, rtol=1e-12, atol=1e-12)
    assert_close(gradient(out.loss, x), gradient(loss, y), rtol=1e-10, atol=1e-13)
    if form == "padded":
        assert_close(token_stats(x, b.targets.clamp_min(0), temperature=t).logprob, logp)


def test_token_stats_of_one_segment_per_row_needs_no_segments() -> None:
    x, y = torch.randn(5, V), torch.arange(5)
    t = torch.linspace(0.5, 2, 5)
    assert_close(token_stats(x, y, temperature=t).logprob, stats(x, y, t)[0])
    assert token_stats(x, y).is_top1.shape == (5,)


def test_a_mask_of_statistics_may_be_numbers() -> None:
    x, head, y = torch.randn(5, 4), torch.randn(V, 4), torch.arange(5)
    mask = torch.tensor([[1, 0, 1, 1, 0], [0] * 5]).T[:, 0]
    assert_close(token_stats(x @ head.T, y, mask=mask), token_stats(x @ head.T, y, mask=mask > 0))
    linear = (linear_token_stats(x, head, y, mask=m) for m in (mask.float(), mask > 0))
    assert_close(next(linear), next(linear))


def test_a_vocabulary_of_one_token_has_no_stride() -> None:
    x = torch.randn(1, 3).T
    assert x.stride() == (1, 3) and (token_stats(x, torch.zeros(3).long()).max_prob == 1).all()


def test_softcap() -> None:
    b = make_batch()
    c = b.clean()

    def literal(logp: Tensor, entropy: Tensor) -> Tensor:
        loss = TOKEN_LOSSES["dro"][1](logp, c.old_logprob, spread(c, c.advantage))
        return total(c, loss) - 0.3 * total(c, entropy)

    check(b, Objective.dro(entropy_coef=0.3), literal, scaling={"softcap": 3.0, "temperature": 0.8})


# ---- the loss


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("path", ["fused", "two-phase"])
@pytest.mark.parametrize("name", TOKEN_LOSSES)
def test_objective_is_its_published_formula(name: str, path: str, form: str) -> None:
    objective, loss = TOKEN_LOSSES[name]
    if path == "two-phase":
        fields = {k: getattr(objective, k) for k in objective.__dataclass_fields__}
        objective = Objective(**(fields | TWO_PHASE))
    b = batch(form)
    c = b.clean()
    a = spread(b, b.advantage)
    out = check(
        b,
        objective,
        lambda logp, _: total(c, loss(logp, c.old_logprob, a)),
        "rollout_logprob",
    )
    logp, _ = stats(b.logits, b.targets)
    trained = b.weight != 0
    assert_close(out.token_loss[trained], loss(logp, c.old_logprob, a)[trained], rtol=1e-10, atol=0)
    assert not out.token_loss[~trained].any()


@pytest.mark.parametrize("path", ["fused", "two-phase"])
@pytest.mark.parametrize("unbiased", [False, True])
@pytest.mark.parametrize("kind", ["k1", "k2", "k3"])
def test_loss_formula_with_every_term(kind: str, unbiased: bool, path: str) -> None:
    """L = sum w (is l + kl_coef kl) - entropy_coef sum ew H, each factor written out."""
    b = make_batch(seed=3)
    c = b.clean()
    a = spread(b, b.advantage)
    importance = (c.old_logprob - c.rollout_logprob).exp().clamp(0.9, 1.1)
    k = {"k1": lambda d: -d, "k2": lambda d: d * d / 2, "k3": lambda d: d.exp() - d - 1}[kind]

    def literal(logp: Tensor, entropy: Tensor) -> Tensor:
        r = (logp - c.old_logprob).exp()
        policy = -torch.minimum(r * a, r.clamp(0.8, 1.28) * a)
        kl = k(c.ref_logprob - logp) * (r if unbiased else 1)
        loss = importance * policy + 0.3 * kl
        return total(c, loss) - 0.2 * total(c, entropy, c.entropy_weight)

    objective = Objective.dapo(
        kl=(kind, 0.3, unbiased),
        entropy_coef=0.2,
        importance=("token", "truncate", 0.9, 1.1),
        **(TWO_PHASE if path == "two-phase" else {}),
    )
    names = ("ref_logprob", "rollout_logprob", "entropy_weight")
    check(b, objective, literal, *names, scaling={"temperature": 0.9, "softcap": 20.0})


@pytest.mark.parametrize("path", ["fused", "two-phase"])
def test_entropy_weight_replaces_weight_in_the_bonus_alone(path: str) -> None:
    b = make_batch()
    c = b.clean()
    only = b.mask & (torch.arange(T) == 2)
    entropy_weight = torch.where(only, 0.7, 0.0).double()
    objective = Objective.gpg(entropy_coef=0.5, **(TWO_PHASE if path == "two-phase" else {}))

    def literal(logp: Tensor, entropy: Tensor) -> Tensor:
        loss = total(c, -spread(c, c.advantage) * logp)
        return loss - 0.5 * total(c, entropy, entropy_weight)

    check(b, objective, literal, "rollout_logprob", entropy_weight=entropy_weight)


def test_on_policy_ratio_is_one_with_gradient() -> None:
    b = make_batch()
    c = b.clean()
    a = spread(b, b.advantage)

    def literal(logp: Tensor, entropy: Tensor) -> Tensor:
        return total(c, -(logp - logp.detach()).exp() * a)

    out = check(b, Objective.ppo(), literal, old_logprob=None)
    assert out.metrics.compute()["ratio_var"] == 0 and out.metrics.compute()["ratio_mean"] == 1


def test_zero_advantage_and_a_huge_ratio_give_zero() -> None:
    b = make_batch()
    objective = Objective.ppo(log_ratio_clamp=None)
    far = b.old_logprob.nan_to_num(0) - 1e4  # exp overflows
    out, grad = run(b, objective, old_logprob=far, advantage=torch.zeros(B))
    assert out.loss == 0 and not grad.any()


def test_log_ratio_clamp_limits_the_ratio_and_stops_its_gradient() -> None:
    b = make_batch()
    far = b.old_logprob.nan_to_num(0) - 30
    out, grad = run(b, Objective.ppo(None, None), old_logprob=far)
    assert_close(out.token_loss[0, 0], torch.tensor(-math.exp(20) * 1.3, dtype=torch.float64))
    assert not grad.any()
    _, detached = run(b, Objective.cispo(5.0), old_logprob=far)  # its ratio is detached
    assert detached[b.mask].any()


def test_outputs_are_detached_and_shaped_like_targets() -> None:
    b = make_batch(torch.bfloat16).to(torch.float32)
    x = b.logits.bfloat16().requires_grad_()
    out = policy_loss(x, b.targets, objective=Objective.ppo(), **b.given())
    assert out.loss.shape == () and out.loss.requires_grad and out.loss.dtype == torch.float32
    for t in (out.token_loss, out.logprob, out.entropy):
        assert t.shape == b.targets.shape and not t.requires_grad and t.dtype == torch.float32
    assert gradient(out.loss, x).dtype == torch.bfloat16


@pytest.mark.parametrize("dtype", [torch.float64, torch.int64, torch.int32, torch.bool])
def test_row_inputs_of_other_dtypes_are_converted(dtype: torch.dtype) -> None:
    """Weights of floats alone: integers are a mask that was not divided by anything."""
    b = make_batch(torch.float32)
    weight = b.mask.to(dtype if dtype.is_floating_point else torch.float16)
    other = {"advantage": b.advantage.sign().to(dtype), "weight": weight}
    same = {name: x.float() for name, x in other.items()}
    out, grad = run(b, Objective.ppo(), **other)
    expected, expected_grad = run(b, Objective.ppo(), **same)
    assert torch.equal(out.loss, expected.loss) and torch.equal(grad, expected_grad)


def test_int32_targets() -> None:
    b = make_batch()
    expected = run(b, Objective.ppo())[0].loss
    for targets in (b.targets.int(), b.targets.T.int().contiguous().T):
        out = policy_loss(b.logits, targets, objective=Objective.ppo(), **b.given())
        assert torch.equal(out.loss, expected)


def test_row_inputs_get_no_gradient() -> None:
    """Not even from a function that multiplies by them."""
    b = make_batch()
    for advantage in (b.advantage, spread(b, b.advantage), b.advantage.float()):
        given = {"advantage": advantage.clone(), "loss_scale": torch.tensor(2.0)}
        for x in given.values():
            x.requires_grad_()
        for objective in (Objective.ppo(), lambda logp, _, ctx: -ctx.advantage * logp):
            out = policy_loss(b.leaf(), b.targets, objective=objective, **b.given(**given))
            out.loss.backward()
            assert all(x.grad is None for x in given.values())


# ---- hyper-parameters as tensors

FIELDS: dict[str, Callable[[Any], dict[str, Any]]] = {
    "ratio_min": lambda v: {"objective": Objective.ppo(v(0.8), 1.2)},
    "ratio_max": lambda v: {"objective": Objective.cispo(v(1.2))},
    "dual_clip": lambda v: {"objective": Objective.ppo(dual_clip=v(1.5))},
    "ratio_cap": lambda v: {"objective": Objective.ppo(ratio_cap=v(1.5))},
    "beta_low": lambda v: {"objective": Objective.ce_gppo(beta_low=v(0.3))},
    "tau": lambda v: {"objective": Objective.sapo(v(1.1), v(1.3))},
    "threshold": lambda v: {"objective": Objective.dppo_tv(v(0.05), v(0.05))},
    "beta": lambda v: {"objective": Objective.dro(v(0.3))},
    "kl_coef": lambda v: {"objective": Objective.ppo(kl=("k3", v(0.3)))},
    "entropy_coef": lambda v: {"objective": Objective.ppo(entropy_coef=v(0.3))},
    "log_ratio_clamp": lambda v: {"objective": Objective.ppo(log_ratio_clamp=v(0.3))},
    "gspo": lambda v: {"objective": Objective.gspo(v(0.9), v(1.1))},
    "gmpo": lambda v: {"objective": Objective.gmpo(v(0.9), v(1.1), entropy_coef=v(0.1))},
    "vespo": lambda v: {"objective": Objective.vespo(v(2.5), v(1.5), v(1.0), v(2.0))},
    "opsm": lambda v: {"objective": Objective.ppo(opsm=v(0.05))},
    "importance": lambda v: {
        "objective": Objective.ppo(importance=("token", "truncate", v(0.9), v(1.1)))
    },
    "importance_mask": lambda v: {
        "objective": Objective.ppo(importance=("sequence", "mask", v(0.9), v(1.1)))
    },
}


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("how", ["0-dim", "per row"])
@pytest.mark.parametrize("field", FIELDS)
def test_tensor_hyper_parameters_equal_floats(field: str, how: str, form: str) -> None:
    b = batch(form)
    shape = () if how == "0-dim" else b.targets.shape

    def tensor(x: float) -> Tensor:
        return torch.full(shape, x, dtype=torch.float64)

    names = ("ref_logprob", "rollout_logprob")
    expected, grad = run(b, FIELDS[field](lambda x: x)["objective"], *names)
    out, other = run(b, FIELDS[field](tensor)["objective"], *names)
    assert_close(out.loss, expected.loss, rtol=1e-14, atol=0)
    assert_close(other, grad, rtol=1e-13, atol=1e-16)
    values, others = expected.metrics.compute(), out.metrics.compute()
    assert_close(others, values, rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("field", [*FIELDS, "custom"])
def test_numbers_get_no_gradient(field: str) -> None:
    """A learnt coefficient is a constant of the loss, whatever else wants a gradient."""
    b = batch("packed")
    given: list[Tensor] = []

    def learnt(x: float) -> Tensor:
        given.append(torch.tensor(x, dtype=torch.float64, requires_grad=True))
        return given[-1]

    if field == "custom":
        terms = {"entropy_coef": learnt(0.1), "kl": ("k3", learnt(0.2))}
        objective = Objective.custom(lambda logprob, entropy, ctx: -logprob, **terms)
    else:
        objective = FIELDS[field](learnt)["objective"]
    names = ("ref_logprob", "rollout_logprob")
    run(b, objective, *names)
    assert given and all(x.grad is None for x in given)
    constant = policy_loss(b.logits, b.targets, objective=objective, **b.given(*names))
    assert not constant.loss.requires_grad


@pytest.mark.parametrize("make", [Objective.ppo, Objective.gspo, Objective.gmpo])
def test_bounds_that_differ_between_rows(make: Callable[..., Objective]) -> None:
    """GSPO's gradient sums each row's own clipped loss; PPO's and GMPO's bounds act by token."""
    b = make_batch(spread=0.1)
    # All ratios are near 1.2, in the middle of the upper bounds.
    b = replace(b, old_logprob=b.old_logprob - 0.18, advantage=b.advantage.abs())
    c = b.clean()
    g = torch.Generator().manual_seed(2)
    high = 1 + 0.4 * torch.rand(b.targets.shape, generator=g, dtype=torch.float64)
    a = spread(b, b.advantage)

    def literal(logp: Tensor, entropy: Tensor) -> Tensor:
        log_r = logp - c.old_logprob
        if make == Objective.ppo:
            r = log_r.exp()
            return total(c, -torch.minimum(r * a, torch.minimum(r.clamp_min(0.8), high) * a))
        loss = torch.zeros((), dtype=torch.float64)
        for rows in sequences(c):
            if not len(rows):
                continue
            at, hi, adv, w = (t.flatten()[rows] for t in (log_r, high, a, c.weight))
            if make == Objective.gmpo:
                at = torch.where(adv > 0, torch.minimum(at, hi.log()), at.clamp_min(math.log(0.8)))
            s = at.mean().exp()
            if make == Objective.gmpo:
                loss = loss + (w * -adv * s).sum()
            else:
                clipped = torch.minimum(s.clamp_min(0.8), hi)
                loss = loss + (w * -torch.minimum(s * adv, clipped * adv)).sum()
        return loss

    check(b, make(0.8, high), literal)
