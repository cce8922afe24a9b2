"""The table's CUDA kernels in the simulator: no result depends on how they are launched."""

from __future__ import annotations

import shutil

import pytest
import torch
from contract import assert_same_bits
from speculation_table_cases import random_batch, random_requests, run_draft, run_update
from speculation_table_cases import state_tensors as tensors

from reasonkern import DraftTree, NgramTable, _load
from reasonkern.speculation import table_op

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
