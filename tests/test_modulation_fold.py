"""The fold over tokens: drafted text is the sequential one; progress and windows by backend."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from conftest import make_backend
from contract import bits
from modulation_cases import (
    END,
    SETS,
    VOCAB,
    Loop,
    commit,
    make_state,
    modulate,
    one,
    random_requests,
)
from modulation_literal import Literal

import reasonkern as rk
from reasonkern.modulation import layout as at
from reasonkern.modulation import reference

INF, NAN = float("inf"), float("nan")
FLOATS = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


SHAPES = ([-1, 0, 1, 2], [-1, 0, 0, 1, 1, 2, 4], [-1, 0, 1, 2, 3, 4, 5], [-1], [-1, 0, 0, 0])


def check_fold(backend, traces: int, limit: int, seed: int) -> Loop:
    """Drafted text is the sequential one, and the reference's."""
    requests = random_requests(traces, seed)
    sequential = Loop(backend, requests, seed, limit)
    sequential.run()
    drafted = Loop(backend, requests, seed, limit)
    drafted.run(SHAPES, preempt=0.1)
    assert drafted.text == sequential.text
    order = drafted.slot
    progress = [x.state.tensors.progress for x in (drafted, sequential)]
    assert torch.equal(progress[0][order], progress[1])
    assert drafted.accepted > 0.1 * drafted.drafts / 5
    if backend.name != "reference":
        expected = Loop(make_backend("reference"), requests, seed, limit)
        expected.run(SHAPES)
        assert expected.text == sequential.text
        assert torch.equal(expected.state.tensors.progress, progress[1])
    return sequential


@pytest.fixture
def tall_programs(backend, monkeypatch):
    """Interpreted, a program takes as long for a row as for many."""
    if backend.name == "triton" and backend.slow:
        from reasonkern.modulation import triton_modulation

        monkeypatch.setattr(triton_modulation, "config", lambda dense: (512, 32))


def test_drafted_text_is_the_sequential_one(backend, tall_programs):
    loop = check_fold(backend, 64, 20, 11)
    progress = loop.state.tensors.progress
    assert (progress[:, at.PHRASE] == at.DONE).sum() > 5
    assert (progress[:, at.PHASE] == at.CLOSED).sum() > 10
    for (spec, prompt), text, row in zip(loop.requests, loop.text, progress.tolist(), strict=True):
        literal = Literal(spec, SETS, prompt, text)
        phase, spent = literal.phases()[-1]
        assert (row[at.T], row[at.SPENT]) == (len(text), spent)
        assert row[at.PHASE] == ("before", "thinking", "closed").index(phase)


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(4))
def test_drafted_text_is_the_sequential_one_of_many_traces(backend, seed):
    if backend.slow:
        pytest.skip("64 traces are run above")
    check_fold(backend, 500, 40, 100 + seed)


def test_backends_agree_on_rows_and_progress(backend):
    """The same bits as the reference, statistics pushed into the windows included."""
    count, steps = (8, 6) if backend.slow else (64, 20)
    states = []
    for op in (reference.commit_, None):
        state = make_state(count)
        for slot, (spec, prompt) in enumerate(random_requests(count, 7, windows=True)):
            state.add(slot, spec, prompt)
        g = torch.Generator().manual_seed(0)
        for _ in range(steps):
            slot = torch.randperm(count, generator=g)
            tokens = torch.randint(-1, VOCAB, (count, 4), generator=g)
            length = torch.randint(0, 5, (count,), generator=g)
            entropy, confidence = torch.rand(2, count, 4, generator=g).unbind(0)
            entropy[torch.rand(count, 4, generator=g) < 0.1] = NAN
            confidence[torch.rand(count, 4, generator=g) < 0.1] = INF
            rows = (slot, tokens, length, entropy.contiguous(), confidence.contiguous())
            if op is None:
                commit(backend, state, *rows)
            else:
                op(*rows, *state.tensors)
        states.append(state)
    for name, ours in states[1].tensors._asdict().items():
        assert torch.equal(bits(ours), bits(getattr(states[0].tensors, name))), name
    assert states[0].stopped.any() and not states[0].stopped.all()


FORCES = {
    "budget": (rk.Modulation(budget=rk.Budget(2, [9, END]), think_end=END), [8, 8, 9, END]),
    "wait": (rk.Modulation(min_think=rk.MinThink(0, 1, [7, 9, 11]), think_end=END), [8, 7, 9, 11]),
    "stop": (rk.Modulation(), [8, 8, 6, 6]),
}


@pytest.mark.parametrize("force", FORCES)
def test_forced_rows_say_nothing_to_the_windows(backend, force):
    """Their law is that of one token; a confidence of 3e4 would outweigh a window of 2,048 rows."""
    spec, tokens = FORCES[force]
    deepconf = rk.DeepConf(6.0 if force == "stop" else 1.0, 2, eos=6)
    state = one(replace(spec, deepconf=deepconf, entropy_trigger=rk.EntropyTrigger(4)))
    confidence, entropy = torch.tensor([[5.0, 5.5, 3e4, 3e4]]), torch.tensor([[1.0, 2.0, 0.0, 0.0]])
    length = torch.tensor([4])
    commit(backend, state, torch.tensor([0]), torch.tensor([tokens]), length, entropy, confidence)
    progress = state.tensors.progress[0]
    assert (
        progress[at.T] == 4 and progress[at.CONFIDENCE_PUSHED] == progress[at.ENTROPY_PUSHED] == 2
    )
    assert state.tensors.numbers[0, at.CONFIDENCE_SUM] == 10.5
    assert state.tensors.entropy[0, :4].tolist() == [1.0, 2.0, 0.0, 0.0]
    assert bool(state.stopped[0]) == (force == "stop")


def test_a_mean_at_the_threshold_stops_nothing(backend):
    state = one(rk.Modulation(deepconf=rk.DeepConf(5.25, 2)))
    one_row = torch.tensor([0])
    for value, stops in ((5.0, False), (5.5, False), (4.5, True)):
        confidence = torch.tensor([[value]])
        commit(backend, state, one_row, one_row[None], one_row + 1, None, confidence)
        assert bool(state.stopped[0]) == stops


def test_all_sets_and_more_entries_than_are_taken_at_once(backend):
    """The last set's bit is the sign of an entry; an id in every set, the last of the row."""
    sets = {f"set {k}": [k, 2 * k + 40, 399] for k in range(1, at.MAX_SETS - 2)}
    sets |= {"banned": [1, 2, 398], "last": range(0, 400, 2), "reflect": [4, 5, 399]}
    state = rk.ModulationState(1, rk.TokenSets.from_ids(sets))
    assert len(sets) == at.MAX_SETS and len(state.tensors.set_ids) > 200
    spec = rk.Modulation(
        constant=rk.Constant(2.0, "last"), tip=rk.TIP(3.0, 2), ban=rk.Ban("banned"),
        schedule=rk.Schedule([(0, 0.25)], "set 29"),
    )  # fmt: skip
    state.add(0, spec, [], [8, 8, 5, 6])  # the switch is 5, and TIP goes on after it
    expected = torch.zeros(1, 400)
    expected[0, ::2] = 2.0
    expected[0, [4, 5, 399]] -= 3.0
    expected[0, [29, 98, 399]] += 0.25
    expected[0, [1, 2, 398]] = -INF
    slot = torch.tensor([0])
    assert torch.equal(modulate(backend, torch.zeros(1, 400), state, slot), expected)
    commit(backend, state, slot, torch.tensor([[399, 8]]), torch.tensor([2]))
    assert torch.equal(modulate(backend, torch.zeros(1, 400), state, slot), expected)
    commit(backend, state, slot, torch.tensor([[8]]), torch.tensor([1]))
    expected[0, [4, 5, 399]] += 3.0
    assert torch.equal(modulate(backend, torch.zeros(1, 400), state, slot), expected)


def test_a_state_without_sets(backend):
    """Budgets and minima act in rows and commits as beside sets that they do not name."""
    specs = [
        rk.Modulation(budget=rk.Budget(1, [9, END]), think_end=END),
        rk.Modulation(budget=rk.Budget(9, [9, END], rk.SoftBudget(0.0)), think_end=END),
        rk.Modulation(min_think=rk.MinThink(9, 0, [7, 8]), think_end=END),
    ]
    parents = torch.tensor([-1, 0, 0, 1], dtype=torch.int32)
    slot, drafts = torch.arange(3), torch.tensor([[1, 9, 7, END], [1, 9, 3, 9], [1, 7, 8, 8]])
    logits = torch.randn(12, VOCAB, generator=torch.Generator().manual_seed(0))
    bare, beside = rk.ModulationState(3), make_state(3)
    for state in (bare, beside):
        for i, spec in enumerate(specs):
            state.add(i, spec, prompt_tokens=[1], generated_tokens=[3])
    for tokens in ([[3, 9], [9, 2], [7, 8]], [[9, END], [4, 9], [7, END]]):
        rows = [modulate(backend, logits, s, slot, None, drafts, parents) for s in (bare, beside)]
        assert torch.equal(bits(rows[0]), bits(rows[1]))
        changed = (rows[0] != logits).any(-1).view(3, 4)
        assert changed.any(-1).all()
        for state in (bare, beside):
            commit(backend, state, slot, torch.tensor(tokens), torch.full((3,), 2))
        assert torch.equal(bare.tensors.records, beside.tensors.records)
    assert bare.tensors.progress[0, at.PHASE] == at.CLOSED != bare.tensors.progress[1, at.PHASE]
