"""Requests under control, and the rows that an engine's adapter owes them."""

from __future__ import annotations

import torch
from torch import Tensor

import reasonkern as rk

V, THINK, END, WAIT = 32, 1, 2, 3
SETS = rk.TokenSets.from_ids({"reflect": [5, 6, 7], "switch": [6, 9]})
SPECS = (
    rk.Modulation(cyclic=rk.Cyclic(5.0, 12), think_end=END),
    rk.Modulation(
        tip=rk.TIP(3.0, 4, set="switch"), budget=rk.Budget(5, [4, END], rk.SoftBudget(0.5)),
        think_start=THINK, think_end=END,
    ),
    rk.Modulation(ban=rk.Ban(), min_think=rk.MinThink(6, 1, [WAIT, 8]), think_end=END),
    rk.Modulation(schedule=rk.Schedule([(0, 1.0), (20, -4.0)]), constant=rk.Constant(0.5)),
)  # fmt: skip


def expected_row(
    row: Tensor, spec: rk.Modulation | None, prompt: list[int], generated: list[int], t: float
) -> Tensor:
    """The row under a state that has seen these tokens and nothing else."""
    out = row.clone().unsqueeze(0)
    if spec is not None:
        state = rk.ModulationState(1, SETS)
        state.add(0, spec, prompt, generated)
        slot = torch.zeros(1, dtype=torch.int64)
        rk.modulate_logits_(out, state, slot, temperature=t, allow_dense=True)
    return out[0]
