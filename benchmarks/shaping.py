"""Benchmarks of shaping and scaling: the GAE scan and the elliptical bonus and selection."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from benchmarks.case import DTYPES, Case, Family, Gate, Provider, Runner, Tolerance, Truth
from benchmarks.peers import ours

GAMMA, LAM, RIDGE, PICKS, BLOCK = 0.999, 0.95, 0.01, 32, 64


@dataclass
class Batch:
    """Inputs of one case; `first` is (B, T) rewards or (N, d) features."""

    first: Tensor
    value: Tensor | None = None
    mask: Tensor | None = None


def case(
    op: str,
    shape: tuple[int, int],
    providers: tuple[str, ...],
    *,
    label: str = "",
    device: str = "cpu",
    passes: int = 1,
    gates: tuple[Gate, ...] = (),
    quick: bool = False,
) -> Case:
    """float32; two threads on a CPU."""
    return Case(
        op=op,
        shape=shape,
        dtype="float32",
        device=device,
        passes=passes,
        providers=providers,
        threads=2 if device == "cpu" else None,
        label=label,
        gates=gates,
        quick=quick,
    )


# Rewards and values in, advantages and returns out: four passes over (B, T).
SCAN = ("reasonkern", "loop", "blocked", "copy")
GATED = (
    case("gae", (256, 8192), SCAN, passes=4,
         gates=(Gate("speedup", 20, "loop"), Gate("speedup", 3, "blocked"))),
    case("elliptical_bonus", (16, 4096), ("reasonkern", "rank-one"),
         gates=(Gate("speedup", 1.0, "rank-one"),)),
)  # fmt: skip
OTHERS = (
    case("gae", (256, 8192), ("reasonkern", "loop", "copy"), passes=4, label="masked"),
    case("gae", (32, 1024), SCAN, passes=4, quick=True),
    case("elliptical_select", (1024, 512), ("reasonkern", "rank-one")),
    case("elliptical_select", (256, 128), ("reasonkern", "rank-one"), quick=True),
)
CUDA_CASES = (
    case("gae", (256, 8192), ("ours-triton", "loop", "blocked", "copy"), device="cuda", passes=4,
         gates=(Gate("speedup", 20, "loop"), Gate("speedup", 3, "blocked"))),
    case("gae", (256, 8192), ("ours-triton", "loop", "copy"), device="cuda", passes=4,
         label="masked"),
    case("elliptical_select", (1024, 512), ("ours-triton", "rank-one"), device="cuda",
         gates=(Gate("speedup", 1.0, "rank-one"),)),
)  # fmt: skip


def make_inputs(case: Case, seed: int) -> Batch:
    """An outcome reward at the end of each row; features like hidden states."""
    device, dtype = torch.device(case.device), DTYPES[case.dtype]
    generator = torch.Generator(device).manual_seed(1000 + seed)

    def normal() -> Tensor:
        return torch.randn(case.shape, generator=generator, device=device, dtype=dtype)

    if case.op != "gae":
        return Batch(normal())
    reward = 0.01 * normal()
    reward[:, -1] += 1.0
    mask = None
    if case.label == "masked":
        mask = torch.rand(case.shape, generator=generator, device=device) < 0.8
    return Batch(reward, normal(), mask)


# ---- what trainers and the released code do


def loop(batch: Batch) -> dict[str, Tensor]:
    """One step per token, all rows at once."""
    reward, value, mask = batch.first, batch.value, batch.mask
    carry = following = torch.zeros_like(reward[:, 0])
    out = []
    for t in range(reward.shape[1] - 1, -1, -1):
        step = reward[:, t] + GAMMA * following - value[:, t] + GAMMA * LAM * carry
        if mask is None:
            carry, following = step, value[:, t]
        else:
            carry = torch.where(mask[:, t], step, carry)
            following = torch.where(mask[:, t], value[:, t], following)
        out.append(carry)
    advantage = torch.stack(out[::-1], 1)
    returns = advantage + value
    if mask is not None:
        advantage, returns = advantage * mask, returns * mask
    return {"advantage": advantage, "returns": returns}


def blocked(batch: Batch) -> dict[str, Tensor]:
    """A scan by two matrix products: inside blocks of 64 tokens, then across the blocks."""
    reward, value = batch.first, batch.value
    rows, length = reward.shape
    decay = GAMMA * LAM
    delta = reward - value
    delta[:, :-1].add_(value[:, 1:], alpha=GAMMA)
    inside = delta.view(rows, -1, BLOCK) @ powers(BLOCK, decay, reward)
    blocks = length // BLOCK
    starts = inside[:, :, 0] @ powers(blocks, decay**BLOCK, reward)
    behind = torch.cat((starts[:, 1:], starts.new_zeros(rows, 1)), 1)
    left = torch.arange(BLOCK, 0, -1, device=reward.device)
    inside.addcmul_(behind.unsqueeze(-1), (decay**left).to(reward.dtype))
    advantage = inside.view(rows, length)
    return {"advantage": advantage, "returns": advantage + value}


def powers(n: int, decay: float, like: Tensor) -> Tensor:
    """(n, n): what token j adds to token i <= j, transposed for products from the right."""
    distance = torch.arange(n, device=like.device)
    distance = distance[:, None] - distance
    matrix = torch.where(distance >= 0, torch.exp(math.log(decay) * distance), 0.0)
    return matrix.to(like.dtype)


def rank_one_bonus(batch: Batch) -> dict[str, Tensor]:
    """One Sherman-Morrison update of the d×d inverse per response, one back per bonus."""
    phi = batch.first.double()
    phi = phi - phi.mean(0)
    inverse = torch.eye(phi.shape[1], dtype=torch.float64, device=phi.device) / RIDGE
    for x in phi:
        u = inverse @ x
        inverse.addr_(u, u, alpha=-1 / float(1 + x @ u))
    h = ((phi @ inverse) * phi).sum(1)
    return {"bonus": h / (1 - h)}


def rank_one_select(batch: Batch) -> dict[str, Tensor]:
    """Greedy argmax; all scores anew from the updated d×d inverse for every pick."""
    h = batch.first.double()
    inverse = torch.eye(h.shape[1], dtype=torch.float64, device=h.device) / RIDGE
    taken = torch.zeros(len(h), dtype=torch.bool, device=h.device)
    picks = []
    for _ in range(PICKS):
        score = ((h @ inverse) * h).sum(1).masked_fill(taken, -1)
        best = score.argmax()
        taken[best] = True
        picks.append(best)
        u = inverse @ h[best]
        inverse = inverse - torch.outer(u, u) / (1 + h[best] @ u)
    return {"picks": torch.stack(picks)}


# ---- ours


def gae(batch: Batch) -> dict[str, Tensor]:
    rk = ours.library()
    names = ("advantage", "returns")
    out = rk.shaping.gae(batch.first, batch.value, batch.mask, gamma=GAMMA, lam=LAM)
    return dict(zip(names, out, strict=True))


def bonus(batch: Batch) -> dict[str, Tensor]:
    group = torch.zeros(len(batch.first), dtype=torch.int64, device=batch.first.device)
    return {"bonus": ours.library().shaping.elliptical_bonus(batch.first, group, RIDGE)}


def select(batch: Batch) -> dict[str, Tensor]:
    return {"picks": ours.library().scaling.elliptical_select(batch.first, PICKS, RIDGE)}


def truth(case: Case, batch: Batch) -> Truth:
    """The plain formulation in float64; float32 scans may be off by its rounding."""
    wide = Batch(batch.first.double(), None if batch.value is None else batch.value.double(),
                 batch.mask)  # fmt: skip
    if case.op == "gae":
        # Sums of 1 / (1 - γλ) = 20 terms of size 1.
        tolerance = Tolerance(4e-6, 4e-6)
        values = loop(wide)
        return Truth(values, dict.fromkeys(values, tolerance))
    if case.op == "elliptical_bonus":
        return Truth(rank_one_bonus(wide), {"bonus": Tolerance(1e-6, 0.0)})
    picks = {"picks": rank_one_select(wide)["picks"].double()}
    return Truth(picks, {"picks": Tolerance(0.0, 0.0)})


Compute = Callable[[Batch], dict[str, Tensor]]


def runner(compute: Compute) -> Callable[[Case, Any], Runner]:
    def build(case: Case, batch: Batch) -> Runner:
        return Runner(lambda: compute(batch), lambda result: result)

    return build


def copy(case: Case, batch: Batch) -> Runner:
    destination = torch.zeros_like(batch.first)
    return Runner(lambda: destination.copy_(batch.first))


OURS = {"gae": runner(gae), "elliptical_bonus": runner(bonus), "elliptical_select": runner(select)}
PROVIDERS = (
    Provider("reasonkern", OURS),
    Provider("ours-triton", {op: ours.on_gpu("triton", build) for op, build in OURS.items()}),
    Provider("loop", {"gae": runner(loop)}),
    Provider("blocked", {"gae": runner(blocked)}),
    Provider(
        "rank-one",
        {"elliptical_bonus": runner(rank_one_bonus), "elliptical_select": runner(rank_one_select)},
    ),
    Provider("copy", {"gae": copy}, checked=False, passes=2),
)
FAMILY = Family(
    name="shaping",
    cases=(*GATED, *OTHERS, *CUDA_CASES),
    providers={provider.name: provider for provider in PROVIDERS},
    inputs=make_inputs,
    truth=truth,
)
