"""Valid calls of the modulation family, by the name of the function."""

from __future__ import annotations

from typing import Any

import torch
from calls_speculation import filters, request, words
from draws import Arguments, Draw

import reasonkern as rk

VOCAB, SLOTS = 40, 3
START, END = 30, 31


def spec(draw: Draw) -> Arguments:
    """The parts of a `Modulation`, each there or not."""
    soft = draw.maybe(lambda: rk.SoftBudget(0.5, 0.25))
    parts: Arguments = {
        "cyclic": draw.maybe(lambda: rk.Cyclic(draw.number(-9, 9), draw.number(0.5, 9), 0.25)),
        "tip": draw.maybe(lambda: rk.TIP(3.0, draw.integer(0, 5))),
        "constant": draw.maybe(lambda: rk.Constant(1.5)),
        "schedule": draw.maybe(lambda: rk.Schedule([(0, 0.0), (4, 2.0)])),
        "ban": draw.maybe(rk.Ban),
        "budget": draw.maybe(lambda: rk.Budget(draw.integer(1, 6), [7, END], soft)),
        "min_think": draw.maybe(lambda: rk.MinThink(draw.integer(0, 1), 1, [9])),
        "deepconf": draw.maybe(lambda: rk.DeepConf(draw.number(0, 5), 4, eos=2)),
        "entropy_trigger": draw.maybe(rk.EntropyTrigger),
        "think_start": draw.choice(None, START),
        "think_end": END,
    }
    return parts


def state(draw: Draw) -> rk.ModulationState:
    made = rk.ModulationState(SLOTS, rk.TokenSets.from_ids({"reflect": [1, 3, 5]}))
    for slot in range(SLOTS):
        prompt = draw.ids(VOCAB, draw.size()).tolist()
        made.add(slot, rk.Modulation(**spec(draw)), [*prompt, START], draw.ids(VOCAB, 3).tolist())
    return made


def cloned(given: Any) -> Any:
    """A state that a call may advance."""
    if not isinstance(given, rk.ModulationState):
        return given
    twin = rk.ModulationState(given.max_requests, given.sets)
    twin.load_state_dict(given.state_dict())
    return twin


def modulate_logits_(draw: Draw) -> Arguments:
    rows = draw.choice(0, 1, 2, 3)
    return {
        "logits": draw.logits(rows, VOCAB),
        "state": state(draw),
        "slot": torch.arange(rows) - draw.integer(0, 1),
        "temperature": draw.choice(0.0, 0.7, draw.positive(rows).clone()),
        "allow_dense": True,
    }


def run_modulate_logits_(logits: Any, **arguments: Any) -> Any:
    given = logits.detach().clone() if isinstance(logits, torch.Tensor) else logits
    return rk.modulate_logits_(given, **arguments)


def sample_controlled(draw: Draw) -> Arguments:
    arguments = modulate_logits_(draw)
    rows = len(arguments["slot"])
    del arguments["allow_dense"]
    mask = {"mask": words(draw, rows)}
    return arguments | request(draw, rows) | filters(draw, rows) | mask


def commit_(draw: Draw) -> Arguments:
    rows, width = draw.choice(0, 1, 2, 3), draw.integer(1, 4)
    return {
        "state": state(draw),
        "slot": torch.randperm(SLOTS)[:rows],
        "tokens": draw.ids(VOCAB, rows, width, low=-1).contiguous(),
        "length": draw.ids(width + 1, rows).contiguous(),
        "entropy": draw.positive(rows, width).contiguous(),
        "confidence": draw.positive(rows, width).contiguous(),
    }


def run_commit_(state: Any, **arguments: Any) -> Any:
    advanced = cloned(state)
    rk.commit_(advanced, **arguments)
    return advanced.stopped


def modulation_state(draw: Draw) -> Arguments:
    prompt, generated = draw.ids(VOCAB, 4), draw.ids(VOCAB, draw.size())
    return {
        "max_requests": draw.integer(1, 4),
        "sets": {"reflect": draw.ids(VOCAB, 3).tolist()},
        "slot": 0,
        "prompt_tokens": draw.choice(prompt, prompt.tolist()),
        "generated_tokens": draw.choice(generated, generated.tolist()),
    }


def run_modulation_state(max_requests: Any, sets: Any, slot: Any, **tokens: Any) -> Any:
    made = rk.ModulationState(max_requests, rk.TokenSets.from_ids(sets))
    spec = rk.Modulation(ban=rk.Ban(), budget=rk.Budget(3, [4, END]), think_end=END)
    made.add(slot, spec, **tokens)
    twin = cloned(made)
    logits = rk.modulate_logits_(torch.zeros(1, VOCAB), twin, torch.zeros(1, dtype=torch.int64))
    twin.remove(slot)
    return logits


def foreign_state(draw: Draw) -> Arguments:
    """A saved state, whose tensors then come from anywhere."""
    return state(draw).state_dict()


def run_foreign_state(**saved: Any) -> Any:
    made = rk.ModulationState(SLOTS, rk.TokenSets.from_ids({"reflect": [1, 3, 5]}))
    made.load_state_dict(saved)
    slot, logits = torch.arange(SLOTS), torch.zeros(SLOTS, VOCAB)
    out = rk.modulate_logits_(logits, made, slot, temperature=1.0, allow_dense=True)
    tokens, one = torch.ones(SLOTS, 1, dtype=torch.int64), torch.ones(SLOTS, 1)
    rk.commit_(made, slot, tokens, tokens[:, 0], entropy=one, confidence=one)
    return out


CALLS = {
    "modulate_logits_": (run_modulate_logits_, modulate_logits_),
    "sample_controlled": (rk.sample_controlled, sample_controlled),
    "commit_": (run_commit_, commit_),
    "Modulation": (rk.Modulation, spec),
    "ModulationState": (run_modulation_state, modulation_state),
    "ModulationState.load_state_dict": (run_foreign_state, foreign_state),
    "TokenSets": (lambda sets: rk.TokenSets.from_ids(sets)["a"], lambda draw: {"sets": {"a": [1]}}),
}
