"""Whole-sequence terms: GSPO, GMPO, VESPO, importance weights and OPSM."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from policy_loss_literal import (
    LENGTHS,
    Batch,
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
from reasonkern import Objective, policy_loss, token_weights

B = len(LENGTHS)
padded_and_packed = pytest.mark.parametrize("form", ["padded", "packed"])


def by_sequence(b: Batch, loss: Callable[..., Tensor], *rows: Tensor) -> Tensor:
    """Row tensor of ``loss(i, *rows of sequence i)`` for the trained rows of each sequence i."""
    out = torch.zeros(b.targets.numel(), dtype=rows[0].dtype)
    for i, index in enumerate(sequences(b)):
        if len(index):
            value = loss(i, *(r.flatten()[index] for r in rows))
            out = out.index_put((index,), value.expand(len(index)))
    return out.view(b.targets.shape)


def gspo(b: Batch, low: float = 0.9997, high: float = 1.0004, c: float = math.inf) -> Any:
    def loss(i: int, logp: Tensor, old: Tensor) -> Tensor:
        a = b.advantage[i]
        s = ((logp - old).sum() / len(logp)).exp()
        value = -torch.minimum(s * a, s.clamp(low, high) * a)
        return torch.minimum(value, -c * a) if a < 0 and math.isfinite(c) else value

    return loss


def gmpo(b: Batch, low: float = math.exp(-0.4), high: float = math.exp(0.4)) -> Any:
    def loss(i: int, logp: Tensor, old: Tensor) -> Tensor:
        a = b.advantage[i]
        log_r = logp - old
        log_r = log_r.clamp_max(math.log(high)) if a > 0 else log_r.clamp_min(math.log(low))
        return -a * log_r.mean().exp()

    return loss


def vespo(
    b: Batch, k_pos: float = 2, lam_pos: float = 3, k_neg: float = 3, lam_neg: float = 2
) -> Any:
    def loss(i: int, logp: Tensor, old: Tensor) -> Tensor:
        a = b.advantage[i]
        k, lam = (k_pos, lam_pos) if a >= 0 else (k_neg, lam_neg)
        ln_w = (logp - old).sum().detach().clamp(math.log(1e-8), 20.0)
        return -(lam + k * ln_w - lam * ln_w.exp()).exp() * a * logp

    return loss


SEQUENCE_LOSSES: dict[str, tuple[Objective, Callable[[Batch], Any]]] = {
    "gspo": (Objective.gspo(), gspo),
    "gspo_wide": (Objective.gspo(0.9, 1.1), lambda b: gspo(b, 0.9, 1.1)),
    "gspo_dual": (Objective.gspo(0.9, 1.1, dual_clip=1.05), lambda b: gspo(b, 0.9, 1.1, 1.05)),
    "gmpo": (Objective.gmpo(), gmpo),
    "gmpo_narrow": (Objective.gmpo(0.9, 1.1), lambda b: gmpo(b, 0.9, 1.1)),
    "vespo": (Objective.vespo(), vespo),
    "vespo_other": (Objective.vespo(1.5, 2, 1, 3), lambda b: vespo(b, 1.5, 2, 1, 3)),
}


def every_branch(b: Batch) -> list[Batch]:
    """Advantages of every sign combination that a clip distinguishes, and old policies on both
    sides, so that sequences are clipped below, above and not."""
    shifts = torch.tensor([0.2, 0.0, -0.15, 0.3], dtype=torch.float64)
    out = []
    for sign in (1, -1):
        for shift in (1, -1, 0.02):
            old = b.old_logprob + shift * spread(b, shifts)
            out.append(replace(b, advantage=sign * b.advantage, old_logprob=old))
    return out


@padded_and_packed
@pytest.mark.parametrize("name", SEQUENCE_LOSSES)
def test_sequence_objective_is_its_published_formula(name: str, form: str) -> None:
    objective, literal = SEQUENCE_LOSSES[name]
    for b in every_branch(batch(form, spread=0.2)):
        c = b.clean()

        def expected(logp: Tensor, _: Tensor, c: Batch = c) -> Tensor:
            return total(c, by_sequence(c, literal(c), logp, c.old_logprob))

        out = check(b, objective, expected)
        logp, _ = stats(b.logits, b.targets)
        rows = by_sequence(c, literal(c), logp, c.old_logprob)
        assert_close(out.token_loss, rows, rtol=1e-10, atol=1e-15)


@pytest.mark.parametrize("name", ["gspo_wide", "gmpo_narrow"])
def test_the_branches_above_are_all_taken(name: str) -> None:
    seen = set()
    for b in every_branch(batch("padded", spread=0.2)):
        c = b.clean()
        logp, _ = stats(b.logits, b.targets)
        for i, index in enumerate(sequences(b)):
            log_r = (logp - c.old_logprob).flatten()[index]
            for r in [log_r.mean()] if name == "gspo_wide" and len(index) else log_r:
                side = (r.exp() > 1.1) * 1 - (r.exp() < 0.9) * 1
                seen.add((bool(b.advantage[i] > 0), int(side)))
    assert seen == {(positive, side) for positive in (True, False) for side in (-1, 0, 1)}


@padded_and_packed
@pytest.mark.parametrize("name", SEQUENCE_LOSSES)
def test_sequence_objective_with_every_term(name: str, form: str) -> None:
    """KL, entropy, importance and per-row weights of a sequence act as in the loss formula."""
    objective, literal = SEQUENCE_LOSSES[name]
    terms = {
        "kl": ("k3", 0.2, True),
        "entropy_coef": 0.1,
        "importance": ("token", "truncate", 0.8, 1.2),
    }
    objective = replace(objective, **terms)
    b = batch(form, seed=2)
    c = b.clean()
    importance = (c.old_logprob - c.rollout_logprob).exp().clamp(0.8, 1.2)

    def expected(logp: Tensor, entropy: Tensor) -> Tensor:
        d = c.ref_logprob - logp
        kl = (logp - c.old_logprob).exp() * (d.exp() - d - 1)
        loss = importance * by_sequence(c, literal(c), logp, c.old_logprob) + 0.2 * kl
        return total(c, loss) - 0.1 * total(c, entropy, c.entropy_weight)

    check(b, objective, expected, "ref_logprob", "rollout_logprob", "entropy_weight")


@padded_and_packed
@pytest.mark.parametrize("name", SEQUENCE_LOSSES)
def test_on_policy_sequence_objective(name: str, form: str) -> None:
    objective, literal = SEQUENCE_LOSSES[name]
    b = batch(form)
    c = b.clean()

    def expected(logp: Tensor, _: Tensor) -> Tensor:
        return total(c, by_sequence(c, literal(c), logp, logp.detach()))

    check(b, objective, expected, old_logprob=None)


def test_gspo_loss_ends_where_all_ratios_explode() -> None:
    """The mean log-ratio is clamped: the loss stays finite and its gradient is 0."""
    b = make_batch()
    out = policy_loss(
        x := b.leaf(), b.targets, objective=Objective.gspo(None, None),
        **b.given(old_logprob=b.old_logprob.nan_to_num(0) - 1000),
    )  # fmt: skip
    assert_close(out.token_loss[0, 0], torch.tensor(-1.3 * math.exp(20), dtype=torch.float64))
    assert not gradient(out.loss, x).any()


@pytest.mark.parametrize("sign", [1, -1])
@pytest.mark.parametrize("shift", [1000.0, -1000.0])
def test_vespo_limits_ln_w(shift: float, sign: int) -> None:
    b = make_batch()
    b = replace(b, old_logprob=b.old_logprob + shift, advantage=sign * b.advantage)
    c = b.clean()
    check(b, Objective.vespo(), lambda p, _: total(c, by_sequence(c, vespo(c), p, c.old_logprob)))


def test_luspo_is_gspo_with_token_sum_weights() -> None:
    """LUSPO: mean over sequences of length x sequence loss."""
    b = make_batch()
    b = replace(b, weight=token_weights(b.mask, "seq-mean-token-sum").double())
    c = b.clean()

    def expected(logp: Tensor, _: Tensor) -> Tensor:
        one = by_sequence(c, lambda i, p, o: gspo(c)(i, p, o) / len(p), logp, c.old_logprob)
        lengths = spread(c, c.mask.sum(-1))
        return (one * lengths)[c.mask].sum() / B

    check(b, Objective.gspo(), expected)


# ---- importance weights and OPSM

IMPORTANCE: dict[str, tuple[tuple[Any, ...], Callable[[Tensor], Tensor]]] = {
    "TIS": (("token", "truncate", None, 1.1), lambda d: d.exp().clamp_max(1.1)),
    "TIS both": (("token", "truncate", 0.9, 1.1), lambda d: d.exp().clamp(0.9, 1.1)),
    "no bound": (("token", "truncate", None, None), lambda d: d.exp()),
    "IcePop": (
        ("token", "mask", 0.8, 1.2),
        lambda d: torch.where((d.exp() >= 0.8) & (d.exp() <= 1.2), d.exp(), 0.0),
    ),
    "sequence TIS": (("sequence", "truncate", None, 1.1), lambda d: d.sum().exp().clamp_max(1.1)),
    "MIS": (
        ("sequence", "mask", None, 1.2),
        lambda d: torch.where(d.sum().exp() <= 1.2, d.sum().exp(), 0.0),
    ),
    "geometric TIS": (
        ("sequence", "truncate", 0.8, 1.2, True),
        lambda d: d.mean().exp().clamp(0.8, 1.2),
    ),
    "geometric MIS": (
        ("sequence", "mask", 0.8, 1.2, True),
        lambda d: torch.where((d.mean().exp() - 1).abs() <= 0.2, d.mean().exp(), 0.0),
    ),
}


def importance_rows(b: Batch, name: str, old: Tensor) -> Tensor:
    return by_sequence(b, lambda i, d: IMPORTANCE[name][1](d), (old - b.rollout_logprob).detach())


@padded_and_packed
@pytest.mark.parametrize("on_policy", [False, True])
@pytest.mark.parametrize("name", IMPORTANCE)
@pytest.mark.parametrize("seed", [1, 2, 3])
def test_importance(seed: int, name: str, on_policy: bool, form: str) -> None:
    b = batch(form, seed=seed)
    c = b.clean()
    a = spread(c, c.advantage)

    def expected(logp: Tensor, _: Tensor) -> Tensor:
        old = logp.detach() if on_policy else c.old_logprob
        r = (logp - old).exp()
        loss = -torch.minimum(r * a, r.clamp(0.8, 1.2) * a)
        return total(c, importance_rows(c, name, old) * loss)

    old = {"old_logprob": None} if on_policy else {}
    objective = Objective.ppo(importance=IMPORTANCE[name][0])
    check(b, objective, expected, "rollout_logprob", **old)


@pytest.mark.parametrize("name", [n for n in IMPORTANCE if n != "no bound"])
def test_importance_weights_above_are_in_and_out_of_bounds(name: str) -> None:
    inside = set()
    for seed in range(1, 4):
        c = batch("padded", seed=seed).clean()
        _, _, low, high, *geometric = IMPORTANCE[name][0]
        total_log = c.old_logprob - c.rollout_logprob
        if name.startswith(("sequence", "geometric", "MIS")):
            one = torch.mean if geometric else torch.sum
            total_log = by_sequence(c, lambda i, d, one=one: one(d), total_log)
        w = total_log.exp()[c.mask]
        inside |= set(((w >= (low or 0)) & (w <= high)).tolist())
    assert inside == {True, False}


@pytest.mark.parametrize("form", ["padded", "packed"])
def test_importance_multiplies_the_policy_term_alone(form: str) -> None:
    b = batch(form)
    nothing = Objective.gpg(importance=("token", "mask", 1e9, None), kl=("k1", 0.5))
    out = policy_loss(
        b.logits, b.targets, objective=nothing, **b.given("ref_logprob", "rollout_logprob")
    )
    logp, _ = stats(b.logits, b.targets)
    c = b.clean()
    assert_close(out.loss, total(c, 0.5 * (logp - c.ref_logprob)))


@pytest.mark.parametrize("delta", [-0.1, 0.0, 0.1])
@padded_and_packed
@pytest.mark.parametrize("objective", [Objective.ppo(), Objective.gspo()], ids=lambda o: o.name)
def test_opsm(objective: Objective, form: str, delta: float) -> None:
    for b in every_branch(batch(form)):
        c = b.clean()
        a = spread(c, c.advantage)

        def dropped(i: int, logp: Tensor, rollout: Tensor, c: Batch = c) -> Tensor:
            drift = (rollout - logp.detach()).mean()
            return ((c.advantage[i] < 0) & (drift > delta)).double()

        def expected(logp: Tensor, _: Tensor, c: Batch = c, a: Tensor = a) -> Tensor:
            keep = 1 - by_sequence(c, dropped, logp, c.rollout_logprob)
            r = (logp - c.old_logprob).exp()
            loss = -torch.minimum(r * a, r.clamp(0.8, 1.2) * a)
            if objective.name == "gspo":
                loss = by_sequence(c, gspo(c), logp, c.old_logprob)
            return total(c, keep * loss)

        check(b, replace(objective, opsm=delta), expected, "rollout_logprob")


@pytest.mark.parametrize("sign", [1, -1])
def test_opsm_drops_only_negative_sequences_beyond_delta(sign: int) -> None:
    b = make_batch()
    far = {"rollout_logprob": stats(b.logits, b.targets)[0] + 1}
    given = b.given(**far, advantage=torch.full((B,), float(sign)))
    out = policy_loss(b.logits, b.targets, objective=Objective.gpg(opsm=0.99), **given)
    assert bool(out.loss == 0) == (sign < 0)
    kept = policy_loss(b.logits, b.targets, objective=Objective.gpg(opsm=1.01), **given)
    assert kept.loss != 0


def test_one_sequence_of_one_token() -> None:
    x = torch.zeros(1, 3, dtype=torch.float64, requires_grad=True)
    out = rk.policy_loss(
        x, torch.tensor([0]), old_logprob=torch.tensor([-1.2]), advantage=torch.tensor([2.0]),
        weight=torch.ones(1), objective=Objective.gspo(), segments=torch.tensor([0, 1]),
    )  # fmt: skip
    assert_close(out.loss.item(), -2 * 1.0004)
