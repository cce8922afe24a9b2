"""LASER, LASER-D and LASER-DE: a step reward for short answers with targets by difficulty."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from .. import _checks
from .groups import Groups, check_flags, wide
from .rewards import check_answers

MODES = ("reward", "penalty", "hybrid")


def laser(
    length: Tensor,
    correct: Tensor,
    *,
    target: float | Tensor,
    mode: str = "reward",
    bonus: float = 0.5,
    wrong: float = -0.5,
) -> Tensor:
    """A bonus for correct answers within a target length: LASER (arXiv 2505.15612).

    A correct answer gets 1 plus, by mode: "reward": bonus if L <= target; "penalty": -bonus if
    L > target; "hybrid": both. A wrong one gets ``wrong``. Equivalent to, for "reward":
    ``torch.where(correct, 1 + bonus * (length <= target), wrong)``. (The released code writes each
    reward at the end of the batch's last sample, which a sum over tokens hides.)

    Args:
        length: (N,) tokens of each answer.
        correct: (N,) bool.
        target: L_T, a number (paper: 2048, 4096, 8192) or one per sequence (N,).
        mode: "reward", "penalty" or "hybrid".
        bonus: reward of being short enough. Code: 0.5.
        wrong: reward of a wrong answer. Code: -0.5.

    Returns:
        (N,) float32.

    Raises:
        ValueError: wrong shape or dtype, an unknown mode, or no number; on CPU also a length that
            is negative or not finite and a target that is not finite.

    Example:
        >>> import torch
        >>> from reasonkern.shaping import laser
        >>> laser(torch.tensor([10, 90, 10]), torch.tensor([True, True, False]), target=50)
        tensor([ 1.5000,  1.0000, -0.5000])
    """
    check_answers(length, correct)
    _checks.check_choice("mode", mode, MODES)
    for name, value in (("bonus", bonus), ("wrong", wrong)):
        _checks.check_number(name, value)
    if isinstance(target, Tensor):
        _checks.check_shape("target", target, length.shape, "length.shape")
        _checks.check_device("target", target, length, "length")
        _checks.check_finite("target", target, expected="finite numbers")
    else:
        _checks.check_number("target", target, 0.0)
    short = wide(wide(length) <= target)  # a small dtype would wrap or round the target
    gained = short * (bonus if mode != "penalty" else 0.0)
    lost = (1 - short) * (bonus if mode != "reward" else 0.0)
    return torch.where(correct, 1 + gained - lost, wrong).float()


def laser_d(
    length: Tensor,
    correct: Tensor,
    group: Tensor,
    *,
    targets: Sequence[float] | Tensor,
    bonus: float = 0.5,
    wrong: float = -0.5,
) -> Tensor:
    """LASER with a target by difficulty: LASER-D (arXiv 2505.15612).

    The accuracy of a group makes it high (>= 2/3), medium (>= 1/3) or low, and each level has its
    own target, searched for by `adaptive_length_targets`. Equivalent to, for one group of the first
    level: ``laser(length, correct, target=targets[0])``.

    Args:
        length: (N,) tokens of each answer.
        correct: (N,) bool.
        group: (N,) int64 ids.
        targets: three, for high, medium and low accuracy.
        bonus: reward of being short enough. Code: 0.5.
        wrong: reward of a wrong answer. Code: -0.5.

    Returns:
        (N,) float32.

    Raises:
        ValueError: wrong shape or dtype, not three targets, or no number; on CPU also a length that
            is negative or not finite and a target that is not finite.

    Example:
        >>> import torch
        >>> from reasonkern.shaping import laser_d
        >>> length, correct = torch.tensor([10, 90, 90]), torch.tensor([True, True, True])
        >>> laser_d(length, correct, torch.tensor([0, 0, 0]), targets=(50, 100, 200))
        tensor([1.5000, 1.0000, 1.0000])
    """
    check_answers(length, correct)
    target = _spread_targets(targets, accuracy_level(correct, group))
    return laser(length, correct, target=target, bonus=bonus, wrong=wrong)


def laser_de(
    length: Tensor,
    correct: Tensor,
    group: Tensor,
    *,
    targets: Sequence[float] | Tensor,
    repetitive: Tensor | None = None,
    bonus: float = 0.5,
    wrong: float = -0.5,
) -> Tensor:
    """LASER-D that also pays for exploring: LASER-DE (arXiv 2505.15612).

    A wrong answer longer than its target gets ``wrong + bonus``, unless it only repeats itself.
    Equivalent to ``torch.where(~correct & (length > target) & ~repetitive, wrong + bonus, d)``,
    with d of `laser_d` and the target of each group's level.

    Args:
        length: (N,) tokens of each answer.
        correct: (N,) bool.
        group: (N,) int64 ids.
        targets: three, for high, medium and low accuracy.
        repetitive: (N,) bool, answers in which a repetition detector found a loop; None = none.
        bonus: reward of being short enough. Code: 0.5.
        wrong: reward of a wrong answer. Code: -0.5.

    Returns:
        (N,) float32.

    Raises:
        ValueError: wrong shape or dtype, not three targets, or no number; on CPU also a length that
            is negative or not finite and a target that is not finite.

    Example:
        >>> import torch
        >>> from reasonkern.shaping import laser_de
        >>> length, correct = torch.tensor([90, 300]), torch.tensor([True, False])
        >>> laser_de(length, correct, torch.tensor([0, 0]), targets=(50, 100, 200))
        tensor([1.5000, 0.0000])
    """
    check_answers(length, correct)
    target = _spread_targets(targets, accuracy_level(correct, group))
    out = laser(length, correct, target=target, bonus=bonus, wrong=wrong)
    explores = ~correct & (wide(length) > target)
    if repetitive is not None:
        explores = explores & ~check_flags("repetitive", repetitive, correct, "correct")
    return torch.where(explores, wrong + bonus, out)


def adaptive_length_targets(
    length: Tensor,
    correct: Tensor,
    group: Tensor,
    *,
    lower: int,
    upper: int,
    step: int = 1024,
    rollouts: int = 8,
) -> Tensor:
    """The target search of LASER-D: per level the shortest length that keeps one correct answer.

    The automatic adaptation of arXiv 2505.15612, with the numbers of its released code.
    Among ``lower, lower + step, …, upper`` the smallest ℓ with ⌊cover(ℓ) n⌋ >= 1: cover is the
    share of a level's correct answers (on a monitoring set) that are no longer than ℓ, and n the
    correct answers that a group of the level has at least: ⌊2/3 rollouts⌋ for high, ⌊1/3 rollouts⌋
    for medium, both at least 1, and 1 for low, so low needs all of them. Compared in integers. In
    the released code cover counts wrong answers, too, levels begin above their bounds (in the
    search alone), and no target is longer than the batch's longest answer.

    Args:
        length: (N,) tokens of the monitoring set's answers.
        correct: (N,) bool.
        group: (N,) int64 ids.
        lower: first candidate.
        upper: last candidate; the target of a level without correct answers, or without a
            candidate that covers enough.
        step: between candidates. Code: 1024.
        rollouts: answers per prompt. Code: 8.

    Returns:
        (3,) int64: targets for high, medium and low accuracy.

    Raises:
        ValueError: wrong shape or dtype, or a number out of range; on CPU also a length that is
            negative or not finite.

    Example:
        >>> import torch
        >>> from reasonkern.shaping import adaptive_length_targets
        >>> length, correct = torch.tensor([40, 60, 150]), torch.tensor([True, True, False])
        >>> group = torch.tensor([0, 0, 1])
        >>> adaptive_length_targets(length, correct, group, lower=50, upper=200, step=50)
        tensor([ 50, 200, 200])
    """
    check_answers(length, correct)
    for name, value in (("lower", lower), ("step", step), ("rollouts", rollouts)):
        _checks.check_integer(name, value, 1)
    _checks.check_integer("upper", upper)
    if upper < lower:
        _checks.fail("upper", f"an integer >= lower = {lower}", upper)
    level = accuracy_level(correct, group)
    count = -(-(upper - lower) // step) + 1
    candidates = (lower + step * torch.arange(count, device=length.device)).clamp_max(upper)
    kept = max(rollouts * 2 // 3, 1), max(rollouts // 3, 1), 1
    out = []
    for i, n in enumerate(kept):
        counted = correct & (level == i)
        covered = counted[:, None] & (wide(length)[:, None] <= candidates)
        enough = n * covered.sum(0) >= counted.sum().clamp_min(1)
        enough[-1] = True
        out.append(candidates.gather(0, enough.long().argmax(0, keepdim=True)).squeeze(0))
    return torch.stack(out)


def accuracy_level(correct: Tensor, group: Tensor) -> Tensor:
    """(N,) int64: 0, 1, 2 for groups with accuracy >= 2/3, >= 1/3, below; exact in integers."""
    groups = Groups(group, correct, "correct")
    right, size = groups.sum(correct), groups.size()
    return 2 - (3 * right >= size).long() - (3 * right >= 2 * size).long()


def _spread_targets(targets: Sequence[float] | Tensor, level: Tensor) -> Tensor:
    if isinstance(targets, Tensor):
        _checks.check_shape("targets", targets, (3,), "(levels,)")
        _checks.check_device("targets", targets, level, "length")
        _checks.check_finite("targets", targets, expected="finite numbers")
        return wide(targets)[level]
    three = "three numbers, for high, medium and low accuracy"
    _checks.check_list("targets", targets, three)
    if len(targets) != 3:
        _checks.fail("targets", three, targets)
    for i, target in enumerate(targets):
        _checks.check_number(f"targets[{i}]", target)
    high, medium, low = (float(t) for t in targets)
    # Two numbers alone would meet in torch's default dtype.
    rest = torch.where(level == 1, medium, torch.full_like(level, low, dtype=torch.float64))
    return torch.where(level == 0, high, rest)
