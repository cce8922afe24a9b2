"""Objectives that take each path through the logits, and what a call dispatches on its way."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from policy_loss_literal import Batch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from reasonkern import Objective, policy_loss

FORMS = ("padded", "packed")


class Calls(TorchDispatchMode):
    """Names of the package's operators over logits, and the largest new tensor of any operator."""

    OVER_ROWS = ("policy_metrics", "objective_map", "sequence_map")

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []
        self.outputs: list[tuple[str, int]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        before = {a.untyped_storage().data_ptr() for a in args if isinstance(a, Tensor)}
        out = func(*args, **(kwargs or {}))
        name = func._schema.name.split("::")[1]
        if func.namespace == "reasonkern" and name not in self.OVER_ROWS:
            self.names.append(name)
        for t in out if isinstance(out, (tuple, list)) else [out]:
            if isinstance(t, Tensor) and t.untyped_storage().data_ptr() not in before:
                self.outputs.append((str(func), t.numel() * t.element_size()))
        return out

    def at_least(self, size: int) -> list[str]:
        return [name for name, n in self.outputs if n >= size]


PATHS = [
    ("fused", Objective.dapo(entropy_coef=0.1), torch.float32),
    ("two-phase half", Objective.dapo(entropy_coef=0.1), torch.float16),
    ("sequence", Objective.gspo(0.9, 1.1, entropy_coef=0.1), torch.float32),
    ("custom", lambda logp, entropy, ctx: -ctx.advantage * logp - 0.1 * entropy, torch.float32),
]


def paths(*names: str) -> Any:
    chosen = [p for p in PATHS if not names or p[0] in names]
    return pytest.mark.parametrize(
        ("objective", "dtype"), [p[1:] for p in chosen], ids=[p[0] for p in chosen]
    )


def head(b: Batch, dtype: torch.dtype, inplace: bool, objective: Any, **given: Any) -> Any:
    """(loss, leaf) with the logits an intermediate result, as behind an lm_head."""
    b = b.to(torch.float32)
    x = b.logits.to(dtype).clone().requires_grad_()
    given = b.given(inplace_grad=inplace, **given)
    return policy_loss(x * 1, b.targets, objective=objective, **given).loss, x
