"""Exact laws of a verifier: it is run once for every outcome of every random choice it makes."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

from .. import _checks
from .laws import LawReport, exact_law
from .toy import Toy

MAX_RUNS = 4_000_000


class Coins:
    """Random choices that an enumeration decides; their probabilities are multiplied up.

    A run replays the choices of `prefix` and takes the first possible outcome from there on.
    """

    def __init__(self, prefix: Sequence[int]) -> None:
        self.prefix = prefix
        self.taken: list[int] = []
        self.options: list[list[float]] = []
        self.probability = 1.0

    def below(self, threshold: float) -> bool:
        """Whether a uniform number of [0, 1) is below the threshold."""
        p = min(max(float(threshold), 0.0), 1.0)
        return self._take([p, 1.0 - p]) == 0

    def choice(self, weights: Sequence[float]) -> int:
        """An index, with probabilities in proportion to the weights."""
        values = [float(w) for w in weights]
        total = sum(values)
        if not total > 0 or min(values) < 0:
            _checks.fail("weights", "values >= 0, not all 0", values)
        return self._take([w / total for w in values])

    def _take(self, options: list[float]) -> int:
        at = len(self.taken)
        outcome = self.prefix[at] if at < len(self.prefix) else _next_possible(options, 0)
        self.taken.append(outcome)
        self.options.append(options)
        self.probability *= options[outcome]
        return outcome


def _next_possible(options: list[float], start: int) -> int:
    """First outcome from `start` on with a probability above 0; len(options) when there is none."""
    while start < len(options) and options[start] <= 0:
        start += 1
    return start


class Draws:
    """The step under enumeration: laws after a prefix, and children drawn there when asked for."""

    def __init__(self, toy: Toy, coins: Coins) -> None:
        self.toy, self._coins = toy, coins
        self._children: dict[tuple[int, ...], list[int]] = {}

    def target(self, prefix: Sequence[int]) -> list[float]:
        """Probabilities of the target's next token."""
        law: list[float] = self.toy.target_lists[len(prefix)][_last(prefix)]
        return law

    def draft(self, prefix: Sequence[int]) -> list[float]:
        """Probabilities that the drafter draws from."""
        law: list[float] = self.toy.draft_lists[len(prefix)][_last(prefix)]
        return law

    def children(self, prefix: Sequence[int]) -> list[int]:
        """Tokens drawn without replacement, in draw order; none at the last depth."""
        key = tuple(prefix)
        if len(key) >= self.toy.depth:
            return []
        if key not in self._children:
            weights, drawn = list(self.draft(key)), []
            for _ in range(min(self.toy.children, sum(w > 0 for w in weights))):
                drawn.append(self._coins.choice(weights))
                weights[drawn[-1]] = 0.0
            self._children[key] = drawn
        return self._children[key]


def _last(prefix: Sequence[int]) -> int:
    return prefix[-1] if prefix else 0


def runs(fn: Callable[[Draws, Coins], list[int]], toy: Toy) -> Iterator[tuple[list[int], float]]:
    """Every outcome of `fn` with its probability."""
    prefix: list[int] = []
    for _ in range(MAX_RUNS):
        coins = Coins(prefix)
        tokens = fn(Draws(toy, coins), coins)
        if not isinstance(tokens, (list, tuple)) or not all(isinstance(t, int) for t in tokens):
            _checks.fail("fn's result", "a list of integers", repr(tokens))
        yield list(tokens), coins.probability
        following = _following(coins)
        if following is None:
            return
        prefix = following
    raise ValueError(f"exact: expected at most {MAX_RUNS} outcomes; use a smaller toy")


def _following(coins: Coins) -> list[int] | None:
    """The choices of the next run in order; None after the last."""
    for at in reversed(range(len(coins.taken))):
        options = coins.options[at]
        outcome = _next_possible(options, coins.taken[at] + 1)
        if outcome < len(options):
            return [*coins.taken[:at], outcome]
    return None


def exact_report(fn: Callable[[Draws, Coins], list[int]], toy: Toy) -> LawReport:
    """The laws of `check_verifier`, enumerated."""
    v, n = toy.vocab, toy.depth + 1
    joint = toy.target.new_zeros((v,) * n)
    later = [toy.target.new_zeros((v, v)) for _ in range(toy.depth)]
    rest: dict[tuple[int, ...], float] = {}
    for tokens, p in runs(fn, toy):
        if not 1 <= len(tokens) <= n or not all(0 <= t < v for t in tokens):
            _checks.fail("tokens", f"1 to {n} ids below {v}", tokens)
        key = tuple(tokens)
        rest[key] = rest.get(key, 0.0) + p
    for key, p in rest.items():
        joint[key] += p * toy.continued(key)
        for j in range(1, len(key)):
            later[j - 1][key[j - 1], key[j]] += p
    laws = [
        exact_law("marginal", joint.flatten(1).sum(-1), toy.target[0, 0]),
        exact_law("joint", joint.flatten(), toy.joint(n)),
    ]
    for j, seen in enumerate(later, start=1):
        laws.append(exact_law(f"length > {j}", seen, seen.sum(-1, keepdim=True) * toy.target[j]))
    return LawReport(tuple(laws))
