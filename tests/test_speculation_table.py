"""`NgramTable`: one definition on every backend, its merge rule, its bounds, its state."""

from __future__ import annotations

import io
import math
from fractions import Fraction
from typing import Any

import pytest
import torch
from contract import assert_same_bits
from hypothesis import given, settings
from hypothesis import strategies as st
from speculation_table_cases import (
    Batch,
    Requests,
    entries,
    generator,
    random_batch,
    random_requests,
    run_draft,
    run_update,
    state_tensors,
)
from torch import Tensor

from reasonkern import DraftTree, NgramTable, _load
from reasonkern.speculation import noise
from reasonkern.speculation import table_reference as reference

TOPK = 4
STORED = {
    "packed": {"vocab_size": 50},
    "wide": {"vocab_size": 1 << 26},
    "exact": {"vocab_size": 1 << 26, "storage": "exact"},
}


def small(kind: str = "packed", capacity: int = 64, **more: Any) -> NgramTable:
    options = {"orders": (3, 2, 1), "topk": TOPK, "max_count": 5, "max_scopes": 4}
    return NgramTable(capacity, **(options | STORED[kind] | more))


def define(op: str, *args: Any) -> Any:
    return _load.implementation(op, "reference")(*args)


def assert_same_table(got: NgramTable, expected: NgramTable) -> None:
    for name, tensor in state_tensors(expected).items():
        assert torch.equal(state_tensors(got)[name].cpu(), tensor.cpu()), name


def filled(kind: str = "packed", seed: int = 0, calls: int = 6, **more: Any) -> NgramTable:
    table = small(kind, **more)
    for call in range(calls):
        run_update(define, table, spread(random_batch(100 * seed + call), table))
    return table


def spread(batch: Batch, table: NgramTable) -> Batch:
    """Ids over the whole vocabulary, the upper bits of a wide id included."""
    factor = table.vocab_size // 50
    batch.ids = torch.where(batch.ids >= 0, batch.ids * factor, batch.ids)
    return batch


# ---- every backend is the definition


@pytest.mark.parametrize("kind", STORED)
@pytest.mark.parametrize("with_lse", [True, False])
def test_update_is_the_definition(backend, kind, with_lse):
    capacity = 16 if backend.slow else 64
    got, expected = small(kind, capacity).to(backend.device), small(kind, capacity)
    rows = 60 if not backend.slow else 10 if backend.name == "triton" else 24
    for call in range(2 if backend.slow else 12):
        batch = spread(random_batch(call, rows=rows, with_lse=with_lse), got)
        run_update(define, expected, batch)
        run_update(backend, got, Batch(*map(backend.to, vars(batch).values())))
        assert_same_table(got, expected)
    stats = expected.stats()
    assert stats["evictions"] and stats["load"] > 0.5  # most sets overflow


@pytest.mark.parametrize("noise_kind", [0, 1, 2], ids=["none", "shared", "rejection"])
@pytest.mark.parametrize("kind", STORED)
def test_draft_is_the_definition(backend, kind, noise_kind):
    interpreted = backend.slow and backend.name == "triton"
    tree = DraftTree([-1, 0, 0, 1]) if interpreted else DraftTree.default(24)
    requests = random_requests(1, batch=6 if backend.slow else 33)
    outputs = []
    for op, device in ((define, "cpu"), (backend, backend.device)):
        table = filled(kind).to(device)
        here = Requests(*(x.to(device) for x in list(vars(requests).values())[:5]))
        outputs.append((run_draft(op, table, tree, here, noise_kind), table))
    (expected, first), (got, second) = outputs
    assert_same_bits([x.cpu() for x in got], expected)
    assert_same_table(second, first)
    assert expected[1][:, 1:].any() and not expected[1].all()


@pytest.mark.parametrize("tree", [[-1], [-1] + [0] * 20, [-1, 0, 0, 1, 1, 2, 0, 5, 7, 8]], ids=str)
def test_trees_of_any_shape(backend, tree):
    if backend.slow and backend.name == "triton":
        tree = tree[:6]
    requests = random_requests(2, batch=2 if backend.slow else 9)
    got, expected = (
        run_draft(op, filled().to(device), DraftTree(tree), Requests(
            *(x.to(device) for x in list(vars(requests).values())[:5])), 1)
        for op, device in ((backend, backend.device), (define, "cpu"))
    )  # fmt: skip
    assert_same_bits([x.cpu() for x in got], expected)


def bad_rows() -> Batch:
    batch = random_batch(5, rows=12, vocab=40)
    batch.context[batch.context[:, -1] < 0] = 1
    batch.ids.clamp_(min=0)
    batch.ids[0, 1], batch.ids[1, 0] = 50, -2
    batch.logits[2, 3], batch.logits[3, 0] = math.nan, math.inf
    batch.lse[4] -= 0.01  # probabilities add up to 1.01
    batch.context[5, 0], batch.context[6, 1] = 50, -2
    batch.scope[7], batch.scope[8] = 4, -1
    return batch


def test_a_bad_row_is_ignored_and_counted(backend):
    table, expected = small().to(backend.device), small()
    run_update(backend, table, Batch(*map(backend.to, vars(bad_rows()).values())))
    run_update(define, expected, bad_rows().take(slice(9, None)))
    assert table.stats()["rejected"] == 9 and table.stats()["rows"] == 3
    assert entries(table) == entries(expected) and len(expected)


def test_a_strict_update_changes_nothing(backend):
    if backend.device != "cpu" or backend.name in ("triton", "cuda-sim"):
        pytest.skip("devices do not raise")
    table, before = filled(calls=1), filled(calls=1)
    with pytest.raises(RuntimeError, match="table_update_: "):
        run_update(backend, table, bad_rows(), strict=True)
    assert_same_table(table, before)


# ---- the merge rule


def literal(batches: list[Batch], topk: int, max_count: int) -> dict[tuple[Any, ...], Any]:
    """(scope, context) -> ([(id, p)], n) by the rule in rational numbers; no eviction."""
    held: dict[tuple[Any, ...], Any] = {}
    for batch in batches:
        values, _ = reference.row_values(batch.logits, batch.lse, batch.ids)
        calls: dict[tuple[Any, ...], list[int]] = {}
        for row, context in enumerate(batch.context.tolist()):
            for order in (3, 2, 1):
                if min(context[-order:]) >= 0:
                    where = (int(batch.scope[row]), *context[-order:])
                    calls.setdefault(where, []).append(row)
        for where, rows in calls.items():
            old, n = held.get(where, ({}, 0))
            sums: dict[int, Fraction] = {t: n * p for t, p in old.items()}
            for row in rows:
                for token, value in zip(batch.ids[row].tolist(), values[row].tolist(), strict=True):
                    if token >= 0:
                        sums[token] = sums.get(token, Fraction(0)) + Fraction(value, 1 << 30)
            total = n + len(rows)
            ranked = sorted(sums.items(), key=lambda item: (-item[1], item[0]))[:topk]
            held[where] = ({t: s / total for t, s in ranked if s}, min(total, max_count))
    return held


@given(st.integers(0, 10_000))
@settings(max_examples=8, deadline=None)
def test_the_merge_rule(seed: int) -> None:
    batches = [random_batch(seed + call, tokens=2) for call in range(3)]
    table = small("exact", capacity=4096, max_count=1000)
    for batch in batches:
        run_update(define, table, batch)
    expected = literal(batches, TOPK, 1000)
    s = state_tensors(table)
    for (scope, *context), (law, n) in expected.items():
        window = torch.tensor([[-1] * (3 - len(context)) + context])
        keys, fits = reference.keys_of(window, torch.tensor([scope]), s["epochs"], (len(context),))
        entry, order = reference.look_up(reference.Storage(**s), keys, fits)
        e = int(entry)
        assert int(order) == 0 and int(s["counts"][e]) == n
        stored = zip(s["slots"][e].tolist(), s["extra"][e].tolist(), strict=True)
        assert {t: Fraction(x, n << 30) for t, x in stored if x} == law
    assert len(table) == len(expected)


@given(st.integers(0, 10_000), st.randoms(use_true_random=False), st.sampled_from(list(STORED)))
@settings(max_examples=15, deadline=None)
def test_the_order_of_rows_does_not_matter(seed: int, random: Any, kind: str) -> None:
    first, second = filled(kind, calls=2), filled(kind, calls=2)
    batch = spread(random_batch(seed), first)
    order = list(range(len(batch.context)))
    random.shuffle(order)
    cpu = _load.implementation("table_update_", "cpu" if _load.available("cpu") else "reference")
    for table, rows in ((first, batch), (second, batch.take(order))):
        run_update(lambda op, *args: cpu(*args), table, rows)
    assert_same_table(first, second)


def split_tables(batch: Batch, cuts: list[int], **options: Any) -> list[NgramTable]:
    tables = []
    for edges in ([0, len(batch.context)], [0, *cuts, len(batch.context)]):
        table = small(**({"kind": "exact", "capacity": 4096, "max_count": 1000} | options))
        for begin, end in zip(edges, edges[1:], strict=False):
            run_update(define, table, batch.take(slice(begin, end)))
        tables.append(table)
    return tables


@given(st.integers(0, 10_000), st.lists(st.integers(1, 59), unique=True, max_size=5))
@settings(max_examples=20, deadline=None)
def test_one_call_or_several(seed: int, cuts: list[int]) -> None:
    """Support at most K, n at most max_count, exact storage: the split does not matter."""
    batch = random_batch(seed, rows=60, vocab=TOPK, topk=TOPK)
    one, several = split_tables(batch, sorted(cuts))
    assert entries(one) == entries(several)


@pytest.mark.parametrize("options", [{"kind": "packed"}, {"max_count": 2}, {"vocab": 9}], ids=str)
def test_outside_that_regime_the_split_matters(options: dict[str, Any]) -> None:
    options = dict(options)
    batch = random_batch(3, rows=60, vocab=options.pop("vocab", TOPK), topk=TOPK)
    one, several = split_tables(batch, [10, 20, 30], **options)
    assert entries(one) != entries(several)


@pytest.mark.parametrize("p", [1.0, 0.5, 0.3, 1e-2, 6.2e-5, 1e-5, 3.1e-8])
def test_packed_probabilities_are_close(p: float) -> None:
    code = reference.encode(round(p * 2**30), 1)
    stored = int(reference.decode(torch.tensor(code))) / 2**24
    assert abs(stored - p) <= max(p * 2**-11, 2**-25) and code < 1 << 14
    assert reference.encode(2**30, 1) == reference.encode(255 * 2**30, 255)
    assert reference.encode(2**4, 1) == 0  # below half a unit of 2^-24


def test_codes_decode_to_themselves() -> None:
    codes = torch.arange(15 * 1024 + 100)
    values = reference.decode(codes)
    assert (values.diff() > 0).all() and int(values[15 * 1024]) == 1 << 24
    assert [reference.encode(64 * int(v), 1) for v in values[::97]] == codes[::97].tolist()


def test_exponential_is_close() -> None:
    x = torch.linspace(-80, 1, 200_001)
    error = (reference.exp(x).double() / x.double().exp() - 1).abs()
    assert error.max() < 1e-6 and reference.exp(torch.tensor([0.0, -81.0])).tolist() == [1.0, 0.0]


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


def test_clear_gives_a_new_table() -> None:
    table = filled()
    table.clear()
    assert_same_table(table, small())
    assert len(table) == 0 and table.stats()["calls"] == 0
