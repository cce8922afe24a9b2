"""Test-time selection: votes, pass@k, search, pruning, diverse subsets: see README.md here."""

from __future__ import annotations

from .coreset import elliptical_select
from .metrics import (
    Difficulty,
    Improvement,
    LengthStatistics,
    difficulty_grade,
    length_statistics,
    markov_improvement,
    pass_at_k,
    tail_answers,
)
from .pruning import finish_plan, focal_bce, greedy_cluster
from .search import AStarFrontier, Node
from .similarity import route_peers, select_diverse, text_similarity
from .votes import (
    MARKERS,
    TemperatureVote,
    Verification,
    Vote,
    cons_at_k,
    flexible_verification,
    subthought_split,
    temperature_vote,
    vote,
    vote_ids,
)

__all__ = [
    "MARKERS",
    "AStarFrontier",
    "Difficulty",
    "Improvement",
    "LengthStatistics",
    "Node",
    "TemperatureVote",
    "Verification",
    "Vote",
    "cons_at_k",
    "difficulty_grade",
    "elliptical_select",
    "finish_plan",
    "flexible_verification",
    "focal_bce",
    "greedy_cluster",
    "length_statistics",
    "markov_improvement",
    "pass_at_k",
    "route_peers",
    "select_diverse",
    "subthought_split",
    "tail_answers",
    "temperature_vote",
    "text_similarity",
    "vote",
    "vote_ids",
]
