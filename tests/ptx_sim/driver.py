"""A driver for Triton that compiles for sm_90 and launches in the simulator, on CPU tensors."""

from __future__ import annotations

import os
from typing import Any

import torch

from .program import BUILD, Program, Simulator

os.environ["TRITON_CACHE_DIR"] = str(BUILD / "triton")  # "cubins" there are PTX

import triton  # noqa: E402
from triton.backends.compiler import GPUTarget  # noqa: E402
from triton.backends.nvidia.compiler import CUDABackend  # noqa: E402

SIMULATOR = Simulator()


def flat(values: Any, types: Any) -> Any:
    for value, kind in zip(values, types, strict=True):
        if isinstance(kind, tuple):
            yield from flat(value, kind)
        elif kind != "constexpr":
            yield value


def extent(x: torch.Tensor) -> tuple[int, int]:
    size = 1 + sum((n - 1) * s for n, s in zip(x.shape, x.stride(), strict=True))
    return x.data_ptr(), x.data_ptr() + (size * x.element_size() if x.numel() else 0)


class Launcher:
    def __init__(self, source: Any, metadata: Any) -> None:
        self.types = tuple(source.signature.values())
        self.shared = metadata.shared

    def __call__(self, x: int, y: int, z: int, stream: int, program: Program, *rest: Any) -> None:
        given = list(flat(rest[4:], self.types))
        tensors = [value for value in given if isinstance(value, torch.Tensor)]
        values = [v.data_ptr() if isinstance(v, torch.Tensor) else v for v in given]
        scratch = [0, 0]
        SIMULATOR.launch(
            program, self.shared, (x, y, z), [*values, *scratch], list(map(extent, tensors))
        )


class Utils:
    def get_device_properties(self, device: int) -> dict[str, int]:
        return {"max_shared_mem": 99 * 1024}

    def load_binary(self, name: str, ptx: bytes, shared: int, device: int) -> tuple[Any, ...]:
        program = Program(ptx.decode(), SIMULATOR.functions)
        return program, program, 0, 0, 1024  # a module of None would be loaded at every launch


class Driver:
    utils = Utils()
    launcher_cls = Launcher

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", 90, 32)

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return 0


def install() -> None:
    """From here on Triton's kernels, compiled, run in the simulator."""
    from reasonkern import _triton

    CUDABackend.make_cubin = lambda self, ptx, *rest: ptx.encode()
    triton.runtime.driver.set_active(Driver())
    _triton.check_launchable = lambda *args: None
