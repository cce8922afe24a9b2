"""The parts of a `Modulation`, each frozen and checked on its own."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

from .. import _checks
from . import layout as at

ID_LIMIT = 1 << 31
LIMIT = 1 << 62  # of counts and times: sums and differences of two fit 64 bits


@dataclass(frozen=True)
class Cyclic:
    """A triangular wave on the logits of a set, CyclicReflex (arXiv 2506.11077).

    With t the number of tokens generated so far, ``z[v] += amplitude * w(t)`` for v in the set: w
    is 0 at t = 0, 1 at a quarter of the period, -1 at three quarters. Published: amplitude 5,
    period 1200 (900 on AMC23) for a 7B model; 1 to 3 and 600 for a 1.5B model.

    Args:
        amplitude: of the wave, in logits; a negative one starts downwards.
        period: tokens per period, >= 1e-6, not necessarily whole.
        shift: fraction of the period by which the wave is ahead.
        windows: half-open ranges (low, high) of t outside which nothing is added, at most 8. None =
            everywhere.
        set: name of the token set.

    Raises:
        ValueError: an argument out of its range.
    """

    amplitude: float
    period: float
    shift: float = 0.0
    windows: Sequence[tuple[int, int]] | None = None
    set: str = "reflect"

    def __post_init__(self) -> None:
        """Refuses values that have no meaning."""
        _checks.check_number("amplitude", self.amplitude)
        _checks.check_number("period", self.period, 1e-6)  # t mod period is exact in every backend
        _checks.check_number("shift", self.shift)
        _check_set(self.set)
        if self.windows is None:
            return
        pairs = _checked_pairs("windows", self.windows, at.MAX_WINDOWS, "(low, high)")
        object.__setattr__(self, "windows", pairs)
        for pair in pairs:
            if (
                not all(_checks.is_integer(x) for x in pair)
                or not 0 <= pair[0] < pair[1] <= _checks.INT64
            ):
                _checks.fail("windows", "pairs of integers 0 <= low < high < 2^63", pair)


@dataclass(frozen=True)
class TIP:
    """The thought-switching penalty (arXiv 2501.18585).

    ``z[v] -= alpha`` for v in the set while ``t < psi + beta``, psi being the number of tokens
    generated up to and with the last one of the set, 0 before the first.

    Args:
        alpha: the penalty, in logits.
        beta: tokens for which a thought is protected.
        set: name of the token set.

    Raises:
        ValueError: an argument out of its range.
    """

    alpha: float = 3.0
    beta: int = 600
    set: str = "reflect"

    def __post_init__(self) -> None:
        """Refuses values that have no meaning."""
        _checks.check_number("alpha", self.alpha)
        _check_count("beta", self.beta)
        _check_set(self.set)


@dataclass(frozen=True)
class Constant:
    """``z[v] += bias`` for v in the set, as long as the request thinks.

    Args:
        bias: in logits.
        set: name of the token set.

    Raises:
        ValueError: a bias that is not finite; `Ban` is for -inf.
    """

    bias: float
    set: str = "reflect"

    def __post_init__(self) -> None:
        """Refuses values that have no meaning."""
        _checks.check_number("bias", self.bias)
        _check_set(self.set)


@dataclass(frozen=True)
class Ban:
    """``z[v] = -inf`` for v in the set, as long as the request thinks: NoWait (arXiv 2506.08343).

    A row in which nothing finite would be left is not banned from.

    Args:
        set: name of the token set.
    """

    set: str = "reflect"

    def __post_init__(self) -> None:
        """Refuses values that have no meaning."""
        _check_set(self.set)


@dataclass(frozen=True)
class Schedule:
    """``z[v] += d(t)`` for v in the set: linear between points, constant before and after them.

    Args:
        points: pairs (t, d) by ascending t, 1 to 32 of them: the values of ``numpy.interp``. The
            t are in (-2^62, 2^62), so that differences fit 64 bits.
        set: name of the token set.

    Raises:
        ValueError: an argument out of its range.
    """

    points: Sequence[tuple[int, float]]
    set: str = "reflect"

    def __post_init__(self) -> None:
        """Refuses values that have no meaning."""
        pairs = _checked_pairs("points", self.points, at.MAX_POINTS, "(t, d)")
        object.__setattr__(self, "points", pairs)
        times = [t for t, _ in pairs]
        if not all(_checks.is_integer(t) for t in times) or any(a >= b for a, b in pairwise(times)):
            _checks.fail("points", "ascending integers t", times)
        if times[0] <= -LIMIT or times[-1] >= LIMIT:
            _checks.fail("points", "integers t in (-2^62, 2^62)", times)
        for _, value in pairs:
            _checks.check_number("points", value)
        _check_set(self.set)


@dataclass(frozen=True)
class SoftBudget:
    """Raises the next id of a budget's phrase before the budget is spent.

    From ``start`` of the budget on, its logit moves linearly, over the rest of the budget, from
    where it is to the row's largest logit less ``margin``; it never gets above that. Needs the
    row's largest logit: `modulate_logits_` wants ``allow_dense``.

    Args:
        start: fraction of the budget, in [0, 1).
        margin: in logits, > 0.

    Raises:
        ValueError: an argument out of its range.
    """

    start: float = 0.7
    margin: float = 0.25

    def __post_init__(self) -> None:
        """Refuses values that have no meaning."""
        _checks.check_number("start", self.start, 0)
        if self.start >= 1:
            _checks.fail("start", "a fraction in [0, 1)", self.start)
        _checks.check_number("margin", self.margin, 0, exclusive=True)


@dataclass(frozen=True)
class Budget:
    """Ends thinking after a number of tokens by forcing a phrase, s1 (arXiv 2501.19393).

    Once ``tokens`` thinking tokens are spent, the ids of ``end`` are forced one after the other.
    Where another token comes (a grammar, a foreign sampler), the phrase goes on from its longest
    prefix that the text then ends with. Once complete it is never forced again.

    Args:
        tokens: thinking tokens before the phrase; 0 forces it at once.
        end: its ids, 1 to 64; they contain think_end where the `Modulation` has one.
        soft: a `SoftBudget`; None = off. The phrase may then begin on its own from ``soft.start``
            of the budget on; nothing is forced before it is spent, also not after a think_end.

    Raises:
        ValueError: an argument out of its range.
    """

    tokens: int
    end: Sequence[int]
    soft: SoftBudget | None = None

    def __post_init__(self) -> None:
        """Refuses values that have no meaning."""
        _check_count("tokens", self.tokens)
        object.__setattr__(self, "end", _checked_ids("end", self.end, at.MAX_END))
        check_part("soft", self.soft, SoftBudget)
        if self.soft is not None and self.tokens == 0:
            _checks.fail("soft", "None with a budget of 0 tokens", self.soft)


@dataclass(frozen=True)
class MinThink:
    """Replaces the end of thinking by "Wait", s1 (arXiv 2501.19393), without a second prefill.

    While fewer than ``tokens`` thinking tokens are spent, or ``ignore`` is not used up, the
    probability of think_end goes to the first id of ``wait``: the law of sampling and then
    replacing an end. Each such id, whether the text came to it by itself or not, uses up one of
    ``ignore``; the remaining ids of ``wait`` are forced after it and use up nothing. A row in which
    that id is not allowed is left alone.

    Args:
        tokens: thinking tokens before which there is no end.
        ignore: how often an end is replaced.
        wait: the ids written instead, 1 to 32, think_end not among them.

    Raises:
        ValueError: an argument out of its range, or a rule that never applies.
    """

    tokens: int = 0
    ignore: int = 0
    wait: Sequence[int] = ()

    def __post_init__(self) -> None:
        """Refuses values that have no meaning."""
        _check_count("tokens", self.tokens)
        _check_count("ignore", self.ignore)
        if self.tokens == 0 and self.ignore == 0:
            _checks.fail("tokens, ignore", "one of them > 0", "0, 0")
        object.__setattr__(self, "wait", _checked_ids("wait", self.wait, at.MAX_WAIT))


@dataclass(frozen=True)
class DeepConf:
    """Stops a trace whose confidence falls (arXiv 2508.15260).

    `commit_` pushes the confidence of every accepted row that was not forced; once ``window`` of
    them are there and their mean is below the threshold, the request is stopped for good, see
    `ModulationState.stopped`.

    Args:
        threshold: of the mean of ``-mean(log p)`` over a row's most likely tokens. Paper: of the
            lowest such means of 16 warm-up traces the 90th percentile, or the 10th.
        window: rows in the mean, 1 to 2048.
        eos: id forced on every row of a stopped request. None = it is only marked.

    Raises:
        ValueError: an argument out of its range.
    """

    threshold: float
    window: int = 2048
    eos: int | None = None

    def __post_init__(self) -> None:
        """Refuses values that have no meaning."""
        _checks.check_number("threshold", self.threshold)
        _checks.check_integer("window", self.window, 1, at.MAX_CONFIDENCE)
        check_id("eos", self.eos)


@dataclass(frozen=True)
class EntropyTrigger:
    """Marks rows of unusually high entropy, SRGen (arXiv 2510.02919).

    A row triggers when its entropy exceeds ``max(floor, mean + k * max(std, min_std))`` over the
    last ``window`` accepted rows (std unbiased; forced rows left out), or ``first`` before there
    are that many. The entropy is that of the law the token is drawn from, after temperature and
    filters: that of a greedy row is 0, and it never triggers.

    Args:
        window: rows, 2 to 64.
        k: standard deviations.
        floor: smallest threshold, in nats.
        min_std: smallest standard deviation, in nats.
        first: the threshold until the window is full, in nats.

    Raises:
        ValueError: an argument out of its range.
    """

    window: int = 25
    k: float = 4.0
    floor: float = 1.8
    min_std: float = 0.5
    first: float = 3.0

    def __post_init__(self) -> None:
        """Refuses values that have no meaning."""
        _checks.check_integer("window", self.window, 2, at.MAX_ENTROPY)
        for name in ("k", "floor", "min_std", "first"):
            _checks.check_number(name, getattr(self, name), 0)


def _check_count(name: str, value: object) -> None:
    if not _checks.is_integer(value) or not 0 <= value < LIMIT:
        _checks.fail(name, "an integer >= 0", repr(value))


def _check_set(name: object) -> None:
    if not isinstance(name, str):
        _checks.fail("set", "the name of a token set", repr(name))


def check_part(name: str, value: object, kind: type) -> None:
    """A part is None or of its own kind."""
    if value is not None and not isinstance(value, kind):
        _checks.fail(name, f"None or a {kind.__name__}", repr(value))


def check_id(name: str, value: object) -> None:
    """A token id, or None."""
    if value is not None:
        checked_id(name, value)


def checked_id(name: str, value: object) -> int:
    """A token id as an int."""
    if not _checks.is_integer(value) or not 0 <= value < ID_LIMIT:
        _checks.fail(name, "token ids, integers in [0, 2^31)", repr(value))
    return int(value)


def _checked_pairs(name: str, pairs: Any, most: int, meaning: str) -> tuple[tuple[Any, Any], ...]:
    listed = isinstance(pairs, Sequence) and not isinstance(pairs, str)
    if not listed or not all(isinstance(pair, Sequence) and len(pair) == 2 for pair in pairs):
        _checks.fail(name, f"a sequence of pairs {meaning}", repr(pairs))
    if not 1 <= len(pairs) <= most:
        _checks.fail(name, f"1 to {most} pairs {meaning}", len(pairs))
    return tuple((first, second) for first, second in pairs)


def _checked_ids(name: str, ids: Sequence[int], most: int) -> tuple[int, ...]:
    if isinstance(ids, str) or not isinstance(ids, Iterable):
        _checks.fail(name, "a sequence of token ids", repr(ids))
    checked = tuple(checked_id(name, x) for x in ids)
    if not 1 <= len(checked) <= most:
        _checks.fail(name, f"1 to {most} ids", len(checked))
    return checked
