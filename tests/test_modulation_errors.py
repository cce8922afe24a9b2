"""What the family refuses, and how it says so: specs, sets, states, rows and commits."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
from modulation_cases import (
    BYTE_LEVEL,
    END,
    SETS,
    VOCAB,
    state_of,
)

import reasonkern as rk
from reasonkern.modulation import layout as at

OPS = torch.ops.reasonkern
ONE = torch.tensor([0])
Z = torch.zeros(1, VOCAB)


class Pieces:
    """A tokenizer that has a word with a space before it alone."""

    def get_vocab(self) -> dict[str, int]:
        return {"\u2581Wait": 3, "but": 4}


NAN, INF = float("nan"), float("inf")
SPECS: list[tuple[Callable[[], Any], str]] = [
    (lambda: rk.Cyclic(5.0, 0.0), "period: expected a finite number >= 1e-06, got 0.0"),
    (lambda: rk.Cyclic(5.0, 9e-7), "period: expected a finite number >= 1e-06, got 9e-07"),
    (lambda: rk.Cyclic(5.0, -3), "period: expected a finite number >= 1e-06, got -3"),
    (lambda: rk.Cyclic(5.0, NAN), "period: expected a finite number >= 1e-06, got nan"),
    (lambda: rk.Cyclic(NAN, 5), "amplitude: expected a finite number, got nan"),
    (lambda: rk.Cyclic(1.0, 5, NAN), "shift: expected a finite number"),
    (lambda: rk.Cyclic(1.0, 5, windows=[]), r"windows: expected 1 to 8 pairs \(low, high\), got 0"),
    (lambda: rk.Cyclic(1.0, 5, windows=(0, 5)), r"windows: expected a sequence of pairs .*\(0, 5"),
    (lambda: rk.Cyclic(1.0, 5, windows=[(3, 3)]), r"windows: expected pairs .* got \(3, 3\)"),
    (lambda: rk.Cyclic(1.0, 5, windows=[(-1, 3)]), "windows: expected pairs of integers 0 <= low"),
    (lambda: rk.Cyclic(1.0, 5, windows=[(0, 1 << 63)]), "windows: expected pairs of .* < 2.63"),
    (lambda: rk.Cyclic(1.0, 5, windows=[(0, 1)] * 9), "windows: expected 1 to 8 pairs"),
    (lambda: rk.Cyclic(1.0, 5, set=3), "set: expected the name of a token set, got 3"),
    (lambda: rk.TIP(NAN), "alpha: expected a finite number"),
    (lambda: rk.TIP(3.0, 1.5), "beta: expected an integer >= 0, got 1.5"),
    (lambda: rk.TIP(3.0, 1 << 62), "beta: expected an integer >= 0, got 4611686018427387904"),
    (lambda: rk.TIP(set=3), "set: expected the name of a token set, got 3"),
    (lambda: rk.Constant(1.0, None), "set: expected the name of a token set, got None"),
    (lambda: rk.Ban(3), "set: expected the name of a token set, got 3"),
    (lambda: rk.Schedule([(0, 1.0)], 3), "set: expected the name of a token set, got 3"),
    (lambda: rk.Constant(-float("inf")), "bias: expected a finite number, got -inf"),
    (lambda: rk.Schedule([]), r"points: expected 1 to 32 pairs \(t, d\)"),
    (lambda: rk.Schedule({0: 1.0}), r"points: expected a sequence of pairs \(t, d\), got \{0: 1"),
    (lambda: rk.Schedule([0, 1]), r"points: expected a sequence of pairs \(t, d\), got \[0, 1\]"),
    (lambda: rk.Schedule([(1, 0.0), (1, 1.0)]), "points: expected ascending integers t"),
    (lambda: rk.Schedule([(-(1 << 62), 0.0)]), r"points: expected integers t in \(-2.62"),
    (lambda: rk.Schedule([(0, 0.0), (1 << 62, 0.0)]), r"points: expected integers t in \(-2.62"),
    (lambda: rk.Schedule([(1, NAN)]), "points: expected a finite number, got nan"),
    (lambda: rk.SoftBudget(1.0), r"start: expected a fraction in \[0, 1\), got 1.0"),
    (lambda: rk.SoftBudget(-0.1), "start: expected a finite number >= 0, got -0.1"),
    (lambda: rk.SoftBudget(0.5, 0.0), "margin: expected a finite number > 0"),
    (lambda: rk.Budget(-1, [3]), "tokens: expected an integer >= 0, got -1"),
    (lambda: rk.Budget(True, [3]), "tokens: expected an integer >= 0, got True"),
    (lambda: rk.Budget(5, []), "end: expected 1 to 64 ids, got 0"),
    (lambda: rk.Budget(5, 7), "end: expected a sequence of token ids, got 7"),
    (lambda: rk.TokenSets.from_ids({"a": 5}), r"sets\['a'\]: expected a sequence of token ids"),
    (lambda: rk.Budget(5, [-2]), r"end: expected token ids, integers in \[0, 2\^31\), got -2"),
    (lambda: rk.Budget(5, [1], soft=0.5), "soft: expected None or a SoftBudget, got 0.5"),
    (lambda: rk.Budget(0, [1], rk.SoftBudget()), "soft: expected None with a budget of 0"),
    (lambda: rk.MinThink(wait=[1]), "tokens, ignore: expected one of them > 0"),
    (lambda: rk.MinThink(5), "wait: expected 1 to 32 ids, got 0"),
    (lambda: rk.MinThink(5, -1, [1]), "ignore: expected an integer >= 0"),
    (lambda: rk.MinThink(-1, 1, [1]), "tokens: expected an integer >= 0"),
    (lambda: rk.DeepConf(NAN), "threshold: expected a finite number"),
    (lambda: rk.DeepConf(1.0, 4096), r"window: expected an integer in \[1, 2048\], got 4096"),
    (lambda: rk.DeepConf(1.0, eos=-1), "eos: expected token ids"),
    (lambda: rk.EntropyTrigger(1), r"window: expected an integer in \[2, 64\], got 1"),
    (lambda: rk.EntropyTrigger(k=-1.0), "k: expected a finite number >= 0"),
    (lambda: rk.EntropyTrigger(floor=NAN), "floor: expected a finite number >= 0"),
    (lambda: rk.EntropyTrigger(min_std=NAN), "min_std: expected a finite number >= 0"),
    (lambda: rk.EntropyTrigger(first=NAN), "first: expected a finite number >= 0"),
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
    (lambda: rk.TokenSets.from_ids({f"{k}": [k] for k in range(33)}),
     "sets: expected at most 32 of them, got 33"),
    (lambda: rk.TokenSets.from_ids("a"), "sets: expected a mapping from names to token ids"),
    (lambda: rk.TokenSets.from_ids({"a": []}), r"sets\['a'\]: expected at least one id"),
    (lambda: rk.TokenSets.from_ids({"a": [None]}), r"sets\['a'\]: expected token ids, .* got None"),
    (lambda: rk.TokenSets.from_ids({"a": "wait"}), "strings go to from_tokenizer, got 'wait'"),
    (lambda: rk.TokenSets.from_ids({1: [2]}), "sets: expected names that are strings, got 1"),
    (lambda: rk.TokenSets.from_ids({"a": [1 << 31]}), r"sets\['a'\]: expected token ids"),
    (lambda: rk.TokenSets.from_tokenizer(3, {"a": ["b"]}), "tokenizer: expected an object with"),
    (lambda: rk.TokenSets.from_tokenizer(BYTE_LEVEL, {"a": [" "]}), "strings with more than"),
    (lambda: rk.TokenSets.from_tokenizer(BYTE_LEVEL, {"a": ["b"]}, variants="x"),
     "variants: expected 'exact' or 'space' or 'all', got 'x'"),
    (lambda: rk.TokenSets.from_tokenizer(Pieces(), {"a": ["Wait", "but"]}),
     r'one token each \(variants="space" also takes .*\), got a: \'Wait\''),
]  # fmt: skip
STATES: list[tuple[Callable[[], Any], str]] = [
    (lambda: rk.ModulationState(0, state_of().sets), "max_requests: expected an integer in"),
    (lambda: rk.ModulationState(True, state_of().sets), "max_requests: expected .* got True"),
    (lambda: rk.ModulationState(1 << 31), r"max_requests: .* in \[1, 2147483647\], got 2147483648"),
    (lambda: state_of().load_state_dict(None), "state: expected a mapping, as state_dict returns"),
    (lambda: rk.ModulationState(1, {"a": [1]}), "sets: expected a TokenSets or None, got dict"),
    (lambda: rk.ModulationState(1).add(0, rk.Modulation(cyclic=rk.Cyclic(1.0, 5)), []),
     r"cyclic.set: expected a TokenSets that has it \(sets=TokenSets.from_ids\(\{'reflect': ids\}\)"
     r"\), got no sets"),
    (lambda: state_of().add(4, rk.Modulation(), []), r"slot: expected an integer in \[0, 4\)"),
    (lambda: state_of().add(True, rk.Modulation(), []), r"slot: expected an integer .* got True"),
    (lambda: state_of(rk.Modulation()).add(0, rk.Modulation(), []), "slot: expected a slot that i"),
    (lambda: state_of().remove(1), "slot: expected a slot in use, got 1"),
    (lambda: state_of().add(0, {}, []), "spec: expected a Modulation, got dict"),
    (lambda: state_of(rk.Modulation(ban=rk.Ban("none"))), "ban.set: expected 'reflect' or 'other'"),
    (lambda: state_of().add(0, rk.Modulation(), [-1]), "prompt_tokens: expected values in"),
    (lambda: state_of().add(0, rk.Modulation(), ONE.to("meta")), "prompt_tokens: .* with values"),
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
LOCAL, LOCAL3 = torch.tensor([0, 1]), torch.tensor([0, 1, 2])


def call(*args: Any, spec: rk.Modulation = PLAIN, logits: Any = Z, **more: Any) -> Any:
    args = args or (ONE,)
    return rk.modulate_logits_(logits, state_of(spec), *args, **more)


ROWS: list[tuple[Callable[[], Any], str]] = [
    (lambda: call(logits=[1.0]), r"logits: expected a tensor \(R, V\), got list"),
    (lambda: call(logits=Z[0]), r"logits: expected a tensor \(R, V\), got \(16,\)"),
    (lambda: call(logits=Z.long()), "logits: expected dtype torch.float32"),
    (lambda: call(logits=Z[:, :12], spec=WAITS, temperature=1.0),
     "logits: expected a vocabulary above the state's ids, up to 15, got 12"),
    (lambda: call(logits=Z[:, :END], spec=WAITS, temperature=torch.ones(1)),
     "logits: expected a vocabulary above the state's ids, up to 15, got 15"),
    (lambda: call(logits=torch.zeros(VOCAB, 1).T[:, ::1].expand(1, VOCAB)[:, :1].expand(1, VOCAB)),
     "logits: expected a contiguous last dimension"),
    (lambda: call(torch.tensor([0, 0]), logits=Z.expand(2, VOCAB)), "rows that do not overlap"),
    (lambda: call(logits=Z.to("meta")), "logits: expected the device of state, cpu, got meta"),
    (lambda: call(ONE.to("meta")), "slot: expected the device of state, cpu, got meta"),
    (lambda: rk.modulate_logits_(Z, None, ONE), "state: expected a ModulationState, got NoneType"),
    (lambda: call(0), "slot: expected a tensor, got int"),
    (lambda: call(ONE.int()), "slot: expected dtype torch.int64"),
    (lambda: call(torch.tensor([0, 1])), r"slot: expected shape \(R,\) = \(1,\), got \(2,\)"),
    (lambda: call(torch.tensor([4])), r"slot: expected values in \[-1, 4\), got 4 at \(0,\)"),
    (lambda: call(torch.tensor([-2])), r"slot: expected values in \[-1, 4\), got -2"),
    (lambda: call(torch.tensor([0, 4]), logits=torch.zeros(2, VOCAB)), r"slot: .* got 4 at \(1,\)"),
    (lambda: call(ONE, 1), r"local_pos: expected 0 or a \(R,\) tensor, got 1"),
    (lambda: call(ONE, False), r"local_pos: expected 0 or a \(R,\) tensor, got False"),
    (lambda: call(ONE, ONE), r"draft_tokens: expected a \(R,\) tensor beside local_pos"),
    (lambda: call(ONE, ONE + 2, ONE + 1), r"local_pos: expected the number .* got 2 at \(0,\)"),
    (lambda: call(torch.tensor([0, 1]), 2 * LOCAL, LOCAL, logits=torch.zeros(2, VOCAB)),
     r"local_pos: expected the number of draft tokens before each row.* got 2 at \(1,\)"),
    (lambda: call(torch.tensor([0, 1, 0]), torch.tensor([0, 0, 2]), LOCAL3,
                  logits=torch.zeros(3, VOCAB)), r"local_pos: .* of its slot, got 2 at \(2,\)"),
    (lambda: call(torch.tensor([0, 0, 0]), torch.tensor([0, 2, 1]), LOCAL3,
                  logits=torch.zeros(3, VOCAB)), r"local_pos: .* of its slot, got 2 at \(1,\)"),
    (lambda: call(torch.tensor([0, 0, 0]), torch.tensor([2, 0, 1]), LOCAL3,
                  logits=torch.zeros(3, VOCAB)), r"local_pos: .* of its slot, got 2 at \(0,\)"),
    (lambda: call(torch.tensor([0, 0, 0]), torch.tensor([0, 1, 1]), LOCAL3,
                  logits=torch.zeros(3, VOCAB)), r"local_pos: .* of its slot, got 1 at \(2,\)"),
    (lambda: call(torch.tensor([0, 0, 1]), LOCAL3, LOCAL3,
                  logits=torch.zeros(3, VOCAB)), r"local_pos: .* of its slot, got 2 at \(2,\)"),
    (lambda: call(ONE, 0, LOCAL), r"draft_tokens: expected shape \(R,\)"),
    (lambda: call(ONE, LOCAL, LOCAL[None], LOCAL, logits=torch.zeros(2, VOCAB)),
     "local_pos: expected 0 beside parents"),
    (lambda: call(ONE, 0, LOCAL[None], torch.tensor([-1, 0]), logits=torch.zeros(3, VOCAB)),
     "logits: expected B·N rows with N = 2, got 3"),
    (lambda: call(ONE, 0, LOCAL[None], torch.tensor([-1, 1]), logits=torch.zeros(2, VOCAB)),
     r"parents: expected -1, then the number of an earlier node each, got 1 at \(1,\)"),
    (lambda: call(ONE, 0, LOCAL[None], torch.tensor([-1, -1]).int(), logits=torch.zeros(2, VOCAB)),
     r"parents: .*, got -1 at \(1,\)"),
    (lambda: call(ONE, 0, LOCAL[None], torch.tensor([0, 0]).int(), logits=torch.zeros(2, VOCAB)),
     r"parents: .*, got 0 at \(0,\)"),
    (lambda: call(ONE, 0, LOCAL[None], [-1, 0], logits=torch.zeros(2, VOCAB)),
     "parents: expected a tensor, got list"),
    (lambda: call(ONE, 1, LOCAL[None], torch.tensor([-1, 0]), logits=torch.zeros(2, VOCAB)),
     "local_pos: expected 0 beside parents, which say it, got 1"),
    (lambda: call(ONE, 0, LOCAL[None], LOCAL[:0], logits=torch.zeros(2, VOCAB)),
     r"parents: expected shape \(N,\) with 1 to 4096 nodes, got \(0,\)"),
    (lambda: call(ONE, 0, torch.zeros(1, 4097).long(), torch.arange(4097) - 1,
                  logits=torch.zeros(4097, VOCAB)), r"parents: .* 1 to 4096 nodes, got \(4097,\)"),
    (lambda: call(ONE, 0, None, torch.tensor([-1, 0]), logits=torch.zeros(2, VOCAB)),
     "draft_tokens: expected a tensor, got NoneType"),
    (lambda: call(spec=SOFT), "allow_dense: expected True for requests with a soft budget"),
    (lambda: call(spec=WAITS), r"temperature: expected a number or \(R,\) for requests"),
    (lambda: call(spec=WAITS, temperature=-1.0), "temperature: expected a finite number >= 0"),
    (lambda: call(spec=WAITS, temperature=LOCAL / 1), r"temperature: expected shape \(R,\)"),
    (lambda: call(spec=WAITS, temperature=torch.tensor([NAN])),
     r"temperature: expected finite values >= 0, got nan at \(0,\)"),
    (lambda: call(spec=WAITS, temperature=torch.tensor([-1.0])), "finite values >= 0, got -1.0"),
    (lambda: call(spec=WAITS, temperature=torch.tensor([INF])), "finite values >= 0, got inf"),
    (lambda: call(spec=WAITS, temperature=torch.ones(1, device="meta")),
     "temperature: expected the device of state"),
    (lambda: call(allow_dense="no"), "allow_dense: expected False or True, got 'no'"),
    (lambda: call(torch.tensor([0, 0]), spec=WAITS, temperature=torch.tensor([1.0, torch.inf]),
                  logits=torch.zeros(2, VOCAB)), r"temperature: .* got inf at \(1,\)"),
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
    (lambda: push(ONE, ONE[None].to("meta"), ONE), "tokens: expected the device of state, cpu"),
    (lambda: push(LOCAL, ONE[None], ONE), r"slot: expected shape \(B,\) = \(1,\), got \(2,\)"),
    (lambda: push(ONE, ONE[None], LOCAL), r"length: expected shape \(B,\)"),
    (lambda: push(ONE, ONE[None], ONE + 2), r"length: expected values in \[0, 2\), got 2"),
    (lambda: push(ONE, ONE[None], ONE - 1), r"length: expected values in \[0, 2\), got -1"),
    (lambda: push(ONE + 4, ONE[None], ONE), r"slot: expected values in \[-1, 4\), got 4"),
    (lambda: push(ONE - 2, ONE[None], ONE), r"slot: expected values in \[-1, 4\), got -2"),
    (lambda: push(ONE.repeat(2), LOCAL[:, None], LOCAL), r"slot: expected no slot twice, got \[0"),
    (lambda: push(torch.tensor([1, 0, 1]), LOCAL3[:, None], 0 * LOCAL3), "slot: .*ice, got .1, 0"),
    (lambda: push(spec=CONF), r"confidence: expected a \(B, D \+ 1\) tensor for requests"),
    (lambda: push(spec=TRIGGER), r"entropy: expected a \(B, D \+ 1\) tensor for requests"),
    (lambda: push(spec=CONF, confidence=ONE[None]), "confidence: expected dtype torch.float32"),
    (lambda: push(spec=CONF, confidence=torch.zeros(2, 1)), r"confidence: expected shape \(B, D"),
    (lambda: push(spec=CONF, confidence=torch.zeros(1, 1, device="meta")),
     "confidence: expected the device of state"),
    (lambda: push(LOCAL, torch.ones(2, 2).long(), LOCAL, spec=CONF, confidence=torch.ones(2, 2).T),
     "confidence: expected a contiguous tensor"),
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
    for wrong, message in ROWS + COMMITS:
        with pytest.raises(ValueError, match=message):
            wrong()
    assert call(logits=Z.clone())[0, 1] == 1
    spec = rk.Modulation(constant=rk.Constant(1.0), think_end=END)
    padded = torch.tensor([0, 0, -1, -1]), torch.tensor([0, 1, 7, 0]), torch.tensor([3, END, 3, 3])
    rows = call(*padded, spec=spec, logits=torch.zeros(4, VOCAB))
    assert rows[:, 1].tolist() == [1, 0, 0, 0]
    state = state_of(spec)
    slot, length = torch.tensor([-1, 0, -1]), torch.tensor([0, 2, 1])
    rk.commit_(state, slot, torch.ones(3, 2, dtype=torch.int64), length)
    assert state.tensors.progress[:, at.T].tolist() == [2, 0, 0, 0]


def test_raw_operators_refuse_what_they_cannot_read():
    """Messages of the kernels' own checks, on a call past the fronts."""
    state = state_of(PLAIN)
    read = records, sets = state.tensors
    wrong = [
        ((Z, ONE, None, None, None, None, records[:, :9].contiguous(), sets, True), "records"),
        ((Z, ONE, None, None, None, None, records, sets.int(), True), "sets: expected dtype"),
        ((Z, ONE, None, None, None, None, records, sets[:39], True), "sets: expected bounds"),
        ((Z, ONE, ONE, None, None, None, *read, True), "local_pos: expected draft_tokens"),
        ((Z, torch.tensor([7]), None, None, None, None, *read, True), "slot: got 7 at 0"),
        ((Z.half().to(torch.complex64), ONE, None, None, None, None, *read, True), "logits"),
    ]
    for args, message in wrong:
        with pytest.raises(RuntimeError, match=message) as caught:
            OPS.modulate_logits_(*args)
        assert re.match(r"\w+, csrc/", str(caught.value))  # not where the library was built
    assert not Z.any() and SETS["reflect"] == state.sets["reflect"]
