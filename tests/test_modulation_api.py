"""The family's fronts: specs, the state, the operator contract."""

from __future__ import annotations

import copy
import io
import pickle
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from contract import bits, run_contract
from modulation_cases import (
    END,
    SETS,
    START,
    VOCAB,
    Loop,
    make_state,
    random_requests,
    state_of,
)

import reasonkern as rk
from reasonkern.modulation import layout as at
from reasonkern.modulation.records import failure

OPS = torch.ops.reasonkern
ONE = torch.tensor([0])
Z = torch.zeros(1, VOCAB)


# ---- the state


def test_markers_in_the_prompt():
    """The last one decides; what follows an open start counts."""
    spec = rk.Modulation(think_start=START, think_end=END)
    cases = [
        ([], at.BEFORE, 0), ([1, START], at.THINKING, 0), ([START, 1, 2], at.THINKING, 2),
        ([START, 1, END, 3], at.BEFORE, 0), ([START, END, START, 5], at.THINKING, 1),
        ([START, START, 5], at.THINKING, 2), ([END, 4], at.BEFORE, 0),
    ]  # fmt: skip
    for prompt, phase, spent in cases:
        state = make_state(1)
        state.add(0, spec, prompt)
        assert state.tensors.progress[0, [at.T, at.SPENT, at.PHASE]].tolist() == [0, spent, phase]
    state.remove(0)
    state.add(0, rk.Modulation(think_end=END), [END, 1], torch.tensor([1, 2], dtype=torch.int32))
    assert state.tensors.progress[0, [at.T, at.SPENT, at.PHASE]].tolist() == [2, 2, at.THINKING]


def test_slots_are_reused_without_a_trace():
    requests = random_requests(20, 3, windows=True)
    fresh, used = make_state(1), make_state(1)
    for spec, prompt in requests:
        used.add(0, spec, prompt, [1, 2, 3, END])
        statistic = torch.rand(1, 3)
        rk.commit_(used, ONE, torch.tensor([[3, 2, 1]]), torch.tensor([3]), entropy=statistic,
                   confidence=statistic)  # fmt: skip
        used.remove(0)
    used.tensors.records[0, at.STOPPED] = 1  # of the request that was here
    assert not used.stopped.any() and used.max_id == max(used.sets.max_id, -1)
    loaded = make_state(1)
    loaded.load_state_dict(used.state_dict())
    assert loaded.max_id == used.max_id
    spec, prompt = requests[0]
    used.add(0, spec, prompt)
    fresh.add(0, spec, prompt)
    rows = [state.tensors.records[:, : at.ROW_WIDTH] for state in (used, fresh)]
    assert torch.equal(*rows)
    assert used.max_id == fresh.max_id and not used.stopped.any()


def test_a_default_device_changes_nothing():
    requests = random_requests(12, 5, windows=True)

    def filled():
        state = make_state(12)
        for slot, (spec, prompt) in enumerate(requests):
            state.add(slot, spec, prompt, [1, 2, 7, 3])
        loaded = make_state(12)
        loaded.load_state_dict(state.state_dict())
        return loaded.tensors

    expected = filled()
    with torch.device("meta"):  # as torch.set_default_device("cuda")
        assert all(map(torch.equal, filled(), expected))


@pytest.mark.parametrize("kind", [np.uint8, np.int8, np.int16, np.uint64])
def test_numpys_integers_do_not_wrap(kind):
    """-x of an unsigned one is another number, and torch takes no uint64."""
    records = []
    for whole in (int, kind):
        spec = rk.Modulation(
            budget=rk.Budget(whole(100), [END], rk.SoftBudget(0.5)), think_end=whole(END),
            schedule=rk.Schedule([(whole(3), 1.0), (whole(100), 2.0)]),
        )  # fmt: skip
        hard = rk.Modulation(budget=rk.Budget(whole(100), [END]))
        state = rk.ModulationState(whole(2), make_state(1).sets)
        state.add(whole(0), spec, [1])
        state.add(whole(1), hard, [1])
        records.append(state.tensors.records)
    assert torch.equal(*records)
    buffer = io.BytesIO()
    torch.save(state.state_dict(), buffer)
    buffer.seek(0)
    rk.ModulationState(2, state.sets).load_state_dict(torch.load(buffer))


def test_saving_moving_and_going_on():
    """A loaded state gives the same rows; one on another device holds the same tensors."""
    requests = random_requests(12, 4, windows=True)
    state = make_state(16)
    for slot, (spec, prompt) in enumerate(requests):
        state.add(slot, spec, prompt, [1, 2, 7, 3])
    buffer = io.BytesIO()
    torch.save(state.state_dict(), buffer)
    buffer.seek(0)
    loaded = make_state(16)
    loaded.load_state_dict(torch.load(buffer))
    logits, slot = torch.randn(12, VOCAB), torch.arange(12)
    rows = [
        rk.modulate_logits_(logits.clone(), s, slot, temperature=0.7, allow_dense=True)
        for s in (state, loaded)
    ]
    assert torch.equal(bits(rows[0]), bits(rows[1])) and not torch.equal(rows[0], logits)
    assert (loaded.max_id, loaded.needs_heat, loaded.needs_dense) == (
        state.max_id, state.needs_heat, state.needs_dense
    )  # fmt: skip
    assert "12 of 16 slots" in repr(loaded) and loaded.nbytes == state.nbytes
    with pytest.raises(ValueError, match="slot: expected a slot that is free, got 3"):
        loaded.add(3, requests[3][0], [])
    moved = make_state(2).to("meta")
    assert moved.device.type == "meta" and moved.checked_by_kernel is None


def test_a_state_without_sets_is_saved_copied_and_moved():
    state = rk.ModulationState(2)
    state.add(1, rk.Modulation(budget=rk.Budget(1, [9, END])), [1], [3])
    assert "TokenSets()" in repr(state) and state.max_id == END
    buffer = io.BytesIO()
    torch.save(state.state_dict(), buffer)
    buffer.seek(0)
    loaded = rk.ModulationState(2)
    loaded.load_state_dict(torch.load(buffer))
    for other in (loaded, copy.deepcopy(state), pickle.loads(pickle.dumps(state)).to("cpu")):
        assert other.max_id == END and other.free == [0]
        assert rk.modulate_logits_(Z.clone(), other, ONE + 1)[0, 9] == 3e4
    assert rk.ModulationState(2).to("meta").device.type == "meta"
    with pytest.raises(ValueError, match="state: expected settings {'sets': {'reflect'"):
        make_state(2).load_state_dict(state.state_dict())


def test_an_unpickled_state_asks_anew_who_serves_it():
    """Its fast path trusts kernels that check their arguments; not every device has them."""
    state = make_state(2)
    buffer = io.BytesIO()
    torch.save(state, buffer)
    buffer.seek(0)
    other = torch.load(buffer, map_location="meta", weights_only=False)
    assert state.checked_by_kernel is not None and other.checked_by_kernel is None


def test_a_default_device_moves_no_state():
    spec = rk.Modulation(
        cyclic=rk.Cyclic(1.0, 7), budget=rk.Budget(2, [7, END]),
        min_think=rk.MinThink(1, wait=[6]), think_end=END,
    )  # fmt: skip
    saved = state_of(spec).state_dict()
    drafts, parents = torch.tensor([[5, 6, 7]]), torch.tensor([-1, 0, 1])
    expected = rk.modulate_logits_(
        torch.zeros(3, VOCAB), state_of(spec), ONE, 0, drafts, parents, temperature=1.0
    )
    rows, backwards = torch.zeros(3, VOCAB), torch.tensor([-1, 2, 1])
    with torch.device("meta"):
        state = rk.ModulationState(4, rk.TokenSets.from_ids(SETS), "cpu")
        state.load_state_dict(saved)
        rk.modulate_logits_(rows, state, ONE, 0, drafts, parents, temperature=1.0)
        with pytest.raises(ValueError, match="parents: expected -1, then"):
            rk.modulate_logits_(rows, state, ONE, 0, drafts, backwards, temperature=1.0)
    assert torch.equal(rows, expected)


def test_a_state_outlives_inference_mode():
    """Inference tensors could not be written to outside of it."""
    with torch.inference_mode():
        state = make_state(2)
        state.add(0, rk.Modulation(constant=rk.Constant(1.0)), [])
        rk.modulate_logits_(Z.clone(), state, ONE)
    moved = state.to("cpu")
    state.add(1, rk.Modulation(budget=rk.Budget(1, [9])), [])
    rk.commit_(moved, ONE + 1, torch.tensor([[3]]), ONE + 1)
    assert rk.modulate_logits_(Z.clone(), state, ONE + 1)[0, 9] == 3e4
    with torch.inference_mode():
        assert not any(t.is_inference() for t in rk.ModulationState(1).to("meta").tensors)


def test_bad_states():
    state = make_state(2)
    saved = state.state_dict()
    with pytest.raises(ValueError, match="state: expected settings {'max_requests': 2}, got {"):
        state.load_state_dict(make_state(3).state_dict())
    with pytest.raises(ValueError, match="state: expected settings .*'layout': "):
        other = saved["settings"] | {"layout": at.LAYOUT + 1}
        state.load_state_dict(saved | {"settings": other})
    with pytest.raises(ValueError, match=r"state\['records'\]: expected a tensor, got NoneType"):
        state.load_state_dict({k: v for k, v in saved.items() if k != "records"})
    with pytest.raises(ValueError, match=r"state\['records'\]: expected shape of this state"):
        state.load_state_dict(saved | {"records": saved["records"][:1]})
    with pytest.raises(ValueError, match=r"state\['sets'\]: expected dtype torch.int64"):
        state.load_state_dict(saved | {"sets": saved["sets"].int()})


FOREIGN = [
    ("records", at.END_LENGTH, at.MAX_END + 1),  # read beyond the row
    ("records", at.BAN_SET, len(SETS)),  # a set that does not exist
    ("records", at.END, VOCAB),  # written beyond the row of logits: MAX_ID does not tell
    ("records", at.ENTROPY_WINDOW, 0),  # divided by
    ("records", at.CONFIDENCE_WINDOW, 0),  # likewise
    ("records", at.END_LENGTH, 0),
    ("records", at.POINTS, 0),
    ("records", at.PARTS, -1),
    ("records", at.PARTS, 2 * at.TRIGGER + at.ACTIVE),
    ("records", at.FAILURE, 1000),
    ("records", at.FAILURE, -1),
    ("records", at.FAILURE, 1),  # followed without end
    ("records", at.PERIOD, 0),  # likewise
    ("records", at.PERIOD, 1),  # the least number: no backend has its remainders
    ("records", at.PARTS, at.BAN),  # neither free nor in use
    ("records", at.PHASE, at.CLOSED + 1),
    ("records", at.PHRASE, at.MAX_END + 1),
    ("records", at.PHRASE, 2),  # beyond what is known of the failure function
    ("records", at.WAIT, -1),  # written before the row of logits
    ("records", at.WAIT_LENGTH, 0),  # likewise, since no id is looked at
    ("records", at.WAIT_AT, 1),
    ("records", at.WAIT_AT, -1),
    ("records", at.PHRASE, at.DONE - 1),
    ("records", at.THINK_START, -2),
    ("records", at.THINK_START, 1 << 31),
    ("records", at.CONFIDENCE_PUSHED, -5),
    ("sets", 1, 99),
]


@pytest.mark.parametrize(("name", "column", "value"), FOREIGN)
def test_states_that_no_state_has(name, column, value):
    spec = rk.Modulation(
        ban=rk.Ban(), budget=rk.Budget(3, [7, END]), entropy_trigger=rk.EntropyTrigger(),
        cyclic=rk.Cyclic(1.0, 9), min_think=rk.MinThink(3, 0, [0]), think_end=END,
        schedule=rk.Schedule([(0, 1.0)]), deepconf=rk.DeepConf(1.0),
    )  # fmt: skip
    state = state_of(spec)
    state.load_state_dict(state.state_dict())
    saved = {
        k: v.clone() if isinstance(v, torch.Tensor) else v for k, v in state.state_dict().items()
    }
    saved[name].view(-1)[column] = value
    with pytest.raises(ValueError, match=rf"state\['{name}'\]: expected "):
        state.load_state_dict(saved)


def test_a_state_at_its_limits_is_loaded():
    """Every part at its largest, phrases one id before their end, thinking over."""
    spec = rk.Modulation(
        cyclic=rk.Cyclic(1.0, 1e-6, windows=[(k, k + 1) for k in range(at.MAX_WINDOWS)]),
        tip=rk.TIP(), constant=rk.Constant(1.0), ban=rk.Ban("words"),
        schedule=rk.Schedule([(t, 1.0) for t in range(at.MAX_POINTS)]),
        budget=rk.Budget(1, [7] * (at.MAX_END - 1) + [END], rk.SoftBudget()),
        min_think=rk.MinThink(1, 3, [8] * at.MAX_WAIT), think_end=END,
        deepconf=rk.DeepConf(1.0, at.MAX_CONFIDENCE, eos=9),
        entropy_trigger=rk.EntropyTrigger(at.MAX_ENTROPY),
    )  # fmt: skip
    state = make_state(5)
    phrase = [5] + [7] * (at.MAX_END - 1)
    for slot, tokens in enumerate(([8] * (at.MAX_WAIT - 1), phrase, [*phrase, END])):
        state.add(slot, spec, [], tokens)
    state.add(3, rk.Modulation(think_start=(1 << 31) - 1), [])  # above MAX_ID, which it is not in
    progress = state.tensors.progress
    assert progress[:3, at.WAIT_AT].tolist() == [at.MAX_WAIT - 1, 0, 0]
    assert progress[1:3, at.PHRASE].tolist() == [at.MAX_END - 1, at.DONE]
    assert progress[2, at.PHASE] == at.CLOSED
    loaded = make_state(5)
    loaded.load_state_dict(state.state_dict())
    assert all(map(torch.equal, loaded.tensors, state.tensors)) and loaded.free == [4]


def test_generated_tokens_of_any_strides():
    tokens = torch.tensor([[1, 9], [2, 9], [3, 9]])[:, 0]
    state = state_of()
    state.add(0, rk.Modulation(tip=rk.TIP()), [], tokens)
    assert state.tensors.progress[0, at.T] == 3
    with pytest.raises(ValueError, match="prompt_tokens: expected a sequence of token ids"):
        state.add(1, rk.Modulation(), [None])


@pytest.mark.parametrize(
    "spec",
    [
        rk.Modulation(think_start=11, think_end=9),
        rk.Modulation(budget=rk.Budget(1, [9, 2])),
        rk.Modulation(min_think=rk.MinThink(1, 0, [9, 3]), think_end=2),
        rk.Modulation(deepconf=rk.DeepConf(1.0, eos=9)),
    ],
)
def test_the_largest_id_that_is_written_bounds_the_vocabulary(spec):
    state = rk.ModulationState(1)
    state.add(0, spec, [])
    assert state.max_id == 9


def test_failure_functions():
    assert failure([7, 7, 9]) == [0, 1, 0]
    assert failure([7, 8, 7, 7, 8, 7, 9]) == [0, 0, 1, 1, 2, 3, 0]


# ---- the fronts


def test_fronts_take_what_the_operators_do_not():
    """Numbers for temperatures, int64 parents, float64 temperatures: the same rows."""
    spec = rk.Modulation(min_think=rk.MinThink(3, 0, [0]), think_end=END)
    state = state_of(spec, rk.Modulation(constant=rk.Constant(1.0)))
    slot, parents = torch.tensor([0, 1]), torch.tensor([-1, 0, 0])
    drafts, logits = torch.tensor([[1, 2, 3], [4, 5, 6]]), torch.randn(6, VOCAB)
    heat = torch.full((6,), 0.5)
    rows = [
        rk.modulate_logits_(logits.clone(), state, slot, 0, drafts, p, t)
        for p, t in (
            (parents.int(), heat), (parents, 0.5), (parents, heat.double()),
            (parents.int(), torch.tensor(0.5)),
        )
    ]  # fmt: skip
    assert all(torch.equal(rows[0], other) for other in rows[1:])
    state.remove(0)
    for heat in (None, 0.5, 1, torch.tensor([0.5])):
        out = rk.modulate_logits_(Z.clone(), state, torch.tensor([1]), temperature=heat)
        assert out[0, 1] == 1


def test_logits_that_require_grad_are_modulated_without_a_graph():
    state = state_of(rk.Modulation(constant=rk.Constant(1.0)))
    logits = torch.zeros(1, VOCAB, requires_grad=True)
    rk.modulate_logits_(logits, state, ONE)
    assert logits[0, 1] == 1 and logits.is_leaf


def test_the_fronts_compile_without_a_break():
    state = state_of(rk.Modulation(constant=rk.Constant(1.0), budget=rk.Budget(2, [7])))

    def step(logits: torch.Tensor, tokens: torch.Tensor) -> torch.Tensor:
        out = rk.modulate_logits_(logits, state, ONE)
        rk.commit_(state, ONE, tokens, torch.ones(1, dtype=torch.int64))
        return out + 1

    compiled = torch.compile(step, fullgraph=True, backend="aot_eager")
    for forced in (False, False, True, False):
        out = compiled(torch.zeros(1, VOCAB), torch.tensor([[7]]))
        assert (out.max() == 3e4 + 1) == forced
    assert state.tensors.progress[0, at.T] == 4


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
def test_contract_of_modulate_logits(dtype):
    requests = random_requests(6, 9)
    state = make_state(6)
    for slot, (spec, prompt) in enumerate(requests):
        state.add(slot, spec, prompt, [1, 2, 7])
    logits = torch.randn(6, VOCAB, generator=torch.Generator().manual_seed(0)).to(dtype)
    slot, drafts = torch.tensor([0, 0, 1, 4, 4, -1]), torch.tensor([1, 2, 3, 4, END, 6])
    local, heat = torch.tensor([0, 1, 0, 0, 1, 0]), torch.full((6,), 0.7)
    parents = torch.tensor([-1, 0, 0], dtype=torch.int32)
    read = state.tensors
    samples = [
        (logits, slot, None, None, None, None, *read, True),
        (logits, slot, local, drafts, None, heat, *read, False),
        (logits, slot[:2] + 1, None, drafts.view(2, 3), parents, heat, *read, True),
        (logits[:0], slot[:0], None, None, None, None, *read, True),
    ]
    run_contract(OPS.modulate_logits_.default, samples, mutable=(0,))


def test_contract_of_commit():
    requests = random_requests(4, 9, windows=True)
    state = make_state(4)
    for i, (spec, prompt) in enumerate(requests):
        state.add(i, spec, prompt)
    slot, tokens = torch.tensor([2, -1, 0]), torch.tensor([[1, END], [2, 3], [7, -1]])
    length, statistic = torch.tensor([2, 1, 0]), torch.rand(3, 2)
    tensors = state.tensors
    samples = [
        (slot, tokens, length, statistic, statistic + 1, *tensors),
        (slot, tokens, length, None, None, *tensors),
        (slot[:0], tokens[:0], length[:0], None, None, *tensors),
    ]
    run_contract(OPS.commit_.default, samples, mutable=(5,), views=False)


def test_a_step_of_another_thread_sees_all_parts_while_a_request_is_added():
    class Parts(int):
        def __ror__(self, other: int) -> int:  # between two bytecodes of `add`
            seen.append(state.watches_statistics)
            return other | int(self)

    state, seen = rk.ModulationState(2), []
    state.add(0, rk.Modulation(deepconf=rk.DeepConf(1.0)), [])
    state._parts[0] = Parts(state._parts[0])
    state.add(1, rk.Modulation(), [])
    assert seen == [True]


def test_a_loop_makes_no_tensor_of_another_size():
    """Nothing grows: the same tensors before and after 30 steps of 8 requests."""

    class Registered:
        def __call__(self, op: str, *args: Any) -> None:
            getattr(OPS, op)(*args)

        def to(self, x: Any) -> Any:
            return x

    loop = Loop(Registered(), random_requests(8, 5), limit=30)
    before = [t.data_ptr() for t in loop.state.tensors]
    loop.run([[-1, 0, 1]], preempt=0.2)
    assert [t.data_ptr() for t in loop.state.tensors] == before


def test_the_blocks_of_the_readme_run():
    page = Path(rk.__file__).parent / "modulation" / "README.md"
    names: dict[str, Any] = {}
    for block in re.findall(r"```python\n(.*?)```", page.read_text(), re.S):
        exec(block, names)
    assert names["state"].tensors.progress[0, at.T] == 4
    assert names["stopped"].tolist() == names["uncertain"].tolist() == [False]
