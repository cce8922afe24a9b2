"""What every Triton kernel of the package is declared with."""

import inspect
from collections.abc import Callable
from typing import Any

import triton
import triton.language as tl


def kernel(fn: Callable[..., Any]) -> Any:
    """triton.jit that specialises on nothing: no value 1, no divisibility, no pointer alignment."""
    parameters = inspect.signature(fn).parameters.values()
    names = [p.name for p in parameters if p.annotation is not tl.constexpr]
    return triton.jit(fn, do_not_specialize=names)
