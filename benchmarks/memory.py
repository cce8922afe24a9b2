"""Peak extra memory of one call.

On CPU a fresh process runs the call once, forgets its high-water mark, runs it again and reads how
far the resident size rose: `python -m benchmarks.memory FAMILY CASE PROVIDER` prints the bytes.
"""

from __future__ import annotations

import gc
import json
import os
import statistics
import subprocess
import sys
from pathlib import Path

import torch

from benchmarks.case import Case, Family, Runner

REPEATS = 3
# Every allocation of 64 KiB or more becomes its own mapping and leaves with its last reference;
# otherwise memory that the heap keeps from the first call would hide what the second one needs.
MALLOC = {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "0"}


def peak_extra(family: Family, case: Case, provider: str, runner: Runner) -> int | None:
    """Peak bytes above what was in use before the call; None where they cannot be known."""
    if case.device == "cuda":
        return cuda_peak(runner)
    return cpu_peak_in_fresh_process(family.name, case, provider)


def cuda_peak(runner: Runner) -> int:
    """Peak of the caching allocator over one call."""
    runner.reset()
    gc.collect()
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    result = runner.call()
    torch.cuda.synchronize()
    del result
    return torch.cuda.max_memory_allocated() - before


def cpu_peak_in_fresh_process(family: str, case: Case, provider: str) -> int | None:
    """Asks a fresh process, so that neither allocator caches nor other providers interfere."""
    if not Path("/proc/self/clear_refs").exists():
        return None
    command = [sys.executable, "-m", "benchmarks.memory", family, case.id, provider]
    command += [str(case.threads or 0)]
    done = subprocess.run(
        command,
        capture_output=True,
        text=True,
        env={**os.environ, **MALLOC},
        cwd=Path(__file__).resolve().parent.parent,
        timeout=600,
        check=False,
    )
    if done.returncode != 0:
        return None
    return int(json.loads(done.stdout.splitlines()[-1]))


def cpu_peak(runner: Runner) -> int:
    """Median over a few calls of VmHWM − VmRSS, after a first call that warms everything up."""
    runner.reset()
    runner.call()
    return int(statistics.median(_one_cpu_peak(runner) for _ in range(REPEATS)))


def _one_cpu_peak(runner: Runner) -> int:
    runner.reset()
    gc.collect()
    Path("/proc/self/clear_refs").write_text("5")
    before = _status("VmRSS")
    result = runner.call()
    peak = _status("VmHWM")
    del result
    return max(0, peak - before)


def _status(field: str) -> int:
    for row in Path("/proc/self/status").read_text().splitlines():
        if row.startswith(field + ":"):
            return int(row.split()[1]) * 1024
    raise RuntimeError(f"/proc/self/status has no {field}")


def main(arguments: list[str]) -> None:
    """Entry of the fresh process."""
    from benchmarks.engine import with_threads
    from benchmarks.families import load

    family_name, case_id, provider, threads = arguments
    family = load(family_name)
    case = next(c for c in family.cases if with_threads(c, int(threads)).id == case_id)
    case = with_threads(case, int(threads))
    if case.threads:
        torch.set_num_threads(case.threads)
    inputs = family.inputs(case, 0)
    runner = family.providers[provider].build[case.op](case, inputs)
    print(json.dumps(cpu_peak(runner)))


if __name__ == "__main__":
    main(sys.argv[1:])
