"""Calls that live inside a decoding loop or a captured step: no synchronisation, static shapes.

Without a GPU they run on meta tensors, which have no values to wait for.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from contract import NoHostData
from modulation_cases import SETS
from speculation_cases import generator, likely_tokens, random_tree
from torch import Tensor

import reasonkern as rk
from reasonkern import _load
from reasonkern.modulation import layout as at

BATCH, VOCAB, ORDERS = 5, 300, (3, 2)
TREE = random_tree(9, 4)
ROOT = Path(__file__).parents[1]
LAUNCHERS = sorted(
    path
    for pattern in ("csrc/*/cuda*.cu", "csrc/*/*operators.h", "reasonkern/*/triton_*.py")
    for path in ROOT.glob(pattern)
)


def values(seed: int) -> dict[str, Tensor]:
    """What changes from step to step, by name."""
    g = generator(seed)
    logits = 3 * torch.randn(BATCH, TREE.nodes, VOCAB, generator=g)
    return {
        "logits": logits,
        "drafted": likely_tokens(logits, TREE, seed),
        "context": torch.randint(0, 4, (BATCH, ORDERS[0]), generator=g),
        "targets": torch.randint(0, VOCAB, (BATCH, TREE.nodes), generator=g),
        "temperature": torch.tensor([0.0, 0.5, 0.8, 1.0, 1.3]),
        "top_k": torch.tensor([0, 0, 20, 50, 0]),
        "top_p": torch.tensor([1.0, 0.9, 1.0, 0.95, 0.8]),
        "min_p": torch.tensor([0.0, 0.0, 0.05, 0.0, 0.1]),
        "seed": torch.randint(-(2**62), 2**62, (BATCH,), generator=g),
        "position": torch.randint(0, 2**34, (BATCH,), generator=g),
        "max_length": torch.randint(1, TREE.depth + 2, (BATCH,), generator=g),
        "parents": TREE.parents.int(),
        "slot": torch.randperm(BATCH, generator=g) - 1,
        "emitted": torch.randint(0, 16, (BATCH, 3), generator=g),
        "length": torch.randint(0, 4, (BATCH,), generator=g),
        "statistics": torch.rand(2, BATCH, 3, generator=g),
        "eos": torch.tensor([7, 8]),
    }


FIRST = values(0)
SPECS = (
    rk.Modulation(cyclic=rk.Cyclic(5.0, 12.5), tip=rk.TIP(3.0, 4, "other"), ban=rk.Ban("words")),
    rk.Modulation(
        budget=rk.Budget(3, [7, 15], rk.SoftBudget(0.5)), min_think=rk.MinThink(2, 1, [0, 8]),
        think_end=15,
    ),
    rk.Modulation(schedule=rk.Schedule([(0, 0.0), (9, 3.0)]), constant=rk.Constant(1.0, "other")),
    rk.Modulation(deepconf=rk.DeepConf(0.5, 4, eos=9), entropy_trigger=rk.EntropyTrigger(4)),
)  # fmt: skip


def requests_on(device: str) -> rk.ModulationState:
    """A slot in use for each of SPECS and a free one."""
    state = rk.ModulationState(len(SPECS) + 1, rk.TokenSets.from_ids(SETS))
    for slot, spec in enumerate(SPECS):
        state.add(slot, spec, [])
    return state.to(device)


@dataclass
class Place:
    """Buffers that stay where they are, and a table, on one device."""

    buffers: dict[str, Tensor]
    table: rk.NgramTable
    state: rk.ModulationState

    @classmethod
    def on(cls, device: str) -> Place:
        buffers = {name: x.to(device) for name, x in FIRST.items()}
        table = rk.NgramTable(1 << 10, vocab_size=VOCAB, orders=ORDERS, topk=4, device=device)
        return cls(buffers, table, requests_on(device))

    def clear(self) -> None:
        """To where `on` leaves it."""
        self.table.clear()
        self.state.load_state_dict(requests_on("cpu").state_dict())

    def fill(self, seed: int) -> None:
        for name, x in values(seed).items():
            self.buffers[name].copy_(x)

    def take(self, *names: str) -> dict[str, Tensor]:
        return {name: self.buffers[name] for name in names}


FILTERS = ("temperature", "top_k", "top_p", "min_p", "seed", "position")
DRAWS = ("temperature", "seed", "position")


def given(*results: Tensor | None) -> tuple[Tensor, ...]:
    return tuple(x for x in results if x is not None)


def sample(p: Place) -> tuple[Tensor, ...]:
    return (rk.sample(p.buffers["logits"][:, 0], **p.take(*FILTERS)),)


def verified(p: Place, **more: Any) -> rk.Verified:
    valid = torch.ones_like(p.buffers["drafted"], dtype=torch.bool)
    draft = rk.Draft(p.buffers["drafted"], valid)
    named = p.take(*FILTERS, "max_length", "eos")
    return rk.verify_tree(p.buffers["logits"], draft, TREE, topk=4, **named, **more)


def verify_tree(p: Place) -> tuple[Tensor, ...]:
    return given(*verified(p))


def step(p: Place, mode: str) -> tuple[Tensor, ...]:
    """Draft, verification and learning; the table's tensors are results too."""
    context = p.buffers["context"]
    draft = p.table.draft(context, TREE, mode=mode, **p.take(*DRAWS))
    logits = p.buffers["logits"]
    out = rk.verify_tree(logits, draft, TREE, topk=4, mode=mode, eos=[7, 8], **p.take(*DRAWS))
    p.table.update_verified(context, out)
    state = [x for x in p.table.state_dict().values() if isinstance(x, Tensor)]
    return given(*draft, *out, *state)


def shared_step(p: Place) -> tuple[Tensor, ...]:
    return step(p, "shared")


def rejection_step(p: Place) -> tuple[Tensor, ...]:
    return step(p, "rejection")


def state_of(p: Place) -> tuple[Tensor, ...]:
    """The state's tensors, the statistics among its integers as the numbers that they are."""
    records, sets = p.state.tensors
    total = p.state.tensors.numbers[:, at.CONFIDENCE_SUM]
    rings = records[:, at.CONFIDENCE_RING :].view(torch.float32)
    integers = records[:, : at.CONFIDENCE_RING].clone()
    integers[:, at.CONFIDENCE_SUM] = 0
    return integers, total, rings, sets


def modulated(p: Place) -> tuple[Tensor, ...]:
    """Control of the tree's rows and a commit; the state's tensors are results too."""
    rows = p.buffers["logits"].flatten(0, 1).clone()
    heat = p.buffers["temperature"].unsqueeze(1).expand(-1, TREE.nodes).reshape(-1)
    rk.modulate_logits_(
        rows, p.state, p.buffers["slot"], draft_tokens=p.buffers["drafted"],
        parents=p.buffers["parents"], temperature=heat, allow_dense=True,
    )  # fmt: skip
    first = p.buffers["logits"][:, 0].clone()
    rk.modulate_logits_(first, p.state, p.buffers["slot"], temperature=0.7, allow_dense=True)
    entropy, confidence = p.buffers["statistics"].unbind(0)
    emitted = p.take("slot", "emitted", "length").values()
    rk.commit_(p.state, *emitted, entropy=entropy, confidence=confidence)
    return (rows, first, *state_of(p))


def controlled(p: Place) -> tuple[Tensor, ...]:
    """A row and a walk sampled under control, and the walk's commit."""
    slot = p.buffers["slot"]
    row = rk.sample_controlled(p.buffers["logits"][:, 0], p.state, slot, **p.take(*FILTERS))
    out = verified(p, control=(p.state, slot), stats=True)
    rk.commit_(
        p.state, slot, out.tokens, out.length, entropy=out.entropy, confidence=out.confidence
    )
    return (*row, *given(*out), *state_of(p))


def token_stats(p: Place) -> tuple[Tensor, ...]:
    logits, targets = p.buffers["logits"], p.buffers["targets"]
    return rk.token_stats(logits, targets, temperature=0.7, softcap=20.0)


def rollout_mismatch(p: Place) -> tuple[Tensor, ...]:
    """Padded and packed, both with known sequences."""
    old, rollout = p.buffers["statistics"].unbind(0)
    mask = torch.arange(3, device=old.device) < p.buffers["length"][:, None]
    padded = rk.rollout_mismatch(old, rollout, mask)
    segments = 3 * torch.arange(BATCH + 1, device=old.device)
    flat = (x.flatten() for x in (old, rollout, mask))
    packed = rk.rollout_mismatch(*flat, segments=segments)
    return (*padded.compute().values(), *(padded + packed).compute().values())


CALLS = (
    sample, verify_tree, shared_step, rejection_step, modulated, controlled, token_stats,
    rollout_mismatch,
)  # fmt: skip


@pytest.mark.parametrize("call", CALLS, ids=lambda call: call.__name__)
def test_nothing_waits_for_a_value(call):
    place = Place.on("meta")
    first = call(place)  # copies the tree
    with NoHostData():
        second = call(place)
    assert all(x.device.type == "meta" for x in first)
    assert [x.shape for x in first] == [x.shape for x in second]


def captured(call: Callable[[Place], tuple[Tensor, ...]], place: Place) -> Callable[[], Any]:
    """A function that replays one call on what `place` holds by then."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        call(place)  # compiles, and copies the tree
    torch.cuda.current_stream().wait_stream(stream)
    torch.cuda.set_sync_debug_mode("error")
    try:
        call(place)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        outputs = call(place)

    def replay() -> tuple[Tensor, ...]:
        graph.replay()
        return outputs

    return replay


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
@pytest.mark.parametrize("backend", ["cuda", "triton"])
@pytest.mark.parametrize("call", CALLS, ids=lambda call: call.__name__)
def test_a_captured_call_gives_what_the_cpu_gives(call, backend, force_backend):
    if problem := _load.reason(backend):
        pytest.skip(problem)
    force_backend(backend)
    there, here = Place.on("cuda"), Place.on("cpu")
    replay = captured(call, there)
    there.clear()
    for seed in (1, 2, 1):
        there.fill(seed)
        here.fill(seed)
        results = [x.cpu() for x in replay()]
        for got, expected in zip(results, call(here), strict=True):
            slack = 2e-5 if expected.is_floating_point() else 0
            torch.testing.assert_close(got, expected, rtol=slack, atol=slack)


@pytest.mark.parametrize("path", LAUNCHERS, ids=lambda path: f"{path.parent.name}-{path.name}")
def test_no_launcher_waits_for_the_host(path: Path) -> None:
    """Nothing in the launchers copies to the host or synchronises."""
    text = path.read_text()
    for word in ("Synchronize", "synchronize", "cudaMemcpy", "item(", ".cpu(", "tolist("):
        assert word not in text
