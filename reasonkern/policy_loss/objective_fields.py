"""The fields of an `Objective`: what they may be, and how the operators take them."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from .._fields import documented
from .adaptive import Rule
from .objective_checks import OPTIONAL, REQUIRED, check, fail, of_python, validate, validate_kl
from .reference_objective import CISPO, CLIP, Number

KL_KINDS = {"k1": 1, "k2": 2, "k3": 3}

# The order of `values` and `hyper` in the operators, and of struct Hyper in objective.h.
HYPER = (
    "ratio_min",
    "ratio_max",
    "dual_clip",
    "ratio_cap",
    "low",
    "high",
    "kl_coef",
    "entropy_coef",
    "log_ratio_clamp",
)


class _KL(NamedTuple):
    estimator: Literal["k1", "k2", "k3"]
    coef: Number
    unbiased: bool = False


@documented
class KL(_KL):
    """KL term ``coef * k(d)`` with d = ref - logp: k1 = -d, k2 = d^2/2, k3 = e^d - d - 1.

    Another estimator, or a coefficient that is negative or not finite, is a ValueError.

    Attributes:
        estimator: "k1", "k2" or "k3". Plain k1's gradient does not know ref; k2's is that of
            KL(policy || ref) where the policy has drawn the tokens.
        coef: factor of the term, a number >= 0 or a tensor.
        unbiased: multiplies k by the ratio to the old policy; the gradient flows through it, too.
    """

    __slots__ = ()

    def __new__(
        cls, estimator: Literal["k1", "k2", "k3"], coef: Number, unbiased: bool = False
    ) -> KL:
        """Refuses what has no meaning; a named tuple has no other place for it."""
        coef = of_python(coef)
        validate_kl(estimator, coef)
        return super().__new__(cls, estimator, coef, unbiased)


@documented
class Importance(NamedTuple):
    """Detached trainer/inference correction w = exp(old_logprob - rollout_logprob).

    Attributes:
        level: "token", or "sequence": w is the product over the sequence.
        mode: "truncate" clamps w to [lo, hi] (TIS); "mask" zeroes tokens with w outside (IcePop,
            MIS).
        lo: lower bound; None = 0.
        hi: upper bound; None = no bound.
        geometric_mean: with level "sequence", that of the ratios instead of their product.
    """

    level: Literal["token", "sequence"]
    mode: Literal["truncate", "mask"]
    lo: Number | None
    hi: Number | None
    geometric_mean: bool = False


@dataclass(frozen=True, eq=False)
class ObjectiveFields:
    """See `Objective`, which adds the named constructors."""

    name: str
    level: Literal["token", "sequence", "custom"] = "token"
    kind: int = CLIP
    ratio_min: Number | None = None
    ratio_max: Number | None = None
    dual_clip: Number | None = None
    ratio_cap: Number | None = None
    low: Number = 0.0
    high: Number = 0.0
    vespo_shape: tuple[Number, Number, Number, Number] | None = None
    function: Callable[..., Tensor] | None = None
    kl: KL | tuple[Any, ...] | None = None
    entropy_coef: Number = 0.0
    importance: Importance | tuple[Any, ...] | None = None
    opsm: Number | None = None
    log_ratio_clamp: Number | None = 20.0
    selection: Tensor | None = None
    log_ratio_penalty: Number = 0.0
    rule: Rule | None = None

    def __post_init__(self) -> None:
        """Normalises the tuples and refuses values that have no meaning."""
        for name, kind in (("kl", KL), ("importance", Importance)):
            given = getattr(self, name)
            if given is None:
                continue
            required = len(kind._fields) - len(kind._field_defaults)
            fits = isinstance(given, (tuple, list)) and required <= len(given) <= len(kind._fields)
            expected = f"{kind.__name__}({', '.join(kind._fields)}) or such a tuple"
            check(fits, name, expected, given)
            object.__setattr__(self, name, kind(*map(of_python, given)))
        for name in (*OPTIONAL, *REQUIRED):
            given = getattr(self, name)
            if (number := of_python(given)) is not given:
                object.__setattr__(self, name, number)
        validate(self)

    @property
    def leaves_out_ratio(self) -> bool:
        """Whether both bounds of a detached ratio are 1, as in REINFORCE: it clips nothing."""
        bounds = (self.ratio_min, self.ratio_max)
        return self.kind == CISPO and all(isinstance(x, (int, float)) and x == 1 for x in bounds)

    @property
    def passes(self) -> int:
        """Reads of the logits for loss and gradient: 1 for token-local objectives, else 2."""
        local = self.level == "token" and self.rule is None and self.opsm is None
        return 1 if local and not self.is_penalised else 2

    @property
    def is_penalised(self) -> bool:
        """Whether a multiple of the log-ratio's size is added, which the operators do not know."""
        return isinstance(self.log_ratio_penalty, Tensor) or self.log_ratio_penalty != 0

    # ---- what the operators take

    def numbers(self) -> tuple[Number, ...]:
        """The fields in the order of the kernels' record; None as the number it stands for."""
        kl_coef: Number = self.kl[1] if self.kl is not None else 0.0
        return (
            0.0 if self.ratio_min is None else self.ratio_min,
            math.inf if self.ratio_max is None else self.ratio_max,
            math.inf if self.dual_clip is None else self.dual_clip,
            math.inf if self.ratio_cap is None else self.ratio_cap,
            self.low,
            self.high,
            kl_coef,
            self.entropy_coef,
            math.inf if self.log_ratio_clamp is None else self.log_ratio_clamp,
        )

    def pack_sequence(self, rows: Tensor) -> tuple[list[float], Tensor | None]:
        """`pack` for the map of sequences, where VESPO's shape stands for the four bounds."""
        numbers = self.numbers()
        return self.pack(rows, (*(self.vespo_shape or numbers[:4]), *numbers[4:]))

    def pack(
        self, rows: Tensor, numbers: tuple[Number, ...] | None = None
    ) -> tuple[list[float], Tensor | None]:
        """``(values, hyper)`` for rows like ``rows`` (B, T), of its dtype and device.

        ``hyper`` is None when all numbers are floats, else (9, 1), or (9, B*T) with per-row fields.
        """
        numbers = self.numbers() if numbers is None else numbers
        tensors = [x for x in numbers if isinstance(x, Tensor)]
        if not tensors:
            return [float(x) for x in numbers], None
        per_row = any(x.ndim > 0 for x in tensors)
        shape = rows.shape if per_row else torch.Size(())
        fields = [
            _row_field(name, x, rows, shape) if isinstance(x, Tensor) else rows.new_full(shape, x)
            for name, x in zip(HYPER, numbers, strict=True)
        ]
        return [0.0] * len(HYPER), torch.stack(fields).reshape(len(HYPER), -1)

    def selection_rows(self, rows: Tensor) -> Tensor | None:
        """The selection for rows like ``rows`` (B, T), contiguous."""
        if self.selection is None:
            return None
        return _row_field("selection", self.selection, rows, rows.shape).contiguous()


def _row_field(name: str, x: Tensor, rows: Tensor, shape: torch.Size) -> Tensor:
    x = x.detach().to(device=rows.device, dtype=rows.dtype)
    if x.shape == rows.shape[1:] and rows.shape[0] == 1:
        x = x.unsqueeze(0)  # packed (N,) tokens are rows of shape (1, N)
    if x.ndim and x.shape != rows.shape:
        expected = f"a float, a 0-dim tensor or one value per row {tuple(rows.shape)}"
        fail(name, expected, f"shape {tuple(x.shape)}")
    return x.expand(shape)
