"""Stage 4: the same model, the same seeds, with and without CyclicReflex and a thinking budget."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

import reasonkern as rk

from .. import generation
from .._progress import progress
from .context import Context
from .model import Decoding, Transformer
from .solve import TEMPERATURE, Problem, is_correct, problems_of
from .tokenizer import EOS, FIRST_PIECE, PAD, Tokenizer

WORDS = (b"wait", b"but", b"alternatively")  # CyclicReflex's set, here with a space before it, too
AMPLITUDE, PERIOD = 4.0, 64  # the published 1200 is for texts of thousands of tokens
BUDGET = 64  # thinking tokens
TRAJECTORIES = 8
BIN = 8  # tokens
ENTROPY_ROWS = 8  # texts whose states are held at a time


@dataclass
class Controlled:
    """What one setting gave; means per text, and counts by position in bins of BIN tokens."""

    name: str
    texts: int = 0
    tokens: float = 0.0
    thinking: float = 0.0
    reflections: float = 0.0
    correct: int = 0
    entropy: float = 0.0
    """Of the model itself, at the tokens of the text, in nats."""
    tokens_at: list[int] = field(default_factory=list)
    reflections_at: list[int] = field(default_factory=list)
    entropy_at: list[float] = field(default_factory=list)


@dataclass(frozen=True)
class Markers:
    """Token ids that the controls are about."""

    reflect: list[int]
    end: int
    """The first token of </think>, which no other text begins with."""
    phrase: list[int]

    @classmethod
    def of(cls, tokenizer: Tokenizer) -> Markers | None:
        """None for texts that do not reflect, or do not end their thinking."""
        reflect = [
            FIRST_PIECE + index
            for index, piece in enumerate(tokenizer.pieces)
            if piece.strip().lower() in WORDS
        ]
        end = tokenizer.encode("</think>")[0]
        if not reflect or tokenizer.decode([end]) != "</":
            return None
        return cls(reflect, end, tokenizer.encode("\n</think>\n"))


def control_reflection(context: Context) -> None:
    """Stage 4: one batch of all problems per setting."""
    markers = Markers.of(context.tokenizer)
    if markers is None:
        print("stage 4 skipped: the traces have no Wait, But or Alternatively, or no </think>")
        return
    cyclic = rk.Cyclic(AMPLITUDE, PERIOD)
    budget = rk.Budget(BUDGET, markers.phrase)
    settings = {
        "plain": None,
        "CyclicReflex": rk.Modulation(cyclic=cyclic, think_end=markers.end),
        f"budget {BUDGET}": rk.Modulation(budget=budget, think_end=markers.end),
        "both": rk.Modulation(cyclic=cyclic, budget=budget, think_end=markers.end),
    }
    problems = problems_of(context)
    runs: list[dict[str, Any]] = []
    context.results["control"] = {
        "amplitude": AMPLITUDE, "period": PERIOD, "budget": BUDGET, "bin": BIN, "runs": runs,
    }  # fmt: skip
    context.model.eval()
    with progress("stage 4, control", len(settings)) as update:
        for name, spec in settings.items():
            if len(runs) > 1 and context.out_of_time("control"):  # two of them compare
                break
            runs.append(asdict(_run(context, problems, name, spec, markers)))
            update(f"{name}: {runs[-1]['reflections']:.1f} reflection tokens per text")
    if len(runs) < len(settings):
        print(f"stage 4: {len(runs)} of {len(settings)} settings in the time budget")


def _run(
    context: Context, problems: list[Problem], name: str, spec: rk.Modulation | None,
    markers: Markers,
) -> Controlled:  # fmt: skip
    model = Decoding(context.model)
    prompts = [problem.ids for problem in problems]
    texts = generation.generate(
        model, prompts, temperature=TEMPERATURE, seed=context.config.seed, eos=(EOS,),
        num_trajectories=TRAJECTORIES, max_new_tokens=model.window - max(map(len, prompts)),
        control=_state(spec, prompts, markers, context.device),
    ).texts  # fmt: skip
    each = [problem for problem in problems for _ in range(TRAJECTORIES)]
    return _counted(context, name, each, texts, markers)


def _state(
    spec: rk.Modulation | None, prompts: list[list[int]], markers: Markers, device: torch.device
) -> tuple[rk.ModulationState, Tensor] | None:
    if spec is None:
        return None
    requests = len(prompts) * TRAJECTORIES
    sets = rk.TokenSets.from_ids({"reflect": markers.reflect})
    state = rk.ModulationState(requests, sets, device)
    for slot in range(requests):
        state.add(slot, spec, prompts[slot // TRAJECTORIES])
    return state, torch.arange(requests, device=device)


def _counted(
    context: Context, name: str, problems: list[Problem], texts: list[list[int]], markers: Markers
) -> Controlled:
    out = Controlled(name, len(texts))
    longest = max(map(len, texts))
    bins = -(-longest // BIN)
    entropy = _entropies(context.model, [p.ids for p in problems], texts)
    sums = [0.0] * bins
    out.tokens_at, out.reflections_at = [0] * bins, [0] * bins
    for problem, text, values in zip(problems, texts, entropy, strict=True):
        for t, (token, value) in enumerate(zip(text, values, strict=True)):
            out.tokens_at[t // BIN] += 1
            out.reflections_at[t // BIN] += token in markers.reflect
            sums[t // BIN] += value
        out.thinking += (text.index(markers.end) if markers.end in text else len(text)) / len(texts)
        out.correct += is_correct(context, problem, text)
    total = sum(out.tokens_at)
    out.tokens, out.reflections = total / len(texts), sum(out.reflections_at) / len(texts)
    out.entropy = sum(sums) / total
    out.entropy_at = [s / n for s, n in zip(sums, out.tokens_at, strict=True)]
    return out


def _entropies(
    model: Transformer, prompts: Sequence[list[int]], texts: Sequence[list[int]]
) -> list[list[float]]:
    """Of the row that each token of a text was drawn from, before control, at T = 1."""
    found: list[list[float]] = []
    device = model.head.device
    for begin in range(0, len(texts), ENTROPY_ROWS):
        pairs = list(zip(prompts, texts, strict=True))[begin : begin + ENTROPY_ROWS]
        whole = [torch.tensor(prompt + text) for prompt, text in pairs]
        ids = pad_sequence(whole, batch_first=True, padding_value=PAD).to(device)
        with torch.no_grad():
            hidden = model.hidden(ids)
            values = rk.linear_token_stats(hidden, model.head, ids).entropy.tolist()
        for (prompt, text), row in zip(pairs, values, strict=True):
            found.append(row[len(prompt) - 1 : len(prompt) + len(text) - 1])
    return found
