"""The decoding loop under control: the text of control alone, whatever drafts, token for token."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from generation_cases import MODEL, NEW, PROMPTS, VOCAB, T, taught
from torch import Tensor

import reasonkern as rk
from reasonkern.generation import chain_proposal, generate

BANNED = range(10, 20)
SETS = rk.TokenSets.from_ids({"reflect": [3, 4, 5], "banned": BANNED})
END = 2
SPECS = (
    rk.Modulation(cyclic=rk.Cyclic(6.0, 8), tip=rk.TIP(2.0, 3, "banned")),
    rk.Modulation(
        budget=rk.Budget(9, [7, 7, 8, END], rk.SoftBudget(0.4)), ban=rk.Ban("banned"), think_end=END
    ),
    rk.Modulation(
        min_think=rk.MinThink(12, 2, [6, 21]), schedule=rk.Schedule([(0, 3.0), (30, -3.0)]),
        think_end=END,
    ),
    None,
)  # fmt: skip


def control(specs: Any, trajectories: int = 1) -> tuple[rk.ModulationState, Tensor]:
    """Slots in another order than the requests; -1 where a request has no spec."""
    count = len(PROMPTS) * trajectories
    state, slots = rk.ModulationState(count + 1, SETS), []
    for request in range(count):
        spec = specs[request % len(specs)]
        slots.append(-1 if spec is None else count - request)
        if spec is not None:
            state.add(slots[-1], spec, PROMPTS[request // trajectories])
    return state, torch.tensor(slots)


def whole_text(
    spec: Any, prompt: list[int], new: int, seed: Tensor, temperature: float
) -> list[int]:
    """One pass over the whole text, a state that has seen it, and `sample`, for every token."""
    text = list(prompt)
    for _ in range(new):
        with torch.no_grad():
            logits = MODEL.model(torch.tensor([text]))[:, -1]
        if spec is not None:
            state, slot = rk.ModulationState(1, SETS), torch.zeros(1, dtype=torch.int64)
            state.add(0, spec, prompt, text[len(prompt) :])
            rk.modulate_logits_(logits, state, slot, temperature=temperature, allow_dense=True)
        at = len(text)
        text.append(int(rk.sample(logits, temperature=temperature, seed=seed, position=at)))
    return text[len(prompt) :]


@pytest.mark.parametrize("temperature", [0.0, T])
def test_the_text_is_that_of_controlled_rows(temperature: float) -> None:
    texts = generate(
        MODEL, PROMPTS, max_new_tokens=30, seed=5, temperature=temperature, control=control(SPECS)
    ).texts
    for prompt, text, spec, seed in zip(PROMPTS, texts, SPECS, rk.request_seeds(5, 4), strict=True):
        assert text == whole_text(spec, prompt, 30, seed[None], temperature)
    plain = generate(MODEL, PROMPTS, max_new_tokens=30, seed=5, temperature=temperature).texts
    assert [a == b for a, b in zip(texts, plain, strict=True)] == [False, False, False, True]
    assert texts[1][9:13] == [7, 7, 8, END]


@pytest.mark.parametrize("trajectories", [1, 4])
@pytest.mark.parametrize("temperature", [0.0, T])
@pytest.mark.parametrize("tree", [rk.DraftTree.default(16), rk.DraftTree.chain(5), "auto"], ids=str)
def test_speculation_gives_the_text_of_control_alone(
    trajectories: int, temperature: float, tree: Any
) -> None:
    """Requests end at different times; the state has then seen exactly their texts."""
    options: dict[str, Any] = {
        "max_new_tokens": NEW, "num_trajectories": trajectories, "seed": 7,
        "temperature": temperature, "eos": (39, 30),
    }  # fmt: skip
    expected_state, slot = control(SPECS, trajectories)
    expected = generate(MODEL, PROMPTS, control=(expected_state, slot), **options)
    table = taught(4, temperature=temperature)
    state, slot = control(SPECS, trajectories)
    found = generate(MODEL, PROMPTS, control=(state, slot), table=table, tree=tree, **options)
    assert found.texts == expected.texts
    assert tree == "auto" or found.statistics.mean_accepted > 1.1
    assert torch.equal(state.tensors.progress, expected_state.tensors.progress)


@pytest.mark.parametrize("speculates", [False, True])
def test_a_default_device_moves_nothing(speculates: bool) -> None:
    """``torch.set_default_device``: what is made on the host stays there."""

    def texts() -> Any:
        options: dict[str, Any] = {}
        if speculates:
            options = {"table": taught(4), "tree": rk.DraftTree.default(4)}
        state, slot = rk.ModulationState(5, SETS, "cpu"), torch.arange(4, device="cpu")
        for request, spec in enumerate(SPECS):
            state.add(request, spec or rk.Modulation(), PROMPTS[request], [])
        return generate(
            MODEL, PROMPTS, max_new_tokens=8, seed=7, temperature=T, control=(state, slot),
            **options,
        ).texts  # fmt: skip

    expected = texts()
    with torch.device("meta"):
        assert texts() == expected


def test_any_drafter_gives_the_text_of_control_alone() -> None:
    expected = generate(
        MODEL, PROMPTS, max_new_tokens=NEW, seed=7, temperature=T, control=control(SPECS)
    ).texts

    def drafter(indices: list[int], texts: list[list[int]]) -> list[Any]:
        """The right next tokens, then a wrong one."""
        drafts = []
        for index, text in zip(indices, texts, strict=True):
            t = len(text) - len(PROMPTS[index])
            drafts.append(chain_proposal([*expected[index][t : t + 2], 1]))
        return drafts

    found = generate(
        MODEL, PROMPTS, max_new_tokens=NEW, seed=7, temperature=T, control=control(SPECS),
        drafter=drafter,
    )  # fmt: skip
    assert found.texts == expected and found.statistics.mean_accepted > 2


def test_windows_follow_the_accepted_rows() -> None:
    """DeepConf stops at the same token, and its end of text comes after it."""
    spec = rk.Modulation(deepconf=rk.DeepConf(threshold=4.5, window=8, eos=39))
    options: dict[str, Any] = {"max_new_tokens": NEW, "seed": 3, "temperature": T, "eos": (39,)}
    expected_state, slot = control([spec])
    expected = generate(MODEL, PROMPTS, control=(expected_state, slot), **options).texts
    plain = generate(MODEL, PROMPTS, **options).texts
    state, slot = control([spec])
    found = generate(
        MODEL, PROMPTS, control=(state, slot), table=taught(4), tree=rk.DraftTree.default(16),
        **options,
    )  # fmt: skip
    assert found.texts == expected != plain
    assert state.stopped.tolist() == expected_state.stopped.tolist() and state.stopped.any()


def test_the_table_learns_nothing_of_control() -> None:
    """Bans of tokens that the text does not hold change every row of logits and no token of it."""
    options: dict[str, Any] = {"max_new_tokens": NEW, "seed": 7, "temperature": T}
    plain = rk.NgramTable(1 << 14, vocab_size=VOCAB)
    texts = generate(MODEL, PROMPTS, table=plain, tree=rk.DraftTree.default(8), **options).texts
    unused = sorted(set(range(VOCAB)).difference(*texts))
    assert len(unused) > 2
    state = rk.ModulationState(4, rk.TokenSets.from_ids({"unused": unused}))
    for slot, prompt in enumerate(PROMPTS):
        state.add(slot, rk.Modulation(ban=rk.Ban("unused")), prompt)
    table = rk.NgramTable(1 << 14, vocab_size=VOCAB)
    found = generate(
        MODEL, PROMPTS, table=table, tree=rk.DraftTree.default(8), control=(state, torch.arange(4)),
        **options,
    ).texts  # fmt: skip
    assert found == texts
    ours, theirs = table.state_dict(), plain.state_dict()
    for name, value in ours.items():
        if isinstance(value, Tensor):
            assert torch.equal(value, theirs[name]), name


def test_a_slot_serves_one_text() -> None:
    """It may go on; a call from the prompt again, whose budget is spent, is refused."""
    state, slot = control(SPECS)
    options: dict[str, Any] = {"seed": 5, "temperature": T, "control": (state, slot)}
    first = generate(MODEL, PROMPTS, max_new_tokens=10, **options).texts
    message = r"control\[1\]\[0\]: expected a slot that has seen the . tokens of its prompt"
    with pytest.raises(ValueError, match=rf"{message} and no more, got 4, which has seen . \+ 10"):
        generate(MODEL, PROMPTS, max_new_tokens=10, **options)
    texts = [prompt + text for prompt, text in zip(PROMPTS, first, strict=True)]
    rest = generate(MODEL, texts, max_new_tokens=10, **options).texts
    for at, spec in zip(slot.tolist(), SPECS, strict=True):
        if spec is not None:
            state.remove(at)
            state.add(at, spec, PROMPTS[len(PROMPTS) - at])
    whole = generate(MODEL, PROMPTS, max_new_tokens=20, **options).texts
    assert whole == [a + b for a, b in zip(first, rest, strict=True)]
    for at, spec, text in zip(slot.tolist(), SPECS, whole, strict=True):  # resumed: as preempted
        if spec is not None:
            state.remove(at)
            state.add(at, spec, PROMPTS[len(PROMPTS) - at], text[:10])
    assert generate(MODEL, texts, max_new_tokens=10, **options).texts == rest
    state.remove(4)
    state.add(4, SPECS[0], PROMPTS[0][1:])  # another text, of which nothing is generated yet
    seen = r"and no more, got 4, which has seen . \+ 0 \(remove and add .* without padding\)"
    with pytest.raises(ValueError, match=f"{message} {seen}"):
        generate(MODEL, PROMPTS, max_new_tokens=10, **options)
    loaded = rk.ModulationState(state.max_requests, SETS)
    loaded.load_state_dict(state.state_dict())
    generate(MODEL, PROMPTS, max_new_tokens=1, **options | {"control": (loaded, slot)})


def test_a_slot_without_its_prompt_serves_a_text_that_goes_on() -> None:
    """A spec without a beginning of thinking needs none, and its length is not known."""
    state = rk.ModulationState(1, SETS)
    options: dict[str, Any] = {"max_new_tokens": 10, "control": (state, torch.tensor([0]))}
    state.add(0, SPECS[1], [])
    first = generate(MODEL, PROMPTS[:1], temperature=T, **options).texts[0]
    text = PROMPTS[0] + first
    rest = generate(MODEL, [text], temperature=T, **options).texts[0]
    state.remove(0)
    state.add(0, SPECS[1], PROMPTS[0], first)
    assert generate(MODEL, [text], temperature=T, **options).texts == [rest]
    state.remove(0)
    state.add(0, SPECS[1], [], [])
    rk.commit_(state, torch.tensor([0]), torch.tensor([first]), torch.tensor([10]))
    with pytest.raises(ValueError, match=r"control\[1\]\[0\]: .* which has seen 0 \+ 10"):
        generate(MODEL, [text[:10]], temperature=T, **options)


ERRORS: dict[str, tuple[Any, str]] = {
    "no pair": (3, r"control: expected a tuple \(ModulationState, slot\), got int"),
    "no state": ((1, torch.zeros(4)), r"control\[0\]: expected a ModulationState"),
    "slots": ((control(SPECS)[0], torch.zeros(3)), r"control\[1\]: expected shape \(requests,\)"),
    "dtype": ((control(SPECS)[0], torch.zeros(4)), r"control\[1\]: expected dtype torch.int64"),
    "device": (
        (control(SPECS)[0], torch.zeros(4, dtype=torch.int64, device="meta")),
        "control: expected on the model's device, cpu",
    ),
    "free": (
        (control(SPECS)[0], torch.tensor([4, 3, 0, -1])),
        r"control\[1\]\[2\]: expected -1 or a slot in use, got 0, which is free",
    ),
    "no slot": (
        (control(SPECS)[0], torch.tensor([4, 3, 2, 5])),
        r"control\[1\]\[3\]: expected -1 or a slot in use, got 5",
    ),
    "twice": (
        (control(SPECS)[0], torch.tensor([4, 3, 3, -1])),
        r"control\[1\]\[2\]: expected a slot of its own, got 3, given before",
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", ERRORS)
def test_errors(case: str) -> None:
    given, message = ERRORS[case]
    with pytest.raises(ValueError, match=message):
        generate(MODEL, PROMPTS, temperature=T, max_new_tokens=2, control=given)
