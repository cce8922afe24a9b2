"""Runs checks on every rank of a gloo process group, started once for many of them; programs.

The ranks are forks of one new process, which has imported everything and has no threads yet.
"""

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
    arguments = world, list(modules), list(names), str(folder)
    parent = mp.get_context("spawn").Process(target=_fork, args=arguments)
    parent.start()
    parent.join()
    reports = [
        json.loads(path.read_text()) if (path := folder / f"{rank}.json").exists() else {}
        for rank in range(world)
    ]
    return {name: _verdict(name, reports) for name in names}


PROGRAM = """
import datetime, os, sys
os.environ["CUDA_VISIBLE_DEVICES"] = ""  # a fork of a process that has a GPU open has none
sys.path[:0] = {paths}
import torch, torch.distributed as dist
torch.set_num_threads(1)
{imports}
child = os.fork()
rank, folder = int(child == 0), sys.argv[1]
store, wait = f"file://{{folder}}/store", datetime.timedelta(seconds={seconds})
dist.init_process_group("gloo", store, wait, rank=rank, world_size=2)
{script}
dist.destroy_process_group()
sys.exit(child and os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
"""


def run_script(imports: str, script: str, folder: Path, seconds: float = 120) -> None:
    """Two processes of a group run a script after its imports, with their `rank` and `folder`."""
    here = Path(__file__).parent
    paths = [str(here), str(here.parent)]
    program = PROGRAM.format(paths=paths, imports=imports, script=script, seconds=seconds)
    command = [sys.executable, "-c", program, str(folder)]
    assert subprocess.run(command, timeout=seconds).returncode == 0


def _verdict(name: str, reports: Sequence[dict[str, str]]) -> str:
    found = [report.get(name, "did not run") for report in reports]
    if all(outcome == PASSED for outcome in found):
        return PASSED
    return "\n".join(f"rank {rank}: {outcome}" for rank, outcome in enumerate(found))


def _fork(world: int, modules: list[str], names: list[str], folder: str) -> None:
    os.environ["CUDA_VISIBLE_DEVICES"] = ""  # a fork of a process that has a GPU open has none
    torch.set_num_threads(1)
    checks = {name: f for m in modules for name, f in vars(import_module(m)).items()}
    context = mp.get_context("fork")
    ranks = [
        context.Process(target=_rank, args=(rank, world, checks, names, folder))
        for rank in range(world)
    ]
    for rank in ranks:
        rank.start()
    for rank in ranks:
        rank.join(300)
        if rank.is_alive():
            rank.kill()


def _rank(rank: int, world: int, checks: dict[str, Check], names: list[str], folder: str) -> None:
    dist.init_process_group("gloo", f"file://{folder}/store", timedelta(seconds=120), world, rank)
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
