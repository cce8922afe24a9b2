"""Argument checks that raise ValueError in one form: "name: expected …, got …".

Shapes, dtypes and devices are metadata and may be checked while torch.compile traces. Checks of
values would break the graph, so they do nothing then.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Iterable, Sequence
from typing import NoReturn

import torch
from torch import Tensor


def fail(name: str, expected: str, got: object) -> NoReturn:
    """Raises the ValueError all checks raise."""
    raise ValueError(f"{name}: expected {expected}, got {got}")


def check_tensor(name: str, value: object) -> None:
    """The value is a tensor."""
    if not isinstance(value, Tensor):
        fail(name, "a tensor", type(value).__name__)


def check_shape(name: str, tensor: Tensor, shape: Sequence[int], meaning: str) -> None:
    """`meaning` names the dimensions, for example "(batch, tokens)"."""
    if tuple(tensor.shape) != tuple(shape):
        fail(name, f"shape {meaning} = {tuple(shape)}", tuple(tensor.shape))


def check_dtype(name: str, tensor: Tensor, *dtypes: torch.dtype) -> None:
    """The tensor has one of the dtypes."""
    if tensor.dtype not in dtypes:
        fail(name, "dtype " + _one_of(str(dtype) for dtype in dtypes), tensor.dtype)


def check_device(name: str, tensor: Tensor, other: Tensor, other_name: str) -> None:
    """The tensor lies where the other one lies."""
    if tensor.device != other.device:
        fail(name, f"the device of {other_name}, {other.device}", tensor.device)


def check_choice(name: str, value: object, choices: Collection[object]) -> None:
    """The value is one of a few."""
    if value not in choices:
        fail(name, _one_of(repr(choice) for choice in choices), repr(value))


def check_number(
    name: str, value: object, minimum: float = -math.inf, *, exclusive: bool = False
) -> None:
    """A finite Python number, not below `minimum` (above it if `exclusive`)."""
    if torch.compiler.is_compiling():
        return
    if (
        isinstance(value, (int, float))
        and not isinstance(value, bool)
        and math.isfinite(value)
        and (value > minimum if exclusive else value >= minimum)
    ):
        return
    bound = "" if minimum == -math.inf else f" {'>' if exclusive else '>='} {minimum:g}"
    fail(name, f"a finite number{bound}", repr(value))


def check_range(
    name: str, tensor: Tensor, low: int, high: int, where: Tensor | None = None
) -> None:
    """Elements lie in [low, high), where `where` is true. CPU only: CUDA would synchronise."""
    if torch.compiler.is_compiling() or tensor.device.type != "cpu":
        return
    outside = (tensor < low) | (tensor >= high)
    if where is not None:
        outside &= where
    if outside.any():
        index = tuple(outside.nonzero()[0].tolist())
        fail(name, f"values in [{low}, {high})", f"{tensor[index].item()} at {index}")


def check_finite(
    name: str, tensor: Tensor, where: Tensor, expected: str = "finite values in trained tokens"
) -> None:
    """Elements are finite where `where` is true. CPU only, like `check_range`."""
    if torch.compiler.is_compiling() or tensor.device.type != "cpu":
        return
    wrong = where & ~torch.isfinite(tensor)
    if wrong.any():
        index = tuple(wrong.nonzero()[0].tolist())
        fail(name, expected, f"{tensor[index].item()} at {index}")


def check_mask(name: str, tensor: Tensor) -> None:
    """Bool, or numbers that are 0 or 1. Values are checked on CPU only, like `check_range`."""
    if tensor.dtype == torch.bool or torch.compiler.is_compiling() or tensor.device.type != "cpu":
        return
    wrong = (tensor != 0) & (tensor != 1)
    if wrong.any():
        index = tuple(wrong.nonzero()[0].tolist())
        fail(name, "bool or 0/1 values", f"{tensor[index].item()} at {index}")


def _one_of(choices: Iterable[str]) -> str:
    return " or ".join(choices)
