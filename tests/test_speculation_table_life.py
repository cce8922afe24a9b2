"""`NgramTable` over many calls: its bounds, its scopes, what it drafts, its state."""

from __future__ import annotations

import io
import math

import pytest
import torch
from contract import assert_same_bits
from speculation_table_cases import (
    assert_same_table,
    define,
    filled,
    generator,
    random_batch,
    random_requests,
    run_draft,
    run_update,
    small,
    state_tensors,
)
from torch import Tensor

from reasonkern import DraftTree, NgramTable, _load
from reasonkern.speculation import noise

# ---- bounds: eviction, memory


def one_hot(contexts: list[list[int]], token: int = 1) -> tuple[Tensor, Tensor, Tensor]:
    rows = len(contexts)
    return torch.tensor(contexts), torch.full((rows, 1), token), torch.zeros(rows, 1)


def test_the_oldest_then_the_rarest_is_evicted() -> None:
    """One set of eight: contexts 0 … 7, of which 0 is refreshed and 1 is the rarer of the old."""
    table = NgramTable(8, vocab_size=100, orders=(1,), topk=2)
    for token in range(2, 8):
        table.update(*one_hot([[token]] * 2))
    table.clear()
    table.update(*one_hot([[t] for t in range(8)] + [[t] for t in range(8) if t != 3]))
    table.update(*one_hot([[0]]))

    def known(token: int) -> bool:
        draft = table.draft(
            torch.tensor([[token]]), DraftTree.chain(2), temperature=0, seed=0, position=0
        )
        return bool(draft.valid[0, 1])

    assert all(known(t) for t in range(8)) and len(table) == 8
    table.update(*one_hot([[50]]))  # 3 is as old as 1, 2, 4 … and has the smallest count
    assert not known(3) and known(50) and known(0) and len(table) == 8
    for new in range(60, 66):
        table.update(*one_hot([[new]]))
    assert known(0) and sum(known(t) for t in range(8)) == 1
    table.update(*one_hot([[70]]))
    assert not known(0) and table.stats()["evictions"] == 8


def test_the_age_goes_before_any_count() -> None:
    """Of a set of eight, the oldest goes, a call older than the next and 300 times as frequent."""
    for more in range(2):
        table = NgramTable(8, vocab_size=100, orders=(1,), topk=2, max_count=1000)
        table.update(*one_hot([[0]] * 300))
        for token in (*range(1, 8), *[7] * more, 8):
            table.update(*one_hot([[token]]))
        draft = table.draft(
            torch.arange(9)[:, None], DraftTree.chain(2), temperature=0, seed=0, position=0
        )
        assert draft.valid[:, 1].tolist() == [False] + [True] * 8


def test_drafting_does_not_make_an_entry_younger() -> None:
    table = NgramTable(8, vocab_size=100, orders=(1,), topk=2)
    for token in range(8):
        table.update(*one_hot([[token]]))
    for _ in range(3):
        table.draft(torch.tensor([[0]]), DraftTree.chain(2), temperature=0, seed=0, position=0)
    table.update(*one_hot([[9]]))
    assert not table.draft(
        torch.tensor([[0]]), DraftTree.chain(2), temperature=0, seed=0, position=0
    ).valid[0, 1]


def test_ages_survive_the_wrap_of_the_call_counter() -> None:
    table = NgramTable(8, vocab_size=100, orders=(1,), topk=2)
    table._state.clock.fill_((1 << 32) - 4)
    for token in range(8):
        table.update(*one_hot([[token]]))
    table.update(*one_hot([[9]]))
    known = table.draft(
        torch.arange(8)[:, None], DraftTree.chain(2), temperature=0, seed=0, position=0
    ).valid[:, 1]
    assert known.tolist() == [False] + [True] * 7


def test_more_rows_of_a_key_than_a_product_of_64_bits_takes() -> None:
    """A sum of 2^18 probabilities of 1 in units of 2^-30, times max_count."""
    if not _load.available("cpu"):
        pytest.skip(_load.reason("cpu"))  # the definition takes rows one by one
    table = NgramTable(8, vocab_size=100, orders=(1,), topk=2, max_count=32767, storage="exact")
    context = torch.full((1 << 18 | 1 << 8, 1), 7)
    table.update(context, torch.ones_like(context), torch.zeros(context.shape))
    state = state_tensors(table)
    assert state["counts"].max() == 32767 and state["extra"].max() == 32767 << 30


@pytest.mark.parametrize(("vocab", "entry"), [(1 << 18, 62), ((1 << 18) + 1, 74)])
def test_memory(vocab: int, entry: int) -> None:
    table = NgramTable(1 << 12, vocab_size=vocab)
    fixed = 4096 * 4 + 8 + 8 * 8
    assert table.nbytes == entry * (1 << 12) + fixed
    assert (1 << 20) * entry + fixed <= 80 << 20


def churn(updates: int, rows: int) -> None:
    table = NgramTable(1 << 12, vocab_size=1000, topk=4)
    nbytes = table.nbytes
    pointers = [t.data_ptr() for t in state_tensors(table).values()]
    g = generator(0)
    for _ in range(updates // rows):
        context = torch.randint(0, 1000, (rows, 4), generator=g)
        table.update(context, torch.randint(0, 1000, (rows, 1), generator=g), torch.zeros(rows, 1))
    stats = table.stats()
    assert stats["rows"] == updates and stats["load"] == 1.0 == len(table) / table.capacity
    # 1000^2 bigrams and more in 4096 entries: a context is nearly always new.
    assert 0.9 * 3 * updates < stats["evictions"] + table.capacity <= 3 * updates
    assert table.nbytes == stats["nbytes"] == nbytes
    assert pointers == [t.data_ptr() for t in state_tensors(table).values()]


def test_updates_do_not_grow_the_table() -> None:
    churn(20_000, 1000)


@pytest.mark.slow
def test_ten_million_updates_do_not_grow_the_table() -> None:
    churn(10_000_000, 50_000)


# ---- scopes


def test_scopes_do_not_leak() -> None:
    table = small(capacity=4096)
    batch = random_batch(1, scopes=1)
    for scope in (0, 2):
        shifted = torch.where(batch.ids >= 0, (batch.ids + 10 * scope) % 50, -1)
        table.update(batch.context, shifted, batch.logits, lse=batch.lse, scope=scope)
    alone = small(capacity=4096)
    alone.update(batch.context, batch.ids, batch.logits, lse=batch.lse)
    requests = random_requests(3)
    options = {"temperature": requests.temperature, "seed": requests.seed, "position": 5}
    tree = DraftTree.default(20)
    drafts = [table.draft(requests.context, tree, scope=s, **options) for s in (0, 1, 2, 3)]
    assert torch.equal(drafts[0].tokens, alone.draft(requests.context, tree, **options).tokens)
    assert not torch.equal(drafts[0].tokens, drafts[2].tokens)
    for empty in (drafts[1], drafts[3]):
        assert not empty.valid[:, 1:].any()
    mixed = table.draft(requests.context, tree, scope=torch.arange(9) % 4, **options)
    for row in range(9):
        assert torch.equal(mixed.tokens[row], drafts[row % 4].tokens[row])


def test_reset_forgets_one_scope() -> None:
    table = small(capacity=4096)
    for scope in range(3):
        table.update(*one_hot([[1, 2, 3]], token=scope), scope=scope)
    before = len(table)
    table.reset(1)
    context, tree = torch.tensor([[1, 2, 3]] * 3), DraftTree.chain(2)
    draft = table.draft(context, tree, temperature=0, seed=0, position=0, scope=torch.arange(3))
    assert draft.valid[:, 1].tolist() == [True, False, True] and len(table) == before
    table.update(*one_hot([[1, 2, 3]], token=9), scope=1)
    again = table.draft(context, tree, temperature=0, seed=0, position=0, scope=torch.arange(3))
    assert again.tokens[:, 1].tolist() == [0, 9, 2]
    table.reset(torch.tensor([0, 2]))
    last = table.draft(context, tree, temperature=0, seed=0, position=0, scope=torch.arange(3))
    assert last.valid[:, 1].tolist() == [False, True, False]


# ---- drafting


def test_shared_drafts_are_the_largest_perturbed_scores() -> None:
    table = NgramTable(64, vocab_size=50, orders=(1,), topk=4)
    p = torch.tensor([[0.5, 0.25, 0.125, 0.0625]])
    table.update(torch.tensor([[3]]), torch.tensor([[7, 9, 11, 2]]), p.log())
    tree = DraftTree([-1, 0, 0, 0, 0])
    for seed in range(20):
        token = torch.tensor([7, 9, 11, 2])
        g = noise.gumbel_noise(torch.tensor(seed), torch.tensor(40), token)
        expected = token[(p[0].log() / 0.7 + g).argsort(descending=True)]
        draft = table.draft(torch.tensor([[3]]), tree, temperature=0.7, seed=seed, position=40)
        assert draft.tokens[0, 1:].tolist() == expected.tolist()


def test_each_node_looks_its_own_context_up() -> None:
    """A chain of one-hot bigrams and trigrams is followed to its end, the longest order first."""
    table = NgramTable(64, vocab_size=50, orders=(2, 1), topk=2)
    table.update(*one_hot([[-1, 1]], token=2))
    table.update(*one_hot([[1, 2]], token=3))  # also teaches order 1: 2 -> 3
    table.update(*one_hot([[-1, 3]], token=4))
    table.update(*one_hot([[2, 3]], token=5))  # order 1 of 3 is now half 4, half 5
    draft = table.draft(
        torch.tensor([[9, 1]]), DraftTree.chain(6), temperature=0, seed=0, position=1
    )
    assert draft.tokens.tolist() == [[1, 2, 3, 5, 1, 1]]
    assert draft.valid.tolist() == [[True, True, True, True, False, False]]
    assert table.stats()["hits"] == {2: 2, 1: 1} and table.stats()["misses"] == 1


def test_greedy_ties_go_to_the_lower_id() -> None:
    table = NgramTable(64, vocab_size=50, orders=(1,), topk=3)
    table.update(torch.tensor([[1]]), torch.tensor([[9, 4, 6]]), torch.full((1, 3), 0.25).log())
    for mode in ("greedy", "target-only", "shared", "rejection"):
        draft = table.draft(
            torch.tensor([[1]]), DraftTree([-1, 0, 0, 0]), temperature=0, seed=1, position=0,
            mode=mode,
        )  # fmt: skip
        assert draft.tokens.tolist() == [[1, 4, 6, 9]]
    assert draft.q_logprob[0, 0].exp().tolist() == [1.0, 0.0, 0.0]
    assert draft.q_ids[0, 0, 0] == 4
    # The entry's first one is likelier, by less than its code tells.
    table.update(torch.tensor([[2]]), torch.tensor([[9, 4]]), torch.tensor([[0.25, 0.24999]]).log())
    draft = table.draft(
        torch.tensor([[2]]), DraftTree.chain(2), temperature=0, seed=1, position=0, mode="rejection"
    )
    assert draft.tokens.tolist() == [[2, 4]] and draft.q_ids[0, 0].tolist() == [9, 4, -1]
    assert draft.q_logprob[0, 0].exp().tolist() == [0.0, 1.0, 0.0]


@pytest.mark.parametrize("temperature", [0.6, 1.0])
def test_rejection_drafts_follow_their_q(temperature: float) -> None:
    """Children are Plackett-Luce draws of q: first and second child against the exact law."""
    table = NgramTable(64, vocab_size=50, orders=(1,), topk=3)
    p = torch.tensor([0.5, 0.3, 0.1])
    table.update(torch.tensor([[1]]), torch.tensor([[5, 3, 8]]), p.log()[None])
    batch = 40_000
    draft = table.draft(
        torch.ones(batch, 1, dtype=torch.int64), DraftTree([-1, 0, 0]), temperature=temperature,
        seed=torch.arange(batch), position=9, mode="rejection",
    )  # fmt: skip
    q = draft.q_logprob[0, 0].double().exp()
    ids = draft.q_ids[0, 0].tolist()
    expected = (p / p.sum()) ** (1 / temperature)
    assert torch.allclose(q[:3], (expected / expected.sum()).double(), atol=1e-3)
    assert float(q.sum()) == pytest.approx(1, abs=1e-6)
    assert (draft.q_ids[:, 1:] == -1).all() and (draft.q_logprob[:, 1:] == -torch.inf).all()
    pairs = torch.stack([draft.tokens[:, 1], draft.tokens[:, 2]], -1).tolist()
    for i in range(3):
        for j in range(3):
            if i != j:
                law = float(q[i] * q[j] / (1 - q[i]))
                seen = sum(pair == [ids[i], ids[j]] for pair in pairs) / batch
                assert abs(seen - law) < 5 * math.sqrt(law / batch)


def test_rejection_noise_differs_between_levels_and_from_the_target() -> None:
    """p = q uniform at both levels: children that share noise would be equal."""
    table = NgramTable(64, vocab_size=50, orders=(1,), topk=2)
    half = torch.full((3, 2), 0.5).log()
    table.update(torch.tensor([[1], [3], [4]]), torch.tensor([[3, 4]] * 3), half)
    batch = 4000
    draft = table.draft(
        torch.ones(batch, 1, dtype=torch.int64), DraftTree.chain(3), temperature=1.0,
        seed=torch.arange(batch), position=9, mode="rejection",
    )  # fmt: skip
    same = (draft.tokens[:, 1] == draft.tokens[:, 2]).double().mean()
    assert abs(float(same) - 0.5) < 0.04
    shared = table.draft(
        torch.ones(batch, 1, dtype=torch.int64), DraftTree.chain(2), temperature=1.0,
        seed=torch.arange(batch), position=9,
    )  # fmt: skip
    assert abs(float((draft.tokens[:, 1] == shared.tokens[:, 1]).double().mean()) - 0.5) < 0.04


def test_batch_rows_do_not_matter() -> None:
    table, requests = filled(), random_requests(4)
    order = torch.randperm(9, generator=generator(1))
    tree = DraftTree.default(16)

    def draft(index: Tensor) -> Tensor:
        r = requests
        return table.draft(
            r.context[index], tree, temperature=r.temperature[index], seed=r.seed[index],
            position=r.position[index], scope=r.scope[index],
        ).tokens  # fmt: skip

    assert torch.equal(draft(order), draft(torch.arange(9))[order])


# ---- state


def test_saved_and_loaded_tables_draft_the_same() -> None:
    table, tree, requests = filled(), DraftTree.default(24), random_requests(6)
    table.reset(1)
    file = io.BytesIO()
    torch.save(table.state_dict(), file)
    file.seek(0)
    other = small()
    other.load_state_dict(torch.load(file, weights_only=True))
    assert_same_table(other, table)
    for kind in (0, 1, 2):
        first, second = (run_draft(define, t, tree, requests, kind) for t in (table, other))
        assert_same_bits(second, first)
    batch = random_batch(77)
    for t in (table, other):
        run_update(define, t, batch)
    assert_same_table(other, table)


def test_a_table_outlives_inference_mode() -> None:
    with torch.inference_mode():
        table = small().to("cpu")
        run_update(define, table, random_batch(0))
        assert not any(t.is_inference() for t in state_tensors(small().to("meta")).values())
    table.reset(1)
    table.load_state_dict(filled().state_dict())
    assert_same_table(table, filled())


def test_clear_gives_a_new_table() -> None:
    table = filled()
    table.clear()
    assert_same_table(table, small())
    assert len(table) == 0 and table.stats()["calls"] == 0
