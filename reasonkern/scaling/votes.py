"""Choosing an answer by votes: majority, by temperature, over subthoughts, by verifiers.

Answers are Python objects, one question at a time, so `vote` and `temperature_vote` loop over them;
`vote_ids` and `cons_at_k` take ids of a whole batch.
"""

from __future__ import annotations

import math
import re
from collections.abc import Collection, Hashable, Sequence
from itertools import pairwise
from numbers import Number
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .. import _checks
from .._checks import check_tensor
from .._fields import documented
from ..shaping.groups import Groups

TIES = ("earliest", "latest", "none")


@documented
class Vote(NamedTuple):
    """What `vote` returns.

    Attributes:
        answer: the winner; None when nobody voted, or with weight 0 alone, or after a tie with
            tie="none".
        share: its part of the votes cast, 0 without a winner.
        votes: votes by answer, in the order of their first appearance.
    """

    answer: Any
    share: float
    votes: dict[Any, float]


def vote(
    answers: Sequence[Hashable],
    weights: Sequence[float] | Tensor | None = None,
    *,
    tie: str = "earliest",
) -> Vote:
    """Majority vote over answers already brought to one form (self-consistency, arXiv 2203.11171).

    Also the mode over subthoughts (arXiv 2504.20708: ties go to the earliest answer), the label of
    ETTRL, the agreement of SIFT's two predictions (``tie="none"``: two answers that differ elect
    nobody), the last step of DeepPrune and of multi-agent debate; with the traces' confidences as
    weights, 0 for a trace that is filtered out, that of DeepConf (arXiv 2508.15260).

    Args:
        answers: one per sample; None is no answer and no vote.
        weights: one number >= 0 per sample, a list or a tensor; None = 1 each.
        tie: "earliest": the answer that appeared first wins; "latest": the one whose first
            appearance is last; "none": nobody.

    Returns:
        `Vote`.

    Raises:
        ValueError: no list, an unknown tie rule, weights of another length, negative or not finite,
            or an answer that is a tensor, NaN or not hashable.

    Example:
        >>> from reasonkern.scaling import vote
        >>> vote(["7", "12", "12", None, "7"]).answer
        '7'
    """
    _checks.check_choice("tie", tie, TIES)
    _checks.check_list("answers", answers, "answers, one per sample")
    if weights is None:
        weights = [1.0] * len(answers)
    elif isinstance(weights, Tensor):
        weights = weights.tolist()
    _checks.check_list("weights", weights, "numbers, one per answer")
    if len(weights) != len(answers):
        _checks.fail("weights", f"{len(answers)} numbers, one per answer", len(weights))
    votes: dict[Any, float] = {}
    for i, (answer, weight) in enumerate(zip(answers, weights, strict=True)):
        _checks.check_number(f"weights[{i}]", weight, 0.0)
        if isinstance(answer, Tensor) or not isinstance(answer, Hashable) or _is_nan(answer):
            # Tensors are hashed by identity, NaN equals nothing: no two would agree.
            expected = "a string, a number or the like (a tensor of ids goes to vote_ids)"
            got = "nan" if _is_nan(answer) else type(answer).__name__
            _checks.fail(f"answers[{i}]", expected, got)
        if answer is not None:
            votes[answer] = votes.get(answer, 0.0) + float(weight)
    total = sum(votes.values())
    if total == 0:
        return Vote(None, 0.0, votes)
    most = max(votes.values())
    first, *others = [answer for answer, count in votes.items() if count == most]
    if others and tie == "none":
        return Vote(None, 0.0, votes)
    winner = others[-1] if others and tie == "latest" else first
    return Vote(winner, most / total, votes)


def _is_nan(answer: object) -> bool:
    return isinstance(answer, Number) and bool(answer != answer)  # NumPy's and Decimal's, too


@documented
class TemperatureVote(NamedTuple):
    """What `temperature_vote` returns.

    Attributes:
        answer: the winner over the temperatures, None without any vote.
        done: the question is easy: enough temperatures agree, no more samples are needed.
        by_temperature: the vote within each temperature, ascending.
    """

    answer: Any
    done: bool
    by_temperature: dict[float, Vote]


def temperature_vote(
    answers: Sequence[Hashable],
    temperature: Sequence[float],
    *,
    intra: float = 0.8,
    cross: float = 1.0,
) -> TemperatureVote:
    """Votes within each temperature, then across them, with early exit (arXiv 2510.02611).

    A temperature is confident when at least ``intra`` of its samples, those without an answer
    included, gave its winner; the question is done when at least ``cross`` of the temperatures are
    confident of the same answer, which is then the winner. Else each temperature casts one vote for
    its own; a tie goes to the lowest one's.

    Args:
        answers: one per sample; None is no answer.
        temperature: that at which each sample was drawn, >= 0.
        intra: σ_intra in (0, 1]. Paper: 0.8.
        cross: σ_cross in (0, 1]. Paper: 1.

    Returns:
        `TemperatureVote`.

    Raises:
        ValueError: no lists, lists of different length, no temperature or a share outside (0, 1].

    Example:
        >>> from reasonkern.scaling import temperature_vote
        >>> temperature_vote(["7", "7", "7", "9"], [0.6, 0.6, 1.0, 1.0]).answer
        '7'
    """
    _checks.check_list("answers", answers, "answers, one per sample")
    _checks.check_list("temperature", temperature, "numbers, one per answer")
    if len(temperature) != len(answers):
        _checks.fail("temperature", f"{len(answers)} numbers, one per answer", len(temperature))
    for name, share in (("intra", intra), ("cross", cross)):
        _checks.check_number(name, share, 0, 1, exclusive=True)
    for i, t in enumerate(temperature):
        _checks.check_number(f"temperature[{i}]", t, 0.0)
    samples: dict[float, list[Hashable]] = {t: [] for t in sorted(set(temperature))}
    for answer, t in zip(answers, temperature, strict=True):
        samples[t].append(answer)
    inside = {t: vote(given) for t, given in samples.items()}
    final = vote([v.answer for v in inside.values()])
    confident = [
        v.answer
        for t, v in inside.items()
        if v.answer is not None and v.votes[v.answer] / len(samples[t]) >= intra
    ]
    agreed = max((confident.count(a) for a in confident), default=0)
    done = agreed > 0 and agreed >= float(cross) * len(inside) - 1e-9  # 0.7 * 10 is more than 7
    answer = max(confident, key=confident.count) if done else final.answer
    return TemperatureVote(answer, done, inside)


# Words that open a new thought, after arXiv 2504.20708; the order does not matter.
MARKERS = (
    "Wait", "Alternatively", "Another angle", "Another approach", "But wait", "Hold on", "Hmm",
    "Maybe", "Looking back", "Okay", "Let me", "First", "Then", "Alright", "Compute", "Correct",
    "Good", "Got it", "I don't see any errors", "I think", "Let me double-check", "Let's see",
    "Now", "Remember", "Seems solid", "Similarly", "So", "Starting", "That's correct",
    "That seems right", "Therefore", "Thus",
)  # fmt: skip


def subthought_split(text: str, markers: Collection[str] = MARKERS) -> list[str]:
    """Cuts a reasoning trace before every marker: its subthoughts (arXiv 2504.20708).

    Complete the answer from every prefix ``"".join(parts[: i + 1])`` and take the mode,
    ``vote(answers)``.

    Args:
        text: the trace.
        markers: words or phrases; none is found inside a longer word, case counts, the longest one
            is taken.

    Returns:
        The parts, whose concatenation is the text; one part without a marker, none for "".

    Raises:
        ValueError: an empty marker, or none.

    Example:
        >>> from reasonkern.scaling import subthought_split
        >>> subthought_split("x = 2. Wait, 2 + 2. So x = 4.")
        ['x = 2. ', 'Wait, 2 + 2. ', 'So x = 4.']
    """
    if not isinstance(text, str):
        _checks.fail("text", "a string", type(text).__name__)
    _checks.check_list("markers", markers, "words or phrases", ordered=False)
    if not len(markers) or not all(isinstance(m, str) and m for m in markers):
        _checks.fail("markers", "one word or more, none of them empty", markers)
    longest_first = sorted(markers, key=len, reverse=True)
    pattern = "|".join(re.escape(marker) for marker in longest_first)
    edge = r"(?!(?<=\w)\w)"  # not between two letters, which a marker such as "\n\n" may touch
    cuts = [m.start() for m in re.finditer(rf"{edge}(?:{pattern}){edge}", text)]
    bounds = [0, *cuts, len(text)]
    return [text[a:b] for a, b in pairwise(bounds) if a < b]


def vote_ids(answer_ids: Tensor, weights: Tensor | None = None) -> Tensor:
    """`vote` for a batch of questions on the device; ties go to the earliest answer.

    Equivalent to, where all ids are >= 0:
    ``torch.tensor([vote(row.tolist()).answer for row in answer_ids])``. By sorting: O(N log N).

    Args:
        answer_ids: (B, N) int64, equal ids = equal answers; a negative id is no vote.
        weights: (B, N) >= 0; None = 1 each.

    Returns:
        (B,) int64, the winning id, -1 where nobody voted, or with weight 0 alone.

    Raises:
        ValueError: wrong shape, dtype or device; on CPU also a weight that is negative or not
            finite.

    Example:
        >>> import torch
        >>> from reasonkern.scaling import vote_ids
        >>> vote_ids(torch.tensor([[3, 5, 5, 3], [-1, -1, 0, -1]]))
        tensor([3, 0])
    """
    _check_ids(answer_ids)
    batch, count = answer_ids.shape
    if count == 0:
        return answer_ids.new_full((batch,), -1)
    if weights is not None:
        _checks.check_shape("weights", weights, answer_ids.shape, "answer_ids.shape")
        _checks.check_device("weights", weights, answer_ids, "answer_ids")
        if _checks.reads_values(weights):
            right = (weights >= 0) & weights.isfinite()
            _checks.check_all("weights", weights, right, "finite numbers >= 0")
    one = torch.ones_like(answer_ids, dtype=torch.float64)
    cast = torch.where(answer_ids >= 0, one if weights is None else weights.double(), 0.0)
    # The answers of all questions numbered through: a group is those who gave the same one.
    ids, order = answer_ids.sort(dim=1, stable=True)
    other = torch.ones_like(ids, dtype=torch.bool)
    other[:, 1:] = ids[:, 1:] != ids[:, :-1]
    number = torch.empty_like(order).scatter_(1, order, other.flatten().cumsum(0).view_as(order))
    voters = Groups(number.flatten(), cast.flatten(), "answer_ids")
    votes = voters.sum(cast.flatten()).view_as(cast)
    best = votes.argmax(1, keepdim=True)  # the first one among equals
    winner = answer_ids.gather(1, best)[:, 0]
    return torch.where(votes.gather(1, best)[:, 0] > 0, winner, -1)


def cons_at_k(answer_ids: Tensor, reference: Tensor, k: int) -> Tensor:
    """Whether the majority of the first k samples is right: cons@k, maj@k (TTT-Bench, 2506.10209).

    Equivalent to ``vote_ids(answer_ids[:, :k]) == reference``, but that where nobody voted nothing
    is right.

    Args:
        answer_ids: (B, N) int64, as for `vote_ids`.
        reference: (B,) int64, the right answers' ids.
        k: 1 to N.

    Returns:
        (B,) bool; their mean is the benchmark's number.

    Raises:
        ValueError: wrong shape, dtype or device, or k outside [1, N].

    Example:
        >>> import torch
        >>> from reasonkern.scaling import cons_at_k
        >>> cons_at_k(torch.tensor([[3, 5, 5], [0, 1, 2]]), torch.tensor([5, 2]), k=3)
        tensor([ True, False])
    """
    _check_ids(answer_ids)
    _checks.check_dtype("reference", reference, torch.int64)
    _checks.check_shape("reference", reference, answer_ids.shape[:1], "(B,)")
    _checks.check_device("reference", reference, answer_ids, "answer_ids")
    _checks.check_integer("k", k, 1, answer_ids.shape[1])
    winner = vote_ids(answer_ids[:, :k])
    return (winner == reference) & (winner >= 0)


def _check_ids(answer_ids: Tensor) -> None:
    if check_tensor("answer_ids", answer_ids).ndim != 2:
        _checks.fail("answer_ids", "shape (B, N)", tuple(answer_ids.shape))
    _checks.check_dtype("answer_ids", answer_ids, torch.int64)


@documented
class Verification(NamedTuple):
    """What `flexible_verification` returns, (B,) each.

    Attributes:
        accepted: bool: more votes for than against; a tie rejects.
        escalate: bool: the votes disagree too much, ask the slow verifier.
        used: int64: votes after which ``escalate`` is certain and, where it is False, ``accepted``
            too; the rest need not be sampled.
    """

    accepted: Tensor
    escalate: Tensor
    used: Tensor


def flexible_verification(votes: Tensor, agreement: float = 1.0) -> Verification:
    """A few fast verifier votes, more thinking only on disagreement: FlexiVe (arXiv 2505.11966).

    A solution is settled when the larger side holds at least ``agreement`` of all k votes, and goes
    to the slow verifier otherwise. Votes are counted in order; ``used`` is where one could stop:
    the verdict is settled, or no longer can be.

    Args:
        votes: (B, k) bool, True = the solution was judged right.
        agreement: share in (1/2, 1]; 1 = unanimous. The paper's threshold is not known to us.

    Returns:
        `Verification`.

    Raises:
        ValueError: wrong shape or dtype, no votes, or a share out of range.

    Example:
        >>> import torch
        >>> from reasonkern.scaling import flexible_verification
        >>> flexible_verification(torch.tensor([[True, True], [True, False]])).escalate
        tensor([False,  True])
    """
    _checks.check_dtype("votes", votes, torch.bool)
    if votes.ndim != 2 or votes.shape[1] == 0:
        _checks.fail("votes", "shape (B, k), k >= 1", tuple(votes.shape))
    _checks.check_number("agreement", agreement, 0.5, 1, exclusive=True)
    k = votes.shape[1]
    # 0.7 * 10 is a little more than 7; half of the votes are never enough.
    needed = max(math.ceil(agreement * k - 1e-9), k // 2 + 1)
    yes = votes.cumsum(1)
    seen = torch.arange(1, k + 1, device=votes.device)
    larger, smaller = torch.maximum(yes, seen - yes), torch.minimum(yes, seen - yes)
    closed = (larger >= needed) | (smaller > k - needed)
    used = closed.long().argmax(1) + 1
    total = yes[:, -1]
    settled = torch.maximum(total, k - total) >= needed
    return Verification(2 * total > k, ~settled, used)
