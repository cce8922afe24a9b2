"""Test-time scaling, paper by paper: each function against its definition, written out."""

from __future__ import annotations

import math
import sys
import warnings
from collections import Counter
from fractions import Fraction
from typing import Any

import numpy as np
import pytest
import torch
from tolerance import randn
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

import reasonkern as rk
from reasonkern import scaling

# ---- votes


def test_beyond_the_last_answer() -> None:
    """The mode of the subthoughts' answers; a tie goes to the earliest."""
    text = "Let me see. Wait, no. So, perhaps So what? Awaiting Something. But wait, hm. wait"
    parts = scaling.subthought_split(text)
    assert parts == [
        "Let me see. ", "Wait, no. ", "So, perhaps ", "So what? Awaiting Something. ",
        "But wait, hm. wait",
    ]  # fmt: skip
    assert scaling.subthought_split("") == [] and scaling.subthought_split("plain") == ["plain"]
    assert scaling.subthought_split("a+b? (a+b)", ["a+b"]) == ["a+b? (", "a+b)"]
    assert scaling.subthought_split("x\n\ny</t>z", ["\n\n", "</t>"]) == ["x", "\n\ny", "</t>z"]
    assert scaling.subthought_split("x Wait y But", {"But", "Wait"}) == ["x ", "Wait y ", "But"]
    assert scaling.subthought_split("x But So y", ["So", "But", "But So"]) == ["x ", "But So y"]
    assert len(set(scaling.MARKERS)) == 32
    assert scaling.vote(["4", "5", "5", "4", None], tie="earliest").answer == "4"
    assert scaling.vote(["4", "5", "5", "4"], tie="latest").answer == "5"
    assert scaling.vote(["4", "5", "4"], tie="latest").answer == "4"
    assert scaling.vote(["4", "5", "6"], tie="latest").answer == "6"


def test_two_heads_are_better() -> None:
    """Weighted votes; what nobody voted for."""
    v = scaling.vote(["a", "b", "b", None], [5.0, 1.0, 2.0, 99.0])
    assert v == ("a", 5 / 8, {"a": 5.0, "b": 3.0})
    assert list(v.votes) == ["a", "b"]
    assert scaling.vote([]) == (None, 0.0, {})
    assert scaling.vote([None]).answer is None
    assert scaling.vote(["a"], [0.0]).answer is None
    many = scaling.vote(["a", "a", "b"], np.array([2.0**24, 1, 2.0**24], dtype=np.float32))
    assert many.votes["a"] == 2**24 + 1  # more than float32 holds


def test_sift() -> None:
    """Two predictions agree or they do not."""
    assert scaling.vote([3, 3], tie="none").answer == 3
    assert scaling.vote([3, 4], tie="none") == (None, 0.0, {3: 1.0, 4: 1.0})


def test_ettrl_label_and_vote_ids() -> None:
    """The batched vote is the vote of every row."""
    ids = torch.randint(-1, 4, (200, 9), generator=torch.Generator().manual_seed(1))
    ids[0] = -1
    weights = torch.rand(200, 9, generator=torch.Generator().manual_seed(2)).round(decimals=1)
    for w in (None, weights):
        got = scaling.vote_ids(ids, w)
        for b in range(200):
            named = [None if i < 0 else i for i in ids[b].tolist()]
            exact = None if w is None else w[b].double().tolist()
            voted = scaling.vote(named, exact)
            assert voted == scaling.vote(named, None if w is None else w[b].double())
            assert got[b] == (-1 if voted.answer is None else voted.answer)
    assert scaling.vote_ids(ids[:, :0]).tolist() == [-1] * 200
    no_weight = scaling.vote_ids(torch.tensor([[3, -7], [-7, 4]]), torch.tensor([[0.0, 1.0]] * 2))
    assert no_weight.tolist() == [-1, 4]


class LargestTensor(TorchDispatchMode):
    """Elements of the largest tensor that any operation returns."""

    elements = 0

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        out = func(*args, **(kwargs or {}))
        for x in out if isinstance(out, (tuple, list)) else (out,):
            if isinstance(x, Tensor):
                self.elements = max(self.elements, x.numel())
        return out


def test_vote_ids_compares_no_pairs() -> None:
    """Of thousands of samples all pairs would be gigabytes."""
    ids = torch.arange(300).view(3, 100) % 7
    with LargestTensor() as largest:
        scaling.vote_ids(ids, torch.ones(3, 100))
    assert 300 <= largest.elements <= 301


def test_ttt_bench() -> None:
    ids = torch.tensor([[1, 2, 2, 1], [0, 0, 3, 3], [-1, -1, 5, 5], [4, 4, 4, 4]])
    reference = torch.tensor([2, 0, 5, -1])
    for k in (1, 2, 3, 4):
        got = scaling.cons_at_k(ids, reference, k).tolist()
        for b in range(4):
            answer = scaling.vote([None if i < 0 else i for i in ids[b, :k].tolist()]).answer
            assert got[b] == (answer == reference[b].item())
    assert scaling.cons_at_k(ids, reference, 3).tolist() == [True, True, True, False]
    nobody = torch.full((1, 3), -1)  # voted: nothing is right
    assert scaling.cons_at_k(nobody, reference[3:], 3).tolist() == [False]


def test_role_of_temperature_sampling() -> None:
    """Within temperatures, then across; easy questions leave early."""
    answers = ["a"] * 5 + ["b", "a", "a", "a", "a"] + ["a", "b", "b", "b", "b"]
    temperature = [0.0] * 5 + [0.6] * 5 + [1.2] * 5
    v = scaling.temperature_vote(answers, temperature)
    assert (v.answer, v.done) == ("a", False)
    assert [x.answer for x in v.by_temperature.values()] == ["a", "a", "b"]
    assert [x.share for x in v.by_temperature.values()] == [1.0, 0.8, 0.8]
    two_thirds = scaling.temperature_vote(answers, temperature, cross=2 / 3)
    assert two_thirds.done and two_thirds.answer == "a"
    assert not scaling.temperature_vote(answers, temperature, intra=0.9, cross=2 / 3).done
    ten = scaling.temperature_vote(["a"] * 7 + ["b", "c", "d"], list(range(10)), cross=0.7)
    assert ten.done and ten.answer == "a"
    # Two of five temperatures are sure of a; the winners of the other three, not sure, are b.
    split = ["a"] * 4 + ["b", "c"] * 3
    two = scaling.temperature_vote(split, [0, 0, 1, 1, 2, 2, 3, 3, 4, 4], cross=0.4)
    assert (two.answer, two.done) == ("a", True)
    easy = scaling.temperature_vote(["x"] * 4, [0.9, 1.2, 0.9, 0.6])
    assert easy.done and list(easy.by_temperature) == [0.6, 0.9, 1.2]
    assert scaling.temperature_vote([], []) == (None, False, {})
    silent = scaling.temperature_vote([None, "y"], [0.0, 1.0])
    assert (silent.answer, silent.done) == ("y", False)
    # One answer of ten is no agreement: a hard question is not taken for an easy one.
    cut = scaling.temperature_vote(["y"] + [None] * 9, [0.6] * 10)
    assert (cut.answer, cut.done) == ("y", False)
    assert scaling.temperature_vote(["y"] * 8 + [None] * 2, [0.6] * 10).done


def test_flexive() -> None:
    """Unanimous votes settle; one against escalates, and as soon as that is known no more votes."""
    votes = torch.tensor([[1, 1, 1, 1], [0, 0, 0, 0], [1, 0, 1, 1], [1, 1, 0, 0], [1, 1, 1, 0]])
    got = scaling.flexible_verification(votes.bool())
    assert got.accepted.tolist() == [True, False, True, False, True]
    assert got.escalate.tolist() == [False, False, True, True, True]
    assert got.used.tolist() == [4, 4, 2, 3, 4]
    three = scaling.flexible_verification(votes.bool(), agreement=0.75)
    assert three.escalate.tolist() == [False, False, False, True, False]
    assert three.used.tolist() == [3, 3, 4, 4, 3]
    ten = scaling.flexible_verification(torch.arange(10)[None] < 7, agreement=0.7)
    assert ten.used.tolist() == [7] and not ten.escalate.any()
    half = scaling.flexible_verification(votes[3:4].bool(), agreement=0.5 + 1e-12)
    assert half.escalate.all()  # a tie settles nothing
    for agreement in (0.6, 0.75, 0.8, 1.0):  # the same, vote by vote
        many = torch.rand(300, 7, generator=torch.Generator().manual_seed(3)) < 0.7
        out = scaling.flexible_verification(many, agreement)
        needed = math.ceil(agreement * 7)
        for b in range(300):
            row = many[b].tolist()
            used = next(
                j for j in range(1, 8)
                if max(Counter(row[:j]).values()) >= needed
                or min(sum(row[:j]), j - sum(row[:j])) > 7 - needed
            )  # fmt: skip
            assert out.used[b] == used
            assert out.escalate[b] == (max(sum(row), 7 - sum(row)) < needed)
            if not out.escalate[b]:  # the votes used say what all of them say
                assert out.accepted[b] == (2 * sum(row[:used]) > used)


# ---- numbers


def exact_pass_at_k(n: int, c: int, k: int) -> Fraction:
    return 1 - Fraction(math.comb(n - c, k), math.comb(n, k))


@pytest.mark.parametrize(("n", "k"), [(4096, 1024), (4096, 1), (4096, 4096), (10, 3), (1, 1)])
def test_math_beyond(n: int, k: int) -> None:
    """pass@1024 of 4096 samples against rational arithmetic: right to the last digits."""
    counts = sorted({0, 1, 2, 3, n // 3, n - k - 1, n - k, n - k + 1, n - 1, n} & set(range(n + 1)))
    got = scaling.pass_at_k(n, torch.tensor(counts), k)
    for c, p in zip(counts, got.tolist(), strict=True):
        exact = exact_pass_at_k(n, c, k)
        assert abs(Fraction(p) - exact) <= Fraction(1, 10**14) * exact, c


def test_impossible_counts_and_scores_are_nan_where_none_are_read(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("reasonkern._checks.reads_values", lambda _: False)  # as on CUDA
    got = scaling.pass_at_k(torch.tensor([4, 4, 4, 1]), torch.tensor([2, 5, -1, 1]), 2)
    assert got.isnan().tolist() == [False, True, True, True]
    unknown = scaling.difficulty_grade(torch.tensor([[1.0, torch.nan], [1.0, 1.0]]))
    assert [x.isnan().tolist() for x in unknown[:2]] == [[True, False]] * 2


def test_reasoning_meets_compression() -> None:
    """pass@k over repeats, and what the answers cost in tokens."""
    n = torch.tensor([[8, 9], [16, 12]])
    c = torch.tensor([[1, 8], [0, 4]])
    got = scaling.pass_at_k(n, c, 2)
    for i in range(2):
        for j in range(2):
            exact = exact_pass_at_k(int(n[i, j]), int(c[i, j]), 2)
            assert got[i, j].item() == pytest.approx(float(exact), rel=1e-15)
    assert scaling.pass_at_k(n[:, 0], 4, 2).tolist() == pytest.approx([11 / 14, 9 / 20])
    assert scaling.pass_at_k(4, 4, 2) == 1
    length, correct = torch.tensor([10, 20, 60, 90]), torch.tensor([True, False, True, False])
    out = scaling.length_statistics(length, correct)
    deviation = math.sqrt(sum((x - 45) ** 2 for x in (10, 20, 60, 90)) / 3)
    assert [x.item() for x in out] == pytest.approx([45, deviation, 35, 55])
    assert scaling.length_statistics(length.view(2, 2), correct.view(2, 2)) == out
    assert scaling.length_statistics(length[:2], correct[:2]).std == math.sqrt(50)
    assert all(x.isnan() for x in scaling.length_statistics(length[:0], correct[:0]))
    alone = scaling.length_statistics(length[:1], correct[:1])
    assert (alone.mean, alone.mean_correct) == (10, 10)
    assert alone.std.isnan() and alone.mean_wrong.isnan()


def test_deepdistill() -> None:
    scores = torch.tensor([[1, 1, 1, 1], [1, 0, 0, 1], [0, 0, 0, 0], [0, 0, 0, 1]])
    rate, variation, grade = scaling.difficulty_grade(scores)
    assert rate.tolist() == [1, 0.5, 0, 0.25] and grade.tolist() == [0, 1, 2, 2]
    expected = [0.0, 1.0, 0.0, math.sqrt(3 / 16) / 0.25]
    assert variation.tolist() == pytest.approx(expected)
    assert scaling.difficulty_grade(scores[:, :1]).grade.tolist() == [0, 0, 2, 2]
    at = torch.arange(9) < torch.tensor([[6], [3]])  # 2/3 and 1/3 are not below the thresholds
    assert scaling.difficulty_grade(at).grade.tolist() == [0, 1]
    tenths = torch.full((1, 3), 0.1, dtype=torch.float64)
    assert tenths.std(correction=0) > 0  # from rounding
    assert scaling.difficulty_grade(tenths).variation == 0
    six = scaling.difficulty_grade(tenths.repeat(1, 2), thresholds=(0.1,))
    assert six.pass_rate == 0.1 and six.grade == 0  # the mean of six is less
    assert scaling.difficulty_grade(scores, thresholds=()).grade.tolist() == [0] * 4
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # no problems are no reason to warn
        assert scaling.difficulty_grade(torch.zeros(0, 4)).variation.shape == (0,)


def test_deep_self_evolving_reasoning() -> None:
    """Transition counts of the two-state chain, its limit, and the tail that votes."""
    correct = torch.tensor([[0, 0, 1, 1, 1, 1], [1, 1, 1, 0, 0, 0]]).bool()
    wrong_right, wrong, right_wrong, right = 1, 4, 1, 6
    got = scaling.markov_improvement(correct)
    assert [x.item() for x in got] == pytest.approx([wrong_right / wrong, right_wrong / right, 0.6])
    smooth = scaling.markov_improvement(correct, prior=0.1)
    assert smooth.p_improve.item() == pytest.approx((1 + 0.1) / (4 + 0.2), rel=1e-14)
    # The limit is where the chain goes: iterate the transition matrix.
    p = torch.tensor([[1 - got[0], got[0]], [got[1], 1 - got[1]]], dtype=torch.float64)
    torch.testing.assert_close(torch.linalg.matrix_power(p, 200)[0, 1], got.stationary)
    still = scaling.markov_improvement(torch.tensor([[True], [False], [True]]))
    assert [x.item() for x in still] == pytest.approx([0, 0, 2 / 3])
    ids = torch.arange(12).view(1, 2, 6)
    assert scaling.tail_answers(ids, 2).tolist() == [[5, 11, 4, 10]]
    assert scaling.tail_answers(ids, 99).shape == (1, 12)
    assert scaling.tail_answers(ids.view(1, 1, 12)).shape == (1, 10)


# ---- search, routing, pruning


def test_a_star_decoding() -> None:
    frontier = scaling.AStarFrontier(budget=6)
    assert frontier.push(["c", "b", "a"], [0.5, 0.75, 0.5]) == 3 and len(frontier) == 3
    (best,) = frontier.pop()
    assert (best.state, best.cost, best.priority) == ("b", 0.0, 0.25)
    frontier.push(["b1", "b2"], [0.25, 1.0], parent=best)
    order = frontier.pop(10)
    # b1: h rose from .25 to .75, so g = .5 and f = 1.25; b2: h fell, g stays 0.
    assert [(n.state, n.cost, n.priority) for n in order] == [
        ("b2", 0.0, 0.0), ("c", 0.0, 0.5), ("a", 0.0, 0.5), ("b1", 0.5, 1.25),
    ]  # fmt: skip
    assert len(frontier) == 0 and frontier.pop() == [] and not frontier.exhausted
    assert frontier.push(["x", "y"], [0.1, 0.9]) == 1 and frontier.exhausted
    assert [n.state for n in frontier.pop(2)] == ["x"]
    grandchild = scaling.AStarFrontier()
    grandchild.push(["r"], [1.0])
    node = grandchild.pop()[0]
    for reward, cost in ((0.5, 0.5), (0.75, 0.5), (0.25, 1.0)):
        grandchild.push(["s"], [reward], parent=node)
        (node,) = grandchild.pop()
        assert node.cost == cost and node.priority == cost + 1 - reward


TEXTS = ["kitten", "sitting", "kitten!", "abcdef", "", "sitting on"]


def indel_ratio(a: str, b: str) -> float:
    """1 - (insertions + deletions) / (len a + len b), by the longest common subsequence."""
    table = [[0] * (len(b) + 1) for _ in range(len(a) + 1)]
    for i, x in enumerate(a):
        for j, y in enumerate(b):
            table[i + 1][j + 1] = (
                table[i][j] + 1 if x == y else max(table[i][j + 1], table[i + 1][j])
            )
    total = len(a) + len(b)
    return 2 * table[-1][-1] / total if total else 1.0


def test_leap() -> None:
    pytest.importorskip("rapidfuzz")
    s = scaling.text_similarity(TEXTS)
    n = len(TEXTS)
    for i in range(n):
        for j in range(n):
            assert s[i, j] == pytest.approx(indel_ratio(TEXTS[i], TEXTS[j]))
    assert s[0, 1] == pytest.approx(0.615, abs=5e-4)
    for k in (0, 1, 2, 3, n - 1, -1):
        for strategy in ("dispersed", "clustered", "hybrid"):
            got = scaling.route_peers(TEXTS, k, strategy=strategy)
            size = n - 1 if k == -1 else k
            far = {"dispersed": size, "clustered": 0, "hybrid": size // 2}[strategy]
            for i in range(n):
                up = sorted((j for j in range(n) if j != i), key=lambda j: (s[i, j], j))
                down = sorted(up, key=lambda j: (-s[i, j], j))
                rest = [j for j in down if j not in up[:far]]
                assert got[i] == up[:far] + rest[: size - far]
    drawn = scaling.route_peers(TEXTS, 3, strategy="random", seed=1)
    assert drawn == scaling.route_peers(TEXTS, 3, strategy="random", seed=1)
    assert all(i not in peers and len(set(peers)) == 3 for i, peers in enumerate(drawn))
    assert scaling.route_peers([], -1) == [] and scaling.route_peers(["a"], -1) == [[]]
    assert scaling.route_peers(["a"], -1, strategy="random") == [[]]


def test_ded() -> None:
    pytest.importorskip("rapidfuzz")
    for texts, first in (
        ([*TEXTS, "abc"], 0),  # far from the first pick, near the third: not what comes next
        (list(filter(None, TEXTS)), 1),
    ):
        s, n = scaling.text_similarity(texts), len(texts)
        lowest = min((s[i, j], i) for i in range(n) for j in range(n))[1]
        expected = [lowest]
        while len(expected) < 4:
            rest = [j for j in range(n) if j not in expected]
            expected.append(min(rest, key=lambda j: (max(s[j, c] for c in expected), j)))
        assert scaling.select_diverse(texts, 4) == expected and lowest == first
    assert scaling.select_diverse(TEXTS, 0) == [] and scaling.select_diverse(["a"], 1) == [0]
    assert sorted(scaling.select_diverse(["x"] * 3, 3)) == [0, 1, 2]


def test_similarity_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "rapidfuzz", None)
    with pytest.raises(ImportError, match=r"pip install 'reasonkern\[scaling\]'"):
        scaling.route_peers(["a", "b"], 1)


def test_deepprune() -> None:
    scores = torch.zeros(6, 6)
    same = {
        (1, 0): 0.9, (2, 0): 0.1, (2, 1): 0.2, (3, 0): 0.4, (3, 1): 0.6, (3, 2): 0.7, (4, 0): 0.9,
        (4, 1): 0.3, (4, 2): 0.0, (4, 3): 0.5, (5, 0): 0.1, (5, 2): 0.5,
    }  # fmt: skip
    for (i, j), p in same.items():
        scores[i, j] = p
    assert scaling.greedy_cluster(scores) == [[0, 1, 4], [2, 3], [5]]
    assert scaling.greedy_cluster(scores.tolist()) == [[0, 1, 4], [2, 3], [5]]
    # 5 against the first cluster: 1/30, against the second: 1/4.
    assert scaling.greedy_cluster(scores, max_clusters=2) == [[0, 1, 4], [2, 3, 5]]
    assert scaling.greedy_cluster(scores, max_clusters=1) == [[0, 1, 2, 3, 4, 5]]
    # Means of just tau are not above it, although the sum over the number, or other ways, may be.
    for last in ([0.2] * 3, [0.1, 0.5, 0.0], [0.6, 0.0, 0.0]):
        at_tau = [[1.0] * 4] * 3 + [[*last, 1.0]]
        assert scaling.greedy_cluster(at_tau, 0.2) == [[0, 1, 2], [3]]
    half = np.array([[1, 0, 0], [1, 0, 0], [0.5, 0.5005, 0]], dtype=np.float16)
    assert scaling.greedy_cluster(half) == [[0, 1, 2]]  # in half precision the mean is 0.5
    assert scaling.greedy_cluster(scores, tau=2.0) == [[i] for i in range(6)]
    assert scaling.greedy_cluster([]) == []
    large = [[0, 0, 0, 0], [1e308, 0, 0, 0], [1e308, 1e308, 0, 0], [-1e308, -1e308, -1.5e308, 0]]
    assert scaling.greedy_cluster(large) == [[0, 1, 2], [3]]  # sums that no double holds
    one = scaling.greedy_cluster(scores, max_members=1, seed=5)
    assert one == scaling.greedy_cluster(scores, max_members=1, seed=5)
    assert sorted(sum(one, [])) == list(range(6))
    torn = [[1, 0, 0], [1, 1, 0], [1, 0, 1]]  # the third is like the first, not like the second
    assert scaling.greedy_cluster(torn, max_members=2) == [[0, 1], [2]]
    seen = [scaling.greedy_cluster(torn, max_members=1, seed=s) for s in range(20)]
    assert [[0, 1], [2]] in seen and [[0, 1, 2]] in seen
    plan = scaling.finish_plan
    assert plan([{4}, {3, 0, 1}], 2, 1) == [0, 1]
    assert plan([[0, 1, 4], [2, 3]], 2, 9) == [0, 1] and plan([[0, 1, 4], [2, 3]], 9, 1) == [
        0,
        1,
        4,
    ]
    assert (
        plan([[0, 3], [1, 2]], 9, 9) == [0, 3] and plan([], 1, 1) == [] and plan([[7]], 3, 3) == [7]
    )
    singles = plan([[3], [5], [1], [0]], 9, 2, seed=4)
    assert len(set(singles)) == 2 and set(singles) <= {0, 1, 3, 5} and singles == sorted(singles)
    assert plan([[3], [5]], 1, 9) == [3, 5]


@pytest.mark.parametrize(("gamma", "alpha"), [(0.0, None), (2.0, None), (0.5, 0.1)])
def test_deepprune_judge_loss(gamma: float, alpha: float | None) -> None:
    x = torch.tensor([-800.0, -30.0, -1.0, 0.0, 0.3, 5.0, 40.0, 800.0]).double().requires_grad_()
    for target in (0, 1):
        got = scaling.focal_bce(x, torch.full((8,), target), gamma=gamma, alpha=alpha)
        (grad,) = torch.autograd.grad(got.sum(), x)
        assert got.isfinite().all() and grad.isfinite().all()
        for i, value in enumerate(x.tolist()):
            s = value if target else -value
            log_p = -math.log1p(math.exp(-s)) if s > -30 else s
            log_q = -math.log1p(math.exp(s)) if s < 30 else -s
            weight = 1.0 if alpha is None else alpha if target else 1 - alpha
            expected = -weight * math.exp(gamma * log_q) * log_p
            assert got[i].item() == pytest.approx(expected, rel=1e-12, abs=1e-300)
    y = torch.tensor([1, 0, 1, 0, 1, 0, 1, 0]).double()
    assert torch.equal(scaling.focal_bce(x, y), scaling.focal_bce(x, y, gamma=2.0))
    if gamma == 0 and alpha is None:
        plain = torch.nn.functional.binary_cross_entropy_with_logits(x, y, reduction="none")
        torch.testing.assert_close(scaling.focal_bce(x, y, gamma=0.0), plain)
    sure = scaling.focal_bce(torch.tensor([torch.inf, -torch.inf]), y[:2], gamma=gamma)
    assert sure.tolist() == [0, 0]
    half = x.detach().bfloat16().requires_grad_()  # where an exponent is off by percents
    for target in (0, 1):
        got, exact = (
            scaling.focal_bce(z, torch.full((8,), target), gamma=gamma, alpha=alpha)
            for z in (half, half.double())
        )
        grads = (torch.autograd.grad(out.sum(), half)[0].double() for out in (got, exact))
        for a, b in ((got.double(), exact), grads):
            torch.testing.assert_close(a, b, rtol=2**-8, atol=1e-36)
    small = x[2:6].detach().requires_grad_()
    torch.autograd.gradcheck(
        lambda z: scaling.focal_bce(z, y[2:6], gamma=gamma, alpha=alpha), small
    )


# ---- data filters


def test_not_all_correct_answers_are_equal() -> None:
    """Perplexity of a trace from token_stats, padding left out, beside length statistics."""
    logits = randn(2, 5, 11, seed=7)
    targets = torch.arange(10).view(2, 5)
    mask = torch.tensor([[1, 1, 1, 1, 1], [1, 1, 0, 0, 0]]).bool()
    stats = rk.token_stats(logits, targets, mask=mask)
    got = (-stats.logprob.sum(1) / mask.sum(1)).exp()
    for b, length in enumerate((5, 2)):
        p = [
            math.exp(logits[b, t, targets[b, t]]) / sum(math.exp(x) for x in logits[b, t].tolist())
            for t in range(length)
        ]
        assert got[b].item() == pytest.approx(math.prod(p) ** (-1 / length), rel=1e-12)
    kept = got < got.mean()  # the perplexity filter of a distilled dataset
    assert kept.sum() == 1
    lengths = scaling.length_statistics(mask.sum(1), torch.tensor([True, False]))
    assert (lengths.mean_correct, lengths.mean_wrong) == (5, 2)


def test_sft_of_astro_sky_t1_and_ded() -> None:
    """The fine-tuning loss of a trace and its gradients, from hidden states, without the logits."""
    hidden, weight = randn(2, 5, 6, seed=8), randn(11, 6, seed=9)
    targets = torch.arange(10).view(2, 5)
    mask = torch.tensor([[0, 1, 1, 1, 1], [0, 1, 0, 0, 0]]).bool()  # the prompt is not trained

    def gradients(loss: Tensor, of: tuple[Tensor, Tensor]) -> list[Tensor]:
        return [loss.detach(), *torch.autograd.grad(loss, of)]

    mine = hidden.clone().requires_grad_(), weight.clone().requires_grad_()
    stats = rk.linear_token_stats(*mine, targets, mask=mask)
    got = gradients(-(rk.token_weights(mask) * stats.logprob).sum(), mine)
    plain = hidden.clone().requires_grad_(), weight.clone().requires_grad_()
    logits = (plain[0] @ plain[1].T)[mask]
    loss = torch.nn.functional.cross_entropy(logits, targets[mask])
    for a, b in zip(got, gradients(loss, plain), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-8)
