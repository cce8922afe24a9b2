"""Cases of rows under control on a CPU: every part on, alone and against what it replaces."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

import reasonkern as rk
from benchmarks.case import DTYPES, Case, Gate, Provider, Runner, Skip, Tolerance, Truth
from benchmarks.peers import ours
from reasonkern import _load

VOCAB, SMALL, BATCH, HISTORY = 151_936, 32_000, 64, 4096
AMPLITUDE, PERIOD, HEAT = 5.0, 1200, 0.6
BANNED = -1e30
WIDTH = 32  # of the hidden states that the matmul turns into logits


@dataclass
class Step:
    """Rows of logits about to be sampled from, and the requests they belong to."""

    logits: Tensor  # (B, V) as the model wrote them
    hidden: Tensor  # (B, d) and (V, d): logits = hidden @ head.T
    head: Tensor
    state: rk.ModulationState
    slot: Tensor
    temperature: Tensor
    histories: list[list[int]]
    reflect: list[int]
    touched: Tensor  # ids that any part writes to
    end: int


def specs(kind: str, end: int) -> rk.Modulation:
    """Published settings; every part is on and acts in every row, but for forces."""
    if kind == "cyclic":
        return rk.Modulation(cyclic=rk.Cyclic(AMPLITUDE, PERIOD), think_end=end)
    if kind == "ban":
        return rk.Modulation(ban=rk.Ban("reflect"), think_end=end)
    return rk.Modulation(
        cyclic=rk.Cyclic(AMPLITUDE, PERIOD, windows=[(0, 2 * HISTORY)]),
        tip=rk.TIP(3.0, 600),
        constant=rk.Constant(0.5, "other"),
        schedule=rk.Schedule([(0, 0.0), (HISTORY, 2.0)], "other"),
        ban=rk.Ban("banned"),
        budget=rk.Budget(2 * HISTORY, [198, end]),
        min_think=rk.MinThink(2 * HISTORY, 1, [14_190]),
        think_end=end,
    )


def inputs(case: Case, seed: int) -> Step:
    """Requests in the midst of their thoughts."""
    rows, vocab = case.shape
    dtype = DTYPES[case.dtype]
    g = torch.Generator().manual_seed(1000 + seed)
    hidden, head = (torch.randn(n, WIDTH, generator=g).to(dtype) for n in (rows, vocab))
    end = vocab - 268  # where Qwen's vocabulary has </think>
    ids = torch.randperm(vocab - 1000, generator=g)[:15].view(3, 5).tolist()
    sets = rk.TokenSets.from_ids(dict(zip(("reflect", "other", "banned"), ids, strict=True)))
    state = rk.ModulationState(rows, sets)
    lengths = torch.randint(HISTORY // 2, HISTORY, (rows,), generator=g).tolist()
    histories = [torch.randint(vocab - 1000, (n,), generator=g).tolist() for n in lengths]
    for slot, history in enumerate(histories):
        state.add(slot, specs(case.label, end), [], history)
    columns = ids[0] if case.label in ("cyclic", "ban") else [*sum(ids, []), 14_190, end]
    return Step(
        hidden @ head.T,
        hidden,
        head,
        state,
        torch.arange(rows),
        torch.full((rows,), HEAT),
        histories,
        ids[0],
        torch.tensor(sorted(set(columns))),
        end,
    )


# ---- ours and what it stands beside; each works on its own copy of the logits


def shown(logits: Tensor) -> dict[str, Tensor]:
    """The rows, -inf as a number: differences of infinities are not one."""
    return {"logits": torch.nan_to_num(logits, neginf=BANNED)}


def in_place(
    step: Step, work: Callable[[Tensor], Any], cold: bool = False
) -> tuple[Callable[[], Any], Callable[[], None], Tensor]:
    """(call, reset, buffer): before every call the buffer is what the model wrote.

    Warm, only the columns that are written to are restored: a buffer that stays where it is. Cold,
    a matmul writes all of it.
    """
    buffer = step.logits.clone()
    original = step.logits[:, step.touched]

    def reset() -> None:
        if cold:
            torch.mm(step.hidden, step.head.T, out=buffer)
        else:
            buffer.index_copy_(1, step.touched, original)

    return lambda: work(buffer), reset, buffer


def runner(work_of: Callable[[Step], Callable[[Tensor], Any]]) -> Callable[[Case, Any], Runner]:
    def build(case: Case, step: Step) -> Runner:
        cold = case.op == "modulate_after_matmul"
        call, reset, buffer = in_place(step, work_of(step), cold)
        return Runner(call, lambda _: shown(buffer), reset)

    return build


def modulate(step: Step) -> Callable[[Tensor], Any]:
    call, state, slot, temperature = rk.modulate_logits_, step.state, step.slot, step.temperature
    return lambda buffer: call(buffer, state, slot, temperature=temperature)


def own(case: Case, step: Step) -> Runner:
    return ours.on_cpu(case, runner(modulate)(case, step), "modulate_logits_")


def index_add(step: Step) -> Callable[[Tensor], Any]:
    """The least that any implementation must do: one number to each of the same logits."""
    ids = step.touched
    numbers = torch.ones(len(step.logits), len(ids), dtype=step.logits.dtype)
    return lambda buffer: buffer.index_add_(1, ids, numbers)


def smaller_vocabulary(case: Case, step: Step) -> Runner:
    small = inputs(sparse_case((len(step.slot), SMALL), case.label), 0)
    call, reset, _ = in_place(small, modulate(small))
    return Runner(call, reset=reset)


def loop(step: Step) -> Callable[[Tensor], Any]:
    """The released code's shape: a Python callable per request that looks through its history."""

    def one(tokens: list[int], row: Tensor) -> None:
        t = len(tokens)
        if any(token == step.end for token in tokens):
            return
        u = (t % PERIOD) / PERIOD
        if u <= 0.25:
            delta = AMPLITUDE * u / 0.25
        elif u <= 0.75:
            delta = AMPLITUDE - 2 * AMPLITUDE * (u - 0.25) / 0.5
        else:
            delta = -AMPLITUDE + AMPLITUDE * (u - 0.75) / 0.25
        row[step.reflect] += delta

    def work(buffer: Tensor) -> None:
        for tokens, row in zip(step.histories, buffer, strict=True):
            one(tokens, row)

    return work


def suppress(case: Case, step: Step) -> Runner:
    """transformers' processor for banned ids: the same ids in every row, logits copied."""
    try:
        from transformers.generation.logits_process import SuppressTokensLogitsProcessor
    except ImportError as missing:
        raise Skip(f"transformers cannot be imported ({missing})") from None
    processor = SuppressTokensLogitsProcessor(step.reflect, device="cpu")
    return Runner(lambda: processor(None, step.logits), shown)


def truth(case: Case, step: Step) -> Truth:
    """The definition in float64."""
    wide = step.logits.double()
    definition = _load.implementation("modulate_logits_", "reference")
    definition(wide, step.slot, None, None, None, step.temperature, *step.state.tensors, False)
    eps = torch.finfo(DTYPES[case.dtype]).eps
    return Truth(shown(wide), {"logits": Tolerance(eps, 8 * eps)})


# ---- cases


def sparse_case(
    shape: tuple[int, int],
    label: str,
    *providers: str,
    op: str = "modulate_logits_",
    gates: tuple[Gate, ...] = (),
    dtype: str = "float32",
    quick: bool = False,
) -> Case:
    """One thread: the operator has no work for more."""
    return Case(
        op=op,
        shape=shape,
        dtype=dtype,
        device="cpu",
        passes=0,
        providers=("reasonkern", *providers),
        threads=1,
        label=label,
        gates=gates,
        quick=quick,
    )


FULL = (BATCH, VOCAB)
GATED = (
    sparse_case(FULL, "every-control", "index_add_", "V=32,000",
                gates=(Gate("microseconds", 30.0), Gate("time", 1.5, "V=32,000", 51))),
    sparse_case(FULL, "every-control", "index_add_", op="modulate_after_matmul",
                gates=(Gate("time", 1.3, "index_add_", 25),)),
    sparse_case(FULL, "cyclic", "loop", gates=(Gate("speedup", 100.0, "loop"),)),
    # The processor writes all logits: in every other pair our call comes after it and is cold. What
    # a cold call may take, 1.3 × `index_add_`, is some 80 µs; the processor takes 19 ms.
    sparse_case(FULL, "ban", "SuppressTokens",
                gates=(Gate("speedup", 200.0, "SuppressTokens", needs="transformers"),)),
)  # fmt: skip
OTHERS = (
    sparse_case((1, VOCAB), "every-control", "index_add_"),
    sparse_case((8, VOCAB), "every-control", "index_add_", quick=True),
    sparse_case(FULL, "every-control", "index_add_", dtype="bfloat16"),
)
CASES = (*GATED, *OTHERS)
BOTH = ("modulate_logits_", "modulate_after_matmul")
PROVIDERS = {
    "reasonkern": Provider("reasonkern", dict.fromkeys(BOTH, own)),
    "index_add_": Provider("index_add_", dict.fromkeys(BOTH, runner(index_add)), checked=False),
    "V=32,000": Provider("V=32,000", {BOTH[0]: smaller_vocabulary}, checked=False),
    "loop": Provider("loop", {BOTH[0]: runner(loop)}),
    "SuppressTokens": Provider("SuppressTokens", {BOTH[0]: suppress}),
}
