"""The front of `NgramTable`: sequences, verified steps, replicas, the operator contract, errors."""

from __future__ import annotations

import copy
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import parallel_ranks
import pytest
import torch
from contract import run_contract
from speculation_table_cases import entries, generator, random_batch, random_requests, state_tensors
from torch import Tensor

from reasonkern import Draft, DraftTree, NgramTable, verify_tree
from reasonkern.speculation import reference_table as reference

CHAIN = DraftTree.chain(2)


def small(**more: Any) -> NgramTable:
    options = {"vocab_size": 50, "orders": (3, 2, 1), "topk": 4, "max_scopes": 4}
    return NgramTable(4096, **(options | more))


def laws(*shape: int, seed: int = 0, topk: int = 4) -> tuple[Tensor, Tensor, Tensor]:
    logits = 2 * torch.randn(*shape, 50, generator=generator(seed))
    top = logits.topk(topk, -1)
    return top.indices, top.values, logits.logsumexp(-1)


# ---- rows of sequences and of verified steps


def test_a_sequence_is_its_positions() -> None:
    tokens = torch.randint(0, 50, (3, 9), generator=generator(1))
    ids, logits, lse = laws(3, 9)
    lengths, scope = torch.tensor([9, 0, 5]), torch.tensor([1, 2, 3])
    table, expected = small(), small()
    table.update_from_sequence(tokens, ids, logits, lengths=lengths, lse=lse, scope=scope)
    rows = [(b, t) for b in range(3) for t in range(int(lengths[b]))]
    windows = [([-1, -1, -1] + tokens[b, : t + 1].tolist())[-3:] for b, t in rows]
    pick = tuple(torch.tensor(rows).T)
    expected.update(
        torch.tensor(windows), ids[pick], logits[pick], lse=lse[pick], scope=scope[pick[0]]
    )
    assert entries(table) == entries(expected) and len(table) > 30
    whole, every = small(), small()
    whole.update_from_sequence(tokens, ids, logits, lse=lse)
    every.update_from_sequence(tokens, ids, logits, lse=lse, lengths=torch.full((3,), 9))
    assert entries(whole) == entries(every)


def test_a_verified_step_is_its_rows_up_to_the_length() -> None:
    context = torch.tensor([[1, 2, 3], [-1, -1, 4], [5, 6, 7]])
    ids, logits, lse = laws(3, 4)
    tokens = torch.tensor([[8, 9, 10, 11], [12, -1, -1, -1], [-1, -1, -1, -1]])
    ids[2], logits[2], lse[2] = -7, torch.nan, torch.nan  # nothing there is read
    verified = SimpleNamespace(
        tokens=tokens, length=torch.tensor([4, 1, 0], dtype=torch.int32), topk_ids=ids,
        topk_logits=logits, lse=lse,
    )  # fmt: skip
    table, expected = small(), small()
    table.update_verified(context, verified, scope=torch.tensor([1, 2, 3]))
    windows = [[1, 2, 3], [2, 3, 8], [3, 8, 9], [8, 9, 10], [-1, -1, 4]]
    pick = torch.tensor([0, 0, 0, 0, 1]), torch.tensor([0, 1, 2, 3, 0])
    expected.update(
        torch.tensor(windows), ids[pick], logits[pick], lse=lse[pick],
        scope=torch.tensor([1, 1, 1, 1, 2]),
    )  # fmt: skip
    assert entries(table) == entries(expected)


def test_all_nodes_learn_from_every_valid_node() -> None:
    tree = DraftTree([-1, 0, 0, 1, 3])
    context = torch.tensor([[1, 2, 3], [4, 5, 6]])
    tokens = torch.tensor([[3, 10, 11, 12, 13], [6, 20, 6, 21, 6]])
    valid = torch.tensor([[True] * 5, [True, True, False, True, False]])
    logits = torch.randn(2, 5, 50, generator=generator(2))
    table, expected = small(), small()
    draft = SimpleNamespace(tokens=tokens, valid=valid)
    table.update_verified(context, None, all_nodes=(logits, draft, tree), scope=1)
    bad = logits.index_fill(2, torch.tensor([7]), torch.nan)  # rows that verification skips
    table.update_verified(context, None, all_nodes=(bad, draft, tree), scope=1)
    windows = [[1, 2, 3], [2, 3, 10], [2, 3, 11], [3, 10, 12], [10, 12, 13]]
    windows += [[4, 5, 6], [5, 6, 20], [6, 20, 21]]
    pick = torch.tensor([0] * 5 + [1] * 3), torch.tensor([0, 1, 2, 3, 4, 0, 1, 3])
    top = logits.topk(4, -1)
    expected.update(
        torch.tensor(windows), top.indices[pick], top.values[pick],
        lse=logits.logsumexp(-1)[pick], scope=1,
    )  # fmt: skip
    assert entries(table) == entries(expected)


def test_a_vocabulary_may_be_smaller_than_what_a_table_keeps() -> None:
    table, tokens = small(vocab_size=3), torch.tensor([[1, 2]])
    nodes = torch.zeros(1, 2, 3), Draft(tokens, tokens > 0), CHAIN
    table.update_verified(torch.tensor([[-1, -1, 1]]), None, all_nodes=nodes)
    assert table.stats()["rows"] == 2


def test_padding_teaches_nothing() -> None:
    table = small()
    ids, logits, lse = laws(2)
    table.update(torch.full((2, 3), -1), ids, logits, lse=lse)
    table.update(torch.tensor([[1, 2, 3]]), torch.full((1, 4), -1), torch.zeros(1, 4))
    table.update(torch.empty(0, 3, dtype=torch.int64), ids[:0], logits[:0], lse=lse[:0])
    assert len(table) == 0 and table.stats()["rows"] == 0 and table.stats()["calls"] == 3
    draft = table.draft(torch.full((1, 3), -1), CHAIN, temperature=0, seed=0, position=0)
    assert draft.tokens.tolist() == [[0, 0]] and not draft.valid.any()


def test_other_integer_and_float_types() -> None:
    first, second = small(), small()
    ids, logits, lse = laws(5)
    logits, lse = logits.bfloat16(), lse.bfloat16().float() + 0.05
    context = torch.arange(15).view(5, 3)
    first.update(context, ids, logits.float(), lse=lse, scope=torch.arange(5) % 4)
    second.update(
        context.to(torch.int16).T.contiguous().T, ids.to(torch.uint8), logits, lse=lse.double(),
        scope=(torch.arange(5) % 4).int(),
    )  # fmt: skip
    assert entries(first) == entries(second)


def test_seeds_are_read_as_unsigned() -> None:
    table = small()
    ids, logits, lse = laws(1)
    context = torch.tensor([[1, 2, 3]])
    table.update(context, ids, logits, lse=lse)
    tree = DraftTree([-1, 0, 0, 0, 0])

    def draft(seed: int | Tensor) -> list[int]:
        return table.draft(context, tree, temperature=1.0, seed=seed, position=0).tokens.tolist()

    assert draft(2**64 - 5) == draft(-5) == draft(torch.tensor([-5]))


def test_drafts_compile_with_a_temperature_by_request() -> None:
    table = small()
    ids, logits, lse = laws(2)
    context = torch.tensor([[1, 2, 3], [4, 5, 6]])
    table.update(context, ids, logits, lse=lse)

    def draft(temperature: Tensor) -> Tensor:
        return table.draft(context, CHAIN, temperature=temperature, seed=1, position=3).tokens

    compiled = torch.compile(draft, fullgraph=True, backend="aot_eager")
    temperature = torch.tensor([0.0, 0.7])
    assert torch.equal(compiled(temperature), draft(temperature))


@pytest.mark.parametrize("name", ["temperature", "seed", "position"])
def test_drafts_and_verification_take_the_same_dtypes(name: str) -> None:
    """Any integer; of a temperature any float, too."""
    table = small()
    ids, logits, lse = laws(2)
    context = torch.tensor([[1, 2, 3], [4, 5, 6]])
    table.update(context, ids, logits, lse=lse)
    rows = torch.randn(2, CHAIN.nodes, 50, generator=generator(4))

    known = {"temperature": 0.5, "seed": 1, "position": 3}
    draft = table.draft(context, CHAIN, **known)

    def step(value: Any) -> list[Tensor]:
        given = known | {name: value}
        calls = table.draft(context, CHAIN, **given), verify_tree(rows, draft, CHAIN, **given)
        return [result.tokens for result in calls]

    allowed = {torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8}
    if name == "temperature":
        allowed |= {torch.float32, torch.bfloat16, torch.float16, torch.float64}
    for dtype in allowed:
        for shape in ((), (2,)):
            assert all(map(torch.equal, step(torch.full(shape, 2, dtype=dtype)), step(2)))
    for dtype in {torch.bool, torch.float32, torch.complex64} - allowed:
        given = known | {name: torch.ones(2, dtype=dtype)}
        with pytest.raises(ValueError, match=f"{name}: expected dtype"):
            table.draft(context, CHAIN, **given)
        with pytest.raises(ValueError, match=f"{name}: expected dtype"):
            verify_tree(rows, draft, CHAIN, **given)


# ---- replicas

IMPORTS = """
from speculation_table_cases import random_batch, state_tensors
from reasonkern import NgramTable
"""
RANK = """
table = NgramTable(64, vocab_size=50, orders=(3, 2, 1), topk=4, max_scopes=4)
for step in range(5):
    b = random_batch(2 * step + rank, rows=30)
    scope = b.scope if step else None
    lse, logits = (b.lse, b.logits) if step != 1 else (None, b.logits - b.lse[:, None])
    context, ids, logits = (x.repeat(1, 2)[:, : x.shape[1]] for x in (b.context, b.ids, logits))
    table.update(context, ids, logits, lse=lse, scope=scope, process_group=dist.group.WORLD)
torch.save(state_tensors(table), f"{folder}/{rank}.pt")
"""


def test_replicas_stay_identical(tmp_path: Path) -> None:
    parallel_ranks.run_script(IMPORTS, RANK, tmp_path)
    first, second = (torch.load(tmp_path / f"{rank}.pt") for rank in range(2))
    alone = NgramTable(64, vocab_size=50, orders=(3, 2, 1), topk=4, max_scopes=4)
    for step in range(5):
        a, b = random_batch(2 * step, rows=30), random_batch(2 * step + 1, rows=30)
        parts = [torch.cat(pair) for pair in zip(vars(a).values(), vars(b).values(), strict=True)]
        context, ids, logits, lse, scope = parts
        alone.update(context, ids, logits, lse=lse, scope=scope if step else None)
    for name, tensor in state_tensors(alone).items():
        assert torch.equal(first[name], second[name]) and torch.equal(first[name], tensor), name
    assert alone.stats()["evictions"]


# ---- the operator contract


def draft_sample(table: NgramTable, batch: int, kind: int, tree: DraftTree) -> tuple[Any, ...]:
    r, s = random_requests(1, batch), state_tensors(table)
    names = ("keys", "slots", "extra", "counts", "epochs", "counters")
    state = [s[name].clone() for name in names]
    scope = r.scope if kind else None
    arguments = (scope, r.temperature, r.seed, r.position, kind, 50, True)
    return (r.context, *state, list(table.orders), *tree.tensors(), *arguments)


def update_sample(table: NgramTable, rows: int, with_lse: bool) -> tuple[Any, ...]:
    b, s = random_batch(9, rows, with_lse=with_lse), state_tensors(table)
    names = ("keys", "slots", "extra", "counts", "ages", "clock", "epochs", "counters")
    state = [s[name].clone() for name in names]
    scope = b.scope if with_lse else None
    return (b.context, *state, [3, 2, 1], 5, 50, b.ids, b.logits, b.lse, scope, True)


def filled() -> NgramTable:
    table = NgramTable(64, vocab_size=50, orders=(3, 2, 1), topk=4, max_scopes=4)
    b = random_batch(1)
    table.update(b.context, b.ids, b.logits, lse=b.lse, scope=b.scope)
    return table


def test_contract_of_table_draft() -> None:
    table, tree = filled(), DraftTree([-1, 0, 0, 1])
    samples = [draft_sample(table, 7, kind, tree) for kind in (0, 1, 2)]
    samples += [draft_sample(table, 1, 1, DraftTree.chain(1))]
    empty = list(draft_sample(table, 7, 2, tree))
    for index in (0, 15, 16, 17, 18):
        empty[index] = empty[index][:0]
    run_contract(torch.ops.reasonkern.table_draft, [*samples, empty], mutable=(6,))


def test_contract_of_table_update() -> None:
    samples = [update_sample(filled(), rows, lse) for rows, lse in ((20, True), (3, False))]
    samples.append(update_sample(filled(), 0, True))
    run_contract(torch.ops.reasonkern.table_update_, samples, mutable=(1, 2, 3, 4, 5, 6, 8))


# ---- errors


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"capacity": 12}, "capacity: expected a positive multiple of 8, at most 2.31, got 12"),
        ({"capacity": 0}, "capacity: expected a positive multiple of 8"),
        ({"vocab_size": 0}, r"vocab_size: expected an integer in \[1, 67108864\], got 0"),
        ({"orders": ()}, r"orders: expected a sequence of 1 to 4 descending .* 8\], got \(\)"),
        ({"orders": (2, 3)}, "orders: expected a sequence of 1 to 4 descending integers"),
        ({"orders": (9,)}, "orders: expected a sequence of 1 to 4 descending integers"),
        ({"orders": 3}, r"orders: expected a sequence of 1 to 4 .* in \[1, 8\], got 3"),
        ({"topk": 17}, r"topk: expected an integer in \[1, 16\], got 17"),
        ({"max_count": 0}, r"max_count: expected an integer in \[1, 32767\], got 0"),
        ({"max_scopes": 0}, "max_scopes: expected an integer"),
        ({"storage": "zip"}, "storage: expected 'packed' or 'exact', got 'zip'"),
    ],
)
def test_bad_settings(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        NgramTable(**({"capacity": 64} | options))


CONTEXT = torch.tensor([[1, 2, 3]])
IDS = torch.tensor([[4, 5]])
LOGITS = torch.tensor([[-0.5, -2.0]])


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"context": [[1, 2, 3]]}, "context: expected a tensor, got list"),
        ({"context": CONTEXT.float()}, "context: expected dtype torch.int64 or"),
        ({"context": CONTEXT.to("meta")}, "context: expected the table's device, cpu, got meta"),
        (
            {"context": CONTEXT[:, 1:]},
            r"context: expected shape \(rows, max\(orders\)\) = \(…, 3\)",
        ),
        ({"context": CONTEXT + 47}, r"context: expected values in \[-1, 50\), got 50 at \(0, 2\)"),
        ({"topk_ids": IDS[0]}, r"topk_ids: expected shape \(rows, k\) = \(1, 1 to 4\), got \(2,\)"),
        ({"topk_ids": IDS.repeat(1, 3)}, r"topk_ids: expected shape .* got \(1, 6\)"),
        (
            {"topk_ids": IDS[:, :0], "topk_logits": LOGITS[:, :0]},
            r"topk_ids: expected shape .* got \(1, 0\)",
        ),
        ({"topk_ids": IDS + 45}, r"topk_ids: expected values in \[-1, 50\), got 50 at \(0, 1\)"),
        ({"topk_ids": IDS - 6}, r"topk_ids: expected values in \[-1, 50\), got -2 at \(0, 0\)"),
        ({"topk_logits": LOGITS[:, :1]}, r"topk_logits: expected shape of topk_ids = \(1, 2\)"),
        ({"topk_logits": IDS}, "topk_logits: expected dtype torch.float32 or"),
        ({"topk_logits": LOGITS + torch.nan}, "topk_logits: expected log-probabilities .* no NaN"),
        ({"topk_logits": LOGITS + 0.5}, "at most 1.001 together, got .* in row 0"),
        (
            {
                "context": torch.tensor([[2, 3, -1], [1, 2, 3], [1, 2, 3]]),
                "topk_ids": IDS.repeat(3, 1),
                "topk_logits": LOGITS + torch.tensor([[torch.nan], [0.0], [torch.nan]]),
            },
            "topk_logits: expected log-probabilities .* in row 2",
        ),
        (
            {"lse": torch.tensor([-0.5])},
            "topk_logits: expected logits with no NaN .* with lse -0.5",
        ),
        ({"lse": torch.zeros(2)}, r"lse: expected shape \(rows,\) = \(1,\), got \(2,\)"),
        ({"scope": -1}, r"scope: expected an integer in \[0, 4\), got -1"),
        ({"scope": 4}, r"scope: expected an integer in \[0, 4\), got 4"),
        ({"scope": torch.tensor([-1])}, r"scope: expected values in \[0, 4\), got -1"),
        ({"scope": torch.tensor([0, 1])}, r"scope: expected shape \(rows,\) = \(1,\), got \(2,\)"),
        ({"scope": 0.5}, r"scope: expected an integer or a \(rows,\) tensor, got 0.5"),
    ],
)
def test_bad_rows(changes: dict[str, Any], message: str) -> None:
    table = small()
    arguments = {"context": CONTEXT, "topk_ids": IDS, "topk_logits": LOGITS} | changes
    before = {name: tensor.clone() for name, tensor in state_tensors(table).items()}
    with pytest.raises(ValueError, match=message):
        table.update(**arguments)
    assert all(torch.equal(before[name], t) for name, t in state_tensors(table).items())


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"mode": "fast"}, "mode: expected 'shared' or 'rejection' or"),
        ({"tree": [-1, 0]}, "tree: expected a DraftTree, got list"),
        ({"temperature": -1.0}, "temperature: expected finite values >= 0, got -1.0"),
        ({"temperature": torch.tensor([torch.nan])}, "temperature: expected finite values >= 0"),
        ({"temperature": torch.ones(2)}, r"temperature: expected shape \(B,\) = \(1,\)"),
        ({"seed": 1.5}, r"seed: expected an integer or a \(B,\) tensor, got 1.5"),
        ({"position": -1}, "position: expected values >= 0, got -1"),
        ({"seed": 1 << 64}, r"seed: expected an integer in \[-2\^63, 2\^64\), got 1844"),
        ({"position": torch.tensor([0, 1])}, r"position: expected shape \(B,\) = \(1,\)"),
        ({"position": torch.tensor([-1])}, r"position: expected values >= 0, got -1 at \(0,\)"),
        ({"context": CONTEXT - 3}, r"context: expected values in \[-1, 50\), got -2"),
        ({"scope": 9}, r"scope: expected an integer in \[0, 4\), got 9"),
    ],
)  # fmt: skip
def test_bad_drafts(changes: dict[str, Any], message: str) -> None:
    arguments = {"context": CONTEXT, "tree": CHAIN, "temperature": 1.0, "seed": 0, "position": 3}
    with pytest.raises(ValueError, match=message):
        small().draft(**(arguments | changes))


def test_bad_sequences_and_steps() -> None:
    ids, logits, lse = laws(2, 5)
    tokens = torch.zeros(2, 5, dtype=torch.int64)
    with pytest.raises(ValueError, match=r"tokens: expected shape \(batch, length\), got \(5,\)"):
        small().update_from_sequence(tokens[0], ids[0], logits[0])
    with pytest.raises(ValueError, match=r"topk_logits: expected shape \(batch, length, k\)"):
        small().update_from_sequence(tokens, ids, logits[:, 1:], lse=lse)
    with pytest.raises(ValueError, match=r"lse: expected shape \(batch, length\) = \(2, 5\)"):
        small().update_from_sequence(tokens, ids, logits, lse=lse[..., None])
    with pytest.raises(ValueError, match=r"lengths: expected values in \[0, 6\), got 6 at \(1,\)"):
        small().update_from_sequence(tokens, ids, logits, lengths=torch.tensor([0, 6]))
    with pytest.raises(ValueError, match=r"lengths: expected shape \(batch,\) = \(2,\), got \(1,"):
        small().update_from_sequence(tokens, ids, logits, lengths=torch.tensor([5]))
    verified = SimpleNamespace(tokens=tokens, length=torch.tensor([1, 1]))
    with pytest.raises(ValueError, match=r"verified.tokens: expected shape \(1, depth \+ 1\)"):
        small().update_verified(CONTEXT, verified)
    names = ("topk_ids", "topk_logits", "lse")
    law = dict(zip(names, laws(1, 5, topk=5), strict=True))
    more = SimpleNamespace(tokens=tokens[:1], length=torch.tensor([1]), **law)
    with pytest.raises(ValueError, match=r"verified.topk_ids: .*verify_tree\(…, topk=4\), got 5"):
        small().update_verified(CONTEXT, more)
    with pytest.raises(ValueError, match="verified: expected a Verified, .* got tuple"):
        small().update_verified(CONTEXT, (tokens, verified.length))
    with pytest.raises(ValueError, match="verified: expected a Verified, .* got Draft"):
        small().update_verified(CONTEXT, Draft(tokens, tokens > 0))
    with pytest.raises(ValueError, match="topk_logits: expected a tensor, got list"):
        small().update_from_sequence(tokens, ids, [[0.0]])
    with pytest.raises(ValueError, match=r"all_nodes: expected a triple \(logits, draft, tree\)"):
        small().update_verified(CONTEXT, verified, all_nodes=(1, 2))
    with pytest.raises(ValueError, match="topk_ids: expected a tensor, got list"):
        small().update_from_sequence(tokens, [[0]], logits)
    for shape in ((1, 3, 50), (1, 2)):
        step = torch.zeros(shape), None, DraftTree.chain(2)
        with pytest.raises(ValueError, match=r"all_nodes: expected logits of shape \(1, 2, vocab"):
            small().update_verified(CONTEXT, None, all_nodes=step)


def test_bad_states() -> None:
    table = small()
    with pytest.raises(ValueError, match=r"state: expected settings .*'topk': 4.*'topk': 3"):
        table.load_state_dict(small(topk=3).state_dict())
    state = table.state_dict()
    del state["keys"]
    with pytest.raises(ValueError, match=r"state\['keys'\]: expected a tensor, got NoneType"):
        table.load_state_dict(state)
    state = table.state_dict() | {"ages": torch.zeros(3, dtype=torch.int32)}
    with pytest.raises(ValueError, match=r"state\['ages'\]: expected shape of this table"):
        table.load_state_dict(state)
    with pytest.raises(
        ValueError, match="state: expected a mapping, as state_dict returns it, got"
    ):
        table.load_state_dict(None)
    with pytest.raises(ValueError, match=r"scope: expected an integer in \[0, 4\), got 4"):
        table.reset(4)
    with pytest.raises(ValueError, match=r"scope: expected values in \[0, 4\), got 4 at \(1,\)"):
        table.reset(torch.tensor([0, 4]))
    for wrong in (1.5, "a", None):
        with pytest.raises(ValueError, match="scope: expected an integer or a .*tensor"):
            table.reset(wrong)


@pytest.mark.parametrize("storage", ["packed", "exact"])
@pytest.mark.parametrize(
    ("name", "value"), [("counts", -1), ("slots", -1), ("slots", 1 << 17), ("clock", -1)]
)
def test_states_that_no_table_has(storage: str, name: str, value: int) -> None:
    """A count of -1 divided by zero in the next update, an id beyond the vocabulary was drafted."""
    table = small(storage=storage)
    state = copy.deepcopy(table.state_dict())
    state[name].fill_(value)
    with pytest.raises(ValueError, match=rf"state\['{name}'\]: expected values in \[0, "):
        table.load_state_dict(state)
    with pytest.raises(ValueError, match=r"state\['ages'\]: expected a tensor with values"):
        table.load_state_dict(table.state_dict() | {"ages": state["ages"].to("meta")})


def test_sums_and_upper_bits_of_ids_that_no_table_has() -> None:
    exact, wide = small(storage="exact"), small(vocab_size=(1 << 18) + 1)
    most = reference.TOTAL_LIMIT * exact.max_count
    for table, right, wrong, name in ((exact, most, -1, "extra"), (exact, 0, most + 1, "extra"),
                                      (wide, 1, 2, "slots")):  # fmt: skip
        state = copy.deepcopy(table.state_dict())
        state["extra"].fill_(right)
        table.load_state_dict(state)
        state["extra"].fill_(wrong)
        with pytest.raises(ValueError, match=rf"state\['{name}'\]: expected values in \[0, "):
            table.load_state_dict(state)


def test_the_storage_names_its_tensors() -> None:
    assert set(state_tensors(small())) == set(reference.Storage._fields)
    assert "orders=[3, 2, 1]" in repr(small()) and small().device.type == "cpu"
