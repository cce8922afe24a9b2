"""Backends every kernel test runs over, and allocations poisoned with NaN."""

from __future__ import annotations

import importlib
import os
import shutil
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
import triton_interpreter
from summary import Summary
from torch import Tensor

# Decided before anything imports Triton: without a GPU its kernels run in the interpreter.
if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")
    triton_interpreter.patch_once_a_launch()

from gpu_record import GpuRecord  # noqa: E402

from reasonkern import _load  # noqa: E402

BACKENDS = ("reference", "cpu", "triton", "cuda-sim", "cuda")
# Modules of tests/cuda_sim with operators.
SIMULATED = ("backend", "verify_backend", "modulation_backend")
# Backends that any machine with these programs must have when CI says that the package is built.
REQUIRED_IN_CI = {"cpu": None, "triton": None, "cuda-sim": "g++"}


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--summary", type=Path, metavar="FILE", help="write a dated summary")
    parser.addoption("--gpu-record", type=Path, metavar="FILE", help="which GPU kernels passed")


def pytest_configure(config: pytest.Config) -> None:
    path = config.getoption("--summary")
    if path is not None:
        config.pluginmanager.register(Summary(path), "summary")
    path = config.getoption("--gpu-record")
    if path is not None:
        worker = hasattr(config, "workerinput")
        config.pluginmanager.register(GpuRecord(path, worker), "gpu-record")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Workers take file after file: the longest of the last ones would keep one core waiting."""
    items.sort(key=lambda item: item.path.stem not in ("test_ptx_sim", "test_triton_compile"))


@dataclass(frozen=True)
class Backend:
    """The operators of one backend, called as ``backend("token_stats", *args)``."""

    name: str
    device: str
    function: Callable[[str], Callable[..., Any]]

    def __call__(self, op: str, *args: Any) -> Any:
        return self.function(op)(*args)

    @property
    def slow(self) -> bool:
        """Interpreted or simulated: a row costs milliseconds."""
        return self.name == "cuda-sim" or (self.name == "triton" and self.device == "cpu")

    @property
    def dtypes(self) -> tuple[torch.dtype, ...]:
        types = (torch.float32, torch.bfloat16, torch.float16)
        return types if self.name == "triton" else (*types, torch.float64)

    def to(self, x: Any) -> Any:
        return x.to(self.device) if isinstance(x, Tensor) else x


def _from_registry(name: str) -> Callable[[str], Callable[..., Any]]:
    return lambda op: _load.implementation(op, name)


def _simulated() -> Callable[[str], Callable[..., Any]]:
    adapters = [importlib.import_module(f"cuda_sim.{name}") for name in SIMULATED]
    return lambda op: next(getattr(a, op) for a in adapters if hasattr(a, op))


def make_backend(name: str) -> Backend:
    """RuntimeError or ImportError says why it is not here."""
    gpu = torch.cuda.is_available()
    if name == "cuda-sim":
        return Backend(name, "cpu", _simulated())
    if name == "cuda" and not gpu:
        raise RuntimeError("no GPU")
    function = _from_registry(name)
    if reason := _load.reason(name):
        raise RuntimeError(reason)
    if name == "cpu":
        function("token_stats")
    return Backend(name, "cuda" if gpu and name in ("triton", "cuda") else "cpu", function)


@pytest.fixture
def force_backend(monkeypatch: pytest.MonkeyPatch) -> Callable[[str], None]:
    """Has CUDA tensors go to one backend; what Triton does not take still falls back."""

    def force(backend: str) -> None:
        def choose(name: str, device: object = None, *, triton_serves: bool = True) -> str:
            return backend if triton_serves or backend != "triton" else "reference"

        monkeypatch.setattr(_load, "choose_cuda_backend", choose)

    return force


@pytest.fixture(scope="session")
def _backends() -> dict[str, Backend | str]:
    return {}


@pytest.fixture(params=BACKENDS)
def backend(request: pytest.FixtureRequest, _backends: dict[str, Backend | str]) -> Backend:
    name = request.param
    if name not in _backends:
        try:
            _backends[name] = make_backend(name)
        except (RuntimeError, ImportError) as error:
            _backends[name] = f"{name}: {error}"
    found = _backends[name]
    if isinstance(found, Backend):
        return found
    if os.environ.get("CI") == "true" and name in REQUIRED_IN_CI:
        tool = REQUIRED_IN_CI[name]
        if tool is None or shutil.which(tool):
            pytest.fail(f"CI must have every backend: {found}")
    pytest.skip(found)


FLOATS = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


@pytest.fixture(params=FLOATS, ids=lambda d: str(d).removeprefix("torch."))
def dtype(request: pytest.FixtureRequest, backend: Backend) -> torch.dtype:
    if request.param not in backend.dtypes:
        pytest.skip(f"{backend.name} does not take {request.param}")
    return request.param


# ---- poison


POISONED_CALLERS = ("reasonkern", "cuda_sim")


def _poison(x: Tensor) -> Tensor:
    if type(x) is Tensor and x.device.type != "meta" and x.numel():
        x.fill_(float("nan") if x.is_floating_point() else True if x.dtype == torch.bool else -77)
    return x


def _poisoning(allocate: Callable[..., Tensor]) -> Callable[..., Tensor]:
    def call(*args: Any, **kwargs: Any) -> Tensor:
        out = allocate(*args, **kwargs)
        caller = sys._getframe(1).f_globals.get("__name__", "")
        return _poison(out) if caller.split(".")[0] in POISONED_CALLERS else out

    return call


@pytest.fixture
def poisoned_empty(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Memory that the package allocates and does not write comes back as NaN."""
    for name in ("empty", "empty_like", "empty_strided"):
        monkeypatch.setattr(torch, name, _poisoning(getattr(torch, name)))
    for name in ("new_empty", "new_empty_strided"):
        monkeypatch.setattr(Tensor, name, _poisoning(getattr(Tensor, name)))
    yield
