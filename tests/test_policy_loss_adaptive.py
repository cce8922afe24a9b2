"""Objectives that look at the whole batch, against their formulas written out in float64."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import policy_loss_literal as literal
import pytest
import torch
from conftest import Backend
from policy_loss_adaptive_cases import (
    ADAPTIVE,
    LAMBDA,
    advantages,
    every,
    gtpo,
    names,
)
from policy_loss_literal import batch, check, gradient, make_batch, stats, total
from torch import Tensor

import reasonkern as rk
from reasonkern import Objective, policy_loss
from reasonkern.policy_loss import paths
from reasonkern.policy_loss.inputs import canonical_segments, row_context

SEEDS = range(6)


@every
@pytest.mark.parametrize("form", ["padded", "packed"])
def test_loss_and_gradient_are_the_formula(name: str, form: str) -> None:
    make, formula = ADAPTIVE[name]
    for seed in SEEDS:
        b = batch(form, seed=seed).clean()
        loss = formula(b)
        check(b, make(), lambda p, h, b=b, loss=loss: total(b, loss(p, h)), *names(name))


@every
def test_terms_are_added_outside_the_selection(name: str) -> None:
    make, formula = ADAPTIVE[name]
    b = make_batch(seed=1).clean()
    base = make()
    terms = {"kl": ("k2", 0.3), "entropy_coef": 0.2}
    o = Objective(**{k: v for k, v in vars(base).items() if k not in terms} | terms)
    loss = formula(b)

    def expected(logp: Tensor, entropy: Tensor) -> Tensor:
        k2 = 0.5 * (b.ref_logprob - logp) ** 2
        return total(b, loss(logp, entropy) + 0.3 * k2 - 0.2 * entropy)

    check(b, o, expected, "ref_logprob", *names(name))


def test_gtpo_with_conflict_weights() -> None:
    b = make_batch().clean()
    loss = gtpo(b, LAMBDA.double(), math.log(2) + 1)
    o = Objective.gtpo(LAMBDA, max_entropy=math.log(2) + 1)
    check(b, o, lambda p, h: total(b, loss(p, h)))
    kept = gtpo(b, None, math.inf)
    o = Objective.gtpo(initial_entropy=torch.tensor(0.7))
    check(b, o, lambda p, h: total(b, kept(p, h)))


@pytest.mark.parametrize("form", ["padded", "packed"])
def test_selection_multiplies_the_policy_term_alone(form: str) -> None:
    """Any objective takes one; token-local ones stay on the fused path."""
    b = batch(form).clean()
    factor = LAMBDA if form == "padded" else LAMBDA.flatten()[: b.targets.numel()]
    o = Objective.ppo(selection=factor, importance=("token", "truncate", None, 1.1), kl=("k1", 0.2))
    assert o.passes == 1

    def expected(logp: Tensor, _: Tensor) -> Tensor:
        w = (b.old_logprob - b.rollout_logprob).exp().clamp_max(1.1)
        ppo = literal.ppo((logp - b.old_logprob).exp(), advantages(b), 0.8, 1.2)
        return total(b, factor * w * ppo + 0.2 * (logp - b.ref_logprob))

    check(b, o, expected, "ref_logprob", "rollout_logprob")


@pytest.mark.parametrize("form", ["padded", "packed"])
def test_selection_of_one_number(form: str) -> None:
    """0-dim, on the fused path, in the map and after a rule."""
    b = batch(form).clean()
    half = torch.tensor(0.5)

    def expected(logp: Tensor, _: Tensor) -> Tensor:
        ppo = literal.ppo((logp - b.old_logprob).exp(), advantages(b), 0.8, 1.2)
        return total(b, 0.5 * ppo)

    check(b, Objective.ppo(selection=half), expected)
    opsm = Objective.ppo(selection=half, opsm=100.0)
    assert opsm.passes == 2
    check(b, opsm, expected, "rollout_logprob")
    kept = gtpo(b, None, math.inf)
    check(b, Objective.gtpo(half, 100.0), lambda p, h: total(b, 0.5 * kept(p, h)))


@every
def test_hard_enough(name: str) -> None:
    """Over the seeds every rule chooses something, and not always the same."""
    make, formula = ADAPTIVE[name]
    if name == "tppo":
        pytest.skip("a token-local objective has no rule")
    changed, dropped = [], []
    for seed in SEEDS:
        b = make_batch(seed=seed)
        used = b.weight != 0
        out = policy_loss(b.logits, b.targets, objective=make(), **b.given(*names(name)))
        unruled = Objective(**{k: v for k, v in vars(make()).items() if k != "rule"})
        plain = policy_loss(b.logits, b.targets, objective=unruled, **b.given())
        changed.append((out.token_loss != plain.token_loss)[used].double().mean().item())
        dropped.append((out.token_loss == 0)[used].double().mean().item())
        if name in ("clip_cov", "high_entropy", "gtpo"):
            assert out.metrics.compute()["dropped_frac"].item() == pytest.approx(dropped[-1])
    if name == "gtpo":  # every advantage changes
        assert set(changed) == {1.0} and any(0 < share < 1 for share in dropped)
    else:
        assert any(0 < share < 1 for share in changed)


@pytest.mark.parametrize(("variant", "target"), [("paper", 0.9), ("code", 5.0)])
def test_bapo_searches_what_it_is_given(variant: str, target: float) -> None:
    """Ratios as the loss clamps them; probabilities as weights in the paper's variant alone."""
    given: dict[str, Any] = {"low": (0.5, 0.9, 0.01), "high": (1.1, 1.5, 0.01), "target": target}
    paper = variant == "paper"
    matters = set()
    for seed in SEEDS:
        b = make_batch(seed=seed).clean()
        logprob, _ = stats(b.logits, b.targets.clamp_min(0))
        r = (logprob - b.old_logprob).clamp(-0.3, 0.3).exp()
        rows = {"ratio": r, "advantage": advantages(b), "mask": b.weight != 0, "variant": variant}
        if paper:
            rows["rollout_logprob"] = b.rollout_logprob
        low, high = rk.bapo_bounds(**rows, **given)
        for change in ({name: None} for name in given):
            if rk.bapo_bounds(**rows, **given | change) != (low, high):
                matters |= set(change)
        if paper and rk.bapo_bounds(**rows | {"rollout_logprob": 0 * r}, **given) != (low, high):
            matters.add("rollout_logprob")
        o = Objective.bapo(variant, log_ratio_clamp=0.3, **given)
        got = policy_loss(b.logits, b.targets, objective=o, **b.given("rollout_logprob"))
        dual = None if paper else 3.0
        ppo = Objective.ppo(low, high, log_ratio_clamp=0.3, dual_clip=dual)
        expected = policy_loss(b.logits, b.targets, objective=ppo, **b.given())
        torch.testing.assert_close(got.token_loss, expected.token_loss)
    assert matters == {*given, *(["rollout_logprob"] if paper else [])}


@every
def test_selection_multiplies_what_a_rule_chose(name: str) -> None:
    make, _ = ADAPTIVE[name]
    b = make_batch(seed=1).clean()
    plain, selected = (
        policy_loss(b.logits, b.targets, objective=o, **b.given(*names(name))).token_loss
        for o in (make(), replace(make(), selection=LAMBDA))
    )
    torch.testing.assert_close(selected, LAMBDA * plain)


@every
def test_rows_of_an_entropy_weight_alone_enter_no_rule(name: str) -> None:
    make, _ = ADAPTIVE[name]
    for seed in SEEDS:
        b = make_batch(seed=seed).clean()
        trained = b.weight.clone()
        trained[0, ::2] = trained[2] = 0
        given = b.given(*names(name), weight=trained)
        plain, beside = (
            policy_loss(b.logits, b.targets, objective=make(), entropy_weight=w, **given)
            for w in (None, b.weight)
        )
        used = trained != 0
        assert torch.equal(beside.token_loss[used], plain.token_loss[used])
        assert beside.metrics.compute()["rows_nonfinite"] == 0


# ---- every backend, float32


class _Stats(torch.autograd.Function):
    """The statistics of a backend, as the two-phase path uses them."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, y: Tensor, mask: Tensor, backend: Backend) -> Any:
        rows = [backend.to(t) for t in (x, y, mask)]
        out = backend("token_stats", *rows, None, 1.0, 0.0)
        ctx.save_for_backward(*rows[:2], *(out[i] for i in (0, 1, 3, 5, 7)))
        ctx.backend = backend
        return out[0].to(x.device), out[1].to(x.device)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        x, y, *saved = ctx.saved_tensors
        g, e = (ctx.backend.to(t.contiguous()) for t in grads)
        args = (None, 1.0, 0.0, *saved, g, e, None, None)
        return ctx.backend("token_stats_backward", x, y, *args).cpu(), None, None, None


@every
@pytest.mark.usefixtures("poisoned_empty")
def test_every_backend(backend: Backend, name: str) -> None:
    make, formula = ADAPTIVE[name]
    for seed in SEEDS if not backend.slow else SEEDS[:2]:
        b = make_batch(seed=seed)
        o, near = make(), b.to(torch.float32)
        segments = canonical_segments(None, b.targets, False)
        rollout = near.rollout_logprob if names(name) else None
        context = row_context(
            o, near.logits, segments, near.old_logprob, near.advantage, near.weight, None, rollout,
            None,
        )  # fmt: skip
        x = near.leaf()
        logprob, entropy = _Stats.apply(x, b.targets, context.active, backend)
        out = paths.loss_of_statistics(o, logprob, entropy, context)
        found = gradient(out.loss, x)
        b, y = b.clean(), b.leaf()
        expected = total(b, formula(b)(*stats(y, b.targets)))
        torch.testing.assert_close(out.loss.double(), expected, rtol=2e-6, atol=1e-6)
        exact = gradient(expected, y)
        torch.testing.assert_close(found.double(), exact, rtol=1e-5, atol=2e-6)


# ---- where it sits


@every
@pytest.mark.parametrize("inplace", [False, True])
def test_in_place_float16_and_metrics(name: str, inplace: bool) -> None:
    make, _ = ADAPTIVE[name]
    b = make_batch(torch.float32)
    x = b.logits.half().requires_grad_()
    given = b.given(*names(name), inplace_grad=inplace)
    out = policy_loss(x * 1, b.targets, objective=make(), **given)
    out.loss.backward()
    assert x.grad is not None and x.grad.any() and torch.isfinite(x.grad).all()
    assert all(torch.isfinite(v) for v in out.metrics.compute().values())


def test_metrics_count_with_the_bounds_that_were_chosen() -> None:
    b = make_batch()
    out = policy_loss(b.logits, b.targets, objective=Objective.bapo("code"), **b.given())
    used = b.weight != 0
    r = torch.where(used, (out.logprob - b.old_logprob).exp(), 1.0)
    lo, hi = rk.bapo_bounds(r, advantages(b), used, variant="code")
    same = Objective.ppo(lo, hi, dual_clip=3.0)
    expected = policy_loss(b.logits, b.targets, objective=same, **b.given())
    torch.testing.assert_close(out.loss, expected.loss)
    torch.testing.assert_close(out.metrics.compute(), expected.metrics.compute())
    assert out.metrics.compute()["clip_frac"] > 0


@every
def test_from_hidden_states(name: str) -> None:
    """`linear_policy_loss` chooses what `policy_loss` chooses on the product."""
    make, _ = ADAPTIVE[name]
    b = make_batch().clean()
    given = b.given(*names(name))
    head = torch.eye(b.logits.shape[-1], dtype=torch.float64)
    pairs = [[b.leaf(), head.clone().requires_grad_()] for _ in range(2)]
    out = rk.linear_policy_loss(*pairs[0], b.targets, objective=make(), **given)
    logits = pairs[1][0] @ pairs[1][1].mT
    expected = policy_loss(logits, b.targets, objective=make(), **given)
    torch.testing.assert_close(out.loss, expected.loss, rtol=1e-10, atol=1e-12)
    torch.testing.assert_close(out.metrics.compute(), expected.metrics.compute())
    found = torch.autograd.grad(out.loss, pairs[0])
    torch.testing.assert_close(found, torch.autograd.grad(expected.loss, pairs[1]))


META = {"device": "meta"}
ROWS, MASK = torch.zeros(4, 6, **META), torch.zeros(4, 6, dtype=torch.bool, **META)
IDS, GROUP = MASK.long(), torch.zeros(4, dtype=torch.int64, **META)
CALLS: dict[str, Callable[[], Any]] = {
    "bapo_bounds": lambda: rk.bapo_bounds(ROWS, ROWS, MASK, rollout_logprob=ROWS),
    "bapo_bounds code": lambda: rk.bapo_bounds(ROWS, ROWS, MASK, variant="code"),
    "conflict_token_weights": lambda: rk.conflict_token_weights(IDS, ROWS[:, 0], GROUP, MASK),
    "covariance_mask": lambda: rk.covariance_mask(ROWS, ROWS, MASK),
    "covariance_mask kl": lambda: rk.covariance_mask(ROWS, ROWS, MASK, mode="kl"),
    "entropy_filter": lambda: rk.entropy_filter(ROWS[:, 0], ROWS, MASK),
    "high_entropy_mask": lambda: rk.high_entropy_mask(ROWS, MASK),
}


@pytest.mark.parametrize("name", CALLS)
def test_nothing_waits_for_the_device(name: str) -> None:
    """Meta tensors have no values that could be read."""
    out = CALLS[name]()
    assert all(x.is_meta for x in (out if isinstance(out, tuple) else (out,)))


@every
def test_no_objective_waits_for_the_device(name: str) -> None:
    given = {"old_logprob": ROWS, "advantage": ROWS[:, 0], "weight": ROWS}
    given |= dict.fromkeys(names(name), ROWS)
    out = policy_loss(torch.zeros(4, 6, 9, **META), IDS, objective=ADAPTIVE[name][0](), **given)
    assert out.loss.is_meta and out.metrics.compute()["clip_frac"].is_meta


@every
def test_nonfinite_and_masked_rows_take_no_part(name: str) -> None:
    """Their statistics enter no mean, no quantile, no sum."""
    make, _ = ADAPTIVE[name]
    b = make_batch(torch.float64, seed=2)
    without = b.weight.clone()
    without[0, 0] = 0
    x = b.leaf()
    given = b.given(*names(name), weight=without)
    expected = gradient(policy_loss(x, b.targets, objective=make(), **given).loss, x)
    damaged = b.logits.clone()
    damaged[0, 0, 3] = float("nan")
    x = damaged.requires_grad_()
    out = policy_loss(x, b.targets, objective=make(), **b.given(*names(name)))
    assert torch.equal(gradient(out.loss, x), expected)
    assert out.metrics.compute()["rows_nonfinite"] == 1
    o = replace(make(), entropy_coef=0.1)
    given = b.given(*names(name)) | {"entropy_weight": b.weight}
    assert policy_loss(damaged, b.targets, objective=o, **given).token_loss[0, 0] == 0


@every
def test_batches_without_trained_rows(name: str) -> None:
    make, _ = ADAPTIVE[name]
    b = make_batch(torch.float32)
    nothing = b.given(*names(name), weight=torch.zeros_like(b.weight))
    x = b.leaf()
    out = policy_loss(x, b.targets, objective=make(), **nothing)
    assert out.loss == 0 and not gradient(out.loss, x).any()
    empty = {k: None if v is None else v[:0] for k, v in b.given(*names(name)).items()}
    out = policy_loss(b.logits[:0], b.targets[:0], objective=make(), **empty)
    assert out.loss == 0


SLOW = [pytest.param(n, "inductor", marks=pytest.mark.slow) for n in ("bapo code", "clip_cov")]


@pytest.mark.parametrize(("name", "backend"), [("gtpo", "aot_eager"), *SLOW])
def test_torch_compile_equals_eager(name: str, backend: str) -> None:
    make, _ = ADAPTIVE[name]
    b = make_batch(torch.float32)
    o, given = make(), b.given(*names(name))

    def loss(x: Tensor) -> Tensor:
        return policy_loss(x, b.targets, objective=o, **given).loss

    torch._dynamo.reset()
    x, y = b.leaf(), b.leaf()
    traced = torch.compile(loss, fullgraph=True, backend=backend)(x)
    eager = loss(y)
    torch.testing.assert_close(traced, eager, rtol=1e-6, atol=1e-7)
    torch.testing.assert_close(gradient(traced, x), gradient(eager, y), rtol=1e-6, atol=1e-7)


OBJECTIVE_ERRORS: list[tuple[str, dict[str, Any], str]] = [
    ("bapo", {"variant": "both"}, "variant: expected 'paper' or 'code', got 'both'"),
    ("bapo", {"low": (0.9, 0.6, 0.1)}, "low: expected start <= max within 1000 steps"),
    ("clip_cov", {"fraction": 0.0}, r"fraction: expected a number in \(0, 1\], got 0.0"),
    ("clip_cov", {"low": 6.0}, "high: expected a finite number >= 6, got 5.0"),
    ("kl_cov", {"fraction": 1.5}, r"fraction: expected a number in \(0, 1\], got 1.5"),
    ("kl_cov", {"coef": -1.0}, "coef: expected a finite number >= 0, got -1.0"),
    ("high_entropy", {"rho": 2.0}, r"rho: expected a number in \(0, 1\], got 2.0"),
    ("gtpo", {"max_entropy": -1.0}, "max_entropy: expected a finite number >= 0, got -1.0"),
]


@pytest.mark.parametrize(("constructor", "keywords", "message"), OBJECTIVE_ERRORS)
def test_errors_of_the_constructors(constructor: str, keywords: Any, message: str) -> None:
    with pytest.raises(ValueError, match=f"^{message}"):
        getattr(Objective, constructor)(**keywords)
