"""The table's CUDA kernels in the simulator: no result depends on how they are launched."""

from __future__ import annotations

import shutil

import pytest
import torch
from contract import assert_same_bits
from speculation_table_cases import (
    SPARSE,
    Batch,
    random_batch,
    random_requests,
    run_draft,
    run_update,
)
from speculation_table_cases import state_tensors as tensors

from reasonkern import DraftTree, NgramTable, _load
from reasonkern.speculation import table_op
from reasonkern.speculation.tree import MAX_NODES

pytestmark = pytest.mark.skipif(shutil.which("g++") is None, reason="no g++")

LAUNCHES = [
    {"blocks": 1, "threads": 32, "order": "forward"},
    {"blocks": 5, "threads": 128, "order": "reverse"},
    {"blocks": 2, "threads": 96, "order": "random", "seed": 3},
    {"blocks": 3, "threads": 64, "order": "random", "few": False},
    {"blocks": 5, "threads": 32, "order": "reverse", "few": False},
]


def reference(op, *args):
    return _load.implementation(op, "reference")(*args)


def simulated(op, *args):
    from cuda_sim import table_backend

    return getattr(table_backend, op)(*args)


def table(storage="packed"):
    options = {"orders": (4, 2, 1), "topk": 4, "max_count": 9, "max_scopes": 4}
    return NgramTable(24, vocab_size=50, storage=storage, **options)


@pytest.mark.parametrize("launch", LAUNCHES, ids=lambda x: "-".join(map(str, x.values())))
def test_no_launch_changes_a_bit(launch):
    from cuda_sim import table_backend

    got, expected = table(), table()
    with table_backend.using(**launch):
        for tokens in (2, 1):  # sets of many keys; keys of more rows than a warp has room to sum
            batch = random_batch(tokens, rows=50, window=4, tokens=tokens, scopes=1)
            run_update(reference, expected, batch)
            run_update(simulated, got, batch)
        for name, tensor in tensors(expected).items():
            assert torch.equal(tensors(got)[name], tensor), name
        requests = random_requests(5, batch=4, window=4, tokens=2)
        for kind in (1, 2):
            drafts = [
                run_draft(op, t, DraftTree.default(12), requests, kind)
                for op, t in ((simulated, got), (reference, expected))
            ]
            assert_same_bits(*drafts)
    for name, tensor in tensors(expected).items():
        assert torch.equal(tensors(got)[name], tensor), name


def one_each(rows):
    """Rows of contexts of their own, so that each key is of one row."""
    batch = random_batch(7, rows=rows, window=4, tokens=50, scopes=1)
    batch.context[:, 0] = torch.arange(rows)
    assert len(batch.context[:, 2:].unique(dim=0)) > 0.8 * rows
    return batch


def test_keys_of_one_row():
    """New keys, then entries that have all the tokens, some or none; a token twice in a row."""
    from cuda_sim import table_backend

    got, expected = table("exact"), table("exact")
    with table_backend.using(blocks=4, threads=64, order="random", seed=5):
        batch = one_each(20)
        batch.ids[3] = batch.ids[3, 0]
        assert (batch.ids[3] >= 0).all() and len(batch.ids[3].unique()) == 1
        again = batch.take(slice(None))
        again.ids = batch.ids.clone()
        again.ids[::2] = (again.ids[::2] + 25).clamp(max=49) * (again.ids[::2] >= 0)
        again.ids[1::4, 1:] = (again.ids[1::4, 1:] + 7) % 50
        for rows in (batch, again):
            run_update(reference, expected, rows)
            run_update(simulated, got, rows)
    for name, tensor in tensors(expected).items():
        assert torch.equal(tensors(got)[name], tensor), name


@pytest.mark.parametrize("orders", [(4, 2, 1), (8, 5, 3, 1), (6,)], ids=str)
def test_windows(orders):
    """Both kernels of the draft, with missing tokens and some that are no token of any table."""
    from cuda_sim import table_backend

    window = orders[0]
    options = {"orders": orders, "topk": 4, "max_count": 9, "max_scopes": 4}
    drawn = NgramTable(64, vocab_size=50, **options)
    batch = random_batch(3, rows=60, window=window, tokens=2, scopes=4)
    run_update(reference, drawn, batch)
    requests = random_requests(4, batch=6, window=window, tokens=2)
    requests.context[:4] = batch.context[1:5]
    requests.scope[:4] = batch.scope[1:5]
    requests.context[2, 0] = 2**32 + 1  # its lower half is a token
    copy = NgramTable(64, vocab_size=50, **options)
    copy.load_state_dict(drawn.state_dict())
    with table_backend.using(blocks=3, threads=96, order="random", seed=2):
        for kind in (0, 1, 2):
            drafts = [
                run_draft(op, t, DraftTree.default(12), requests, kind)
                for op, t in ((simulated, drawn), (reference, copy))
            ]
            assert_same_bits(*drafts)
            assert drafts[0][1].sum() > len(requests.context)  # more than roots
    assert torch.equal(tensors(drawn)["counters"], tensors(copy)["counters"])


@pytest.mark.parametrize(
    ("topk", "storage"), [(5, "packed"), (12, "exact"), (16, "packed")], ids=str
)
def test_chains_and_temperatures(topk, storage):
    """Warps wait for each other's nodes; candidates on both halves; where no reciprocal serves."""
    from cuda_sim import table_backend

    options = {"orders": (3, 2, 1), "topk": topk, "max_count": 9, "storage": storage}
    drawn, copy = (NgramTable(64, vocab_size=50, **options) for _ in range(2))
    batch = random_batch(6, rows=60, window=3, tokens=4, topk=topk, scopes=1)
    run_update(reference, drawn, batch)
    copy.load_state_dict(drawn.state_dict())
    requests = random_requests(8, batch=5, window=3, tokens=4)
    requests.context[:] = batch.context[1:6]
    requests.scope.zero_()
    requests.temperature[:] = torch.tensor([1e-38, 1e-20, 0.6, 1e20, 3e38])
    tree = DraftTree(SPARSE)
    for launch in ({"threads": 32}, {"threads": 128, "order": "random"}, {"order": "reverse"}):
        with table_backend.using(blocks=2, **launch):
            for kind in (0, 1, 2):
                drafts = [
                    run_draft(op, t, tree, requests, kind)
                    for op, t in ((simulated, drawn), (reference, copy))
                ]
                assert_same_bits(*drafts)
                assert drafts[0][1].sum() > len(SPARSE)  # more than one tree's worth
    assert torch.equal(tensors(drawn)["counters"], tensors(copy)["counters"])


def test_more_children_than_slots():
    """The seventeenth child of a full entry is missing from the start: a warp waits to draw its."""
    from cuda_sim import table_backend

    drawn = NgramTable(400, vocab_size=50, orders=(1,), topk=4)
    batch = random_batch(1, rows=50, window=1, scopes=1)
    batch.context[:, 0] = torch.arange(50)  # a child of any token has an entry
    run_update(reference, drawn, batch)
    requests = random_requests(5, batch=4, window=1, tokens=50)
    requests.scope.zero_()
    tree = DraftTree([-1] + [0] * 20 + [17, 17])
    expected = run_draft(reference, drawn, tree, requests, 1)
    assert expected[1][:, 1:].sum(-1).max() == drawn.topk
    for seed in range(40):
        with table_backend.using(blocks=1, order="random", seed=seed):
            assert_same_bits(run_draft(simulated, drawn, tree, requests, 1), expected)


def test_children_of_all_candidates():
    """Keys of the first eight candidates' children are worked out before it is known who is drawn;
    here one is as probable as another, and every child is in the table."""
    drawn, copy = (NgramTable(256, vocab_size=16, orders=(2, 1), topk=16) for _ in range(2))
    context = random_batch(6, rows=80, window=2, tokens=16).context
    ids = torch.rand(80, 16, generator=torch.Generator().manual_seed(0)).argsort()
    logits = -0.01 * torch.arange(16.0).repeat(80, 1)
    scope = torch.zeros(80, dtype=torch.int64)
    run_update(reference, drawn, Batch(context, ids, logits, logits.logsumexp(-1), scope))
    copy.load_state_dict(drawn.state_dict())
    requests = random_requests(8, batch=4, window=2, tokens=16)
    requests.scope.zero_()
    requests.temperature[:] = 1
    for kind in (1, 2):
        drafts = [
            run_draft(op, t, DraftTree([-1, 0, 1, 2, 3, 4]), requests, kind)
            for op, t in ((simulated, drawn), (reference, copy))
        ]
        assert_same_bits(*drafts)
        assert drafts[0][1].all()


def test_ids_that_are_no_tokens():
    got, requests = table(), random_requests(5, batch=4, window=4, tokens=2)
    run_update(simulated, got, random_batch(1, rows=50, window=4, tokens=2, scopes=1))
    drafts = []
    for nothing in (-1, -2, -(1 << 40)):  # -2 is what a node holds until it is drawn
        requests.context[::2, 2:] = nothing
        drafts.append(run_draft(simulated, got, DraftTree.default(12), requests, 1))
    assert_same_bits(drafts[0], drafts[1])
    assert_same_bits(drafts[0], drafts[2])


def test_both_sides_agree_on_few():
    from cuda_sim import table_backend

    assert table_backend.module().few_items == table_op.FEW_ITEMS


@pytest.mark.slow
def test_sanitised():
    from cuda_sim.build import run_sanitized

    arguments = ["-m", "pytest", "-n", "0", "-x", "-v", "-p", "no:cacheprovider", __file__]
    done = run_sanitized([*arguments, "-k", "no_launch_changes"])
    assert done.returncode == 0, done.stdout + done.stderr
    assert "passed" in done.stdout and "failed" not in done.stdout


def test_shared_memory_of_other_gpus():
    """What a block takes, of what one has on sm_80, on sm_86, sm_89 and sm_120, and on sm_90."""
    from cuda_sim import table_backend

    module, (ampere, small, hopper) = table_backend.module(), (163 * 1024, 99 * 1024, 227 * 1024)
    assert module.few_bytes(module.few_items, 1024) <= small

    def bytes_of(nodes, window=8, orders=4, topk=16):
        return module.draft_bytes(nodes, window, orders, topk)

    assert bytes_of(MAX_NODES) <= hopper  # else the kernel that serves there would refuse a tree
    assert bytes_of(MAX_NODES, window=4) <= ampere < bytes_of(MAX_NODES)
    assert bytes_of(3135) <= ampere < bytes_of(3136)  # check_room refuses the larger one
    assert bytes_of(2654, window=4) <= small < bytes_of(2655, window=4)
    assert bytes_of(1769) <= small < bytes_of(1770)
