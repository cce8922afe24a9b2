"""How many nodes a step drafts: as many as its time is worth, or none."""

from __future__ import annotations

import itertools
from collections import deque
from collections.abc import Sequence
from math import inf
from statistics import median_low
from typing import NamedTuple, Protocol

from ..speculation import DraftTree
from ..speculation.tree import RANK_RATES

SIZES = (1, 2, 4, 8, 16, 32, 80)  # nodes per request; 1 is plain decoding
TURN = 4  # steps of one size, of which the fastest counts: the first ones find cold caches
RECENT = 3  # turns whose median is the time of a size
SURE = 2  # a size of fewer turns is judged by those below it: a turn may have been interrupted
SHARE = 0.01  # of the time may be lost on trying other sizes again: texts grow, loads change
REST = 4  # turns at least between two such trials
MARGIN = 0.98  # drafting has to beat plain decoding by what the estimates are off
DRAFTS = 128  # of a request's drafts what is known of acceptance remembers about so many
PRIOR = 4.0  # drafts that the rates of typical traces count as, at first
OFTEN = 8  # one step of so many at least fills the whole tree, to see what drafts would do


class Text(Protocol):
    """A request, as far as hindsight asks."""

    text: list[int]
    done: bool


class Choice(NamedTuple):
    """What a step drafts."""

    tree: DraftTree
    """Put to the model."""
    filled: DraftTree
    """Filled from the table; `tree` is a prefix of it."""
    watched: bool
    """Whether to tell what it was filled with."""


class Timing:
    """What is known of the time of steps of one size."""

    def __init__(self) -> None:
        self.recent: deque[float] = deque(maxlen=RECENT)
        """Seconds of the fastest step of the last turns."""
        self.spare = 0.0
        """Seconds that may be lost on trying it again."""


Timings = dict[tuple[int, int], Timing]
"""By (requests, nodes)."""


class BestTree:
    """The prefix of the default tree that emits most tokens per second.

    How many tokens a size emits is known from hindsight: now and then the whole tree is filled,
    whatever part of it is put to the model, and compared with what the text became. That costs no
    pass, and tells of all sizes alike. How long a step of a size takes is known from the steps that
    used it. A new size is tried while it would be the best one if times grew more slowly than
    between the sizes below it; later all are tried again, for a fixed share of the time.

    Args:
        timings: by (requests, nodes); shared by all runs of a model.
    """

    def __init__(self, timings: Timings) -> None:
        self._whole = DraftTree.default(SIZES[-1])
        self._trees = [*map(self._whole.prefix, SIZES[:-1]), self._whole]
        self._hindsight = Hindsight(self._whole)
        self._timings = timings
        self._batch = self._size = self._left = 0
        self._fastest, self._rest = inf, REST
        self._since = OFTEN  # steps since the whole tree was filled

    def next(self, requests: int) -> Choice:
        """What the next step drafts, for a batch of so many requests."""
        batch = batch_size(requests)
        if not self._left or batch != self._batch:
            self._batch, self._left, self._fastest = batch, TURN, inf
            self._size = self._choose(batch)
        self._left -= 1
        tree = self._trees[self._size]
        self._since += 1
        if self._since < min(OFTEN, batch if tree.nodes > 1 else 4 * batch):
            return Choice(tree, tree, False)
        self._since = 0
        return Choice(tree, self._whole, True)

    def drafted(self, requests: Sequence[Text], tokens: list[list[int]]) -> None:
        """Takes in what was drafted where the choice asks for it: tokens by node, -1 = none."""
        self._hindsight.add(requests, tokens)

    def took(self, seconds: float) -> None:
        """Takes in the time of the step."""
        key = self._batch, SIZES[self._size]
        self._fastest = min(self._fastest, seconds)
        if not self._left:
            self._timings.setdefault(key, Timing()).recent.append(self._fastest)
        for size in SIZES:
            if (timing := self._timings.get((self._batch, size))) is not None:
                timing.spare += SHARE / len(SIZES) * seconds

    def _choose(self, batch: int) -> int:
        """Index of the size."""
        recent = [self._timings.get((batch, size), Timing()).recent for size in SIZES]
        times = [median_low(x) for x in itertools.takewhile(len, recent)]
        if not times:
            return 0
        tokens = self._hindsight.expected()
        speeds = [n / t for n, t in zip(tokens, times, strict=False)]
        speeds[1:] = [MARGIN * speed for speed in speeds[1:]]
        best = speeds.index(max(speeds))
        hopes = (
            (MARGIN * tokens[size] / _at_least(times[:size]), size)
            for size in range(1, min(len(times) + 1, len(SIZES)))
            if len(recent[size]) < SURE
        )
        hope, new = max(hopes, default=(0.0, 0))
        if hope > speeds[best]:
            return new
        pairs = zip(times, speeds, strict=True)
        losses = [TURN * time * (1 - speed / speeds[best]) for time, speed in pairs]
        return self._trial(best, losses)

    def _trial(self, best: int, losses: list[float]) -> int:
        """The best size or, where the time for it has come together, another one."""
        self._rest -= 1
        if self._rest > 0:
            return best
        timings = [self._timings[self._batch, size] for size in SIZES[: len(losses)]]
        left = [timing.spare - loss for timing, loss in zip(timings, losses, strict=True)]
        left[best] = 0.0
        other = left.index(max(left))
        if other != best:
            timings[other].spare, self._rest = 0.0, REST
        return other


def batch_size(requests: int) -> int:
    """What times are known for: the power of 2 that holds so many requests."""
    return 1 << (requests - 1).bit_length()


def _at_least(times: list[float]) -> float:
    """What the size above these may take if growth slows down: half of that of the last one."""
    count = len(times)
    if count == 1:
        return times[0]
    growth = max(0.0, times[-1] - times[-2]) / (SIZES[count - 1] - SIZES[count - 2])
    return times[-1] + growth / 2 * (SIZES[count] - SIZES[count - 1])


class Hindsight:
    """How often each node of a tree is accepted: drafts, and what the texts became after them.

    In the equality modes the text does not depend on the drafts, so a draft that was never put to
    the model tells as much as one that was verified.
    """

    def __init__(self, tree: DraftTree) -> None:
        pointers, index = (x.tolist() for x in tree.children)
        self._children = [index[a:b] for a, b in itertools.pairwise(pointers)]
        self._visits, self._drafts = [PRIOR * p for p in _likelihoods(tree)], PRIOR
        self._open: list[tuple[Text, int, list[int]]] = []

    def add(self, requests: Sequence[Text], tokens: list[list[int]]) -> None:
        """Drafts of what follows the texts as they are now: tokens of each node, -1 = none."""
        for request, row in zip(requests, tokens, strict=True):
            self._open.append((request, len(request.text), row))

    def expected(self) -> list[float]:
        """Tokens that a step of each of SIZES emits."""
        found = [(draft, self._path(*draft)) for draft in self._open]
        self._open = [draft for draft, path in found if path is None]
        paths = [path for _, path in found if path is not None]
        keep = (1 - 1 / DRAFTS) ** len(paths)
        self._visits = [keep * x for x in self._visits]
        self._drafts = keep * self._drafts + len(paths)
        for path in paths:
            for node in path:
                self._visits[node] += 1
        return [sum(self._visits[:size]) / self._drafts for size in SIZES]

    def _path(self, request: Text, begin: int, tokens: list[int]) -> list[int] | None:
        """The nodes that are accepted; None = the text is not long enough to know."""
        path = [0]
        for token in itertools.islice(request.text, begin, None):
            node = next((n for n in self._children[path[-1]] if tokens[n] == token), None)
            if node is None:
                return path
            path.append(node)
        return path if request.done or not self._children[path[-1]] else None


def _likelihoods(tree: DraftTree) -> list[float]:
    """Of every node: that it is accepted, by the rates that the default tree was made from."""
    found = [1.0]
    pairs = zip(tree.parents.tolist(), tree.ranks.tolist(), strict=True)
    for parent, rank in itertools.islice(pairs, 1, None):
        found.append(found[parent] * RANK_RATES[min(rank, len(RANK_RATES) - 1)])
    return found
