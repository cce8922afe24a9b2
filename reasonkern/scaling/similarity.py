"""Choices by likeness of texts: LeaP's peers, diverse distillation; needs the extra `scaling`."""

from __future__ import annotations

import random
from collections.abc import Sequence
from typing import Any

from .. import _checks

STRATEGIES = ("dispersed", "clustered", "hybrid", "random")


def check_texts(name: str, texts: Sequence[str]) -> None:
    """Strings: rapidfuzz would call None as unlike as can be, and so the first choice."""
    _checks.check_list(name, texts, "strings")
    for i, text in enumerate(texts):
        if not isinstance(text, str):
            _checks.fail(f"{name}[{i}]", "a string", type(text).__name__)


def text_similarity(texts: Sequence[str]) -> Any:
    """(n, n) float64 numpy array: 1 - InDel distance / (len a + len b), 1 for two empty texts.

    The ratio that LeaP's code calls Levenshtein.ratio: a replacement counts as two edits
    ("kitten", "sitting": 0.615).

    Args:
        texts: n strings.

    Returns:
        A symmetric array, from rapidfuzz, on all cores.

    Raises:
        ValueError: no list of strings.
        ImportError: rapidfuzz is not installed.
    """
    check_texts("texts", texts)
    try:
        from rapidfuzz import process
        from rapidfuzz.distance import Indel
    except ImportError as missing:
        raise ImportError(
            "text similarity needs rapidfuzz: pip install 'reasonkern[scaling]'"
        ) from missing
    import numpy

    texts = list(texts)
    scorer = Indel.normalized_similarity
    return process.cdist(texts, texts, scorer=scorer, dtype=numpy.float64, workers=-1)


def route_peers(
    summaries: Sequence[str], top_k: int, *, strategy: str = "dispersed", seed: int = 0
) -> list[list[int]]:
    """Whose summary each of n parallel paths gets to read: LeaP (arXiv 2505.07787).

    Loops over the paths in Python, of which there are a handful.

    Args:
        summaries: one per path.
        top_k: peers per path, at most n - 1; -1 = all.
        strategy: "dispersed": the least similar; "clustered": the most similar; "hybrid": ⌊k/2⌋
            of the least and the rest of the most; "random". Ties go to the lower index.
        seed: for "random".

    Returns:
        For each path the indices of its peers, in the order named, without itself or repeats.

    Raises:
        ValueError: no list of strings, an unknown strategy, or top_k out of range.
        ImportError: rapidfuzz is not installed ("random" does not need it).

    Example:
        >>> from reasonkern.scaling import route_peers
        >>> route_peers(["x = 2", "x = 7"], top_k=-1, strategy="random")
        [[1], [0]]
    """
    _checks.check_choice("strategy", strategy, STRATEGIES)
    check_texts("summaries", summaries)
    n = len(summaries)
    if not _checks.is_integer(top_k) or top_k < -1:
        _checks.fail("top_k", "an integer >= 0, or -1 for all", top_k)
    if top_k > max(n - 1, 0):
        _checks.fail("top_k", f"at most {max(n - 1, 0)}, the number of peers", top_k)
    k = max(n - 1, 0) if top_k == -1 else top_k
    others = [[j for j in range(n) if j != i] for i in range(n)]
    if strategy == "random":
        seed = _checks.check_seed("seed", seed)
        draw = random.Random(seed)
        return [draw.sample(peers, k) for peers in others]
    if k == 0:
        return [[] for _ in range(n)]
    similarity = text_similarity(summaries)
    return [_nearest(peers, similarity[i], k, strategy) for i, peers in enumerate(others)]


def _nearest(peers: list[int], similarity: Any, k: int, strategy: str) -> list[int]:
    least = {"dispersed": k, "clustered": 0, "hybrid": k // 2}[strategy]
    far = sorted(peers, key=lambda j: (similarity[j], j))[:least]
    rest = [j for j in peers if j not in far]
    return far + sorted(rest, key=lambda j: (-similarity[j], j))[: k - least]


def select_diverse(texts: Sequence[str], k: int) -> list[int]:
    """Picks k texts unlike each other, to distil from few traces: DED (arXiv 2508.09883).

    The two least similar come first, then always the text whose nearest chosen one is farthest;
    ties go to the lower index. The paper asks for diverse trajectories of low mutual edit
    similarity and does not say how the set is found: the greedy rule is ours.

    Args:
        texts: n strings.
        k: number to choose, 0 to n.

    Returns:
        Indices in the order chosen.

    Raises:
        ValueError: no list of strings, or k out of range.
        ImportError: rapidfuzz is not installed.
    """
    check_texts("texts", texts)
    _checks.check_integer("k", k, 0, len(texts))
    if k == 0:
        return []
    if len(texts) == 1:
        return [0]
    similarity = text_similarity(texts)
    rows = similarity.min(1)
    first = int(rows.argmin())
    chosen = [first]
    nearest = similarity[first]
    while len(chosen) < k:
        nearest[chosen] = float("inf")
        chosen.append(int(nearest.argmin()))
        nearest = nearest.clip(similarity[chosen[-1]])
    return chosen
