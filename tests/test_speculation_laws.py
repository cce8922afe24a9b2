"""Losslessness: exact laws of the rejection rule, and `check_verifier` with what it must find."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch
from speculation_verifiers import MISTAKES, batched, enumerated
from torch import Tensor

import reasonkern as rk
from reasonkern.speculation import rejection
from reasonkern.speculation.laws import exact_law, g_test
from reasonkern.speculation.toy import Toy

F64 = torch.float64


def node_law(p: Tensor, q: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """(V,) P(child x is accepted) and (V,) P(the node ends with y): every draw order of k children,
    coins integrated, by the state that the definition itself keeps."""
    vocab = len(p)
    ids = q.nonzero()[:, 0]
    k = min(k, len(ids))
    orders = torch.tensor(list(itertools.permutations(ids.tolist(), k)))
    reach, left = torch.ones(len(orders), dtype=F64), torch.ones(len(orders), dtype=F64)
    for j in range(k):  # Plackett-Luce
        weight = q[orders[:, j]]
        reach, left = reach * weight / left, left - weight
    n, one = len(orders), torch.ones(len(orders), dtype=F64)
    support = p[ids].expand(n, -1)
    state = rejection.State(
        ids.expand(n, -1), q[ids].expand(n, -1), support, support, one,
        one * (1 - p[ids].sum()).clamp_min(0), one, torch.zeros(n, dtype=torch.bool),
        torch.ones(n, dtype=torch.bool),
    )  # fmt: skip
    accepted = torch.zeros(vocab, dtype=F64)
    for j in range(k):
        x = orders[:, j]
        slot = (state.ids == x.unsqueeze(-1)).to(torch.int8).argmax(-1, keepdim=True)
        s_x, r_x = (t.gather(-1, slot).squeeze(-1) for t in (state.s, state.r))
        tested = state.live & (s_x > 0)
        chance = torch.where(tested, (r_x / torch.where(tested, s_x, 1)).clamp(0, 1), 0)
        accepted.index_add_(0, x, reach * chance)
        reach = reach * (1 - chance)
        coin = torch.full_like(reach, 2.0)  # rejects wherever the test has a choice
        rejection.test(state, x, coin, tested & (chance < 1))
    r = torch.where(state.patched.unsqueeze(-1), state.tail.unsqueeze(-1) * p, p)
    r = torch.where(state.patched.unsqueeze(-1), r.scatter(-1, state.ids, state.r), r)
    return accepted, (reach.unsqueeze(-1) * r).sum(0)


def law(values) -> Tensor:
    x = torch.tensor(values, dtype=F64)
    return x / x.sum()


LAWS = {
    "plain": ([1, 2, 3, 4, 5, 6], [6, 1, 2, 1, 4, 3]),
    "equal": ([1, 2, 3, 4, 5, 6], [1, 2, 3, 4, 5, 6]),
    "disjoint": ([1, 2, 3, 0, 0, 0], [0, 0, 0, 3, 1, 1]),
    "one-hot target": ([0, 0, 1, 0, 0, 0], [1, 1, 2, 3, 1, 1]),
    "one-hot target outside": ([0, 0, 1, 0, 0, 0], [1, 1, 0, 3, 1, 1]),
    "one-hot draft": ([1, 2, 3, 4, 5, 6], [0, 0, 0, 1, 0, 0]),
    "both one-hot": ([0, 1, 0, 0, 0, 0], [0, 1, 0, 0, 0, 0]),
    "zeros": ([0, 5, 0, 1, 3, 0], [2, 1, 0, 0, 4, 1]),
    "ties": ([1, 1, 1, 1, 1, 1], [1, 1, 2, 2, 1, 1]),
    "tiny": ([1e-9, 1, 1e-12, 2, 1, 1], [1, 1e-9, 1, 1e-12, 1, 1]),
    "two tokens": ([1, 3], [3, 1]),
}


@pytest.mark.parametrize("k", [1, 2, 3])
@pytest.mark.parametrize("name", LAWS)
def test_rejection_is_exact(name, k):
    p, q = map(law, LAWS[name])
    accepted, ended = node_law(p, q, k)
    assert float((accepted + ended - p).abs().sum() / 2) < 1e-12


def test_rejection_is_exact_for_random_laws():
    g = torch.Generator().manual_seed(0)
    for seed in range(40):
        p = law((torch.rand(6, generator=g) ** 3).tolist())
        q = torch.rand(6, generator=g, dtype=F64) ** 3
        q[torch.randperm(6, generator=g)[: seed % 4]] = 0
        accepted, ended = node_law(p, q / q.sum(), 1 + seed % 3)
        assert float((accepted + ended - p).abs().sum() / 2) < 1e-12


@pytest.mark.parametrize("k", [1, 2, 3])
def test_rejection_is_exact_down_a_tree(k):
    """Depth 3: tokens follow their prefix's law whether a step ends before them or not."""
    toy = Toy(6, k, 3, seed=1)
    emitted = torch.ones(1, dtype=F64)  # P(prefix, and the walk is still going)
    whole = torch.zeros(6**4, dtype=F64)
    last = torch.zeros(1, dtype=torch.int64)
    for d in range(4):
        laws = [node_law(toy.target[d, t], toy.draft[d, t], k if d < 3 else 0) for t in range(6)]
        accepted, ended = (torch.stack(x)[last] for x in zip(*laws, strict=True))
        tail = (emitted.unsqueeze(-1) * ended).reshape(-1)
        ends = torch.arange(6).repeat(len(emitted))
        for j in range(d + 1, 4):
            tail = (tail.unsqueeze(-1) * toy.target[j, ends]).reshape(-1)
            ends = torch.arange(6).repeat(len(tail) // 6)
        whole += tail
        emitted = (emitted.unsqueeze(-1) * accepted).reshape(-1)
        last = torch.arange(6).repeat(len(last))
    assert exact_law("joint", whole, toy.joint(4)).total_variation < 1e-12


# ---- check_verifier


def ours(mode: str):
    def verify(logits, draft, tree, temperature, seed, position):
        out = rk.verify_tree(
            logits, draft, tree, temperature=temperature, seed=seed, position=position, mode=mode
        )
        return out.tokens, out.length

    return verify


@pytest.mark.parametrize("shared", [False, True])
def test_equality_is_lossless(shared):
    report = rk.check_verifier(ours("shared"), draws=2**14, shared=shared)
    assert report and not report.broken, str(report)
    assert [law.name for law in report.laws] == [
        "marginal", "pair", "joint", "length > 1", "length > 2", "length > 3"
    ]  # fmt: skip


@pytest.mark.parametrize("vocab", [5, 16])
def test_rejection_is_lossless(vocab):
    report = rk.check_verifier(ours("rejection"), vocab=vocab, draws=2**14)
    assert report, str(report)


@pytest.mark.slow
@pytest.mark.parametrize("mode", ["shared", "rejection"])
def test_a_million_draws(mode):
    report = rk.check_verifier(ours(mode))
    assert report, str(report)


@pytest.mark.parametrize("mistake", MISTAKES)
def test_mistakes_are_found_by_drawing(mistake):
    # One child leaves the residual the most to do.
    children = 1 if mistake == "reused noise" else 3
    report = rk.check_verifier(batched(mistake), vocab=8, children=children, depth=1, draws=2**15)
    assert not report and "marginal" in report.broken, str(report)
    assert "BROKEN" in str(report) and "marginal" in str(report)


def test_the_right_batched_verifier_passes():
    assert rk.check_verifier(batched(None), vocab=8, depth=2, draws=2**14)


@pytest.mark.parametrize("exact", [False, True])
def test_a_default_device_does_not_matter(exact):
    toy = {"vocab": 3, "children": 1, "depth": 1, "exact": exact}
    fn = enumerated(None) if exact else ours("rejection")
    expected = str(rk.check_verifier(fn, **toy, **({} if exact else {"draws": 64})))
    with torch.device("meta"):
        assert str(rk.check_verifier(fn, **toy, **({} if exact else {"draws": 64}))) == expected


@pytest.mark.parametrize("mistake", MISTAKES)
def test_mistakes_are_found_by_enumeration(mistake):
    report = rk.check_verifier(enumerated(mistake), vocab=5, children=2, depth=1, exact=True)
    assert not report and "marginal" in report.broken, str(report)
    assert report.laws[0].total_variation > 0.01


@pytest.mark.parametrize(("vocab", "children", "depth"), [(6, 3, 1), (None, None, None), (3, 1, 3)])
def test_the_right_rule_passes_enumeration(vocab, children, depth):
    report = rk.check_verifier(
        enumerated(None), vocab=vocab, children=children, depth=depth, exact=True
    )
    assert report, str(report)
    assert max(law.total_variation for law in report.laws) < 1e-12


def test_a_mistake_below_the_root_breaks_the_later_laws_only():
    def late(logits, draft, tree, temperature, seed, position):
        good, length = ours("target-only")(logits, draft, tree, temperature, seed, position)
        wrong = torch.where(length == 3, 0, good[:, 2])
        return torch.cat([good[:, :2], wrong[:, None]], 1), length

    report = rk.check_verifier(late, depth=2, draws=2**14)
    assert report.broken == ("joint", "length > 2"), str(report)


@pytest.mark.parametrize("mode", ["shared", "rejection"])
def test_noise_that_neighbours_share_is_found(mode):
    """Each of them alone has the target's law."""

    def shared(logits, draft, tree, temperature, seed, position):
        seed = seed[torch.arange(len(seed)) // 2 * 2]
        return ours(mode)(logits, draft, tree, temperature, seed, position)

    report = rk.check_verifier(shared, draws=2**14 + 1)
    assert report.broken == ("pair",), str(report)


def test_laws_without_draws_are_not_tested():
    """Plain sampling never emits a second token; 16 draws tell nothing."""

    def plain(logits, draft, tree, temperature, seed, position):
        tokens, _ = ours("shared")(logits, draft, tree, temperature, seed, position)
        return tokens, torch.ones_like(tokens[:, 0])

    report = rk.check_verifier(plain, draws=2**12)
    assert report and report.untested == ("length > 1", "length > 2", "length > 3")
    assert "length > 1   not tested (too few draws, n = 0)" in str(report)
    report = rk.check_verifier(ours("shared"), draws=16)
    assert not report and not report.broken and len(report.untested) == 6
    assert "holds" not in str(report)


def test_an_impossible_token_breaks_the_law_at_once():
    observed, target = torch.tensor([[5.0, 0.0, 1.0]]), torch.tensor([[0.5, 0.5, 0.0]])
    law = g_test("x", observed, target)
    assert law.p_value == 0 and law.tested and "BROKEN" in str(law)


def test_g_test_of_a_true_law_is_uniform():
    g = torch.Generator().manual_seed(3)
    p = torch.tensor([0.5, 0.2, 0.15, 0.1, 0.05])
    values = []
    for _ in range(200):
        draws = torch.multinomial(p, 2000, replacement=True, generator=g)
        values.append(g_test("x", torch.bincount(draws, minlength=5)[None], p[None]).p_value)
    share = (torch.tensor(values) < 0.1).double().mean()
    assert 0.04 < share < 0.18


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"vocab": 1}, "vocab: expected an integer"), ({"depth": 0}, "depth: expected an integer"),
        ({"vocab": 7, "exact": True}, "vocab: expected"), ({"draws": 0}, "draws: expected"),
        ({"children": 17}, "children: expected an integer"), ({"depth": 9}, r"depth: .*\[1, 8\]"),
        ({"children": 4, "exact": True}, r"children: expected an integer in \[1, 3\]"),
        ({"depth": 4, "exact": True}, r"depth: expected an integer in \[1, 3\], got 4"),
        ({"vocab": 2}, r"children: expected an integer in \[1, 2\] \(vocab = 2\), got 3"),
    ],
)  # fmt: skip
def test_sizes_are_checked(change, message):
    with pytest.raises(ValueError, match=f"^{message}"):
        rk.check_verifier(ours("shared"), **change)


def test_sizes_of_numpy_are_sizes():
    sizes = dict.fromkeys(("children", "depth"), np.int64(2)) | {"vocab": np.int32(4)}
    assert rk.check_verifier(ours("shared"), draws=np.int64(4096), **sizes)
    assert rk.check_verifier(ours("shared"), vocab=np.uint8(16), depth=1, draws=np.int16(4096))


def test_results_are_checked():
    def short(logits, *_):
        return torch.zeros(len(logits), 1, dtype=torch.int64), torch.ones(len(logits))

    with pytest.raises(ValueError, match="^tokens: expected shape"):
        rk.check_verifier(short, draws=16)
    with pytest.raises(ValueError, match="^fn's result: expected the pair .* got NoneType"):
        rk.check_verifier(lambda *_: None, draws=16)
    with pytest.raises(ValueError, match="^length: expected a tensor, got int"):
        rk.check_verifier(lambda *_: (torch.zeros(16, 4).long(), 1), draws=16)
    with pytest.raises(ValueError, match="^tokens: expected dtype torch.int64 or .*float32"):
        rk.check_verifier(lambda *_: (torch.zeros(16, 4), torch.ones(16).long()), draws=16)
    with pytest.raises(ValueError, match=r"^fn: expected a function \(logits, .*\), .* got 3"):
        rk.check_verifier(3)
    with pytest.raises(ValueError, match=r"^fn: .*draft, tree, temperature, seed, position\), all"):
        rk.check_verifier(lambda logits, draft, *, tree: None, draws=16)
    with pytest.raises(ValueError, match=r"^fn: .* \(draws, coins\), .* got \(logits\) \(too many"):
        rk.check_verifier(lambda logits: [], vocab=3, exact=True)
    for wrong in (None, [torch.tensor(0)]):
        with pytest.raises(ValueError, match="^fn's result: expected a list of integers"):
            rk.check_verifier(
                lambda *_, wrong=wrong: wrong, vocab=3, children=1, depth=1, exact=True
            )
    with pytest.raises(ValueError, match="^tokens: expected 1 to 2 ids"):
        rk.check_verifier(lambda draws, coins: [], vocab=3, children=1, depth=1, exact=True)
