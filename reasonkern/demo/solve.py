"""Stage 3: the trained model solves problems, plain and with speculation: the same texts."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import reasonkern as rk

from .. import generation
from .._progress import progress
from ..generation import Statistics
from . import arithmetic
from .context import Context
from .model import Decoding
from .tokenizer import BOS, EOS, VOCABULARY

TRAJECTORIES = (1, 4, 16)
TEMPERATURE = 0.6
CAPACITY = 1 << 16  # contexts of the table
WAYS = ("plain", "speculation")


@dataclass
class Problem:
    """A prompt; its statement where the answer can be checked."""

    ids: list[int]
    statement: str | None = None


def solve_problems(context: Context) -> None:
    """Trajectories of a problem one after another, which share the table; then as many at once.

    Those have other seeds: the table has seen no text of theirs.
    """
    problems = problems_of(context)
    model = Decoding(context.model.eval())
    solving = _Solving(context, model)
    results: dict[str, Any] = {"temperature": TEMPERATURE, "problems": len(problems)}
    context.results["solve"] = results
    most = TRAJECTORIES[-1]
    with progress("stage 3, solving", (most + 1) * len(problems)) as update:
        for index, problem in enumerate(problems):
            table = rk.NgramTable(CAPACITY, vocab_size=VOCABULARY, device=context.device)
            seeds = rk.request_seeds(context.config.seed + index, 2 * most)
            for j in range(most):
                if solving.texts and context.out_of_time("solve"):
                    break
                solving.compare(problem, table, seeds[j : j + 1], j)
                update(f"problem {index + 1}, {solving.tokens_per_step(j + 1):.2f} tokens per step")
            if not context.out_of_time("solve"):
                solving.compare(problem, table, seeds[most:], most)
                update(f"problem {index + 1}, {most} at once")
    ran = [n for n in TRAJECTORIES if solving.has_run(n - 1)]
    results["outcomes"] = [solving.outcome(range(n), n) for n in ran]
    if solving.has_run(most):
        results["at_once"] = solving.outcome((most,), most)
    results["texts"], results["equal"] = solving.texts, solving.equal
    results["asked"] = 2 * most * len(problems)
    results["correct"] = solving.correct


class _Solving:
    """Statistics of both ways by turn: trajectory j of every problem, and last the batch."""

    def __init__(self, context: Context, model: Decoding) -> None:
        self._context, self._model = context, model
        turns = range(TRAJECTORIES[-1] + 1)
        self._seen = {way: [Statistics() for _ in turns] for way in WAYS}
        self.texts = self.equal = self.correct = 0

    def compare(self, problem: Problem, table: rk.NgramTable, seeds: Any, turn: int) -> None:
        """The same requests both ways, in alternating order."""
        found: dict[str, list[list[int]]] = {}
        for way in WAYS if turn % 2 else WAYS[::-1]:
            found[way] = generation.generate(
                self._model, [problem.ids], temperature=TEMPERATURE, seed=seeds, eos=(EOS,),
                max_new_tokens=self._model.window - len(problem.ids), num_trajectories=len(seeds),
                table=table if way == "speculation" else None, statistics=self._seen[way][turn],
            ).texts  # fmt: skip
        self.texts += len(seeds)
        self.equal += sum(a == b for a, b in zip(*found.values(), strict=True))
        self.correct += sum(is_correct(self._context, problem, text) for text in found["plain"])

    def has_run(self, turn: int) -> bool:
        """Whether there was time for it, of one problem at least."""
        return self._seen["plain"][turn].steps > 0

    def tokens_per_step(self, turns: int) -> float:
        """With speculation, of the first so many trajectories."""
        return self._sums("speculation", range(turns))[0]

    def outcome(self, turns: Sequence[int], trajectories: int) -> dict[str, Any]:
        """Of those turns, over all problems."""
        sums = {way: self._sums(way, turns) for way in WAYS}
        return {
            "trajectories": trajectories,
            "tokens_per_step": sums["speculation"][0],
            "tokens_per_second": {way: sums[way][1] for way in WAYS},
        }

    def _sums(self, way: str, turns: Sequence[int]) -> tuple[float, float]:
        chosen = [self._seen[way][turn] for turn in turns]
        tokens, steps = (sum(getattr(s, name) for s in chosen) for name in ("tokens", "steps"))
        seconds = sum(sum(s.seconds.values()) for s in chosen)
        return tokens / max(1, steps), tokens / seconds if seconds else 0.0


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
