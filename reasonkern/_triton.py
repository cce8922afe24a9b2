"""What every Triton kernel of the package is declared with."""

import inspect
from collections.abc import Callable
from typing import Any

import torch
import triton
import triton.language as tl


def kernel(fn: Callable[..., Any]) -> Any:
    """triton.jit that specialises on nothing: no value 1, no divisibility, no pointer alignment."""
    parameters = inspect.signature(fn).parameters.values()
    names = [p.name for p in parameters if p.annotation is not tl.constexpr]
    return triton.jit(fn, do_not_specialize=names)


FLOATS = (torch.float32, torch.bfloat16, torch.float16)


def check_dtype(name: str, x: torch.Tensor, taken: tuple[torch.dtype, ...] = FLOATS) -> None:
    """NotImplementedError for a dtype that the kernel does not compute in."""
    if x.dtype not in taken:
        raise NotImplementedError(
            f"{name}: the Triton backend takes {' or '.join(map(str, taken))}, got {x.dtype}; "
            "the reference backend takes it"
        )


def check_launchable(name: str, device: torch.device, function: object) -> None:
    """RuntimeError where a kernel is compiled and its tensors are the CPU's."""
    if device.type == "cpu" and isinstance(function, triton.JITFunction):
        raise RuntimeError(
            f"{name}: the Triton backend got a CPU tensor; it needs a GPU, or TRITON_INTERPRET=1 "
            "in the environment before triton is imported"
        )
