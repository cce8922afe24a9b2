"""What a GPU test run reached: pytest --gpu-record FILE, which benchmarks/evidence.py reads.

Every operator of a GPU backend is watched. A passed test vouches for those that returned to it with
tensors on the GPU, a failed one speaks against all that it called there.
"""

from __future__ import annotations

import json
import os
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from reasonkern import _load

WATCHED = ("cuda", "triton")
Key = tuple[str, str]  # op, backend


class Watch:
    """Which operators the running test called, and which of them returned."""

    def __init__(self, device: str = "cuda") -> None:
        self.device = device
        self.called: set[Key] = set()
        self.returned: set[Key] = set()

    def put_in(self) -> None:
        """Puts itself between the package and its GPU kernels."""
        for op, implementations in list(_load._ops.items()):
            watched = {
                backend: self.around((op, backend), function)
                if function is not None and backend in WATCHED
                else function
                for backend, function in implementations.items()
            }
            _load.register_op(op, watched)

    def around(self, key: Key, function: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any) -> Any:
            if not any(isinstance(x, Tensor) and x.device.type == self.device for x in args):
                return function(*args)
            self.called.add(key)
            result = function(*args)
            self.returned.add(key)
            return result

        return call

    def clear(self) -> None:
        self.called.clear()
        self.returned.clear()


class GpuRecord:
    """Watches in every process that runs tests; the one that hears all reports writes the file."""

    def __init__(self, path: Path, worker: bool, watch: Watch | None = None) -> None:
        self.path, self.worker, self.watch = path, worker, watch or Watch()
        self.passed: Counter[Key] = Counter()
        self.failed: Counter[Key] = Counter()
        self.accounted: set[str] = set()
        self.lost: list[str] = []

    def pytest_sessionstart(self) -> None:
        self.watch.put_in()

    @pytest.hookimpl(hookwrapper=True)
    def pytest_runtest_call(self, item: pytest.Item) -> Iterator[None]:
        self.watch.clear()
        yield
        for name in ("called", "returned"):
            item.user_properties.append((name, sorted(getattr(self.watch, name))))

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        found = dict(report.user_properties)
        if report.when == "call" and "called" in found:
            self.accounted.add(report.nodeid)
            if report.passed:
                self.passed.update(map(tuple, found["returned"]))
            elif report.failed:
                self.failed.update(map(tuple, found["called"]))
        elif report.failed and report.nodeid not in self.accounted:
            self.lost.append(report.nodeid)  # its process died, or its fixtures failed

    @pytest.hookimpl(hookwrapper=True)
    def pytest_runtest_protocol(self, item: pytest.Item) -> Iterator[None]:
        """A process whose CUDA context is broken would fail every test from here on: it ends."""
        yield
        if torch.cuda.is_available() and torch.cuda.is_initialized():
            try:
                torch.cuda.synchronize()
            except RuntimeError as error:
                if self.worker:
                    os._exit(1)  # pytest-xdist starts another one
                pytest.exit(f"the CUDA context is lost after {item.nodeid}: {error}")

    def pytest_sessionfinish(self) -> None:
        if not self.worker:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            self.path.write_text(json.dumps(self.content(), indent=1) + "\n")

    def content(self) -> dict[str, Any]:
        from benchmarks import machine

        passed, failed = self.passed, self.failed
        rows = [
            {
                "op": op,
                "backend": backend,
                "passed": passed[op, backend],
                "failed": failed[op, backend],
            }
            for op, backend in sorted({*passed, *failed})
        ]
        return {"machine": machine.describe(), "tests": rows, "lost": self.lost}
