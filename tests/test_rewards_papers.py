"""Rewards, paper by paper: each function against its formula, written out sequence by sequence."""

from __future__ import annotations

import math

import pytest
import torch
from test_shaping_papers import BITS, GROUP, LENGTH, REWARD, N, check, mean, members, std

from reasonkern import shaping
from reasonkern.shaping.laser import accuracy_level


def accuracy(i: int) -> float:
    return mean(BITS[j].item() for j in members(i))


def test_demystifying_agentic_rl() -> None:
    """Overlong shaping of GRPO-TCR (and DAPO), floored."""
    length = torch.tensor([0, 16384, 16385, 18432, 20480, 90000])
    got = shaping.overlong_penalty(length, max_length=20480, buffer=4096)
    check(got, lambda i: -min(1.0, max(0.0, (length[i].item() - 16384) / 4096)))
    assert got[0] == 0 and not got[0].signbit() and got[-1] == -1
    half = shaping.overlong_penalty(length, max_length=20480, buffer=4096, factor=0.5)
    assert half[-1] == -0.5
    assert shaping.overlong_penalty(length[:2], max_length=1, buffer=1).tolist() == [0, -1]


def test_grpo_lambda() -> None:
    """Groups by accuracy: -3 and 2^60 have 1, 7 has 3/5, 12 has 1/2, 0 has 1/4."""
    for fraction, top in ((0.2, {-3}), (0.4, {-3, 2**60}), (0.6, {-3, 2**60, 7}), (0.0, {-3}),
                          (0.41, {-3, 2**60, 7}), (1.0, {-3, 2**60, 7, 12, 0})):  # fmt: skip
        got = shaping.grpo_lambda(LENGTH, BITS, GROUP, alpha=0.6, top_fraction=fraction)

        def expected(i: int, top: set[int] = top) -> float:
            if not BITS[i]:
                return 0.0
            if GROUP[i].item() not in top:
                return 1.0
            right = [LENGTH[j].item() for j in members(i) if BITS[j]]
            s = std(right)
            z = (LENGTH[i].item() - mean(right)) / s if s > 0 else 0.0
            return 1 - 0.6 / (1 + math.exp(-z))

        check(got, expected)
        if fraction == 0.2:
            assert torch.equal(got, shaping.grpo_lambda(LENGTH, BITS, GROUP, alpha=0.6))
    # 0.07 of 100 groups are 7, although the product of the floats is more.
    hundred = torch.arange(100)
    for k in range(1, 101):
        one_by_one = {"alpha": 1.0, "top_fraction": k / 100}
        top_k = shaping.grpo_lambda(hundred, hundred >= 0, hundred, **one_by_one)
        assert (top_k < 1).sum() == k and (top_k[:k] < 1).all()
    near = shaping.grpo_lambda(torch.tensor([10, 11]), BITS[:2], 0 * GROUP[:2], alpha=1.0)
    check(near, lambda i: 1 - 1 / (1 + math.exp((0.5 - i) / math.sqrt(0.5))))
    one = shaping.grpo_lambda(LENGTH, BITS, GROUP, alpha=0.6, top_fraction=0.4)
    assert one[3] == pytest.approx(0.7)  # the only answer of its group: σ(0)
    nobody = torch.zeros(N, dtype=torch.bool)
    assert not shaping.grpo_lambda(LENGTH, nobody, GROUP, alpha=0.6).any()


def test_s_grpo() -> None:
    got = shaping.serial_decay(BITS, GROUP)

    def expected(i: int) -> float:
        if not BITS[i]:
            return 0.0
        place = sum(BITS[j].item() for j in members(i) if j <= i)
        return 2.0 ** -(place - 1)

    check(got, expected, rel=0)
    assert {1.0, 0.5, 0.25, 0.0} <= set(got.tolist())


def test_adactrl() -> None:
    tag = torch.tensor([0, 0, 1, 0, 1, -1, 0, 1, 0, 0, -1, 1, 0, 1, 0])
    got = shaping.adactrl(LENGTH, BITS, GROUP, tag)

    def expected(i: int) -> float:
        gold = 0 if accuracy(i) > 0.625 else 1
        label = -1.0 if tag[i] == -1 else float(tag[i].item() == gold)
        longest = max(LENGTH[j].item() for j in members(i))
        share = LENGTH[i].item() / longest if longest else 0.0
        short = 1 - (1 - math.cos(math.pi * share)) / 2 if BITS[i] and tag[i] == 0 else 0.0
        return (1.0 if BITS[i] else -1.0) + 0.5 * label + 0.5 * short

    check(got, expected)
    exact = torch.zeros(8, dtype=torch.int64)  # 5 of 8 right is not above 0.625
    five, six = torch.arange(8) < 5, torch.arange(8) < 6
    assert shaping.adactrl(exact, five, exact, exact + 1, length_weight=0.0)[0] == 1.5
    assert shaping.adactrl(exact, six, exact, exact + 1, length_weight=0.0)[0] == 1
    for size in range(1, 30):  # nor is any other accuracy above itself
        zeros = torch.zeros(size, dtype=torch.int64)
        for right in range(size + 1):
            args = (zeros, torch.arange(size) < right, zeros, zeros + 1)
            equal = shaping.adactrl(*args, easy_above=right / size, length_weight=0.0)
            assert equal[-1] == (1.5 if right == size else -0.5)
    with pytest.raises(ValueError, match=r"tag: expected values in \[-1, 2\), got 2"):
        shaping.adactrl(exact, five, exact, exact + 2)


def test_format_and_length_surrogate() -> None:
    length = torch.tensor([0, 768, 1536, 2304, 3072, 6144, 768, 3072])
    answer = torch.tensor([1, 1, 1, 1, 1, 1, 0, 0]).bool()
    soft = torch.tensor([1, 0, 1, 0, 1, 1, 1, 0]).bool()
    got = shaping.format_length_surrogate(length, answer, soft)

    def expected(i: int, scale: float = 3072.0, p: float = 0.5) -> float:
        x = length[i].item() / scale
        f = 1 - (1 - x / p) ** 2 if x <= p else 1 - 2 * ((x - p) / (1 - p)) ** 2
        if not answer[i]:
            return min(0.0, f)
        return 0.5 * (soft[i].item() + answer[i].item()) + f

    check(got, expected)
    other = shaping.format_length_surrogate(length, answer, soft, scale=1.0, peak=0.25)
    check(other, lambda i: expected(i, 1.0, 0.25))
    assert got[5] < -1 and got[6] == 0
    assert torch.equal(
        shaping.format_length_surrogate(length, answer),
        shaping.format_length_surrogate(length, answer, answer),
    )


def test_r_horizon() -> None:
    correct = torch.tensor(
        [[1, 1, 1], [1, 0, 1], [1, 1, 0], [0, 1, 1], [1, 1, 1], [1, 1, 0]]
    ).bool()
    valid = torch.tensor([[1, 1, 1], [1, 1, 1], [1, 1, 0], [0, 1, 1], [0, 0, 0], [1, 0, 1]]).bool()
    assert shaping.composed_all_correct(correct).tolist() == [1, 0, 0, 0, 1, 0]
    assert shaping.composed_all_correct(correct, valid=valid).tolist() == [1, 0, 1, 1, 0, 0]
    assert shaping.composed_all_correct(correct, mode="last").tolist() == [1, 1, 0, 1, 1, 0]
    last = shaping.composed_all_correct(correct, valid=valid, mode="last")
    assert last.dtype == shaping.composed_all_correct(correct).dtype == torch.float32
    assert last.tolist() == [1, 1, 1, 1, 0, 0]


def test_spc() -> None:
    detected = torch.tensor([True, False, True, False])
    harmful = torch.tensor([True, True, False, False])
    generator, critic = shaping.zero_sum_rewards(detected, harmful)
    assert critic.tolist() == [1, -1, 0, 0] and generator.tolist() == [-1, 1, 0, 0]
    assert not (generator + critic).any() and not generator[2:].signbit().any()
    assert shaping.zero_sum_rewards(detected)[1].tolist() == [1, -1, 1, -1]


def test_pass_at_k_reward() -> None:
    r = REWARD.clone()
    r[GROUP == 12] = 0.5  # a tie for the best
    got = shaping.pass_at_k_reward(r, GROUP)

    def expected(i: int) -> float:
        ordered = sorted((r[j].item() for j in members(i)), reverse=True)
        alone = len(ordered) > 1 and r[i].item() == ordered[0]
        return ordered[0] - ordered[1] if alone else 0.0

    check(got, expected)
    assert got.dtype == torch.float64 and (got > 0).sum() == 3
    two = shaping.pass_at_k_reward(torch.tensor([0.25, 1.0]), 0 * GROUP[:2])
    assert two.tolist() == [0, 0.75]
    small = shaping.pass_at_k_reward(r.float(), GROUP)
    assert small.dtype == torch.float32 and (small > 0).sum() == 3


# ---- LASER


def level(i: int) -> int:
    right, size = sum(BITS[j].item() for j in members(i)), len(members(i))
    return 0 if 3 * right >= 2 * size else 1 if 3 * right >= size else 2


def test_laser() -> None:
    for mode, gain, loss in (("reward", 0.5, 0.0), ("penalty", 0.0, 0.5), ("hybrid", 0.5, 0.5)):
        got = shaping.laser(LENGTH, BITS, target=30, mode=mode)
        check(got, lambda i, g=gain, s=loss: -0.5 if not BITS[i]
              else 1 + (g if LENGTH[i] <= 30 else -s))  # fmt: skip
    assert (LENGTH[BITS] == 30).any()  # on the target counts as within
    assert shaping.laser(LENGTH, BITS, target=0)[3] == 1.5 and LENGTH[3] == 0


def test_laser_takes_lengths_of_any_dtype() -> None:
    """A target that the dtype of the lengths cannot hold: it wrapped around or was rounded."""
    right = torch.ones(1, dtype=torch.bool)
    for dtype, length, target in (
        (torch.int8, 100, 300), (torch.int16, 30000, 40000), (torch.bfloat16, 2048, 2049.0),
        (torch.float16, 2048, 1e6),
    ):  # fmt: skip
        assert shaping.laser(torch.tensor([length], dtype=dtype), right, target=target) == 1.5
    assert shaping.laser(torch.tensor([2048]).bfloat16(), right, target=2047) == 1
    search = {"group": torch.zeros(1, dtype=torch.int64), "lower": 2047, "upper": 2051, "step": 1}
    found = shaping.adaptive_length_targets(torch.tensor([2048]).bfloat16(), right, **search)
    assert found[0] == 2048


def test_laser_d_and_de() -> None:
    targets = (20, 60, 40)
    assert accuracy_level(BITS, GROUP).tolist() == [level(i) for i in range(N)]
    assert {level(i) for i in range(N)} == {0, 1, 2}
    repetitive = LENGTH == 80

    def d(i: int, bonus: float = 0.5, wrong: float = -0.5) -> float:
        if not BITS[i]:
            return wrong
        return 1 + bonus if LENGTH[i] <= targets[level(i)] else 1.0

    def de(i: int, bonus: float = 0.5, wrong: float = -0.5) -> float:
        explores = not BITS[i] and LENGTH[i] > targets[level(i)] and not repetitive[i]
        return wrong + bonus if explores else d(i, bonus, wrong)

    check(shaping.laser_d(LENGTH, BITS, GROUP, targets=targets), d)
    check(shaping.laser_d(LENGTH, BITS, GROUP, targets=torch.tensor(targets)), d)
    check(shaping.laser_de(LENGTH, BITS, GROUP, targets=targets, repetitive=repetitive), de)
    other = {"targets": targets, "bonus": 0.25, "wrong": -2.0}
    check(shaping.laser_d(LENGTH, BITS, GROUP, **other), lambda i: d(i, 0.25, -2.0))
    explored = shaping.laser_de(LENGTH, BITS, GROUP, repetitive=repetitive, **other)
    check(explored, lambda i: de(i, 0.25, -2.0))
    assert {d(i) for i in range(N)} == {-0.5, 1.0, 1.5} and 0.0 in {de(i) for i in range(N)}
    assert repetitive.any()
    assert (LENGTH[~BITS] == 60).any() and (LENGTH[~BITS] == 40).any()  # not longer than its target


def test_levels_at_their_exact_bounds() -> None:
    """1/3 and 2/3 are not floats: accuracy is compared in integers."""
    for size in (3, 6, 9, 21):
        group = torch.zeros(size, dtype=torch.int64)
        at = [accuracy_level(torch.arange(size) < size * k // 3, group)[0].item() for k in (1, 2)]
        assert at == [1, 0]


def test_laser_target_search() -> None:
    length = torch.arange(1, 101).repeat(3) * 10
    group = torch.arange(300) // 100
    correct = torch.ones(300, dtype=torch.bool)
    correct[100:200] = torch.arange(100) < 40
    correct[200:] = torch.arange(100) % 10 == 0
    got = shaping.adaptive_length_targets(length, correct, group, lower=100, upper=1000, step=100)

    def search(i: int, n: int) -> int:
        right = [
            x.item() for x, c in zip(length[group == i], correct[group == i], strict=True) if c
        ]
        for target in range(100, 1001, 100):
            if math.floor(sum(x <= target for x in right) * n / len(right)) >= 1:
                return target
        return 1000

    assert got.tolist() == [search(0, 5), search(1, 2), search(2, 1)] == [200, 200, 1000]
    for rollouts, high, medium in ((6, 4, 2), (1, 1, 1)):
        grid = {"lower": 100, "upper": 1000, "step": 100, "rollouts": rollouts}
        other = shaping.adaptive_length_targets(length, correct, group, **grid)
        assert other.tolist() == [search(0, high), search(1, medium), 1000]
    one = shaping.adaptive_length_targets(  # right answer of a hundred, by the usual steps
        length[200:], torch.arange(100) == 99, group[200:], lower=1, upper=5000
    )
    assert one.tolist() == [5000, 5000, 1025]
    one = shaping.adaptive_length_targets(length, correct, group, lower=7, upper=7)
    assert one.tolist() == [7, 7, 7]
    uneven = shaping.adaptive_length_targets(length, correct, group, lower=128, upper=1000, step=64)
    assert uneven.tolist() == [256, 256, 960]
    nobody = torch.zeros(300, dtype=torch.bool)
    nothing = shaping.adaptive_length_targets(length, nobody, group, lower=1, upper=999)
    assert nothing.tolist() == [999] * 3


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_nothing_depends_on_the_default_dtype(dtype: torch.dtype) -> None:
    """Two numbers of Python that meet in a tensor are rounded to it."""
    long, targets = torch.full((N,), 1025), (1025, 1025, 1025)
    ids, sign = torch.zeros(N, 2, dtype=torch.int64), REWARD.float()
    mask = torch.ones(N, 2, dtype=torch.bool)

    def results() -> list[torch.Tensor]:
        return [
            shaping.laser(long, BITS, target=1025, bonus=0.3),
            shaping.laser_d(long, BITS, GROUP, targets=targets, bonus=0.3),
            shaping.laser_de(long, BITS, GROUP, targets=targets),
            *shaping.zero_sum_rewards(BITS, REWARD > 0),
            shaping.adactrl(long, BITS, GROUP, 0 * GROUP, tag_weight=0.3),
            shaping.conflict_token_weights(ids, sign, GROUP, mask, amplify=1.1),
        ]

    expected, usual = results(), torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        got = results()
    finally:
        torch.set_default_dtype(usual)
    for a, b in zip(got, expected, strict=True):
        assert a.dtype == torch.float32 and torch.equal(a, b)
