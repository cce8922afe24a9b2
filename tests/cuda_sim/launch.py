"""How the kernels of a simulated module are launched, and what they are handed."""

from __future__ import annotations

from collections.abc import Container, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from functools import cache
from pathlib import Path
from types import ModuleType
from typing import Any

from cuda_sim.build import load
from torch import Tensor

ORDERS = ("forward", "reverse", "random")


@dataclass(frozen=True)
class Settings:
    """The order in which threads run; a module adds the sizes of its grids and blocks."""

    order: str = "forward"
    seed: int = 0


@dataclass
class Kernels:
    """The module of one source, built when it is first asked for."""

    name: str
    settings: Settings

    @contextmanager
    def using(self, **changes: Any) -> Iterator[None]:
        """Launches differently inside the `with` block."""
        before, self.settings = self.settings, replace(self.settings, **changes)
        try:
            yield
        finally:
            self.settings = before

    def module(self) -> ModuleType:
        return _module(self.name)

    def launch(self, **changes: Any) -> dict[str, Any]:
        """The settings with `changes`, as the module takes them."""
        values = asdict(self.settings) | changes
        return values | {"order": ORDERS.index(values["order"])}


@cache
def _module(name: str) -> ModuleType:
    return load([Path(__file__).with_name(f"{name}.cpp")], name)


def pointers(fields: dict[str, Any], strided: Container[str] = ()) -> dict[str, Any]:
    """Tensors as addresses, without what is None; those not named `strided` must be contiguous."""
    for name, value in fields.items():
        if isinstance(value, Tensor) and name not in strided:
            assert value.is_contiguous(), f"{name}: row tensors are contiguous at operator level"
    given = {name: value for name, value in fields.items() if value is not None}
    return {k: v.data_ptr() if isinstance(v, Tensor) else v for k, v in given.items()}
