"""Shaping, paper by paper: each function against its formula, written out sequence by sequence."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from tolerance import randn
from torch import Tensor

from reasonkern import shaping

# Ids in any order and far apart, groups of 5, 3, 1, 4 and 2 sequences.
GROUP = torch.tensor([7, -3, 7, 2**60, 7, -3, 0, 0, 7, -3, 12, 0, 12, 0, 7])
N = len(GROUP)
BITS = torch.tensor([1, 1, 0, 1, 1, 1, 0, 0, 0, 1, 1, 0, 0, 1, 1]).bool()
LENGTH = torch.tensor([30, 10, 25, 0, 90, 20, 40, 5, 60, 30, 7, 80, 100, 55, 45])
REWARD = randn(N, seed=1)


def members(i: int, group: Tensor = GROUP) -> list[int]:
    return [j for j in range(len(group)) if group[j] == group[i]]


def mean(values: Any) -> float:
    values = list(values)
    return math.fsum(values) / len(values)


def std(values: Any) -> float:
    values = list(values)
    if len(values) < 2:
        return 0.0
    m = mean(values)
    return math.sqrt(math.fsum((x - m) ** 2 for x in values) / (len(values) - 1))


def check(got: Tensor, expected: Callable[[int], float], rel: float = 1e-6) -> None:
    """Element by element, in the float32 that rewards are returned in."""
    for i in range(len(got)):
        assert got[i].item() == pytest.approx(expected(i), rel=rel, abs=1e-6), i


def test_groups_are_what_the_tests_need() -> None:
    sizes = sorted(len(members(i)) for i in range(N))
    assert sorted(set(sizes)) == [1, 2, 3, 4, 5]
    kinds = {sum(BITS[j].item() for j in members(i)) / len(members(i)) for i in range(N)}
    assert {1.0, 0.25} <= kinds and len(kinds) > 3


# ---- advantages


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("scale", ["std", "none", "batch-std"])
@pytest.mark.parametrize(
    "baseline", ["group-mean", "batch-mean", "leave-one-out", "length-weighted", "none"]
)
def test_group_advantages(baseline: str, scale: str, dtype: torch.dtype) -> None:
    r = REWARD.to(dtype)
    x = r.tolist()

    def centred(i: int) -> float:
        g = members(i)
        if baseline == "leave-one-out":
            others = [x[j] for j in g if j != i]
            return x[i] - (mean(others) if others else x[i])
        total = sum(LENGTH[j].item() for j in g)
        b = {
            "group-mean": mean(x[j] for j in g),
            "batch-mean": mean(x),
            "length-weighted": sum(LENGTH[j].item() * x[j] for j in g) / max(total, 1),
            "none": 0.0,
        }[baseline]
        return x[i] - b

    every = [0.0 if len(members(i)) == 1 and baseline != "none" and baseline != "batch-mean"
             else centred(i) for i in range(N)]  # fmt: skip

    def expected(i: int) -> float:
        by_group = scale == "std" or baseline not in ("none", "batch-mean")
        if by_group and len(members(i)) == 1:
            return 0.0
        if scale == "none":
            return centred(i)
        s = std(x[j] for j in members(i)) if scale == "std" else std(every)
        return centred(i) / (s + 1e-4)

    got = shaping.group_advantages(r, GROUP, length=LENGTH, baseline=baseline, scale=scale)
    assert got.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    check(got, expected)


@pytest.mark.parametrize("scale", ["std", "none", "batch-std"])
@pytest.mark.parametrize(
    "baseline", ["group-mean", "batch-mean", "leave-one-out", "length-weighted"]
)
def test_equal_rewards_give_exactly_zero(baseline: str, scale: str) -> None:
    for value in (0.1, 1e8 + 0.3, -1 / 3):
        r = torch.full((7,), value, dtype=torch.float64)
        assert value < 0 or r.mean() != value  # a plain mean is off
        for n in range(1, 8):
            group, length = torch.zeros(n, dtype=torch.int64), torch.arange(n)
            kind = {"baseline": baseline, "scale": scale, "eps": 0.0}
            got = shaping.group_advantages(r[:n], group, length=length, **kind)
            assert torch.equal(got, torch.zeros(n, dtype=torch.float64))


def test_length_weighted_baseline_of_next_to_no_tokens() -> None:
    reward, group = torch.tensor([1.0, 0.0, 1.0, 0.0]), torch.tensor([0, 0, 1, 1])
    kind = {"length": torch.tensor([1, 0, 0, 0]), "baseline": "length-weighted", "scale": "none"}
    assert shaping.group_advantages(reward, group, **kind).tolist() == [0, -1, 0.5, -0.5]


def test_nan_is_not_taken_for_zero() -> None:
    """0 over a standard deviation that is NaN is no advantage of 0."""
    reward, group = torch.tensor([0.0, torch.nan, 1.0, 1.0]), torch.tensor([0, 0, 1, 1])
    assert shaping.group_advantages(reward, group, baseline="none")[:2].isnan().all()
    assert shaping.group_advantages(reward, group, scale="batch-std").isnan().all()
    reward[1] = torch.inf
    by_mean = shaping.group_advantages(reward, group, scale="none")
    assert by_mean[0] == -torch.inf and by_mean[1].isnan() and not by_mean[2:].any()


def test_a_group_of_one_gives_zero_whatever_its_reward() -> None:
    reward, group = torch.tensor([torch.nan, 0.5, 0.5]), torch.tensor([0, 1, 1])
    for baseline in ("group-mean", "leave-one-out", "length-weighted"):
        kind = {"baseline": baseline, "scale": "none", "length": torch.ones(3)}
        assert shaping.group_advantages(reward, group, **kind).tolist() == [0, 0, 0]
    parts = {"normalise": "per-component", "group": group}
    assert shaping.mix_rewards({"a": reward}, {"a": 1.0}, **parts).tolist() == [0, 0, 0]


@pytest.mark.parametrize("baseline", ["group-mean", "leave-one-out", "batch-mean"])
def test_equal_rewards_give_exactly_zero_without_eps(baseline: str) -> None:
    reward, group = torch.full((4,), 0.1), torch.tensor([0, 0, 1, 1])
    out = shaping.group_advantages(reward, group, baseline=baseline, eps=0.0)
    assert out.tolist() == [0, 0, 0, 0]
    plain = shaping.group_advantages(reward, group, baseline="none", eps=0.0)
    assert plain.tolist() == [torch.inf] * 4
    kind = {"normalise": "per-component", "group": group, "eps": 0.0}
    assert shaping.mix_rewards({"a": reward}, {"a": 1.0}, **kind).tolist() == [0, 0, 0, 0]


def test_bounds_of_elliptical_bonus_may_be_any_size() -> None:
    features, group = torch.randn(3, 2, generator=torch.Generator().manual_seed(0)), torch.zeros(3)
    for groups, size in ((1 << 62, 1 << 62), (1, 3)):
        given = {"max_groups": groups, "max_group_size": size}
        bounded = shaping.elliptical_bonus(features, group.long(), **given)
        assert torch.equal(bounded, shaping.elliptical_bonus(features, group.long()))
    nothing = shaping.elliptical_bonus(features[:, :0], group.long(), project=2)
    assert nothing.tolist() == [0, 0, 0]


def test_results_are_constants_of_the_loss() -> None:
    """Entropies of the policy are differentiable, the advantages they shape are not."""
    x, ones = REWARD.clone().requires_grad_(), torch.ones(N, requires_grad=True)
    kind = {"normalise": "per-component", "group": GROUP}
    for out in (
        shaping.group_advantages(x, GROUP),
        shaping.group_advantages(x, GROUP, baseline="batch-mean", scale="batch-std"),
        shaping.entropy_reshape(x, ones, GROUP),
        shaping.mix_rewards({"a": x, "b": ones}, {"a": 1.0, "b": 1.0}, {"a": ones}),
        shaping.mix_rewards({"a": x}, {"a": 1.0}, **kind),
        shaping.pass_at_k_reward(x, GROUP),
        shaping.elliptical_bonus(x[:, None], GROUP),
        shaping.overlong_penalty(ones, max_length=2, buffer=1),
        shaping.length_adaptive_lambda(ones),
        shaping.grpo_lambda(ones, BITS, GROUP, alpha=0.5),
        shaping.concise_gated(ones, BITS, GROUP, limit=2),
        shaping.adactrl(ones, BITS, GROUP, 0 * GROUP),
        shaping.format_length_surrogate(ones, BITS),
    ):
        assert not out.requires_grad


def test_groups_do_not_see_each_other() -> None:
    """Bits of a group are the same alone and beside a group of NaN and infinity."""
    r = REWARD.clone()
    r[GROUP == 0] = torch.nan
    r[GROUP == 12] = torch.inf
    got = shaping.group_advantages(r, GROUP)
    for g in (7, -3):
        alone = shaping.group_advantages(REWARD[g == GROUP], GROUP[g == GROUP])
        assert torch.equal(got[g == GROUP], alone)


def test_no_sequences() -> None:
    none, ids = torch.zeros(0), torch.zeros(0, dtype=torch.int64)
    flags = none.bool()
    for out in (
        shaping.group_advantages(none, ids),
        shaping.entropy_reshape(none, none, ids),
        shaping.elliptical_bonus(torch.zeros(0, 4), ids),
        shaping.serial_decay(flags, ids),
        shaping.grpo_lambda(none, flags, ids, alpha=0.5),
        shaping.dynamic_sampling_mask(none, ids),
        shaping.laser_d(none, flags, ids, targets=(1, 2, 3)),
        shaping.pass_at_k_reward(none, ids),
        shaping.overlong_penalty(none, max_length=2, buffer=1),
    ):
        assert out.shape == (0,)


def test_t1(monkeypatch: pytest.MonkeyPatch) -> None:
    """Leave-one-out advantages and the moving anchor."""
    got = shaping.group_advantages(REWARD, GROUP, baseline="leave-one-out", scale="none")
    check(got, lambda i: REWARD[i].item() - mean([REWARD[j].item() for j in members(i) if j != i]
                                                 or [REWARD[i].item()]))  # fmt: skip
    anchor = [randn(3, 4, seed=2).float(), randn(5, seed=3)]
    policy = [randn(3, 4, seed=4).bfloat16(), randn(5, seed=5)]
    old = [a.double().clone() for a in anchor]
    assert shaping.anchor_update_(anchor, policy, 0.75) is None
    for a, b, p in zip(anchor, old, policy, strict=True):
        torch.testing.assert_close(a.double(), 0.75 * b + 0.25 * p.double(), rtol=1e-6, atol=1e-7)
    before = [a.clone() for a in anchor]
    shaping.anchor_update_(anchor, policy, 1.0)
    assert all(torch.equal(a, b) for a, b in zip(anchor, before, strict=True))
    shaping.anchor_update_([], [], 0.5)
    many = [torch.zeros(n) for n in (5, 3, 9, 0, 8, 1)]
    calls: list[int] = []  # a copy in float32 of a whole policy in bfloat16 would not fit
    lerp = torch._foreach_lerp_

    def counted(ema: list[Tensor], new: list[Tensor], weight: float) -> None:
        calls.append(sum(x.numel() for x in new))
        lerp(ema, new, weight)

    monkeypatch.setattr("reasonkern.shaping.advantages.COPIED", 8)
    monkeypatch.setattr(torch, "_foreach_lerp_", counted)
    shaping.anchor_update_(many, [torch.ones_like(x).bfloat16() for x in many], 0.5)
    assert all((x == 0.5).all() for x in many) and calls == [8, 9, 8, 1]
    with pytest.raises(ValueError, match=r"ema_params\[0\]: expected dtype torch.float32"):
        shaping.anchor_update_([policy[0]], [policy[0]], 0.5)


def test_ettrl() -> None:
    h = torch.rand(N, dtype=torch.float64, generator=torch.Generator().manual_seed(6))
    h[1] = 50.0  # far above twice the mean of its group
    h[GROUP == 12] = 0.0
    active = torch.ones(N, dtype=torch.bool)
    active[4] = False
    h[4] = torch.nan
    advantage = randn(N, seed=7)

    def expected(i: int) -> float:
        others = [h[j].item() for j in members(i) if active[j]]
        if not active[i] or not others or mean(others) == 0:
            return advantage[i].item()
        return advantage[i].item() * max(0.0, 2 - h[i].item() / mean(others))

    got = shaping.entropy_reshape(advantage, h, GROUP, active=active)
    check(got, expected, rel=1e-12)
    assert got[1] == 0 and got.isfinite().all()
    equal = shaping.entropy_reshape(advantage, torch.full_like(h, 0.1), GROUP)
    assert torch.equal(equal, advantage)  # a plain mean of three is off


def test_conciser() -> None:
    """Dynamic sampling of stage 1; a length term of stage 2 where all rollouts are right."""
    kept = shaping.dynamic_sampling_mask(BITS.float(), GROUP)
    check(kept, lambda i: len({BITS[j].item() for j in members(i)}) > 1)
    assert kept.any() and not kept.all() and not kept[GROUP == 2**60].any()
    got = shaping.concise_gated(LENGTH, BITS, GROUP, limit=25)

    def expected(i: int) -> float:
        every = all(BITS[j] for j in members(i))
        return BITS[i].item() + (max(0.0, 1 - LENGTH[i].item() / 25) if every else 0.0)

    check(got, expected)
    assert (got > 1).any() and (got == 1).any() and (got == 0).any()


def test_skywork_r1v2() -> None:
    """Selective sample buffer: which samples are drawn, how often, and what happens without."""
    a = torch.tensor([0.0, 1.0, -3.0, 0.0, 2.0])
    out = shaping.prioritised_sample(a, 5, seed=3)
    assert out.valid.tolist() == [True] * 3 + [False] * 2
    assert sorted(out.indices[:3].tolist()) == [1, 2, 4] and len(set(out.indices.tolist())) == 5
    again = shaping.prioritised_sample(a, 5, seed=3)
    assert torch.equal(out.indices, again.indices)
    for alpha in (0.0, 1.0, 2.0):
        first = [shaping.prioritised_sample(a, 1, alpha=alpha, seed=s).indices for s in range(4000)]
        share = torch.cat(first).bincount(minlength=5) / 4000
        p = torch.where(a != 0, a.abs() ** alpha, 0.0)
        # Five standard deviations of a share of 4000 draws are below 0.04.
        torch.testing.assert_close(share, p / p.sum(), rtol=0, atol=0.04)
    assert not shaping.prioritised_sample(torch.zeros(3), 3).valid.any()
    torch._dynamo.reset()
    compiled = torch.compile(shaping.prioritised_sample, fullgraph=True, backend="aot_eager")
    for seed in (3, 4, -1):
        drawn, eager = (f(a, 3, seed=seed) for f in (compiled, shaping.prioritised_sample))
        assert torch.equal(drawn.indices, eager.indices)


# ---- exploration


def rank_one_updates(phi: Tensor, lam: float, mode: str) -> Tensor:
    """The released code's way: a Sherman-Morrison update per response, then one back per bonus."""
    phi = phi - phi.mean(0)
    inverse = torch.eye(phi.shape[1], dtype=torch.float64) / lam
    for x in phi:
        u = inverse @ x
        inverse = inverse - torch.outer(u, u) / (1 + x @ u)
    h = torch.stack([x @ inverse @ x for x in phi])
    if mode == "leverage":
        return h
    without = []
    for x in phi:
        u = inverse @ x
        without.append(x @ (inverse + torch.outer(u, u) / (1 - x @ u)) @ x)
    return torch.stack(without)


@pytest.mark.parametrize("mode", ["leave-one-out", "leverage"])
@pytest.mark.parametrize("lam", [0.01, 3.0])
def test_representation_based_exploration(mode: str, lam: float) -> None:
    """The closed form is the sequential definition to 1e-6, for groups of any size together."""
    features = randn(N, 24, seed=8) / 3
    features[GROUP == 12] = features[GROUP == 12][:1].clone()  # equal features
    got = shaping.elliptical_bonus(features, GROUP, lam, mode)
    assert got.dtype == torch.float64
    for g in GROUP.unique():
        expected = rank_one_updates(features[g == GROUP], lam, mode)
        torch.testing.assert_close(got[g == GROUP], expected, rtol=1e-6, atol=1e-9)
    for g in (12, 2**60):
        assert not got[g == GROUP].any()
        for ridge in (0.03, 0.1, 0.7):  # whose inverse square root is no float
            assert not shaping.elliptical_bonus(features, GROUP, ridge, mode)[g == GROUP].any()
    hints = shaping.elliptical_bonus(features, GROUP, lam, mode, max_groups=9, max_group_size=6)
    torch.testing.assert_close(hints, got, rtol=1e-9, atol=1e-12)
    if (lam, mode) == (0.01, "leave-one-out"):
        assert torch.equal(shaping.elliptical_bonus(features, GROUP), got)


def test_representation_based_exploration_saturation_and_remedies() -> None:
    features, group = randn(8, 64, seed=9), torch.zeros(8, dtype=torch.int64)
    bonus = shaping.elliptical_bonus(features, group, 1e-6)
    torch.testing.assert_close(bonus, torch.full_like(bonus, 7.0), rtol=1e-6, atol=0)
    relative = shaping.elliptical_bonus(features, group, 1.0, lam_relative=True)
    assert relative.std() > 0.01 and relative.max() < 3
    for scale in (100, 0.1):
        scaled = shaping.elliptical_bonus(scale * features, group, 1.0, lam_relative=True)
        torch.testing.assert_close(scaled, relative)
    trace = (features - features.mean(0)).square().sum().item()
    torch.testing.assert_close(shaping.elliptical_bonus(features, group, trace / 7), relative)
    alone = shaping.elliptical_bonus(features, torch.arange(8), 1.0, lam_relative=True)
    assert not alone.any()
    for ridge in (0.1, 3.0, 7.0):  # K is less than a digit of λ
        assert (shaping.elliptical_bonus(1e-9 * features, group, ridge) >= 0).all()
    equal = shaping.elliptical_bonus(features[:1].expand(8, -1), group, 1.0, lam_relative=True)
    assert not equal.any()
    narrow = shaping.elliptical_bonus(features, group, project=16, seed=1)
    assert torch.equal(narrow, shaping.elliptical_bonus(features, group, project=16, seed=1))
    assert not torch.equal(narrow, shaping.elliptical_bonus(features, group, project=16, seed=2))
    with pytest.raises(ValueError, match="lam: expected a ridge of at least 1e-12 tr K"):
        shaping.elliptical_bonus(1e4 * features, group, 1e-3)
    with pytest.raises(ValueError, match="max_group_size: expected at least 8"):
        shaping.elliptical_bonus(features, group, max_group_size=4)


def test_representation_based_exploration_is_nan_where_no_value_is_read(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """As on CUDA: what has no place, no ridge or no number spoils its own group only."""
    features, group = randn(8, 3, seed=9), torch.arange(8) // 3
    usual = shaping.elliptical_bonus(features, group)
    large, broken = features.clone(), features.clone()
    large[:3] *= 1e8
    broken[1, 2] = torch.nan
    with pytest.raises(ValueError, match="lam: expected a ridge of at least 1e-12 tr K"):
        shaping.elliptical_bonus(large, group)
    monkeypatch.setattr("reasonkern._checks.reads_values", lambda _: False)
    for x, bounds, spoilt in (
        (features, {"max_groups": 2}, [6, 7]), (features, {"max_group_size": 2}, [*range(6)]),
        (large, {}, [0, 1, 2]), (broken, {}, [0, 1, 2]),
    ):  # fmt: skip
        got = shaping.elliptical_bonus(x, group, **bounds)
        nan = torch.zeros(8, dtype=torch.bool).index_fill(0, torch.tensor(spoilt), True)
        assert torch.equal(got.isnan(), nan)
        torch.testing.assert_close(got[~nan], usual[~nan])


def test_representation_based_exploration_compiles_with_its_bounds() -> None:
    """Without a graph break; a group beyond a bound is NaN then, all of it, as on CUDA."""
    features, group = randn(8, 3, seed=9), torch.arange(8) // 3

    def bounded(size: int) -> Tensor:
        return shaping.elliptical_bonus(features, group, max_groups=3, max_group_size=size)

    compiled = torch.compile(bounded, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(3), shaping.elliptical_bonus(features, group))
    assert compiled(2).isnan().tolist() == [True] * 6 + [False] * 2
    torch.testing.assert_close(compiled(2)[6:], compiled(3)[6:])
    bounds = {"project": 2, "max_groups": 3, "max_group_size": 3}
    projected = torch.compile(shaping.elliptical_bonus, fullgraph=True, backend="aot_eager")
    expected = shaping.elliptical_bonus(features, group, **bounds)
    torch.testing.assert_close(projected(features, group, **bounds), expected)


def test_sparse_projection_keeps_lengths() -> None:
    from reasonkern.shaping.exploration import sparse_projection

    p = sparse_projection(400, 256, 0, torch.device("cpu"))
    assert (p == 0).double().mean().item() == pytest.approx(1 - 1 / 20, abs=0.005)
    assert p.mean().abs() < 1e-3
    every = sparse_projection(1, 4, 0, torch.device("cpu"))  # of one feature, with density 1
    assert every.abs().tolist() == [[0.5] * 4]
    x = randn(30, 400, seed=10)
    torch.testing.assert_close(((x @ p).square().sum(1) / x.square().sum(1)).mean(),
                               torch.ones((), dtype=torch.float64), rtol=0.1, atol=0)  # fmt: skip


# ---- along the tokens


def test_t_ppo() -> None:
    """Windows: V of the last token stands for the next state; who trains on what."""
    reward, value = randn(2, 6, seed=11), randn(2, 6, seed=12)
    mask = torch.tensor([[1, 1, 1, 1, 1, 0], [1, 1, 1, 1, 0, 0]]).bool()
    cut = torch.tensor([True, False])
    advantage, returns = shaping.gae(
        reward, value, mask, gamma=0.9, lam=0.8, lam_value=1.0, bootstrap="last", truncated=cut
    )
    last_delta = reward[0, 4] + (0.9 - 1) * value[0, 4]
    torch.testing.assert_close(advantage[0, 4], last_delta)
    torch.testing.assert_close(advantage[1, 3], reward[1, 3] - value[1, 3])
    # lam_value = 1: targets are discounted returns.
    follow = reward[1, 0] + 0.9 * (reward[1, 1] + 0.9 * (reward[1, 2] + 0.9 * reward[1, 3]))
    torch.testing.assert_close(returns[1, 0], follow)
    window = torch.tensor([[0, 0, 1, 1, 1, 1], [0, 0, 0, 1, 1, 1]]).bool()
    policy, critic = shaping.tppo_masks(mask, window, ~cut, drop_tail=2)
    assert policy.tolist() == [[0, 0, 1, 0, 0, 0], [0, 0, 0, 1, 0, 0]]
    assert critic.tolist() == [[0] * 6, [1, 1, 1, 1, 0, 0]]
    policy, critic = shaping.tppo_masks(mask, window, ~cut, truncated=~cut, drop_tail=1)
    assert policy.tolist() == [[0, 0, 1, 1, 1, 0], [0] * 6]
    assert critic.tolist() == [[0] * 6, [1, 1, 1, 1, 0, 0]]
    assert shaping.tppo_masks(mask, window, ~cut)[0].tolist() == (mask & window).tolist()


def test_enigmata() -> None:
    """The VC-PPO / VAPO recipe: λ by length for the policy, λ = 1 for the value function."""
    lam = shaping.length_adaptive_lambda(LENGTH)
    check(lam, lambda i: max(0.0, 1 - 1 / (0.05 * max(LENGTH[i].item(), 1e-9))))
    reward, value = randn(N, 4, seed=13), randn(N, 4, seed=14)
    advantage, returns = shaping.gae(reward, value, lam=lam, lam_value=1.0)
    for b in range(N):
        delta = reward[b] + torch.cat((value[b, 1:], value.new_zeros(1))) - value[b]
        power = lam[b].double() ** torch.arange(4)
        torch.testing.assert_close(advantage[b, 0], (power * delta).sum())
        torch.testing.assert_close(returns[b, 0], reward[b].sum())


# ---- mixtures


def test_pta_grpo() -> None:
    parts = {"answer": BITS.float(), "plan": randn(N, seed=15), "length": LENGTH.double()}
    parts["length"][~BITS] = torch.nan  # behind a closed gate
    weights = {"answer": 1.0, "plan": 0.25, "length": -0.01}
    half = torch.full((N,), 0.5)
    got = shaping.mix_rewards(parts, weights, {"length": BITS, "plan": half})
    check(got, lambda i: BITS[i].item() + 0.125 * parts["plan"][i].item()
          - (0.01 * LENGTH[i].item() if BITS[i] else 0.0), rel=1e-12)  # fmt: skip
    assert got.dtype == torch.float64


def test_rlsp() -> None:
    """Exploration decoupled from correctness: a convex sum."""
    effort = LENGTH / 100
    got = shaping.mix_rewards(
        {"correct": BITS.float(), "explore": effort}, {"correct": 0.8, "explore": 0.2}
    )
    check(got, lambda i: 0.8 * BITS[i].item() + 0.2 * LENGTH[i].item() / 100)


def test_datarus_r1() -> None:
    """Two rewards change places along a cosine."""
    assert [shaping.cosine(s, 10) for s in (0, 5, 10, 99)] == [1.0, pytest.approx(0.5), 0.0, 0.0]
    parts = {"structure": REWARD, "answer": BITS.double()}
    for step in (0, 3, 10):
        w = (1 + math.cos(math.pi * step / 10)) / 2
        schedule = {
            "structure": shaping.cosine(step, 10),
            "answer": shaping.cosine(step, 10, 0.0, 1.0),
        }
        got = shaping.mix_rewards(parts, dict.fromkeys(parts, 2.0), schedule=schedule)
        check(got, lambda i, w=w: 2 * (w * REWARD[i].item() + (1 - w) * BITS[i].item()), 1e-12)


def test_gdpo() -> None:
    """Each component normalised by group after its gate, then summed."""
    parts = {"answer": BITS.double(), "style": REWARD}
    got = shaping.mix_rewards(
        parts, {"answer": 1.0, "style": 0.5}, {"style": BITS},
        normalise="per-component", group=GROUP,
    )  # fmt: skip
    style = [REWARD[i].item() if BITS[i] else 0.0 for i in range(N)]

    def normal(x: list[float], i: int) -> float:
        g = members(i)
        if len(g) == 1:
            return 0.0
        return (x[i] - mean(x[j] for j in g)) / (std(x[j] for j in g) + 1e-4)

    answer = [float(b) for b in BITS]
    check(got, lambda i: normal(answer, i) + 0.5 * normal(style, i), rel=1e-12)
