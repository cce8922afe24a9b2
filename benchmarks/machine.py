"""Facts about the machine and the software that a result depends on."""

from __future__ import annotations

import datetime
import importlib
import importlib.metadata
import os
import platform
import subprocess
from pathlib import Path
from typing import Any

import torch

ROOT = Path(__file__).resolve().parent.parent

PACKAGES = ("triton", "trl", "liger-kernel", "quack-kernels", "transformers", "arctic-inference")


def describe() -> dict[str, Any]:
    """Everything the first line and the result file say about where a run took place."""
    cuda = torch.cuda.is_available()
    return {
        "cpu": cpu_model(),
        "cores": os.cpu_count(),
        "features": cpu_features(),
        "gpu": torch.cuda.get_device_name() if cuda else None,
        "architecture": "sm_{}{}".format(*torch.cuda.get_device_capability()) if cuda else None,
        "driver": _driver() if cuda else None,
        "system": f"{platform.system()} {platform.machine()}",
        "python": platform.python_version(),
        "torch": torch.__version__,
        "packages": {name: found for name in PACKAGES if (found := version(name))},
        "reasonkern": version("reasonkern") or "not installed",
        "commit": git_commit(),
        "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        "load": [round(x, 2) for x in os.getloadavg()] if hasattr(os, "getloadavg") else None,
    }


def line(facts: dict[str, Any]) -> str:
    """The machine in one line."""
    gpu = f"{facts['gpu']} (driver {facts['driver']}) · " if facts["gpu"] else ""
    features = f" {' '.join(facts['features'])}" if facts["features"] else ""
    load = (facts["load"] or ["?"])[0]
    packages = "".join(f" · {name} {found}" for name, found in facts["packages"].items())
    return (
        f"{gpu}{facts['cpu']} ({facts['cores']} cores{features}, load {load})"
        f" · python {facts['python']} · torch {facts['torch']}{packages}"
        f" · reasonkern {facts['reasonkern']} commit {facts['commit']}"
    )


def cpu_model() -> str:
    """Model name as the kernel gives it."""
    for row in _read("/proc/cpuinfo").splitlines():
        if row.startswith(("model name", "CPU part")):
            return row.split(":", 1)[1].strip()
    return platform.processor() or platform.machine()


def cpu_features() -> list[str]:
    """The vector extensions that gates and results depend on."""
    flags = next(
        (r.split(":", 1)[1] for r in _read("/proc/cpuinfo").splitlines() if r.startswith("flags")),
        "",
    ).split()
    wanted = {"avx2": {"avx2", "fma"}, "avx512": {"avx512f", "avx512bw", "avx512dq", "avx512vl"}}
    return [name for name, needed in wanted.items() if needed <= set(flags)]


def version(distribution: str) -> str | None:
    """Version of an installed distribution, or of a package imported from the source tree."""
    try:
        return importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        pass
    try:
        return getattr(importlib.import_module(distribution), "__version__", None)
    except ImportError:
        return None


def git_commit() -> str:
    """Short commit of the checkout that holds the benchmarks, marked when it has local changes."""
    head = _run("git", "-C", str(ROOT), "rev-parse", "--short=10", "HEAD")
    if not head:
        return "unknown"
    changed = _run("git", "-C", str(ROOT), "status", "--porcelain", "-uno")
    return head + ("+changes" if changed else "")


def _driver() -> str:
    query = ("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader")
    return (_run(*query).splitlines() or ["unknown"])[0]


def _run(*command: str) -> str:
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=20, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return ""
    return done.stdout.strip() if done.returncode == 0 else ""


def _read(path: str) -> str:
    try:
        return Path(path).read_text()
    except OSError:
        return ""
