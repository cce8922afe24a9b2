"""What the fuzzer draws: tensors of any shape, dtype, layout and values, and spoilt arguments."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from hypothesis import strategies as st
from torch import Tensor

Arguments = dict[str, Any]
FLOATS = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
HARD = (math.nan, math.inf, -math.inf, 80.0, -80.0, 0.0)


class Draw:
    """Hypothesis behind a small interface: it chooses structure, a drawn seed fills the tensors."""

    def __init__(self, data: st.DataObject) -> None:
        self._data = data
        self._generator = torch.Generator().manual_seed(self.integer(0, 1 << 16))

    def integer(self, low: int, high: int) -> int:
        return self._data.draw(st.integers(low, high))

    def choice(self, *options: Any) -> Any:
        return options[self.integer(0, len(options) - 1)]

    def flag(self) -> bool:
        return self.choice(False, True)

    def maybe(self, make: Callable[[], Any]) -> Any:
        return make() if self.flag() else None

    def number(self, low: float, high: float) -> float:
        return self._data.draw(st.floats(low, high, width=32))

    def size(self) -> int:
        """0 to 9, and often the sizes around the width of a vector register."""
        return self.choice(0, 1, 2, 3, 5, 9)

    # ---- tensors

    def normal(self, *shape: int, dtype: torch.dtype = torch.float32, scale: float = 1.0) -> Tensor:
        x = torch.randn(shape, generator=self._generator) * scale
        return self.laid_out(x.to(dtype))

    def positive(self, *shape: int, high: float = 1.0) -> Tensor:
        return self.laid_out(torch.rand(shape, generator=self._generator) * high + 1e-3)

    def ids(self, high: int, *shape: int, low: int = 0, dtype: torch.dtype = torch.int64) -> Tensor:
        x = torch.randint(low, max(high, low + 1), shape, generator=self._generator)
        return self.laid_out(x.to(dtype))

    def bools(self, *shape: int, share: float = 0.7) -> Tensor:
        return self.laid_out(torch.rand(shape, generator=self._generator) < share)

    def mask(self, *shape: int) -> Tensor:
        return self.bools(*shape).to(self.choice(torch.bool, torch.float32, torch.int64))

    def logits(self, *shape: int) -> Tensor:
        """Any floating dtype; rows may share an odd pitch, hold hard values, want a gradient."""
        dtype, scale = self.choice(*FLOATS), self.choice(0.0, 1.0, 30.0, 1e4)
        *lead, width = shape
        pitch = width + self.choice(0, 0, 1, 5)
        x = (torch.randn((*lead, pitch), generator=self._generator) * scale).to(dtype)[..., :width]
        if x.numel() and self.integer(0, 3) == 0:
            index = tuple(self.integer(0, n - 1) for n in shape)
            x[index] = self.choice(*HARD)
        return x.requires_grad_(self.flag())

    def laid_out(self, x: Tensor) -> Tensor:
        """Contiguous, every other element of a larger one, transposed, or with stride 0."""
        kind = self.integer(0, 7)
        if kind == 0 and x.ndim:
            return torch.stack((x, x), -1)[..., 0]
        if kind == 1 and x.ndim > 1:
            return x.mT.contiguous().mT
        if kind == 2 and x.ndim and x.shape[0]:
            return x[:1].expand(x.shape)
        return x


# ---- spoiling


def _poked(value: float) -> Callable[[Tensor], Tensor]:
    def poke(x: Tensor) -> Tensor:
        x = x.detach().clone()
        if x.numel() and (x.is_floating_point() or math.isfinite(value)):
            x.view(-1)[x.numel() // 2] = value
        return x

    return poke


def _cast(dtype: torch.dtype) -> Callable[[Tensor], Tensor]:
    return lambda x: x.detach().to(dtype)


CASTS = (*FLOATS, torch.complex64, torch.int64, torch.int32, torch.uint8, torch.bool)
TENSORS: tuple[Callable[[Tensor], Any], ...] = (
    *map(_poked, (math.nan, math.inf, -math.inf, -1.0, 3.0, 100.0)),
    *map(_cast, CASTS),
    _cast(torch.float8_e4m3fn),
    lambda x: x.detach().to("meta"),
    lambda x: x.detach()[:0],
    lambda x: x.detach()[..., :0],
    lambda x: x.detach()[..., :-1],
    lambda x: x.detach()[0],
    lambda x: torch.cat((x, x)).detach(),
    lambda x: torch.cat((x, x), -1).detach(),
    lambda x: x.detach().unsqueeze(0),
    lambda x: x.detach().unsqueeze(-1),
    lambda x: x.detach().flatten(),
    lambda x: x.detach().mT.contiguous().mT,
    lambda x: x.detach().expand(2, *x.shape),
    lambda x: x.detach().to_sparse(),
    lambda x: x.detach().sum(),
)
NUMBERS = (math.nan, math.inf, -math.inf, 1e308, -1, 0, 1, 0.5, 1.5, -0.0, 1 << 62, 1 << 70)
OTHERS = (None, "nonsense", "", 3, 0.5, (), [None], object())


def spoil(draw: Draw, arguments: Arguments) -> tuple[Arguments, bool]:
    """One argument replaced; and whether by something of another Python type."""
    name = draw.choice(*arguments)
    value = arguments[name]
    if isinstance(value, Tensor) and draw.integer(0, 9):
        try:
            return arguments | {name: draw.choice(*TENSORS)(value)}, False
        except (RuntimeError, IndexError):  # this tensor cannot be spoilt so
            return arguments, False
    if isinstance(value, (int, float)) and not isinstance(value, bool) and draw.integer(0, 9):
        given = draw.choice(*NUMBERS, torch.tensor(float(value)), torch.full((2,), float(value)))
        return arguments | {name: given}, False
    return arguments | {name: draw.choice(*OTHERS)}, True
