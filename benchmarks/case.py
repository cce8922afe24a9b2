"""What a benchmark is made of, as data: cases, providers, gates and the family that holds them."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch

DTYPES = {
    "float32": torch.float32,
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
    "float64": torch.float64,
}


class Skip(Exception):
    """Raised by a provider that cannot run a case; the message is shown in the table."""


def _nothing() -> None:
    return None


@dataclass
class Runner:
    """One provider made ready for one set of inputs."""

    call: Callable[[], Any]
    """The timed work; whatever it returns goes to `outputs`."""
    outputs: Callable[[Any], dict[str, torch.Tensor]] = field(default=lambda _: {})
    """Named tensors to compare with the float64 truth."""
    reset: Callable[[], None] = _nothing
    """Untimed work before every call, such as refilling an input that the call overwrites."""
    repeat: int = 1
    """How many times the work is done in one call (graph replay over rotated inputs)."""
    about: dict[str, Any] = field(default_factory=dict)
    """Goes into the provider's row after a call: the backend that served it, and its ops."""


@dataclass(frozen=True)
class Gate:
    """A bound on the subject of a case, checked by `--check`."""

    quantity: str
    """`time`: subject ÷ `against`; `speedup`: `against` ÷ subject (both medians of pair ratios);
    `memory`: peak extra bytes ÷ those of `against`, or ÷ input bytes; `copy_share`: bandwidth ÷
    that of a copy; `microseconds`: of one item of the subject's call (see `Runner.repeat`);
    `accepted`: tokens per step of the subject ÷ those of `against`."""
    bound: float
    against: str = ""
    min_pairs: int = 5
    needs: str = ""
    """Machine feature or package without which the gate is reported instead of enforced."""

    @property
    def upper(self) -> bool:
        """Whether the value must stay at or below the bound (else: at or above)."""
        return self.quantity in ("time", "memory", "microseconds")

    @property
    def _memory_of(self) -> str:
        return f"that of {self.against}" if self.against else "the input"

    def text(self) -> str:
        """The gate in words."""
        sign, bound = ("≤" if self.upper else "≥"), f"{self.bound:g}"
        return {
            "time": f"time {sign} {bound} × {self.against}",
            "speedup": f"{sign} {bound} × faster than {self.against}",
            "memory": f"extra memory {sign} {self.bound:.0%} of {self._memory_of}",
            "microseconds": f"{sign} {bound} µs per item",
            "copy_share": f"{sign} {self.bound:.0%} of the copy bandwidth",
            "accepted": f"tokens per step {sign} {bound} × {self.against}",
        }[self.quantity]


@dataclass(frozen=True)
class Case:
    """One op at one shape; everything that decides what is measured."""

    op: str
    shape: tuple[int, ...]
    dtype: str
    device: str
    passes: int
    """Times the input must at least cross the memory bus (reads plus writes)."""
    providers: tuple[str, ...]
    """Subject first: the others are paired with it."""
    threads: int | None = None
    label: str = ""
    spec: Any = None
    gates: tuple[Gate, ...] = ()
    quick: bool = False
    input_shape: tuple[int, ...] | None = None
    """Shape of the large input where `shape` holds other sizes, too."""
    flops: int = 0
    """Operations of the matrix products; where given, rates are FLOP/s instead of bandwidths."""
    rotate: int = 1
    """CUDA only: replay a graph over this many input sets, for work that would sit in the L2."""
    memory: bool = True
    """False: the peak memory of a call is not measured (that of a model's passes)."""
    pairs: int | None = None
    """So many pairs whatever the budget, where counts in the rows matter and not times."""

    @property
    def id(self) -> str:
        """Name used by `--case`, `--list` and the result file."""
        shape = "x".join(map(str, self.shape))
        parts = (self.op, self.label, shape, self.dtype, f"t{self.threads}" if self.threads else "")
        return "/".join(p for p in (*parts, self.device) if p)

    @property
    def input_bytes(self) -> int:
        """Bytes of the large input."""
        size = torch.tensor([], dtype=DTYPES[self.dtype]).element_size()
        for n in self.input_shape or self.shape:
            size *= n
        return size


@dataclass(frozen=True)
class Provider:
    """Something that can run ops: ours, a formulation in torch, a peer library, a ceiling."""

    name: str
    build: Mapping[str, Callable[[Case, Any], Runner]]
    """Per op: from a case and its inputs to a runner; may raise `Skip`."""
    checked: bool = True
    """False for ceilings and yardsticks that compute something else (a copy)."""
    passes: int | None = None
    """Own memory passes where they differ from the case's (a copy reads once and writes once)."""


def merged(*parts: Mapping[str, Provider]) -> dict[str, Provider]:
    """The providers of several modules; those of one name become one, with the ops of all."""
    found: dict[str, Provider] = {}
    for part in parts:
        for name, provider in part.items():
            known = found.get(name, provider)
            found[name] = replace(known, build={**known.build, **provider.build})
    return found


@dataclass(frozen=True)
class Tolerance:
    """Allowed error of one output: `rel·|truth| + absolute`, elementwise, broadcastable."""

    rel: torch.Tensor | float
    absolute: torch.Tensor | float


@dataclass
class Truth:
    """float64 outputs of a case and how far from them a provider may be."""

    values: dict[str, torch.Tensor]
    tolerance: dict[str, Tolerance]


@dataclass(frozen=True)
class Family:
    """The benchmarks of one family of ops."""

    name: str
    cases: tuple[Case, ...]
    providers: Mapping[str, Provider]
    inputs: Callable[[Case, int], Any]
    """(case, seed) → inputs on the case's device."""
    truth: Callable[[Case, Any], Truth]
