"""The fronts of verification: seeds, scalars, errors; the speculative loop equals the plain one."""

from __future__ import annotations

import pytest
import torch
from contract import NoHostData
from speculation_cases import generator, random_tree

import reasonkern as rk

V, TREE = 9, rk.DraftTree([-1, 0, 0, 1])


def draft(batch=2, nodes=4, **law):
    return rk.Draft(torch.zeros(batch, nodes).long(), torch.ones(batch, nodes).bool(), **law)


def call(**change):
    given = {"logits": torch.zeros(2, 4, V), "draft": draft(), "tree": TREE, "temperature": 1.0,
             "seed": 0, "position": 0} | change  # fmt: skip
    return rk.verify_tree(given.pop("logits"), given.pop("draft"), given.pop("tree"), **given)


# ---- seeds


def test_request_seeds_are_hashed_and_stable():
    a, b = rk.request_seeds(0, 1000), rk.request_seeds(1, 1000)
    assert len(set(a.tolist()) | set(b.tolist())) == 2000
    assert a.dtype == torch.int64 and torch.equal(a[:3], rk.request_seeds(0, 3))
    assert torch.equal(rk.request_seeds(2**64 - 1, 4), rk.request_seeds(-1, 4))
    assert torch.equal(rk.request_seeds(torch.tensor(7), 4), rk.request_seeds(7, 4))
    assert rk.request_seeds(5, 0).shape == (0,)
    bits = (a.unsqueeze(-1) >> torch.arange(64)) & 1
    assert ((bits.double().mean(0) - 0.5).abs() < 5 / (2 * 1000**0.5)).all()


def test_requests_with_one_seed_share_their_noise_in_any_row():
    x = torch.randn(1, 50, generator=generator(0)).expand(6, 50).contiguous()
    seed = torch.tensor([3, 4, 3, 5, 3, 4])
    token = rk.sample(x, temperature=2.0, seed=seed, position=11)
    assert token[0] == token[2] == token[4] and token[1] == token[5]
    alone = rk.sample(x[:1], temperature=2.0, seed=5, position=11)
    assert alone.item() == token[3]


# ---- parameters


def test_scalars_and_tensors_mean_the_same():
    x = torch.randn(3, 40, generator=generator(1))
    full = {"temperature": 0.7, "top_k": 9, "top_p": 0.8, "min_p": 0.02, "seed": 5, "position": 6}
    tensors = {k: torch.tensor([v] * 3) for k, v in full.items()}
    zero_dim = {k: torch.tensor(v) for k, v in full.items()}
    expected = rk.sample(x, **full)
    assert torch.equal(rk.sample(x, **tensors), expected)
    assert torch.equal(rk.sample(x, **zero_dim), expected)


def test_numbers_are_filled_in_on_the_device():
    TREE.tensors("meta")  # copied there once
    logits = torch.zeros(2, 4, V, device="meta")
    on_device = rk.Draft(*(x.to("meta") for x in draft()[:2]))
    for eos in (3, [3, 4], []):
        with NoHostData():
            seed = rk.request_seeds(5, 2, device="meta")
            limits = {"eos": eos, "max_length": 2, "num_nodes": 3, "top_k": 5, "top_p": 0.9}
            out = call(logits=logits, draft=on_device, seed=seed, **limits)
        assert out.tokens.shape == (2, TREE.depth + 1)


def test_numbers_beyond_float32_mean_off():
    x = torch.randn(3, 40, generator=generator(1))
    expected = rk.sample(x, temperature=0.7, seed=5, position=6)
    given = {"temperature": 0.7, "seed": 5, "position": 6}
    assert torch.equal(rk.sample(x, top_p=1e300, min_p=-1e300, **given), expected)
    assert torch.equal(rk.sample(x, top_p=1 << 70, **given), expected)
    with pytest.raises(ValueError, match="temperature: expected finite values >= 0"):
        rk.sample(x, temperature=1e300, seed=5, position=6)


def test_masks_of_any_strides():
    x = torch.randn(2, 70, generator=generator(1))
    mask = torch.randint(1 << 31, (2, 3), generator=generator(2)).int()
    strided = mask.mT.contiguous().mT
    assert strided.stride() == (1, 2)
    given = {"temperature": 1.0, "seed": 5, "position": 6}
    assert torch.equal(rk.sample(x, mask=strided, **given), rk.sample(x, mask=mask, **given))
    given = {"logits": torch.zeros(2, 4, 70), "node_mask": mask[:, None].expand(2, 4, 3).mT}
    given["node_mask"] = given["node_mask"].contiguous().mT
    assert call(**given).length.tolist() == [1, 1]
    assert rk.sample(x[:0], mask=strided[:0], temperature=1.0, seed=0, position=0).shape == (0,)


def test_filters_that_are_off_change_nothing():
    x = torch.randn(3, 40, generator=generator(1))
    plain = rk.sample(x, temperature=1.3, seed=1, position=2)
    off = {"top_k": 40, "top_p": 1.0, "min_p": 0.0}
    assert torch.equal(rk.sample(x, temperature=1.3, seed=1, position=2, **off), plain)


def test_sample_has_the_law_of_the_filtered_softmax():
    x = torch.tensor([2.0, 1.5, 1.0, 0.5, 0.0, -5.0])
    n = 20000
    seeds = rk.request_seeds(4, n)
    token = rk.sample(x.expand(n, 6).contiguous(), temperature=0.8, top_p=0.8, seed=seeds,
                      position=0)  # fmt: skip
    p = (x / 0.8).softmax(0)
    kept = p.cumsum(0) - p < 0.8
    law = torch.where(kept, p, 0) / p[kept].sum()
    share = torch.bincount(token, minlength=6) / n
    assert ((share - law).abs() < 5 * (law * (1 - law) / n).sqrt() + 1e-9).all()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"temperature": -1.0}, "temperature: expected finite values >= 0, got -1.0"),
        ({"temperature": float("nan")}, "temperature: expected finite values >= 0"),
        ({"temperature": torch.ones(3)}, "temperature: expected shape"),
        ({"temperature": "warm"}, "temperature: expected a number"),
        ({"top_p": 0.0}, "top_p: expected values > 0"),
        ({"top_p": torch.tensor([0.5, -0.5])}, r"top_p: expected values > 0, got -0.5 at \(1,\)"),
        ({"min_p": 1.5}, "min_p: expected values <= 1"),
        ({"top_k": 2.5}, r"top_k: expected an integer or a \(B,\) tensor, got 2.5"),
        ({"seed": 2**64}, r"seed: expected an integer in \[-2\^63, 2\^64\)"),
        ({"seed": torch.zeros(2)}, "seed: expected dtype torch.int64"),
        ({"position": -1}, "position: expected values >= 0"),
        ({"mode": "exact"}, "mode: expected 'shared' or"),
        ({"mode": "greedy"}, "temperature: expected the number 0"),
        ({"mode": "rejection"}, "draft: expected q_ids and q_logprob"),
        ({"topk": 0}, "topk: expected an integer"),
        ({"max_length": -1}, "max_length: expected values >= 0"),
        ({"num_nodes": 5}, r"num_nodes: expected values in \[1, 5\)"),
        ({"tree": [-1, 0]}, "tree: expected a DraftTree"),
        ({"logits": torch.zeros(2, 3, V)}, "logits: expected one row per node"),
        ({"logits": torch.zeros(2, 4, V).long()}, "logits: expected dtype"),
        ({"logits": torch.zeros(2, 4, V, 2)[..., 0]}, "logits: expected the last dimension"),
        ({"draft": draft(batch=3)}, "draft.tokens: expected shape"),
        ({"node_mask": torch.zeros(2, 4, 2).int()}, "node_mask: expected shape"),
        ({"node_mask": torch.zeros(2, 4, 1).long()}, "node_mask: expected dtype"),
        ({"eos": torch.zeros(1)}, "eos: expected dtype"),
        ({"eos": torch.tensor([[1], [2]])}, r"eos: expected shape \(E,\), of ids that end any"),
        ({"eos": list(range(65))}, "eos: expected at most 64 ids"),
        ({"eos": "stop"}, "eos: expected an id, a list of ids or a tensor, got 'stop'"),
        ({"eos": [0.5]}, r"eos: expected an id, a list of ids or a tensor, got \[0.5\]"),
        ({"eos": {1, 2}}, r"eos: expected an id, a list of ids or a tensor, got \{1, 2\}"),
        ({"draft": None}, "draft: expected a Draft, got NoneType"),
        ({"max_length": torch.ones(2).long().to_sparse()}, "max_length: expected a dense tensor"),
    ],
)  # fmt: skip
def test_errors(change, message):
    with pytest.raises(ValueError, match="^" + message):
        call(**change)


def test_errors_of_the_draft_law():
    ids = torch.zeros(2, 4, 3).long()
    with pytest.raises(ValueError, match=r"^draft.q_ids: expected shape \(B, N, K\)"):
        call(mode="rejection", draft=draft(q_ids=ids[0], q_logprob=ids[0].float()))
    with pytest.raises(ValueError, match=r"^draft.q_logprob: expected log-probabilities <= 0"):
        call(mode="rejection", draft=draft(q_ids=ids, q_logprob=ids.float() + 1))
    with pytest.raises(ValueError, match="^batch: expected an integer >= 0"):
        rk.request_seeds(0, -1)


# ---- the loop


class Bigram:
    """A toy language model: the row depends on the two last tokens."""

    def __init__(self, vocab: int, seed: int) -> None:
        self.table = 2.5 * torch.randn(vocab, vocab, vocab, generator=generator(seed)).double()

    def __call__(self, before: torch.Tensor, last: torch.Tensor) -> torch.Tensor:
        return self.table[before, last]


def speculative(model, seeds, steps, filters, tree, drafter, batch):
    """Tokens of every request, by trees of drafts; requests run ahead of each other."""
    text = [[0, 0] for _ in range(batch)]
    calls = 0
    while min(len(t) for t in text) < steps + 2:
        tokens = torch.tensor([t[-1] for t in text])[:, None].repeat(1, tree.nodes)
        before = torch.tensor([t[-2] for t in text])[:, None].repeat(1, tree.nodes)
        for node in range(1, tree.nodes):
            parent = int(tree.parents[node])
            before[:, node] = tokens[:, parent]
            tokens[:, node] = drafter(before[:, parent], tokens[:, parent], int(tree.ranks[node]))
        valid = torch.ones_like(tokens, dtype=torch.bool)
        out = rk.verify_tree(
            model(before, tokens), rk.Draft(tokens, valid), tree, seed=seeds,
            position=torch.tensor([len(t) - 2 for t in text]), **filters,
        )  # fmt: skip
        for b, t in enumerate(text):
            t += out.tokens[b, : out.length[b]].tolist()
        calls += 1
    return [t[2 : steps + 2] for t in text], calls


@pytest.mark.parametrize(
    "filters",
    [
        {"temperature": 0.9}, {"temperature": 0.0},
        {"temperature": 0.8, "top_k": 7, "top_p": 0.9, "min_p": 0.01},
    ],
)  # fmt: skip
def test_the_speculative_loop_is_the_plain_loop(filters):
    vocab, batch, steps = 12, 100, 60
    model, seeds = Bigram(vocab, 0), rk.request_seeds(9, batch)
    plain, text = [], [torch.zeros(batch).long(), torch.zeros(batch).long()]
    for n in range(steps):
        token = rk.sample(model(text[-2], text[-1]), seed=seeds, position=n, **filters)
        text.append(token)
        plain.append(token)
    expected = torch.stack(plain, 1).tolist()

    def good(before, last, rank):
        return model(before, last).argsort(-1, descending=True)[:, rank]

    def adversarial(before, last, rank):
        return model(before, last).argsort(-1)[:, rank]

    calls = []
    for seed, drafter in enumerate((good, adversarial)):
        got, count = speculative(model, seeds, steps, filters, random_tree(8, seed), drafter, batch)
        assert got == expected
        calls.append(count)
    assert calls[0] < calls[1]
    order = torch.randperm(batch, generator=generator(1))
    tree = rk.DraftTree.chain(3)
    got, _ = speculative(model, seeds[order], steps, filters, tree, good, batch)
    assert got == [expected[i] for i in order.tolist()]
