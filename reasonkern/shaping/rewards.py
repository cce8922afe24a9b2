"""Rewards from outcome, length and group: overlong, exits, gates, difficulty, pass@k, games."""

from __future__ import annotations

import torch
from torch import Tensor

from .. import _checks
from .groups import Groups, check_flags, check_length, check_vector, narrow, wide


def check_answers(length: Tensor, correct: Tensor) -> None:
    """Lengths (N,) beside (N,) bool outcomes."""
    check_flags("correct", correct)
    check_length(length, correct, "correct")


def overlong_penalty(
    length: Tensor, *, max_length: int, buffer: int, factor: float = 1.0
) -> Tensor:
    """Soft punishment of long answers: 0, then linear over the buffer to -factor, and no less.

    DAPO (arXiv 2503.14476), GRPO-TCR (max_length 20480, buffer 4096). verl's code lets it fall
    below -factor beyond ``max_length``. Equivalent to
    ``-factor * ((length - (max_length - buffer)) / buffer).clamp(0, 1)``.

    Args:
        length: (N,) tokens of each answer.
        max_length: length at which the penalty is -factor.
        buffer: tokens over which it grows, 1 to max_length.
        factor: >= 0.

    Returns:
        (N,) float32, to be added to the reward.

    Raises:
        ValueError: wrong shape or a number out of range; on CPU also a length that is negative or
            not finite.

    Example:
        >>> import torch
        >>> from reasonkern.shaping import overlong_penalty
        >>> overlong_penalty(torch.tensor([60, 90, 120]), max_length=100, buffer=20)
        tensor([ 0.0000, -0.5000, -1.0000])
    """
    check_length(length)
    _checks.check_number("max_length", max_length, 0, exclusive=True)
    _checks.check_number("buffer", buffer, 0, exclusive=True)
    _checks.check_number("factor", factor, 0.0)
    if buffer > max_length:
        _checks.fail("buffer", f"at most max_length = {max_length}", buffer)
    over = (wide(length) - (max_length - buffer)) / buffer
    return (0.0 - factor * over.clamp(0, 1)).float()


def grpo_lambda(
    length: Tensor,
    correct: Tensor,
    group: Tensor,
    *,
    alpha: float,
    top_fraction: float = 0.2,
) -> Tensor:
    """Length counts only where the model already succeeds: GRPO-λ (arXiv 2505.18086).

    In the ``top_fraction`` of groups with the highest accuracy a correct answer gets
    ``1 - alpha σ((L - mean) / std)``, σ the logistic function, mean and std (Bessel-corrected) over
    the correct lengths of its group; elsewhere it gets 1. Wrong answers get 0 everywhere (a public
    re-implementation gives those in top groups the length term too).

    Args:
        length: (N,) tokens of each answer.
        correct: (N,) bool.
        group: (N,) int64 ids.
        alpha: weight of the length. The paper's value is not known to us; a re-implementation
            uses 0.6.
        top_fraction: of the groups, rounded up, at least one; among groups of equal accuracy the
            lower id comes first. Paper: 20 %.

    Returns:
        (N,) float32. One correct answer, or equal lengths: σ(0) = 1/2.

    Raises:
        ValueError: wrong shape or dtype, or a number out of range; on CPU also a length that is
            negative or not finite.

    Example:
        >>> import torch
        >>> from reasonkern.shaping import grpo_lambda
        >>> length, correct = torch.tensor([10, 10, 90]), torch.tensor([True, True, False])
        >>> grpo_lambda(length, correct, torch.tensor([0, 0, 1]), alpha=0.6)
        tensor([0.7000, 0.7000, 0.0000])
    """
    check_answers(length, correct)
    _checks.check_number("alpha", alpha, 0.0)
    _checks.check_number("top_fraction", top_fraction, 0, 1)
    groups = Groups(group, correct, "correct")
    accuracy = groups.reduce(correct, "sum") / groups.offsets.diff().clamp_min(1)
    order = accuracy.argsort(descending=True, stable=True)
    place = torch.empty_like(order).scatter_(
        0, order, torch.arange(len(order), device=order.device)
    )
    # 0.07 * 100 is a little more than 7.
    count = (top_fraction * groups.exists().sum().double() - 1e-9).ceil().clamp_min(1)
    efficient = groups.spread(place < count)
    std = groups.std(length, correct)
    z = (wide(length) - groups.mean(length, correct)) / torch.where(std > 0, std, 1.0)
    shaped = torch.where(efficient, 1 - alpha * torch.sigmoid(z), 1.0)
    return torch.where(correct, shaped, 0.0).float()


def serial_decay(correct: Tensor, group: Tensor) -> Tensor:
    """Rewards early exits of one chain of thought: S-GRPO (arXiv 2505.07686).

    A group holds the answers forced from one chain, in the order of their exits, the full chain
    last: the N-th correct one gets 2^-(N-1), a wrong one 0. Advantages are r - mean, without std
    (``group_advantages(scale="none")``). Equivalent to, for one group:
    ``correct * 0.5 ** (correct.cumsum(0) - 1)``.

    Args:
        correct: (N,) bool.
        group: (N,) int64 ids; within a group the order of the batch is the order of the exits.

    Returns:
        (N,) float32.

    Raises:
        ValueError: wrong shape or dtype.

    Example:
        >>> import torch
        >>> from reasonkern.shaping import serial_decay
        >>> serial_decay(torch.tensor([False, True, True]), torch.tensor([0, 0, 0]))
        tensor([0.0000, 1.0000, 0.5000])
    """
    check_flags("correct", correct)
    before = Groups(group, correct, "correct").count_before(correct)
    return torch.where(correct, torch.exp2(-wide(before)), 0.0).float()


def concise_gated(length: Tensor, correct: Tensor, group: Tensor, *, limit: int) -> Tensor:
    """Length counts only once every rollout of a prompt is correct: ConciseR (arXiv 2505.21178).

    Where all of a group are correct (L-GRPO) the reward is ``1 + max(0, 1 - L / limit)``, else the
    plain accuracy. The gate is the paper's; its exact scale of the length term is not known to us.
    Equivalent to, for one group: ``correct + correct.all() * (1 - length / limit).clamp(min=0)``.

    Args:
        length: (N,) tokens of each answer.
        correct: (N,) bool.
        group: (N,) int64 ids.
        limit: length that earns nothing, > 0.

    Returns:
        (N,) float32.

    Raises:
        ValueError: wrong shape or dtype, or a limit that is not positive; on CPU also a length that
            is negative or not finite.

    Example:
        >>> import torch
        >>> from reasonkern.shaping import concise_gated
        >>> length, correct = torch.tensor([25, 25, 50]), torch.tensor([True, True, False])
        >>> concise_gated(length, correct, torch.tensor([0, 1, 1]), limit=100)
        tensor([1.7500, 1.0000, 0.0000])
    """
    check_answers(length, correct)
    _checks.check_number("limit", limit, 0, exclusive=True)
    every = Groups(group, correct, "correct").min(correct) > 0
    saved = (1 - wide(length) / limit).clamp_min(0)
    return (correct + torch.where(every, saved, 0.0)).float()


EASY, HARD, MISSING = 0, 1, -1


def adactrl(
    length: Tensor,
    correct: Tensor,
    group: Tensor,
    tag: Tensor,
    *,
    easy_above: float = 0.625,
    tag_weight: float = 0.5,
    length_weight: float = 0.5,
) -> Tensor:
    """Difficulty-aware budgets: AdaCtrl (arXiv 2505.18822).

    ``accuracy + tag_weight label + length_weight short``: accuracy is ±1; label is 1 where the tag
    that the answer opens with is the right one (easy iff the group's accuracy is above
    ``easy_above``), 0 where it is not and -1 without a tag; short is
    ``1 - (1 - cos(π L / L_max)) / 2`` for a correct answer tagged easy, else 0, L_max being the
    longest of the group.

    Args:
        length: (N,) tokens of each answer.
        correct: (N,) bool.
        group: (N,) int64 ids.
        tag: (N,) int64: 0 = easy, 1 = hard, -1 = missing.
        easy_above: accuracy above which a prompt is easy. Code: 0.625.
        tag_weight: the released script's 0.5; its configuration file has 1.
        length_weight: likewise.

    Returns:
        (N,) float32. Where L_max is 0, short is 1.

    Raises:
        ValueError: wrong shape or dtype, or no number; on CPU also a tag other than -1, 0, 1 and a
            length that is negative or not finite.

    Example:
        >>> import torch
        >>> from reasonkern.shaping import adactrl
        >>> length, correct = torch.tensor([50, 100]), torch.tensor([True, False])
        >>> adactrl(length, correct, torch.tensor([0, 0]), tag=torch.tensor([0, 1]))
        tensor([ 1.2500, -0.5000])
    """
    check_answers(length, correct)
    check_vector("tag", tag, correct, "correct")
    _checks.check_dtype("tag", tag, torch.int64)
    _checks.check_range("tag", tag, MISSING, HARD + 1)
    numbers = {"easy_above": easy_above, "tag_weight": tag_weight, "length_weight": length_weight}
    for name, value in numbers.items():
        _checks.check_number(name, value)
    groups = Groups(group, correct, "correct")
    accuracy = groups.sum(correct) / groups.size()  # rounded once: 3 of 10 are not above 0.3
    gold = torch.where(accuracy > easy_above, EASY, HARD)
    label = torch.where(tag == MISSING, -1.0, wide(tag == gold))
    longest = groups.max(length)
    share = wide(length) / torch.where(longest > 0, longest, 1.0)
    short = torch.where(correct & (tag == EASY), (1 + torch.cos(torch.pi * share)) / 2, 0.0)
    outcome = torch.where(correct, 1.0, -1.0)
    return (outcome + tag_weight * label + length_weight * short).float()


def format_length_surrogate(
    length: Tensor,
    answer_format: Tensor,
    soft_format: Tensor | None = None,
    *,
    scale: float = 3072.0,
    peak: float = 0.5,
) -> Tensor:
    """A reward without ground truth, from format and length ("Surrogate signals …", 2505.19439).

    With x = L / scale and p = peak: f = 1 - (1 - x/p)² up to p, then 1 - 2 ((x - p) / (1 - p))²
    (x > 1 goes on falling below -1). The reward is ``(soft_format + answer_format) / 2 + f`` where
    the answer's format is right, else ``min(0, f)``.

    Args:
        length: (N,) tokens of each answer.
        answer_format: (N,) bool, the answer is where it belongs.
        soft_format: (N,) bool, the looser format check; None = ``answer_format``.
        scale: tokens of x = 1. Code: 3072.
        peak: x of the largest f, in (0, 1). Code: 0.5.

    Returns:
        (N,) float32.

    Raises:
        ValueError: wrong shape or dtype, or a number out of range; on CPU also a length that is
            negative or not finite.

    Example:
        >>> import torch
        >>> from reasonkern.shaping import format_length_surrogate
        >>> format_length_surrogate(torch.tensor([1536, 3072]), torch.tensor([True, True]))
        tensor([2., 0.])
    """
    check_flags("answer_format", answer_format)
    check_length(length, answer_format, "answer_format")
    _checks.check_number("scale", scale, 0.0, exclusive=True)
    _checks.check_number("peak", peak, 0.0, exclusive=True)
    if peak >= 1:
        _checks.fail("peak", "a number in (0, 1)", peak)
    soft = answer_format if soft_format is None else soft_format
    check_flags("soft_format", soft, answer_format, "answer_format")
    x = wide(length) / scale
    rising, falling = 1 - (1 - x / peak).square(), 1 - 2 * ((x - peak) / (1 - peak)).square()
    f = torch.where(x <= peak, rising, falling)
    formats = (wide(soft) + wide(answer_format)) / 2
    return torch.where(answer_format, formats + f, f.clamp_max(0)).float()


def composed_all_correct(
    correct: Tensor, *, valid: Tensor | None = None, mode: str = "all"
) -> Tensor:
    """Several problems in one prompt: all or nothing, or the last one only (R-Horizon, 2510.08189).

    Equivalent to, for "all": ``(valid.any(1) & (correct | ~valid).all(1)).float()``.

    Args:
        correct: (N, k) bool, the sub-answers of each response.
        valid: (N, k) bool, for responses with fewer problems than k; None = all.
        mode: "all" (the released reward) or "last", the last valid sub-answer.

    Returns:
        (N,) float32, 1 or 0; a response without a valid sub-answer gets 0.

    Raises:
        ValueError: wrong shape or dtype, or an unknown mode.

    Example:
        >>> import torch
        >>> from reasonkern.shaping import composed_all_correct
        >>> composed_all_correct(torch.tensor([[True, True], [True, False]]))
        tensor([1., 0.])
    """
    _checks.check_choice("mode", mode, ("all", "last"))
    _checks.check_dtype("correct", correct, torch.bool)
    if correct.ndim != 2:
        _checks.fail("correct", "shape (N, k)", tuple(correct.shape))
    used = torch.ones_like(correct) if valid is None else valid
    _checks.check_dtype("valid", used, torch.bool)
    _checks.check_shape("valid", used, correct.shape, "correct.shape")
    _checks.check_device("valid", used, correct, "correct")
    if mode == "all":
        return (used.any(1) & (correct | ~used).all(1)).float()
    from_end = used.flip(1).cumsum(1).flip(1)
    return (used & correct & (from_end == 1)).any(1).float()


def pass_at_k_reward(reward: Tensor, group: Tensor) -> Tensor:
    """Rewards a group for its best member: the margin of the best over the second best.

    The first sample with the largest reward gets max - second max, which is what the maximum over
    the group would lose without it; the others 0 (arXiv 2503.19595). verl's ``grpo_passk`` divides
    by the group's std + 1e-6 unless ``norm_adv_by_std_in_grpo`` is off. Equivalent to, for one
    group: ``first, second = reward.topk(2).values``, and first - second at ``reward.argmax()``.

    Args:
        reward: (N,), one per sequence.
        group: (N,) int64 ids.

    Returns:
        (N,) float32 (float64 for float64 rewards); all 0 in a group of one and where the best is
        not alone.

    Raises:
        ValueError: wrong shape or dtype; on CPU also a reward that is not finite.

    Example:
        >>> import torch
        >>> from reasonkern.shaping import pass_at_k_reward
        >>> pass_at_k_reward(torch.tensor([0.0, 1.0, 0.25]), torch.tensor([0, 0, 0]))
        tensor([0.0000, 0.7500, 0.0000])
    """
    check_vector("reward", reward)
    groups = Groups(group, reward, "reward")
    _checks.check_finite("reward", reward, expected="finite numbers")
    r = wide(reward)
    best = r == groups.max(r)
    chosen = best & (groups.count_before(best) == 0)
    second = groups.max(torch.where(chosen, -torch.inf, r))
    return narrow(torch.where(chosen & (groups.size() > 1), r - second, 0.0), reward)


def zero_sum_rewards(detected: Tensor, harmful: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """The adversarial game of SPC (arXiv 2504.19162): a sneaky generator against a step critic.

    The generator plants an error, the critic says whether the step is wrong. Who wins gets 1 and
    the other -1. Train both with `reasonkern.Objective.reinforce` or any other objective.
    Equivalent to, where all rounds count: ``critic = 2.0 * detected - 1; generator = -critic``.

    Args:
        detected: (N,) bool, the critic called the planted step wrong.
        harmful: (N,) bool, False where the planted step changed nothing for the worse and so was
            no error: the round does not count, both get 0. None = all count.

    Returns:
        (generator reward, critic reward), (N,) float32 each, that add up to 0.

    Raises:
        ValueError: wrong shape or dtype.

    Example:
        >>> import torch
        >>> from reasonkern.shaping import zero_sum_rewards
        >>> zero_sum_rewards(torch.tensor([True, False]))
        (tensor([-1.,  1.]), tensor([ 1., -1.]))
    """
    check_flags("detected", detected)
    critic = 2 * detected.float() - 1
    if harmful is not None:
        critic = critic.where(check_flags("harmful", harmful, detected, "detected"), 0.0)
    return 0.0 - critic, critic
