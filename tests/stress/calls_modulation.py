"""Valid calls of the modulation family, by the name of the function."""

from __future__ import annotations

from typing import Any

import torch
from calls_speculation import filters, request, words
from draws import FLOATS, Arguments, Draw

import reasonkern as rk

VOCAB, SLOTS = 40, 3
START, END = 30, 31
SETS = rk.TokenSets.from_ids({"reflect": [1, 3, 5]})


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


def parts(draw: Draw) -> Arguments:
    """The numbers of every part as arguments of their own, so that they are spoilt one by one."""
    return {
        "amplitude": draw.number(-9, 9),
        "period": draw.number(0.5, 9),
        "shift": draw.number(-1, 1),
        "windows": draw.choice(None, [(0, 3)], ((1, 2), (5, 9))),
        "alpha": draw.number(-9, 9),
        "beta": draw.integer(0, 5),
        "bias": draw.number(-9, 9),
        "points": draw.choice([(0, 0.0), (4, 2.0)], ((1, -1.0),)),
        "start": draw.choice(0.0, 0.5),
        "margin": draw.number(0.25, 9),
        "tokens": draw.integer(2, 6),
        "end": draw.choice([7, END], (END,)),
        "least": draw.integer(0, 2),
        "ignore": draw.integer(1, 2),
        "wait": draw.choice([9], (9, 3)),
        "threshold": draw.number(0, 5),
        "window": draw.integer(2, 9),
        "eos": draw.choice(None, 2),
        "k": draw.number(0, 9),
        "floor": draw.number(0, 2),
        "set": "reflect",
    }


def run_parts(
    amplitude: Any, period: Any, shift: Any, windows: Any, alpha: Any, beta: Any, bias: Any,
    points: Any, start: Any, margin: Any, tokens: Any, end: Any, least: Any, ignore: Any, wait: Any,
    threshold: Any, window: Any, eos: Any, k: Any, floor: Any, set: Any,
) -> Any:  # fmt: skip
    """A request with all of them, three tokens long."""
    spec = rk.Modulation(
        cyclic=rk.Cyclic(amplitude, period, shift, windows, set),
        tip=rk.TIP(alpha, beta, set),
        constant=rk.Constant(bias, set),
        schedule=rk.Schedule(points, set),
        ban=rk.Ban(set),
        budget=rk.Budget(tokens, end, rk.SoftBudget(start, margin)),
        min_think=rk.MinThink(least, ignore, wait),
        deepconf=rk.DeepConf(threshold, window, eos),
        entropy_trigger=rk.EntropyTrigger(window, k, floor),
        think_end=END,
    )
    made, slot = rk.ModulationState(1, SETS), torch.zeros(1, dtype=torch.int64)
    made.add(0, spec, [START])
    out, one = [], torch.ones(1, 1)
    for token in (1, 4, 9):
        logits = torch.zeros(1, VOCAB)
        out.append(rk.modulate_logits_(logits, made, slot, temperature=0.7, allow_dense=True))
        rk.commit_(made, slot, one.long() * token, slot + 1, entropy=one, confidence=one)
    return out


def state(draw: Draw) -> rk.ModulationState:
    made = rk.ModulationState(SLOTS, SETS)
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
    made = rk.ModulationState(SLOTS, SETS)
    made.load_state_dict(saved)
    slot, logits = torch.arange(SLOTS), torch.zeros(SLOTS, VOCAB)
    out = rk.modulate_logits_(logits, made, slot, temperature=1.0, allow_dense=True)
    tokens, one = torch.ones(SLOTS, 1, dtype=torch.int64), torch.ones(SLOTS, 1)
    rk.commit_(made, slot, tokens, tokens[:, 0], entropy=one, confidence=one)
    return out


def completion_probe(draw: Draw) -> Arguments:
    rows = draw.choice(0, 1, 3)
    shared, each = [4, 5], torch.tensor([[4, -1], [5, 6], [7, -1]])
    return {
        "logits": draw.logits(rows, VOCAB),
        "slot": draw.ids(SLOTS, rows, low=-1),
        "ids_a": draw.choice(shared, each),
        "ids_b": draw.choice([8], each + (each >= 0)),
    }


def run_completion_probe(**arguments: Any) -> Any:
    """NaN of padding rows, as its docstring says."""
    return rk.completion_probe(**arguments).nan_to_num()


def srgen_delta(draw: Draw) -> Arguments:
    rows, width, dtype = draw.integer(1, 5), draw.choice(1, 4), draw.choice(*FLOATS)
    hidden, head = draw.normal(rows, width, dtype=dtype), draw.normal(VOCAB, width, dtype=dtype)
    return {
        "prefix": draw.choice((hidden, head), draw.normal(rows, VOCAB, dtype=dtype)),
        "labels": draw.ids(VOCAB, rows),
        "last_hidden": draw.normal(width, dtype=dtype),
        "weight": head,
        "mask": draw.maybe(lambda: draw.bools(rows)),
        "chunk_rows": draw.choice(None, 2),
    }


def run_srgen_delta(**arguments: Any) -> Any:
    """In two steps: any number is legal, and 2^62 of them take their time."""
    return rk.srgen_delta(**arguments, steps=2)


def latent_policy_gradient(draw: Draw) -> Arguments:
    rows, dtype = draw.size(), draw.choice(*FLOATS)
    return {
        "hidden": draw.normal(rows, 4, dtype=dtype).requires_grad_(draw.flag()),
        "weight": draw.normal(VOCAB, 4, dtype=dtype),
        "reward": draw.choice(-1.0, draw.normal(rows)),
        "chunk_rows": draw.choice(None, 1),
    }


def entropy_forks(draw: Draw) -> Arguments:
    shape = draw.size(), draw.size()
    entropy = draw.positive(*shape).to(draw.choice(*FLOATS))
    return {"entropy": entropy, "mask": draw.bools(*shape), "n": draw.integer(0, 5)}


CALLS = {
    "completion_probe": (run_completion_probe, completion_probe),
    "srgen_delta": (run_srgen_delta, srgen_delta),
    "latent_policy_gradient": (rk.latent_policy_gradient, latent_policy_gradient),
    "entropy_forks": (rk.entropy_forks, entropy_forks),
    "modulate_logits_": (run_modulate_logits_, modulate_logits_),
    "sample_controlled": (rk.sample_controlled, sample_controlled),
    "commit_": (run_commit_, commit_),
    "Modulation": (rk.Modulation, spec),
    "Modulation's parts": (run_parts, parts),
    "ModulationState": (run_modulation_state, modulation_state),
    "ModulationState.load_state_dict": (run_foreign_state, foreign_state),
    "TokenSets": (lambda sets: rk.TokenSets.from_ids(sets)["a"], lambda draw: {"sets": {"a": [1]}}),
}
