"""Threads, forked and spawned processes, DataLoader workers: the bits of the serial run."""

from __future__ import annotations

import multiprocessing
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
from steps import STEPS, everything, same
from torch.utils.data import DataLoader, Dataset

import reasonkern as rk

THREADS, ROUNDS = 8, 6


@pytest.mark.parametrize("step", STEPS, ids=lambda step: step.__name__)
def test_eight_threads_at_once(step: Any) -> None:
    """The interpreter switches every 10 µs, and all threads start together."""
    expected = [step(seed) for seed in range(THREADS)]
    barrier, interval = threading.Barrier(THREADS), sys.getswitchinterval()

    def run(seed: int) -> bool:
        barrier.wait()
        return all(same(step(seed), expected[seed]) for _ in range(ROUNDS))

    sys.setswitchinterval(1e-5)
    try:
        with ThreadPoolExecutor(THREADS) as pool:
            assert all(pool.map(run, range(THREADS)))
    finally:
        sys.setswitchinterval(interval)


def test_one_table_read_by_eight_threads() -> None:
    """Drafting does not write what another draft reads; only the statistics are shared."""
    table, tree = rk.NgramTable(512, vocab_size=50, orders=(2, 1)), rk.DraftTree.default(12)
    g = torch.Generator().manual_seed(0)
    context = torch.randint(9, (64, 2), generator=g)
    ids = torch.randint(50, (64, 3), generator=g)
    table.update(context, ids, torch.full((64, 3), -2.0))
    given = {"temperature": 0.7, "seed": 3, "position": 5}
    expected = table.draft(context, tree, **given).tokens
    assert (expected != context[:, -1:]).any()
    with ThreadPoolExecutor(THREADS) as pool:
        drafts = pool.map(lambda _: table.draft(context, tree, **given).tokens, range(40))
        assert all(torch.equal(tokens, expected) for tokens in drafts)


def child(seed: int, results: Any) -> None:
    torch.set_num_threads(1)  # OpenMP's threads do not survive a fork; torch asks for the same
    results.put([x.tolist() for x in everything(seed)])


@pytest.mark.parametrize("method", ["fork", "spawn"])
def test_processes(method: str) -> None:
    """The parent has run every op, threads and all, before the child starts."""
    expected = [x.tolist() for x in everything(1)]
    context = multiprocessing.get_context(method)
    results = context.Queue()
    process = context.Process(target=child, args=(1, results))
    process.start()
    try:
        assert results.get(timeout=120) == expected
    finally:
        process.kill()
        process.join()


class Steps(Dataset[list[torch.Tensor]]):
    def __len__(self) -> int:
        return 6

    def __getitem__(self, seed: int) -> list[torch.Tensor]:
        return everything(seed)


@pytest.mark.parametrize("method", ["fork", "spawn"])
def test_dataloader_workers(method: str) -> None:
    expected = [everything(seed) for seed in range(6)]
    loader = DataLoader(
        Steps(), batch_size=None, num_workers=2, multiprocessing_context=method, timeout=120
    )
    for got, wanted in zip(loader, expected, strict=True):
        assert same(got, wanted)
