"""Valid calls of the scaling family, by the name of the function."""

from __future__ import annotations

from typing import Any

import torch
from draws import FLOATS, Arguments, Draw

from reasonkern import scaling

WORDS = ("Wait, no. ", "So 4. ", "", "x", "Hmm", "two")


def texts(draw: Draw) -> list[str]:
    return [draw.choice(*WORDS) + draw.choice(*WORDS) for _ in range(draw.integer(0, 5))]


def cons_at_k(draw: Draw) -> Arguments:
    batch, n = draw.size(), draw.integer(1, 6)
    votes = {"answer_ids": draw.ids(3, batch, n, low=-1), "reference": draw.ids(3, batch)}
    return votes | {"k": draw.integer(1, n)}


def difficulty_grade(draw: Draw) -> Arguments:
    scores = draw.bools(draw.size(), draw.integer(1, 5))
    thresholds = draw.choice((0.7, 0.3), (0.5,))
    return {"scores": scores.to(draw.choice(torch.bool, *FLOATS)), "thresholds": thresholds}


def elliptical_select(draw: Draw) -> Arguments:
    n, d = draw.size(), draw.integer(1, 5)
    shape = (n, d) if draw.flag() else (2, n, d)
    features = draw.normal(*shape, dtype=draw.choice(*FLOATS))
    return {"features": features, "k": draw.integer(0, n), "lam": draw.choice(0.01, 1.0)}


def finish_plan(draw: Draw) -> Arguments:
    clusters = [[3 * i + j for j in range(draw.integer(1, 3))] for i in range(draw.integer(0, 3))]
    numbers = {"per_cluster": draw.integer(1, 4), "singletons": draw.integer(1, 4)}
    return {"clusters": clusters, **numbers, "seed": draw.integer(0, 9)}


def flexible_verification(draw: Draw) -> Arguments:
    votes = draw.bools(draw.size(), draw.integer(1, 5))
    return {"votes": votes, "agreement": draw.choice(1.0, 0.6)}


def focal_bce(draw: Draw) -> Arguments:
    shape = draw.size(), draw.size()
    return {
        "logit": draw.normal(*shape, dtype=draw.choice(*FLOATS), scale=draw.choice(1, 100)),
        "target": draw.mask(*shape),
        "gamma": draw.choice(0.0, 0.5, 2.0),
        "alpha": draw.choice(None, 0.25, 1.0),
    }


def greedy_cluster(draw: Draw) -> Arguments:
    n = draw.size()
    scores = draw.positive(n, n)
    return {
        "scores": draw.choice(scores, scores.tolist()),
        "tau": 0.5,
        "max_clusters": draw.choice(None, 2),
        "max_members": draw.choice(None, 1),
        "seed": draw.integer(0, 9),
    }


def length_statistics(draw: Draw) -> Arguments:
    shape = draw.integer(1, 5), draw.integer(1, 5)
    return {"length": draw.ids(99, *shape), "correct": draw.bools(*shape)}


def run_length_statistics(**arguments: Any) -> Any:
    """A mean over nothing is NaN, as its docstring says."""
    return [x.nan_to_num() for x in scaling.length_statistics(**arguments)]


def markov_improvement(draw: Draw) -> Arguments:
    correct = draw.bools(draw.integer(1, 4), draw.integer(1, 5))
    return {"correct": correct, "prior": draw.choice(0.0, 0.5)}


def pass_at_k(draw: Draw) -> Arguments:
    n = draw.integer(1, 30)
    right = draw.choice(draw.integer(0, n), draw.ids(n, draw.size()))
    return {"n": draw.choice(n, torch.tensor(n)), "c": right, "k": draw.integer(1, n)}


def route_peers(draw: Draw) -> Arguments:
    summaries = texts(draw)
    strategy = draw.choice("dispersed", "clustered", "hybrid", "random")
    top_k = draw.integer(-1, max(len(summaries) - 1, 0))
    return {"summaries": summaries, "top_k": top_k, "strategy": strategy, "seed": 1}


def select_diverse(draw: Draw) -> Arguments:
    given = texts(draw)
    return {"texts": given, "k": draw.integer(0, len(given))}


def subthought_split(draw: Draw) -> Arguments:
    return {"text": "".join(texts(draw)), "markers": draw.choice(("Wait", "So"), ["x"])}


def tail_answers(draw: Draw) -> Arguments:
    ids = draw.ids(3, draw.size(), draw.size(), draw.size(), low=-1)
    return {"answer_ids": ids, "last": draw.integer(1, 9)}


def temperature_vote(draw: Draw) -> Arguments:
    answers = [draw.choice("4", "5", None) for _ in range(draw.size())]
    temperature = [draw.choice(0.6, 1.0) for _ in answers]
    return {"answers": answers, "temperature": temperature, "intra": 0.8, "cross": 1.0}


def vote(draw: Draw) -> Arguments:
    answers = [draw.choice("4", "5", None) for _ in range(draw.size())]
    weights = draw.choice(None, [draw.choice(0.0, 0.5) for _ in answers])
    return {"answers": answers, "weights": weights, "tie": draw.choice("earliest", "latest")}


def vote_ids(draw: Draw) -> Arguments:
    shape = draw.size(), draw.size()
    weights = draw.maybe(lambda: draw.positive(*shape))
    return {"answer_ids": draw.ids(3, *shape, low=-1), "weights": weights}


def frontier(draw: Draw) -> Arguments:
    rewards = [draw.number(0, 1) for _ in range(draw.integer(1, 4))]
    states = list(range(len(rewards)))
    return {"states": states, "rewards": rewards, "budget": draw.choice(None, 3), "count": 2}


def run_frontier(states: Any, rewards: Any, budget: Any, count: Any) -> Any:
    search = scaling.AStarFrontier(budget)
    search.push(states, rewards)
    for node in search.pop(count):
        search.push(states, rewards, node)
    return [node.priority for node in search.pop(9)]


CALLS = {
    "AStarFrontier": (run_frontier, frontier),
    "cons_at_k": (scaling.cons_at_k, cons_at_k),
    "difficulty_grade": (scaling.difficulty_grade, difficulty_grade),
    "elliptical_select": (scaling.elliptical_select, elliptical_select),
    "finish_plan": (scaling.finish_plan, finish_plan),
    "flexible_verification": (scaling.flexible_verification, flexible_verification),
    "focal_bce": (scaling.focal_bce, focal_bce),
    "greedy_cluster": (scaling.greedy_cluster, greedy_cluster),
    "length_statistics": (run_length_statistics, length_statistics),
    "markov_improvement": (scaling.markov_improvement, markov_improvement),
    "pass_at_k": (scaling.pass_at_k, pass_at_k),
    "route_peers": (scaling.route_peers, route_peers),
    "select_diverse": (scaling.select_diverse, select_diverse),
    "subthought_split": (scaling.subthought_split, subthought_split),
    "tail_answers": (scaling.tail_answers, tail_answers),
    "temperature_vote": (scaling.temperature_vote, temperature_vote),
    "text_similarity": (scaling.text_similarity, lambda draw: {"texts": texts(draw)}),
    "vote": (scaling.vote, vote),
    "vote_ids": (scaling.vote_ids, vote_ids),
}
