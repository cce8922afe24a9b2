"""Argument checks that raise ValueError in one form: "name: expected …, got …".

Shapes, dtypes and devices are metadata and may be checked while torch.compile traces. Checks of
values would break the graph, so they do nothing then.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Iterable, Mapping, Sequence
from numbers import Integral, Real
from typing import Any, NoReturn, TypeGuard

import torch
from torch import Tensor

REAL = frozenset((
    torch.float32, torch.bfloat16, torch.float16, torch.float64, torch.int64, torch.int32,
    torch.int16, torch.int8, torch.uint8, torch.bool,
))  # fmt: skip
LARGEST = torch.finfo(torch.float32).max  # kernels take their numbers as float32
INT64 = (1 << 63) - 1


def fail(name: str, expected: str, got: object) -> NoReturn:
    """Raises the ValueError all checks raise."""
    raise ValueError(f"{name}: expected {expected}, got {got}")


def check_tensor(name: str, value: object) -> Tensor:
    """The value is a dense tensor of real numbers; returns it."""
    if not isinstance(value, Tensor):
        fail(name, "a tensor", type(value).__name__)
    if value.layout != torch.strided or value.dtype not in REAL:
        got = value.dtype if value.layout == torch.strided else value.layout
        fail(name, "a dense tensor of floats, integers or bools", got)
    return value


def check_values(name: str, value: object) -> Tensor:
    """The value is a tensor whose values can be read, which those of device meta cannot."""
    tensor = check_tensor(name, value)
    if tensor.is_meta:
        fail(name, "a tensor with values", "one on device meta")
    return tensor


def is_contiguous(
    value: object, shape: Sequence[int], dtype: torch.dtype, device: torch.device
) -> bool:
    """Whether kernels can take the value as it is; the slower checks can then be left out."""
    return (
        isinstance(value, Tensor)
        and value.dtype is dtype
        and value.shape == shape
        and value.device == device
        and value.layout is torch.strided
        and value.is_contiguous()
    )


def check_shape(name: str, tensor: Tensor, shape: Sequence[int], meaning: str) -> None:
    """`meaning` names the dimensions, for example "(batch, tokens)"."""
    check_tensor(name, tensor)
    if tuple(tensor.shape) != tuple(shape):
        fail(name, f"shape {meaning} = {tuple(shape)}", tuple(tensor.shape))


def check_dtype(name: str, tensor: Tensor, *dtypes: torch.dtype) -> None:
    """The value is a tensor of one of the dtypes."""
    if not isinstance(tensor, Tensor) or tensor.layout != torch.strided:
        check_tensor(name, tensor)
    if tensor.dtype not in dtypes:
        fail(name, "dtype " + _one_of(str(dtype) for dtype in dtypes), tensor.dtype)


def expanded(name: str, value: object, other: Tensor, other_name: str) -> Tensor:
    """A view of the tensor in the shape of the other one, on whose device it must be."""
    tensor = check_tensor(name, value)
    check_device(name, tensor, other, other_name)
    try:
        return tensor.expand(other.shape)
    except RuntimeError:
        fail(name, f"a shape that broadcasts to {tuple(other.shape)}", tuple(tensor.shape))


def check_device(name: str, tensor: Tensor, other: Tensor, other_name: str) -> None:
    """The tensor lies where the other one lies."""
    check_tensor(name, tensor)
    if tensor.device != other.device:
        fail(name, f"the device of {other_name}, {other.device}", tensor.device)


def as_device(name: str, value: Any) -> torch.device:
    """A device on which tensors can be made here."""
    try:
        return torch.empty(0, device=value).device
    except (AssertionError, RuntimeError, TypeError) as error:
        reason = (str(error).splitlines() or [""])[0]
        fail(name, "a device of this machine", f"{str(value)!r} ({reason})")


def filled(values: Sequence[int], device: torch.device) -> Tensor:
    """(K,) int64, filled on the device: a copy from the host would synchronise."""
    out = torch.empty(len(values), dtype=torch.int64, device=device)
    for k, value in enumerate(values):
        out[k].fill_(value)
    return out


def check_settings(given: object, own: Mapping[str, object]) -> None:
    """A saved state has the settings of its owner; the message names those that differ."""
    if not isinstance(given, Mapping):
        fail("state['settings']", "a mapping, as state_dict writes it", type(given).__name__)
    names = [name for name in {**own, **given} if given.get(name) != own.get(name)]
    if names:
        expected, got = ({name: x.get(name) for name in names} for x in (own, given))
        fail("state", f"settings {expected}", got)


def check_saved(state: Mapping[str, object], own: Mapping[str, Tensor], owner: str) -> None:
    """A saved state has the tensors of its owner, in shape and dtype."""
    for name, tensor in own.items():
        given = check_values(f"state[{name!r}]", state.get(name))
        check_dtype(f"state[{name!r}]", given, tensor.dtype)
        check_shape(f"state[{name!r}]", given, tensor.shape, f"of this {owner}")


def check_list(name: str, value: object, of: str, *, ordered: bool = True) -> None:
    """A list or the like: no string, which is a sequence of letters, and if `ordered` no set."""
    unfit = isinstance(value, (str, bytes, Mapping, *((set, frozenset) if ordered else ())))
    if unfit or not hasattr(value, "__len__"):
        fail(name, f"a list of {of}", repr(value) if value is None else type(value).__name__)


def check_choice(name: str, value: object, choices: Collection[object]) -> None:
    """The value is one of a few; a tensor, which compares by element, is none of them."""
    if isinstance(value, Tensor) or value not in choices:
        got = type(value).__name__ if isinstance(value, Tensor) else repr(value)
        fail(name, _one_of(repr(choice) for choice in choices), got)


def check_number(
    name: str,
    value: object,
    minimum: float = -math.inf,
    maximum: float = math.inf,
    *,
    exclusive: bool = False,
) -> None:
    """A number, NumPy's too, finite in float32, in [minimum, maximum]; `exclusive`: not minimum."""
    if torch.compiler.is_compiling():
        return
    if is_number(value):
        x = value if isinstance(value, (int, float)) else float(value)
        above = x > minimum if exclusive else x >= minimum
        exact = not isinstance(x, int) or abs(x) <= INT64
        if above and x <= maximum and -LARGEST <= x <= LARGEST and exact:
            return
    expected = "a finite number"
    if maximum < math.inf:
        expected = f"a number in {'(' if exclusive else '['}{minimum:g}, {maximum:g}]"
    elif minimum > -math.inf:
        expected += f" {'>' if exclusive else '>='} {minimum:g}"
    fail(name, expected, repr(value))


def is_number(value: object) -> TypeGuard[float]:
    """A number of Python or NumPy, no bool; int and float come first because they test fast."""
    return isinstance(value, (int, float, Real)) and not isinstance(value, bool)


def is_integer(value: object) -> TypeGuard[int]:
    """As `is_number`."""
    return isinstance(value, (int, Integral)) and not isinstance(value, bool)


def check_integer(
    name: str, value: object, minimum: int = -INT64 - 1, maximum: int = INT64, or_none: str = ""
) -> None:
    """An integer, NumPy's too, in [minimum, maximum]; `or_none` continues the sentence."""
    if is_integer(value) and minimum <= int(value) <= maximum:
        return
    bounds = f">= {minimum}" if maximum == INT64 else f"in [{minimum}, {maximum}]"
    fail(name, f"an integer {bounds}{or_none}", repr(value))


def check_ids(name: str, value: object, high: int, origin: str = "") -> None:
    """A sequence of integers in [0, high), NumPy's among them; `origin` says what high is."""
    if isinstance(value, str) or not isinstance(value, Sequence):
        fail(name, "a sequence of token ids", type(value).__name__)
    for token in value:
        if not is_integer(token) or not 0 <= int(token) < high:
            fail(name, f"ids in [0, {high}){origin}", repr(token))


def check_seed(name: str, value: object) -> int:
    """An integer of 64 bits, signed or not; Python's, as generators take no other."""
    if not is_integer(value) or not -INT64 <= int(value) + 1 <= 1 << 64:
        fail(name, "an integer in [-2^63, 2^64)", repr(value))
    return int(value)


def signed(word: int) -> int:
    """An integer of 64 bits, signed or not, as the int64 with its bits."""
    return word - (1 << 64) if word >> 63 == 1 else word  # a mask would not fit a traced integer


def reads_values(tensor: Tensor) -> bool:
    """Whether values are checked: on CPU (CUDA would synchronise), and not while tracing."""
    return tensor.device.type == "cpu" and not torch.compiler.is_compiling()


def check_all(name: str, tensor: Tensor, right: Tensor, expected: str) -> None:
    """Every element is right, else ValueError shows the first wrong one; call if `reads_values`."""
    if not right.all():
        index = tuple((~right).nonzero()[0].tolist())
        fail(name, expected, f"{tensor[index].item()} at {index}")


def extremes(tensor: Tensor) -> list[float]:
    """The smallest and the largest element, at a third of a comparison's time; NaN is both."""
    return [x.item() for x in tensor.aminmax()] if tensor.numel() else []


def check_range(
    name: str, tensor: Tensor, low: int, high: int, where: Tensor | None = None, remedy: str = ""
) -> None:
    """Elements lie in [low, high), where `where` is true; under `reads_values`."""
    if reads_values(tensor):
        looked_at = tensor if where is None else tensor.where(where, low)
        if all(low <= x < high for x in extremes(looked_at)):
            return
        inside = (tensor >= low) & (tensor < high)
        right = inside if where is None else inside | ~where
        check_all(name, tensor, right, f"values in [{low}, {high}){remedy}")


def check_finite(
    name: str,
    tensor: Tensor,
    where: Tensor | None = None,
    expected: str = "finite values in trained tokens",
) -> None:
    """Elements are finite, where `where` is true; under `reads_values`."""
    if reads_values(tensor):
        finite = torch.isfinite(tensor)
        check_all(name, tensor, finite if where is None else finite | ~where, expected)


def check_mask(name: str, tensor: Tensor) -> None:
    """Bool, or numbers that are 0 or 1; the latter under `reads_values`."""
    if tensor.dtype != torch.bool and reads_values(tensor):
        check_all(name, tensor, (tensor == 0) | (tensor == 1), "bool or 0/1 values")


def _one_of(choices: Iterable[str]) -> str:
    return " or ".join(choices)
