"""`NgramTable`: one definition on every backend, and its merge rule."""

from __future__ import annotations

import math
from copy import deepcopy
from fractions import Fraction
from typing import Any

import pytest
import torch
from contract import assert_same_bits
from hypothesis import given, settings
from hypothesis import strategies as st
from speculation_table_cases import (
    SPARSE,
    STORED,
    TOPK,
    Batch,
    Requests,
    assert_same_table,
    define,
    entries,
    filled,
    generator,
    random_batch,
    random_requests,
    renumbered,
    run_draft,
    run_update,
    small,
    spread,
    state_tensors,
)

from reasonkern import DraftTree, NgramTable, _load
from reasonkern.speculation import reference_table as reference

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


@pytest.mark.parametrize("kind", ["packed", "wide"])
def test_small_probabilities_are_the_definition(backend, kind):
    """Of one to three rows a key, down to none; most codes have no exponent."""
    got, expected = small(kind).to(backend.device), small(kind)
    keys = torch.arange(6 if backend.slow else 40)
    context = torch.nn.functional.pad(
        keys.repeat_interleave(1 + keys % 3)[:, None], (2, 0), value=-1
    )
    for call in range(1 if backend.slow else 3):
        logits = -8 - 11 * torch.rand(len(context), TOPK, generator=generator(call))
        batch = spread(Batch(context, torch.arange(TOPK).repeat(len(context), 1), logits), got)
        run_update(define, expected, batch)
        run_update(backend, got, Batch(*map(backend.to, vars(batch).values())))
        assert_same_table(got, expected)
    codes = (state_tensors(expected)["slots"] >> reference.ID_BITS) & 0x3FFF
    assert (codes > 0).sum() > 3 * len(keys) and (codes < 1024)[codes > 0].double().mean() > 0.5
    context, one = context.unique(dim=0), torch.ones(len(keys), dtype=torch.int64)
    requests = context, one.float(), one, one, 0 * one
    tree = DraftTree([-1, 0, 0])
    drafts = run_draft(define, expected, tree, Requests(*requests), 2)
    here = Requests(*map(backend.to, requests))
    assert_same_bits([x.cpu() for x in run_draft(backend, got, tree, here, 2)], drafts)


@pytest.mark.parametrize("kind", STORED)
def test_more_rows_of_a_key_than_a_short_division_takes(backend, kind):
    """Of p = 1, whose sum in units of 2^-24 has 33 bits; 200 of 300 are remembered."""
    if backend.slow and backend.name == "triton":
        pytest.skip("rows are read one by one")
    context = torch.tensor([[-1, -1, 7]]).repeat(300, 1)
    logits = torch.tensor([[0.0, -9.0, -12.0, -13.0]]).repeat(300, 1)
    batch = Batch(context, torch.arange(TOPK).repeat(300, 1), logits)
    got, expected = (small(kind, max_count=200).to(x) for x in (backend.device, "cpu"))
    run_update(define, expected, batch)
    run_update(backend, got, Batch(*map(backend.to, vars(batch).values())))
    assert_same_table(got, expected)
    assert state_tensors(expected)["counts"].max() == 200


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


def test_nodes_in_any_order(backend):
    """An operator takes trees that `DraftTree` refuses: children before their parents."""
    parents = [-1, 0, 0, 1, 1, 2] if backend.slow and backend.name == "triton" else SPARSE
    tree, names = DraftTree(parents), [0, *range(len(parents) - 1, 0, -1)]
    requests = random_requests(2, batch=2 if backend.slow else 9)
    expected = run_draft(define, filled(), tree, requests, 2)
    here = Requests(*(backend.to(x) for x in list(vars(requests).values())[:5]))
    got = run_draft(backend, filled().to(backend.device), renumbered(tree, names), here, 2)
    assert_same_bits([x.cpu()[:, names] for x in got], expected)
    assert expected[1][:, tree.depths > 1].any()


def test_ids_that_are_no_tokens(backend):
    """The newest one of a row: outside the vocabulary it finds nothing, beyond int32 it is none."""
    requests = random_requests(2, batch=6)
    requests.context[:, -1] = torch.tensor([50, 2**31 - 1, 2**31, 2**32 + 1, 2**62, -2])
    requests.context[:, 0] = 2**40
    (got, table), (expected, other) = (
        (run_draft(op, drawn, DraftTree([-1, 0, 1]), here, 2), drawn)
        for op, drawn, here in (
            (backend, filled().to(backend.device), Requests(
                *(backend.to(x) for x in list(vars(requests).values())[:5]))),
            (define, filled(), requests),
        )
    )  # fmt: skip
    assert_same_bits([x.cpu() for x in got], expected)
    assert_same_table(table, other)
    assert expected[0][:, 0].tolist() == [50, 2**31 - 1, 0, 0, 0, 0]
    assert expected[1].tolist() == [[True, False, False]] * 2 + [[False] * 3] * 4


def test_scopes_that_are_none_find_nothing(backend):
    requests = random_requests(2, batch=6)
    requests.context[:] = requests.context[0]
    requests.scope = torch.tensor([0, -1, 4, 2**40, -(2**62), 2**62])
    here = Requests(*(backend.to(x) for x in list(vars(requests).values())[:5]))
    got, expected = (
        run_draft(op, filled().to(device), DraftTree([-1, 0, 1]), rows, 2)
        for op, device, rows in ((backend, backend.device, here), (define, "cpu", requests))
    )
    assert_same_bits([x.cpu() for x in got], expected)
    assert expected[1][:, 1].tolist() == [True] + [False] * 5


def bad_rows() -> Batch:
    """Twelve of them, then three that are right."""
    batch = random_batch(5, rows=15, vocab=40)
    batch.context[batch.context[:, -1] < 0] = 1
    batch.ids.clamp_(min=0)
    batch.ids[0, 1], batch.ids[1, 0] = 50, -2
    batch.logits[2, 3], batch.logits[3, 0] = math.nan, math.inf
    batch.lse[4] = batch.logits[4].logsumexp(-1) - 0.01  # probabilities add up to 1.01
    batch.context[5, 0], batch.context[6, 1] = 50, -2
    batch.scope[7], batch.scope[8] = 4, -1
    batch.logits[9] = torch.tensor([0.0, -20.0, -20.0, -20.0])  # p = 2.2: over 31 bits
    batch.lse[9] = -0.8
    batch.context[10, 2] = -2
    batch.logits[11, 0] = 310.0  # e^300 wraps around to less than a unit
    batch.ids[12, 3], batch.logits[12, 3] = -1, math.nan  # of no candidate
    return batch


def test_a_token_twice_in_an_entry(backend):
    """No update leaves such an entry; one that was loaded must not have warps wait for ever."""
    drawn = NgramTable(8, vocab_size=50, orders=(1,), topk=4, max_scopes=1)
    drawn.update(torch.tensor([[7]]), torch.tensor([[7, 9]]), torch.tensor([[0.5, 0.3]]).log())
    state = deepcopy(drawn.state_dict())
    entry = int(state["counts"].nonzero())
    state["slots"][entry, 1] = state["slots"][entry, 0]
    drawn.load_state_dict(state)
    one = torch.ones(1, dtype=torch.int64)
    requests = (7 * one[:, None], one.float(), one, 0 * one, 0 * one)
    tree = DraftTree([-1, 0, 0, 1, 2])
    expected = run_draft(define, drawn, tree, Requests(*requests), 1)
    here = Requests(*map(backend.to, requests))
    got = run_draft(backend, drawn.to(backend.device), tree, here, 1)
    assert_same_bits([x.cpu() for x in got], expected)


def test_a_bad_row_is_ignored_and_counted(backend):
    table, expected = small().to(backend.device), small()
    run_update(backend, table, Batch(*map(backend.to, vars(bad_rows()).values())))
    run_update(define, expected, bad_rows().take(slice(12, None)))
    assert table.stats()["rejected"] == 12 and table.stats()["rows"] == 3
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
            unit = Fraction(1, min(total, max_count) << 30)  # p is rounded to it above max_count
            law = {t: math.floor(s / total / unit + Fraction(1, 2)) * unit for t, s in ranked}
            held[where] = ({t: p for t, p in law.items() if p}, min(total, max_count))
    return held


@given(st.integers(0, 10_000), st.sampled_from([1000, 3]))
@settings(max_examples=16, deadline=None)
def test_the_merge_rule(seed: int, max_count: int) -> None:
    batches = [random_batch(seed + call, tokens=2) for call in range(3)]
    table = small("exact", capacity=4096, max_count=max_count)
    for batch in batches:
        run_update(define, table, batch)
    expected = literal(batches, TOPK, max_count)
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
