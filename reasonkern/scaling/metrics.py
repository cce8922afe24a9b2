"""Numbers about repeated sampling: pass@k, difficulty grades, chains that improve, lengths."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from .. import _checks
from .._checks import check_tensor
from .._fields import documented


def pass_at_k(n: int | Tensor, c: int | Tensor, k: int) -> Tensor:
    """The unbiased estimate of pass@k, 1 - C(n - c, k) / C(n, k) (arXiv 2107.03374).

    As ``-expm1(Σ_j log1p(-c / (n - j)))`` over j < k: no factorial overflows, no digit is lost for
    small or large c, and k = 1024 (MATH-Beyond, arXiv 2510.11653) of n = 4096 samples is exact to
    1e-14. For repeats average over the first dimension.

    Args:
        n: samples per problem, a number or integer tensor.
        c: right ones among them, a number or integer tensor (``correct.sum(-1)`` of verdicts);
            0 <= c <= n.
        k: 1 <= k <= n.

    Returns:
        float64, of the broadcast shape of n and c.

    Raises:
        ValueError: k < 1, and on CPU k > n or c outside [0, n] (on CUDA those give NaN).

    Example:
        >>> import torch
        >>> from reasonkern.scaling import pass_at_k
        >>> pass_at_k(4, torch.tensor([0, 1, 2, 3]), 2)
        tensor([0.0000, 0.5000, 0.8333, 1.0000], dtype=torch.float64)
    """
    _checks.check_integer("k", k, 1)
    for name, x in (("n", n), ("c", c)):
        if not isinstance(x, Tensor):
            _checks.check_integer(name, x, 0)
        elif check_tensor(name, x).dtype.is_floating_point or x.dtype == torch.bool:
            _checks.fail(name, "an integer or a tensor of integers", x.dtype)
    if isinstance(n, Tensor) and isinstance(c, Tensor):
        _checks.check_device("c", c, n, "n")
    at = next((x.device for x in (n, c) if isinstance(x, Tensor)), None)
    total, right = (
        x.double()
        if isinstance(x, Tensor)
        else torch.full((), int(x), dtype=torch.float64, device=at)
        for x in (n, c)
    )
    try:
        total, right = torch.broadcast_tensors(total, right)
    except RuntimeError:
        expected = f"a shape that broadcasts with that of n, {tuple(total.shape)}"
        _checks.fail("c", expected, tuple(right.shape))
    invalid = (right < 0) | (right > total) | (k > total)
    if _checks.reads_values(total) and invalid.any():
        where = int(invalid.flatten().nonzero()[0])
        got = f"n = {total.flatten()[where]:g}, c = {right.flatten()[where]:g}, k = {k}"
        _checks.fail("n, c, k", "0 <= c <= n and k <= n", got)
    j = torch.arange(k, device=total.device)
    # Fewer than k wrong samples: some draw must be right, and a factor is 0.
    ratio = (right.unsqueeze(-1) / (total.unsqueeze(-1) - j)).clamp(0, 1)
    passed = 0.0 - torch.expm1(torch.log1p(-ratio).sum(-1))
    return torch.where(invalid, torch.nan, passed)


@documented
class Difficulty(NamedTuple):
    """What `difficulty_grade` returns, (P,) each.

    Attributes:
        pass_rate: float64, mean score.
        variation: float64, coefficient of variation: std / mean; 0 where all scores are equal, 0
            among them.
        grade: int64: 0 for the easiest problems, one more for every threshold the pass rate is
            below.
    """

    pass_rate: Tensor
    variation: Tensor
    grade: Tensor


def difficulty_grade(
    scores: Tensor, *, thresholds: tuple[float, ...] = (2 / 3, 1 / 3)
) -> Difficulty:
    """Grades problems by pass rate and its coefficient of variation: DeepDistill (2504.17565).

    Equivalent to ``x.mean(1)`` and ``x.std(1, correction=0) / x.mean(1)``, x = scores.double().

    Args:
        scores: (P, R), R >= 1 repeats of P problems, bool or numbers >= 0.
        thresholds: descending pass rates that part the grades. The paper's are not known to us.

    Returns:
        `Difficulty`.

    Raises:
        ValueError: wrong shape, no repeats, or thresholds that do not descend; on CPU also a score
            that is negative or not finite.

    Example:
        >>> import torch
        >>> from reasonkern.scaling import difficulty_grade
        >>> difficulty_grade(torch.tensor([[1, 1, 1, 1], [1, 0, 0, 1], [0, 0, 0, 0]])).grade
        tensor([0, 1, 2])
    """
    if check_tensor("scores", scores).ndim != 2 or scores.shape[1] == 0:
        _checks.fail("scores", "shape (P, R), R >= 1", tuple(scores.shape))
    _checks.check_list("thresholds", thresholds, "descending numbers")
    for i, threshold in enumerate(thresholds):
        _checks.check_number(f"thresholds[{i}]", threshold)
    if list(thresholds) != sorted(set(thresholds), reverse=True):
        _checks.fail("thresholds", "descending numbers", thresholds)
    x = scores.double()
    if _checks.reads_values(x):
        _checks.check_all("scores", x, (x >= 0) & x.isfinite(), "finite numbers >= 0")
    # Of equal scores the mean, and so the deviation, may be off in the last digit.
    differ = x.amax(1) != x.amin(1)  # NaN differs
    mean = torch.where(differ, x.mean(1), x[:, 0])
    std = x.std(1, correction=0) if len(x) else mean  # torch warns of a std of no numbers
    variation = torch.where(differ, std / mean, 0.0)
    grade = torch.zeros_like(mean, dtype=torch.int64)
    for threshold in thresholds:
        grade += mean < threshold
    return Difficulty(mean, variation, grade)


@documented
class LengthStatistics(NamedTuple):
    """What `length_statistics` returns: 0-dim float64, NaN over no answer.

    Attributes:
        mean: tokens per answer.
        std: bessel-corrected; NaN for fewer than two answers.
        mean_correct: tokens per correct answer.
        mean_wrong: tokens per wrong answer.
    """

    mean: Tensor
    std: Tensor
    mean_correct: Tensor
    mean_wrong: Tensor


def length_statistics(length: Tensor, correct: Tensor) -> LengthStatistics:
    """What reasoning costs: tokens over all, correct and wrong answers.

    The test-time compute of "When Reasoning Meets Compression" (arXiv 2504.02010).
    Equivalent to ``x.mean(), x.std(), x[correct].mean(), x[~correct].mean()``, x = length.double(),
    without the synchronisation of the last two.

    Args:
        length: tokens of each answer, any shape.
        correct: bool, the shape of ``length``.

    Returns:
        `LengthStatistics`. A mean over nothing is NaN: there is no such number.

    Raises:
        ValueError: wrong shape or dtype.

    Example:
        >>> import torch
        >>> from reasonkern.scaling import length_statistics
        >>> length_statistics(torch.tensor([2, 4, 9]), torch.tensor([True, True, False])).mean_wrong
        tensor(9., dtype=torch.float64)
    """
    _checks.check_dtype("correct", correct, torch.bool)
    _checks.check_shape("length", length, correct.shape, "correct.shape")
    _checks.check_device("length", length, correct, "correct")
    x = length.double()

    def mean(where: Tensor) -> Tensor:
        return torch.where(where, x, 0.0).sum() / where.sum()

    every = torch.ones_like(correct)
    deviation = (x - mean(every)).square().sum() / (x.numel() - 1 if x.numel() > 1 else torch.nan)
    return LengthStatistics(mean(every), deviation.sqrt(), mean(correct), mean(~correct))


@documented
class Improvement(NamedTuple):
    """What `markov_improvement` returns: 0-dim float64.

    Attributes:
        p_improve: wrong → right in one iteration.
        p_degrade: right → wrong.
        stationary: accuracy that the chain tends to: p_improve / (p_improve + p_degrade).
    """

    p_improve: Tensor
    p_degrade: Tensor
    stationary: Tensor


def markov_improvement(correct: Tensor, *, prior: float = 0.0) -> Improvement:
    """Self-refinement as a chain of two states: Deep Self-Evolving Reasoning (arXiv 2510.17498).

    However weak the model, as long as p_improve > p_degrade the chain's stationary accuracy is
    above 1/2, and a vote over the tail of several chains finds the answer (`tail_answers`).
    Equivalent to, for ``prior=0``, with c = ``correct``::

        p_improve = (~c[:, :-1] & c[:, 1:]).sum() / (~c[:, :-1]).sum()
        p_degrade = (c[:, :-1] & ~c[:, 1:]).sum() / c[:, :-1].sum()
        stationary = p_improve / (p_improve + p_degrade)

    Args:
        correct: (chains, steps) bool, whether each iteration's answer is right.
        prior: transitions of each of the four kinds added to the counts. With 0 the probability of
            leaving a state that was never left behind is 0.

    Returns:
        `Improvement`. Where neither kind of change was seen, the accuracy of the last iteration.

    Raises:
        ValueError: wrong shape or dtype, no iteration, or a negative prior.

    Example:
        >>> import torch
        >>> from reasonkern.scaling import markov_improvement
        >>> markov_improvement(torch.tensor([[False, True, True], [True, False, True]])).p_improve
        tensor(1., dtype=torch.float64)
    """
    _checks.check_dtype("correct", correct, torch.bool)
    if correct.ndim != 2 or correct.numel() == 0:
        _checks.fail("correct", "shape (chains, steps), one or more of each", tuple(correct.shape))
    _checks.check_number("prior", prior, 0.0)
    before, after = correct[:, :-1], correct[:, 1:]

    def rate(state: Tensor, change: Tensor) -> Tensor:
        seen = state.sum().double() + 2 * prior
        changed = (state & change).sum().double() + prior
        return changed / seen.clamp_min(1e-300)  # of nothing seen nothing changed

    improve, degrade = rate(~before, after), rate(before, ~after)
    either = improve + degrade
    last = correct[:, -1].double().mean()
    return Improvement(improve, degrade, torch.where(either > 0, improve / either, last))


def tail_answers(answer_ids: Tensor, last: int = 10) -> Tensor:
    """The answers of the last iterations of all chains, for `vote_ids` (arXiv 2510.17498).

    Args:
        answer_ids: (B, chains, steps) int64.
        last: iterations of each chain that vote, all if there are fewer. Paper: about 10.

    Returns:
        (B, chains * min(last, steps)), the latest iteration first, so that it wins a tie.

    Raises:
        ValueError: wrong shape or dtype, or ``last`` below 1.

    Example:
        >>> import torch
        >>> from reasonkern.scaling import tail_answers
        >>> tail_answers(torch.tensor([[[1, 2, 3], [4, 5, 6]]]), last=2)
        tensor([[3, 6, 2, 5]])
    """
    _checks.check_dtype("answer_ids", answer_ids, torch.int64)
    if answer_ids.ndim != 3:
        _checks.fail("answer_ids", "shape (B, chains, steps)", tuple(answer_ids.shape))
    _checks.check_integer("last", last, 1)
    return answer_ids[:, :, -last:].flip(2).transpose(1, 2).flatten(1)
