"""The family's fronts: token sets, specs, the state, the operator contract, errors."""

from __future__ import annotations

import io
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from contract import bits, run_contract
from modulation_cases import END, SETS, START, VOCAB, Loop, make_state, random_requests

import reasonkern as rk
from reasonkern.modulation import layout as at
from reasonkern.modulation.state import failure

OPS = torch.ops.reasonkern
ONE = torch.tensor([0])
Z = torch.zeros(1, VOCAB)


def state_of(*specs: rk.Modulation, slots: int = 4) -> rk.ModulationState:
    state = make_state(slots)
    for slot, spec in enumerate(specs):
        state.add(slot, spec, [])
    return state


# ---- token sets


class Vocabulary:
    """What `from_tokenizer` asks of a tokenizer."""

    def __init__(self, *pieces: str) -> None:
        self.pieces = pieces

    def get_vocab(self) -> dict[str, int]:
        return {piece: 100 + i for i, piece in enumerate(self.pieces)}


BYTE_LEVEL = Vocabulary(
    "wait", "Ġwait", "Wait", "ĠWait", "ait", "ĠKuwait", "WAITING", "ĠcafÃ©", "Ġ"
)
SENTENCES = Vocabulary("▁wait", "wait", "Wait", "▁café", "▁Kuwait", "<0x0A>")


def test_ids_are_sorted_and_given_once():
    sets = rk.TokenSets.from_ids({"a": [5, 2, 5], "b": {7}})
    assert dict(sets) == {"a": (2, 5), "b": (7,)} and sets.max_id == 7
    assert repr(sets) == "TokenSets(a: 2 ids, b: 1 ids)"
    offsets, ids, member = rk.TokenSets.from_ids({"a": [5, 2], "b": [5, 9]}).tensors()
    assert (offsets.tolist(), ids.tolist()) == ([0, 2, 4], [2, 5, 5, 9])
    assert member.tolist() == [1, 3, 3, 2]


@pytest.mark.parametrize("tokenizer", [BYTE_LEVEL, SENTENCES])
def test_pieces_by_variant(tokenizer):
    """What is written with Ġ or ▁ is a space; other than as spaces they are not special."""
    vocab = tokenizer.get_vocab()

    def names(variants: str, *strings: str, **more: Any) -> set[str]:
        sets = rk.TokenSets.from_tokenizer(
            tokenizer, {"reflect": strings}, variants=variants, **more
        )
        return {piece for piece, i in vocab.items() if i in sets["reflect"]}

    space = "Ġ" if tokenizer is BYTE_LEVEL else "▁"
    assert names("exact", "wait", "Wait") == {"wait", "Wait"}
    assert names("exact", " wait") == {space + "wait"}
    assert names("space", "wait") == {"wait", space + "wait"}
    everything = {piece for piece in vocab if "wait" in piece.lower()}
    assert names("all", "wait") == everything and len(everything) >= 4
    assert names("all", "wait", exclude=["kuwait"]) == everything - {space + "Kuwait"}
    assert names("exact", " café") in ({"ĠcafÃ©"}, {"▁café"})


def test_strings_of_several_tokens_are_named():
    with pytest.raises(ValueError, match="one token each, got a: 'Hold on', b: 'hm'"):
        rk.TokenSets.from_tokenizer(BYTE_LEVEL, {"a": ["wait", "Hold on"], "b": ["hm"]})
    with pytest.raises(ValueError, match="one token each, got a: 'kuwait'"):
        rk.TokenSets.from_tokenizer(
            BYTE_LEVEL, {"a": ["kuwait"]}, variants="all", exclude=["Kuwait"]
        )


@pytest.mark.parametrize("strings", ["wait", ["wait", 3], 3])
def test_a_set_is_a_sequence_of_strings(strings):
    """The letters of "wait" may be pieces of their own."""
    with pytest.raises(
        ValueError, match=r"sets\['reflect'\]: expected a sequence of strings, got "
    ):
        rk.TokenSets.from_tokenizer(BYTE_LEVEL, {"reflect": strings})
    with pytest.raises(ValueError, match="exclude: expected a sequence of strings, got "):
        rk.TokenSets.from_tokenizer(BYTE_LEVEL, {"reflect": ["wait"]}, exclude=strings)
    with pytest.raises(ValueError, match="sets: expected a mapping from names to strings"):
        rk.TokenSets.from_tokenizer(BYTE_LEVEL, ["wait"])  # type: ignore[arg-type]


@pytest.mark.peers
def test_the_published_set_of_a_real_tokenizer():
    """`convert_tokens_to_ids`, the published look-up, on a byte-level tokenizer trained here."""
    transformers = pytest.importorskip("transformers")
    tokenizers = pytest.importorskip("tokenizers")
    words = ["wait", "Wait", "but", "But", "Alternatively"]
    inner = tokenizers.ByteLevelBPETokenizer()
    inner.train_from_iterator([f"{w} {w}" for w in words for _ in range(50)], 600, min_frequency=2)
    tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_object=inner._tokenizer)
    sets = rk.TokenSets.from_tokenizer(tokenizer, {"reflect": words})
    assert set(sets["reflect"]) == set(tokenizer.convert_tokens_to_ids(words))
    spaced = rk.TokenSets.from_tokenizer(tokenizer, {"reflect": words}, variants="space")
    texts = {tokenizer.decode([i]) for i in spaced["reflect"]}
    assert texts == {*words, *(" " + w for w in words)}


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
    spec, prompt = requests[0]
    used.add(0, spec, prompt)
    fresh.add(0, spec, prompt)
    for name in ("spec", "numbers", "progress", "confidence_sum"):
        assert torch.equal(getattr(used.tensors, name), getattr(fresh.tensors, name)), name
    assert used.max_id == fresh.max_id and not used.stopped.any()


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
    assert moved.device.type == "meta" and not moved.kernel_checks


def test_bad_states():
    state = make_state(2)
    saved = state.state_dict()
    with pytest.raises(ValueError, match="state: expected settings .*'max_requests': 2"):
        state.load_state_dict(make_state(3).state_dict())
    with pytest.raises(ValueError, match=r"state\['progress'\]: expected a tensor, got NoneType"):
        state.load_state_dict({k: v for k, v in saved.items() if k != "progress"})
    with pytest.raises(ValueError, match=r"state\['spec'\]: expected shape of this state"):
        state.load_state_dict(saved | {"spec": saved["spec"][:1]})
    with pytest.raises(ValueError, match=r"state\['numbers'\]: expected dtype torch.float64"):
        state.load_state_dict(saved | {"numbers": saved["numbers"].float()})


FOREIGN = [
    ("spec", at.END_LENGTH, at.MAX_END + 1),  # read beyond the row
    ("spec", at.BAN_SET, len(SETS)),  # a set that does not exist
    ("spec", at.END, VOCAB),  # written beyond the row of logits: MAX_ID does not tell
    ("spec", at.ENTROPY_WINDOW, 0),  # divided by
    ("spec", at.PARTS, -1),
    ("spec", at.FAILURE, 1000),
    ("spec", at.FAILURE, 1),  # followed without end
    ("numbers", at.PERIOD, 0.0),  # likewise
    ("progress", at.PHRASE, at.MAX_END + 1),
    ("progress", at.CONFIDENCE_PUSHED, -5),
    ("set_offsets", 1, 99),
]


@pytest.mark.parametrize(("name", "column", "value"), FOREIGN)
def test_states_that_no_state_has(name, column, value):
    spec = rk.Modulation(
        ban=rk.Ban(), budget=rk.Budget(3, [7, END]), entropy_trigger=rk.EntropyTrigger(),
        cyclic=rk.Cyclic(1.0, 9), think_end=END,
    )  # fmt: skip
    state = state_of(spec)
    state.load_state_dict(state.state_dict())
    saved = {
        k: v.clone() if isinstance(v, torch.Tensor) else v for k, v in state.state_dict().items()
    }
    saved[name].view(-1)[column] = value
    with pytest.raises(ValueError, match=rf"state\['{name}'\]: expected "):
        state.load_state_dict(saved)


def test_generated_tokens_of_any_strides():
    tokens = torch.tensor([[1, 9], [2, 9], [3, 9]])[:, 0]
    state = state_of()
    state.add(0, rk.Modulation(tip=rk.TIP()), [], tokens)
    assert state.tensors.progress[0, at.T] == 3
    with pytest.raises(ValueError, match="prompt_tokens: expected a sequence of token ids"):
        state.add(1, rk.Modulation(), [None])


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
    read = state.read_state
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
    tensors = (*state.read_state, *state.windows)
    samples = [
        (slot, tokens, length, statistic, statistic + 1, *tensors),
        (slot, tokens, length, None, None, *tensors),
        (slot[:0], tokens[:0], length[:0], None, None, *tensors),
    ]
    run_contract(OPS.commit_.default, samples, mutable=(7, 11, 12, 13), views=False)


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


# ---- errors

NAN = float("nan")
SPECS: list[tuple[Callable[[], Any], str]] = [
    (lambda: rk.Cyclic(5.0, 0.0), "period: expected a finite number > 0, got 0.0"),
    (lambda: rk.Cyclic(5.0, -3), "period: expected a finite number > 0, got -3"),
    (lambda: rk.Cyclic(5.0, NAN), "period: expected a finite number > 0, got nan"),
    (lambda: rk.Cyclic(NAN, 5), "amplitude: expected a finite number, got nan"),
    (lambda: rk.Cyclic(1.0, 5, NAN), "shift: expected a finite number"),
    (lambda: rk.Cyclic(1.0, 5, windows=[]), r"windows: expected 1 to 8 pairs \(low, high\), got 0"),
    (lambda: rk.Cyclic(1.0, 5, windows=[(3, 3)]), r"windows: expected pairs .* got \(3, 3\)"),
    (lambda: rk.Cyclic(1.0, 5, windows=[(-1, 3)]), "windows: expected pairs of integers 0 <= low"),
    (lambda: rk.Cyclic(1.0, 5, windows=[(0, 1)] * 9), "windows: expected 1 to 8 pairs"),
    (lambda: rk.Cyclic(1.0, 5, set=3), "set: expected the name of a token set, got 3"),
    (lambda: rk.TIP(NAN), "alpha: expected a finite number"),
    (lambda: rk.TIP(3.0, 1.5), "beta: expected an integer >= 0, got 1.5"),
    (lambda: rk.Constant(-float("inf")), "bias: expected a finite number, got -inf"),
    (lambda: rk.Schedule([]), r"points: expected 1 to 32 pairs \(t, d\)"),
    (lambda: rk.Schedule([(1, 0.0), (1, 1.0)]), "points: expected ascending integers t"),
    (lambda: rk.Schedule([(1, NAN)]), "points: expected a finite number, got nan"),
    (lambda: rk.SoftBudget(1.0), r"start: expected a fraction in \[0, 1\), got 1.0"),
    (lambda: rk.SoftBudget(0.5, 0.0), "margin: expected a finite number > 0"),
    (lambda: rk.Budget(-1, [3]), "tokens: expected an integer >= 0, got -1"),
    (lambda: rk.Budget(True, [3]), "tokens: expected an integer >= 0, got True"),
    (lambda: rk.Budget(5, []), "end: expected 1 to 64 ids, got 0"),
    (lambda: rk.Budget(5, 7), "end: expected a sequence of token ids, got 7"),
    (lambda: rk.TokenSets.from_ids({"a": 5}), r"sets\['a'\]: expected a sequence of token ids"),
    (lambda: rk.Budget(5, [-2]), r"end: expected token ids in \[0, 2147483648\), got -2"),
    (lambda: rk.Budget(5, [1], soft=0.5), "soft: expected None or a SoftBudget, got 0.5"),
    (lambda: rk.Budget(0, [1], rk.SoftBudget()), "soft: expected None with a budget of 0"),
    (lambda: rk.MinThink(wait=[1]), "tokens, ignore: expected one of them > 0"),
    (lambda: rk.MinThink(5), "wait: expected 1 to 32 ids, got 0"),
    (lambda: rk.MinThink(5, -1, [1]), "ignore: expected an integer >= 0"),
    (lambda: rk.DeepConf(NAN), "threshold: expected a finite number"),
    (lambda: rk.DeepConf(1.0, 4096), r"window: expected an integer in \[1, 2048\], got 4096"),
    (lambda: rk.DeepConf(1.0, eos=-1), "eos: expected token ids"),
    (lambda: rk.EntropyTrigger(1), r"window: expected an integer in \[2, 64\], got 1"),
    (lambda: rk.EntropyTrigger(k=-1.0), "k: expected a finite number >= 0"),
    (lambda: rk.Modulation(tip=rk.Ban()), r"tip: expected None or a TIP, got Ban\(set='reflect'\)"),
    (lambda: rk.Modulation(think_end=1.5), "think_end: expected token ids"),
    (lambda: rk.Modulation(think_start=3, think_end=3), "think_end: expected another id than"),
    (lambda: rk.Modulation(budget=rk.Budget(5, [1]), think_end=2),
     r"budget.end: expected think_end = 2 in it, got \(1,\)"),
    (lambda: rk.Modulation(min_think=rk.MinThink(5, 0, [1])), "think_end: expected an id, which"),
    (lambda: rk.Modulation(min_think=rk.MinThink(5, 0, [1, 2]), think_end=2),
     "min_think.wait: expected ids other than think_end"),
    (lambda: rk.Modulation(
        min_think=rk.MinThink(5, 0, [1]), think_end=2, budget=rk.Budget(4, [2])),
     "min_think.tokens: expected at most budget.tokens = 4, got 5"),
    (lambda: rk.TokenSets.from_ids({}), "sets: expected 1 to 32 of them, got 0"),
    (lambda: rk.TokenSets.from_ids("a"), "sets: expected a mapping from names to token ids"),
    (lambda: rk.TokenSets.from_ids({"a": []}), r"sets\['a'\]: expected at least one id"),
    (lambda: rk.TokenSets.from_ids({"a": [None]}), r"sets\['a'\]: expected token ids .* got None"),
    (lambda: rk.TokenSets.from_ids({"a": "wait"}), "strings go to from_tokenizer, got 'wait'"),
    (lambda: rk.TokenSets.from_ids({1: [2]}), "sets: expected names that are strings, got 1"),
    (lambda: rk.TokenSets.from_ids({"a": [1 << 31]}), r"sets\['a'\]: expected token ids"),
    (lambda: rk.TokenSets.from_tokenizer(3, {"a": ["b"]}), "tokenizer: expected an object with"),
    (lambda: rk.TokenSets.from_tokenizer(BYTE_LEVEL, {"a": [" "]}), "strings with more than"),
    (lambda: rk.TokenSets.from_tokenizer(BYTE_LEVEL, {"a": ["b"]}, variants="x"),
     "variants: expected 'exact' or 'space' or 'all', got 'x'"),
]  # fmt: skip
STATES: list[tuple[Callable[[], Any], str]] = [
    (lambda: rk.ModulationState(0, state_of().sets), "max_requests: expected a positive integer"),
    (lambda: rk.ModulationState(1, {"a": [1]}), "sets: expected a TokenSets, got dict"),
    (lambda: state_of().add(4, rk.Modulation(), []), r"slot: expected an integer in \[0, 4\)"),
    (lambda: state_of(rk.Modulation()).add(0, rk.Modulation(), []), "slot: expected a slot that i"),
    (lambda: state_of().remove(1), "slot: expected a slot in use, got 1"),
    (lambda: state_of().add(0, {}, []), "spec: expected a Modulation, got dict"),
    (lambda: state_of(rk.Modulation(ban=rk.Ban("none"))), "ban.set: expected 'reflect' or 'other'"),
    (lambda: state_of().add(0, rk.Modulation(), [-1]), "prompt_tokens: expected values in"),
    (lambda: state_of().add(0, rk.Modulation(), [], [1.5]), "generated_tokens: expected"),
    (lambda: state_of().add(0, rk.Modulation(), [], [[1]]), "generated_tokens: expected one dim"),
    (lambda: state_of(rk.Modulation(
        ban=rk.Ban("words"), min_think=rk.MinThink(5, 0, [6]), think_end=END)),
     "min_think.wait: expected a first id that ban leaves, got 6"),
    (lambda: state_of(rk.Modulation(
        ban=rk.Ban("words"), budget=rk.Budget(5, [7, 6], rk.SoftBudget()))),
     "budget.end: expected ids that ban leaves"),
]  # fmt: skip
PLAIN = rk.Modulation(constant=rk.Constant(1.0))
SOFT = rk.Modulation(budget=rk.Budget(5, [7], rk.SoftBudget()))
WAITS = rk.Modulation(min_think=rk.MinThink(5, 0, [1]), think_end=END)
LOCAL = torch.tensor([0, 1])


def call(*args: Any, spec: rk.Modulation = PLAIN, logits: Any = Z, **more: Any) -> Any:
    args = args or (ONE,)
    return rk.modulate_logits_(logits, state_of(spec), *args, **more)


ROWS: list[tuple[Callable[[], Any], str]] = [
    (lambda: call(logits=[1.0]), r"logits: expected a tensor \(R, V\), got list"),
    (lambda: call(logits=Z[0]), r"logits: expected a tensor \(R, V\), got \(16,\)"),
    (lambda: call(logits=Z.long()), "logits: expected dtype torch.float32"),
    (lambda: call(logits=Z[:, :12], spec=WAITS, temperature=1.0),
     "logits: expected a vocabulary above the state's ids, up to 15, got 12"),
    (lambda: call(logits=torch.zeros(VOCAB, 1).T[:, ::1].expand(1, VOCAB)[:, :1].expand(1, VOCAB)),
     "logits: expected a contiguous last dimension"),
    (lambda: call(torch.tensor([0, 0]), logits=Z.expand(2, VOCAB)), "rows that do not overlap"),
    (lambda: call(logits=Z.to("meta")), "logits: expected the device of state, cpu, got meta"),
    (lambda: rk.modulate_logits_(Z, None, ONE), "state: expected a ModulationState, got NoneType"),
    (lambda: call(0), "slot: expected a tensor, got int"),
    (lambda: call(ONE.int()), "slot: expected dtype torch.int64"),
    (lambda: call(torch.tensor([0, 1])), r"slot: expected shape \(R,\) = \(1,\), got \(2,\)"),
    (lambda: call(torch.tensor([4])), r"slot: expected values in \[-1, 4\), got 4 at \(0,\)"),
    (lambda: call(torch.tensor([-2])), r"slot: expected values in \[-1, 4\), got -2"),
    (lambda: call(ONE, 1), r"local_pos: expected 0 or a \(R,\) tensor, got 1"),
    (lambda: call(ONE, ONE), r"draft_tokens: expected a \(R,\) tensor beside local_pos"),
    (lambda: call(ONE, ONE + 2, ONE + 1), "local_pos: expected the number .* got 2 at 0"),
    (lambda: call(torch.tensor([0, 1]), 2 * LOCAL, LOCAL, logits=torch.zeros(2, VOCAB)),
     "local_pos: expected the number of draft tokens before each row.* got 2 at 1"),
    (lambda: call(ONE, 0, LOCAL), r"draft_tokens: expected shape \(R,\)"),
    (lambda: call(ONE, LOCAL, LOCAL[None], LOCAL, logits=torch.zeros(2, VOCAB)),
     "local_pos: expected 0 beside parents"),
    (lambda: call(ONE, 0, LOCAL[None], torch.tensor([-1, 0]), logits=torch.zeros(3, VOCAB)),
     "logits: expected B·N rows with N = 2, got 3"),
    (lambda: call(ONE, 0, LOCAL[None], torch.tensor([-1, 1]), logits=torch.zeros(2, VOCAB)),
     "parents: expected -1, then the number of an earlier node each, got 1 at 1"),
    (lambda: call(ONE, 0, LOCAL[None], [-1, 0], logits=torch.zeros(2, VOCAB)),
     "parents: expected a tensor, got list"),
    (lambda: call(ONE, 0, None, torch.tensor([-1, 0]), logits=torch.zeros(2, VOCAB)),
     "draft_tokens: expected a tensor, got NoneType"),
    (lambda: call(spec=SOFT), "allow_dense: expected True for requests with a soft budget"),
    (lambda: call(spec=WAITS), r"temperature: expected a number or \(R,\) for requests"),
    (lambda: call(spec=WAITS, temperature=-1.0), "temperature: expected a finite number >= 0"),
    (lambda: call(spec=WAITS, temperature=LOCAL / 1), r"temperature: expected shape \(R,\)"),
    (lambda: call(spec=WAITS, temperature=torch.tensor([NAN])),
     "temperature: expected finite values >= 0, got nan at 0"),
    (lambda: call(spec=WAITS, temperature=ONE), "temperature: expected dtype torch.float32"),
]  # fmt: skip


def push(*args: Any, spec: rk.Modulation = PLAIN, **more: Any) -> Any:
    args = args or (ONE, ONE[None], ONE + 1)
    return rk.commit_(state_of(spec), *args, **more)


CONF, TRIGGER = rk.Modulation(deepconf=rk.DeepConf(1.0)), rk.Modulation(
    entropy_trigger=rk.EntropyTrigger()
)  # fmt: skip
COMMITS: list[tuple[Callable[[], Any], str]] = [
    (lambda: rk.commit_(3, ONE, ONE[None], ONE), "state: expected a ModulationState, got int"),
    (lambda: push(ONE, [1], ONE), "tokens: expected a tensor, got list"),
    (lambda: push(ONE, ONE, ONE), r"tokens: expected shape \(B, D \+ 1\), got \(1,\)"),
    (lambda: push(ONE, ONE[None].int(), ONE), "tokens: expected dtype torch.int64"),
    (lambda: push(LOCAL, ONE[None], ONE), r"slot: expected shape \(B,\) = \(1,\), got \(2,\)"),
    (lambda: push(ONE, ONE[None], LOCAL), r"length: expected shape \(B,\)"),
    (lambda: push(ONE, ONE[None], ONE + 2), r"length: expected values in \[0, 2\), got 2"),
    (lambda: push(ONE + 9, ONE[None], ONE), r"slot: expected values in \[-1, 4\), got 9"),
    (lambda: push(ONE.repeat(2), LOCAL[:, None], LOCAL), r"slot: expected no slot twice, got \[0"),
    (lambda: push(spec=CONF), r"confidence: expected a \(B, D \+ 1\) tensor for requests"),
    (lambda: push(spec=TRIGGER), r"entropy: expected a \(B, D \+ 1\) tensor for requests"),
    (lambda: push(spec=CONF, confidence=ONE[None]), "confidence: expected dtype torch.float32"),
    (lambda: push(spec=CONF, confidence=torch.zeros(2, 1)), r"confidence: expected shape \(B, D"),
]  # fmt: skip


@pytest.mark.parametrize(("wrong", "message"), SPECS + STATES + ROWS + COMMITS)
def test_errors_name_the_argument(wrong, message):
    before = Z.clone()
    with pytest.raises(ValueError, match=message):
        wrong()
    assert torch.equal(Z, before)


def test_the_checks_are_the_same_without_the_cpu_library(monkeypatch):
    """Where no kernel checks, the fronts do so first."""
    monkeypatch.setattr("reasonkern.modulation.op.has_cpu_kernels", lambda: False)
    for wrong, message in ROWS:
        with pytest.raises(ValueError, match=message):
            wrong()
    assert call(logits=Z.clone())[0, 1] == 1


def test_raw_operators_refuse_what_they_cannot_read():
    """Messages of the kernels' own checks, on a call past the fronts."""
    state = state_of(PLAIN)
    read = state.read_state
    wrong = [
        ((Z, ONE, None, None, None, None, read[0][:, :9].contiguous(), *read[1:], True), "spec"),
        ((Z, ONE, None, None, None, None, *read[:3], read[3].long(), *read[4:], True), "set_off"),
        ((Z, ONE, ONE, None, None, None, *read, True), "local_pos: expected draft_tokens"),
        ((Z, torch.tensor([7]), None, None, None, None, *read, True), "slot: got 7 at 0"),
        ((Z.half().to(torch.complex64), ONE, None, None, None, None, *read, True), "logits"),
    ]
    for args, message in wrong:
        with pytest.raises(RuntimeError, match=message):
            OPS.modulate_logits_(*args)
    assert not Z.any() and SETS["reflect"] == state.sets["reflect"]


def test_the_block_of_the_readme_runs():
    page = Path(rk.__file__).parent / "modulation" / "README.md"
    (block,) = re.findall(r"```python\n(.*?)```", page.read_text(), re.S)
    names: dict[str, Any] = {}
    exec(block, names)
    assert names["state"].tensors.progress[0, at.T] == 3
