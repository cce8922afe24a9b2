"""Cases of modulation on a GPU: what a step costs beside a launch that does next to nothing.

`hot`: launches in a row on one state and one buffer. `cold`: each on its own, out of the L2, as
after a pass through a model's weights.
"""

from __future__ import annotations

from collections.abc import Callable
from copy import deepcopy
from dataclasses import dataclass, replace

import torch
from torch import Tensor

import reasonkern as rk
from benchmarks import timing
from benchmarks.case import DTYPES, Case, Gate, Provider, Runner, Tolerance, Truth
from benchmarks.peers.ours import gpu_providers
from reasonkern import _load

LAUNCHES, NODES, BATCH, VOCAB, SMALL = 64, 8, 64, 151_936, 32_000
END, WAIT = 151, 199


@dataclass
class Step:
    """Requests in the midst of their thoughts, their rows of logits, and drafts below them."""

    state: rk.ModulationState
    slot: Tensor
    logits: Tensor  # (B, V), trees: (B * N, V)
    drafts: Tensor  # (B, N)
    parents: Tensor
    temperature: Tensor


def inputs(case: Case, seed: int) -> Step:
    rows, vocab = case.input_shape or case.shape
    batch, device = case.shape[0], torch.device(case.device)
    g = torch.Generator(device).manual_seed(seed)
    logits = torch.randn(rows, vocab, generator=g, device=device).mul_(3)
    sets = rk.TokenSets.from_ids({"reflect": range(900, 905), "other": range(10, 15), "ban": [7]})
    state = rk.ModulationState(batch, sets)
    spec = every_control()
    for slot in range(batch):
        state.add(slot, spec, [], [slot % 7] * (slot + 3))
    drafts = torch.randint(200, (batch, NODES), generator=g, device=device)
    tree = rk.DraftTree.default(NODES)
    return Step(
        state.to(device), torch.randperm(batch, generator=g, device=device),
        logits.to(DTYPES[case.dtype]), drafts, tree.parents.int().to(device),
        torch.full((rows,), 0.6, device=device),
    )  # fmt: skip


def every_control() -> rk.Modulation:
    """All parts that a sparse launch applies, every one at work in every row."""
    return rk.Modulation(
        cyclic=rk.Cyclic(5.0, 1200),
        tip=rk.TIP(3.0, 600),
        constant=rk.Constant(0.5, "other"),
        schedule=rk.Schedule([(0, 0.0), (8192, 2.0)], "other"),
        ban=rk.Ban("ban"),
        budget=rk.Budget(8192, [198, END]),
        min_think=rk.MinThink(8192, 1, [WAIT]),
        think_end=END,
    )


# ---- providers: work on a buffer of logits, in place

Work = Callable[[Tensor], Tensor]


def modulate(case: Case, step: Step) -> Work:
    tree = {}
    if case.op == "control_tree":
        tree = {"draft_tokens": step.drafts, "parents": step.parents}
    return lambda z: rk.modulate_logits_(
        z, step.state, step.slot, temperature=step.temperature, **tree
    )


def commit(case: Case, step: Step) -> Work:
    """The logits play no part; the result is the progress of the step's state, which moves on."""
    tokens = step.drafts[:, : case.shape[1]].contiguous()
    length = torch.full_like(step.slot, case.shape[1])

    def work(_: Tensor) -> Tensor:
        rk.commit_(step.state, step.slot, tokens, length)
        return step.state.tensors.progress

    return work


def nothing(case: Case, step: Step) -> Work:
    """One number is written: torch has no kernel that does less."""
    number = torch.zeros(1, device=step.slot.device)
    return lambda _: number.add_(1.0)


def index_add(case: Case, step: Step) -> Work:
    """One number to as many logits."""
    ids = step.state.tensors.set_ids.long()
    numbers = torch.ones(len(step.logits), len(ids), device=ids.device, dtype=step.logits.dtype)
    return lambda z: z.index_add_(1, ids, numbers)


def launched(work_of: Callable[[Case, Step], Work]) -> Callable[[Case, Step], Runner]:
    """`cold`: one launch, on a buffer of its own. `hot`: a graph of many on one buffer, captured at
    the first call; what is checked then is a launch before them."""

    def build(case: Case, step: Step) -> Runner:
        work, buffer = work_of(case, step), step.logits.clone()
        first: list[Tensor] = []
        graph: list[Runner] = []

        def call() -> None:
            if not first:
                first.append(shown(work(step.logits.clone())))
            if case.label == "cold":
                work(buffer)
                return
            if not graph:
                graph.append(many(Runner(lambda: work(buffer)), case.device))
            graph[0].call()

        repeat = 1 if case.label == "cold" else LAUNCHES
        return Runner(call, lambda _: {"result": first[0]}, repeat=repeat)

    return build


def commits(case: Case, step: Step) -> Runner:
    """Launches on a state of its own, which before every call is the step's again: these tokens
    obey no force and would go on past the budget, as no request does."""
    own = replace(step, state=deepcopy(step.state))
    runner = launched(commit)(case, own)
    records, begun = own.state.tensors.records, step.state.tensors.records
    return replace(runner, reset=lambda: records.copy_(begun))


def many(one: Runner, device: str) -> Runner:
    if device == "cuda":
        return timing.graph_replay([one] * LAUNCHES)
    return Runner(lambda: [one.call() for _ in range(LAUNCHES)])


def shown(x: Tensor) -> Tensor:
    """-inf as a number: differences of infinities are not one."""
    return torch.nan_to_num(x.double(), neginf=-1e30)


def truth(case: Case, step: Step) -> Truth:
    """The definition, in float64."""
    if case.op == "commit":
        state = deepcopy(step.state)
        length = torch.full_like(step.slot, case.shape[1])
        _load.implementation("commit_", "reference")(
            step.slot, step.drafts[:, : case.shape[1]], length, None, None, *state.tensors,
        )  # fmt: skip
        return Truth({"result": state.tensors.progress.double()}, {"result": Tolerance(0.0, 0.0)})
    drafts = (step.drafts, step.parents) if case.op == "control_tree" else (None, None)
    wide = step.logits.double()
    _load.implementation("modulate_logits_", "reference")(
        wide, step.slot, None, *drafts, step.temperature, *step.state.tensors, False
    )
    eps = torch.finfo(DTYPES[case.dtype]).eps
    return Truth({"result": shown(wide)}, {"result": Tolerance(eps, 8 * eps)})


# ---- cases


def case_of(op: str, shape: tuple[int, int], label: str, *gates: Gate) -> Case:
    commits = op == "commit"
    rows = shape[0] * (NODES if op == "control_tree" else 1)
    return Case(
        op, shape, "bfloat16", "cuda", passes=0,
        providers=("ours-cuda", "ours-triton", "launch", *(() if commits else ("index_add_",))),
        label=label, gates=gates, quick=shape == (BATCH, VOCAB) and label == "hot",
        input_shape=(rows, shape[1]), rotate=8 if label == "cold" else 1,
    )  # fmt: skip


NEAR_A_LAUNCH = Gate("time", 1.5, "launch", 25)
CASES = (
    case_of("control_rows", (BATCH, VOCAB), "hot", NEAR_A_LAUNCH),
    case_of("control_rows", (BATCH, SMALL), "hot", NEAR_A_LAUNCH),
    case_of("control_rows", (BATCH, VOCAB), "cold"),
    case_of("control_tree", (BATCH, VOCAB), "hot"),
    case_of("control_tree", (BATCH, VOCAB), "cold"),
    case_of("commit", (BATCH, 4), "hot", NEAR_A_LAUNCH),
    case_of("commit", (BATCH, 4), "cold"),
)
CONTROLS = ("control_rows", "control_tree")
OPS = (*CONTROLS, "commit")
OURS = dict.fromkeys(CONTROLS, launched(modulate)) | {"commit": commits}
PROVIDERS = {
    **gpu_providers(OURS),
    "launch": Provider("launch", dict.fromkeys(OPS, launched(nothing)), checked=False),
    "index_add_": Provider(
        "index_add_", dict.fromkeys(CONTROLS, launched(index_add)), checked=False
    ),
}
