"""Runs checks on every rank of a gloo process group, spawned once for many of them; programs."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import traceback
from collections.abc import Callable, Sequence
from datetime import timedelta
from importlib import import_module
from pathlib import Path

import torch
import torch.distributed as dist
import torch.multiprocessing as mp

Check = Callable[[], None]
PASSED = "passed"


def run(world: int, modules: Sequence[str], names: Sequence[str], folder: Path) -> dict[str, str]:
    """What each check came to: PASSED, or the tracebacks of the ranks on which it failed.

    A failed check ends the run, because the ranks are no longer in step; the rest did not run.
    """
    context = mp.get_context("spawn")
    processes = [
        context.Process(target=_rank, args=(rank, world, list(modules), list(names), str(folder)))
        for rank in range(world)
    ]
    for process in processes:
        process.start()
    for process in processes:
        process.join(300)
        if process.is_alive():
            process.kill()
    reports = [
        json.loads(path.read_text()) if (path := folder / f"{rank}.json").exists() else {}
        for rank in range(world)
    ]
    return {name: _verdict(name, reports) for name in names}


def run_script(script: str, folder: Path, seconds: float = 120) -> None:
    """Two processes run a program, which finds its rank and the folder among its arguments."""
    command = [sys.executable, "-c", script]
    ranks = [subprocess.Popen([*command, str(rank), str(folder)]) for rank in range(2)]
    assert [rank.wait(timeout=seconds) for rank in ranks] == [0, 0]


def _verdict(name: str, reports: Sequence[dict[str, str]]) -> str:
    found = [report.get(name, "did not run") for report in reports]
    if all(outcome == PASSED for outcome in found):
        return PASSED
    return "\n".join(f"rank {rank}: {outcome}" for rank, outcome in enumerate(found))


def _rank(rank: int, world: int, modules: list[str], names: list[str], folder: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", f"file://{folder}/store", timedelta(seconds=120), world, rank)
    checks = {name: f for m in modules for name, f in vars(import_module(m)).items()}
    report: dict[str, str] = {}
    for name in names:
        try:
            checks[name]()
            report[name] = PASSED
        except BaseException:
            report[name] = traceback.format_exc()
        Path(folder, f"{rank}.json").write_text(json.dumps(report))
        if report[name] != PASSED:
            os._exit(1)  # the others' collectives fail instead of waiting for this rank
    dist.destroy_process_group()
