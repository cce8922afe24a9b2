"""Stage 3: the trained model solves problems, plain and with speculation: the same texts."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import Any

import reasonkern as rk

from .. import generation
from .._progress import Update, progress
from . import arithmetic
from .context import Context
from .model import Decoding
from .tokenizer import BOS, EOS, VOCABULARY

TRAJECTORIES = (1, 4, 16)
TEMPERATURE = 0.6
CAPACITY = 1 << 16  # contexts of the table


@dataclass
class Problem:
    """A prompt; its statement where the answer can be checked."""

    ids: list[int]
    statement: str | None = None


@dataclass
class Outcome:
    """What one number of trajectories gave, over all problems, plain and with speculation."""

    trajectories: int
    texts: int = 0
    equal: int = 0
    """Texts that are the same token for token."""
    correct: int = 0
    tokens: int = 0
    tokens_per_step: float = 0.0
    """With speculation, per request."""
    tokens_per_second: dict[str, float] = field(default_factory=dict)


def solve_problems(context: Context) -> None:
    """A new table for every number of trajectories, so that they compare."""
    problems = problems_of(context)
    model = Decoding(context.model)
    outcomes: list[dict[str, Any]] = []
    context.results["solve"] = {
        "temperature": TEMPERATURE, "problems": len(problems), "outcomes": outcomes,
    }  # fmt: skip
    context.model.eval()
    with progress("stage 3, solving", len(TRAJECTORIES) * len(problems)) as update:
        for trajectories in TRAJECTORIES:
            if outcomes and context.out_of_time("solve"):
                break
            outcomes.append(asdict(_outcome(context, model, problems, trajectories, update)))


def _outcome(
    context: Context, model: Decoding, problems: list[Problem], trajectories: int, update: Update
) -> Outcome:
    outcome = Outcome(trajectories)
    table = rk.NgramTable(CAPACITY, vocab_size=VOCABULARY, device=context.device)
    plain, speculative = generation.Statistics(), generation.Statistics()
    for seed, problem in enumerate(problems):
        options: dict[str, Any] = {
            "temperature": TEMPERATURE, "seed": context.config.seed + seed, "eos": (EOS,),
            "num_trajectories": trajectories,
            "max_new_tokens": model.window - len(problem.ids),
        }  # fmt: skip
        expected = generation.generate(model, [problem.ids], statistics=plain, **options).texts
        texts = generation.generate(
            model, [problem.ids], table=table, statistics=speculative, **options
        ).texts
        outcome.texts += len(texts)
        outcome.equal += sum(a == b for a, b in zip(texts, expected, strict=True))
        outcome.correct += sum(is_correct(context, problem, text) for text in texts)
        update(f"{trajectories} trajectories, {speculative.mean_accepted:.2f} tokens per step")
    outcome.tokens = speculative.tokens
    outcome.tokens_per_step = speculative.mean_accepted
    outcome.tokens_per_second = {
        "plain": plain.tokens_per_second, "speculation": speculative.tokens_per_second,
    }  # fmt: skip
    return outcome


def problems_of(context: Context) -> list[Problem]:
    """New ones where they are generated; those of the user's traces otherwise."""
    config, tokenizer = context.config, context.tokenizer
    room = max(1, config.window // 2)  # the other half is for the answer
    if config.traces is None:
        made = arithmetic.generate(config.problems, samples=2, seed=config.seed + 1)
        prompts = dict.fromkeys(trace.prompt for trace in made)
        return [Problem([BOS, *tokenizer.encode(p)][-room:], p) for p in prompts]
    found = {s.problem: s.ids[: s.prompt_length] for s in context.sequences}
    return [Problem(ids[-room:]) for ids in list(found.values())[: config.problems]]


def is_correct(context: Context, problem: Problem, text: list[int]) -> bool:
    """Whether the text holds the answer; False where that cannot be checked."""
    if problem.statement is None:
        return False
    try:
        return arithmetic.verify(problem.statement, context.tokenizer.decode(text))
    except UnicodeDecodeError:  # bytes of a model that has learnt little
        return False
