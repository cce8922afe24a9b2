"""The embedded traces: generated chains of arithmetic with self-checks, and their verifier.

Every sample works a problem step by step and doubts itself at least once ("Wait, …"). A correct
sample may slip and catch it; an incorrect one contains a slip that its self-checks miss.
"""

from __future__ import annotations

import re
from random import Random

from .traces import Trace

WORDS = {"+": "add", "-": "subtract", "*": "multiply by"}
SYMBOLS = {word: symbol for symbol, word in WORDS.items()}
INVERSE = {"+": "-", "-": "+"}

Step = tuple[str, int]


def apply(symbol: str, left: int, right: int) -> int:
    """One operation."""
    return {"+": left + right, "-": left - right, "*": left * right}[symbol]


def generate(problems: int = 32, samples: int = 6, seed: int = 0) -> list[Trace]:
    """`problems` groups of `samples` traces each, both outcomes in every group."""
    rng = Random(seed)
    traces = []
    for problem in range(problems):
        start, steps = _problem(rng)
        prompt = _prompt(start, steps)
        correct = rng.randint(1, samples - 1)
        outcomes = [index < correct for index in range(samples)]
        rng.shuffle(outcomes)
        for outcome in outcomes:
            text = _solution(rng, start, steps, outcome)
            traces.append(Trace(problem, prompt, text, verify(prompt, text)))
    return traces


def expected_answer(prompt: str) -> int:
    """Work the problem out from its statement."""
    found = re.search(r"Start with (\d+)", prompt)
    if found is None:
        raise ValueError(f"prompt: expected 'Start with <number>. …', got {prompt!r}")
    value = int(found[1])
    for word, number in re.findall(r"(add|subtract|multiply by) (\d+)", prompt):
        value = apply(SYMBOLS[word], value, int(number))
    return value


def verify(prompt: str, text: str) -> bool:
    """Whether the boxed answer of `text` solves `prompt`."""
    boxed = re.findall(r"\\boxed\{(-?\d+)\}", text)
    return bool(boxed) and int(boxed[-1]) == expected_answer(prompt)


def _problem(rng: Random) -> tuple[int, list[Step]]:
    start = value = rng.randint(11, 49)
    steps = []
    for _ in range(rng.randint(5, 7)):
        symbol = rng.choice("+-*" if value < 150 else "+-")
        number = {
            "+": rng.randint(6, 69),
            "-": rng.randint(2, max(2, value // 2)),
            "*": rng.randint(2, 6),
        }[symbol]
        steps.append((symbol, number))
        value = apply(symbol, value, number)
    return start, steps


def _prompt(start: int, steps: list[Step]) -> str:
    orders = ", then ".join(f"{WORDS[symbol]} {number}" for symbol, number in steps)
    return f"Start with {start}. Now {orders}. What do you get? Put the answer in \\boxed{{}}.\n"


def _solution(rng: Random, start: int, steps: list[Step], correct: bool) -> str:
    """A missed slip is never undone: the operations map distinct values to distinct values."""
    missed = -1 if correct else rng.randrange(len(steps))
    doubted = rng.randrange(len(steps))
    value = start
    lines = ["<think>", rng.choice(("Let me go step by step.", f"We begin with {start}."))]
    for index, (symbol, number) in enumerate(steps):
        left, right = value, apply(symbol, value, number)
        value = _slip(rng, right) if index == missed else right
        doubt = index == doubted or rng.random() < 0.3
        if index == missed:
            note = _missed_check(rng) if doubt else ""
            line = f"{left} {symbol} {number} = {value}.{note}"
        elif doubt:
            line = _checked(rng, left, symbol, number, right)
        else:
            line = f"{left} {symbol} {number} = {right}."
        lines.append(line)
    return "\n".join([*lines, "</think>", f"The answer is \\boxed{{{value}}}."])


def _slip(rng: Random, value: int) -> int:
    """A number nearby, above 1 if there is one: after a missed slip values can be far below 0."""
    errors = (-10, -2, -1, 1, 2, 10)
    return value + rng.choice([error for error in errors if value + error > 1] or errors)


def _missed_check(rng: Random) -> str:
    return rng.choice(
        (" Wait, is that right? Yes, it looks fine.", " Wait, I should check. It seems right.")
    )


def _checked(rng: Random, left: int, symbol: str, number: int, right: int) -> str:
    """A step with a real self-check: an inverse or split computation, or a slip that it catches."""
    step = f"{left} {symbol} {number} ="
    if rng.random() < 0.4:
        wrong = _slip(rng, right)
        return f"{step} {wrong}. Wait, {wrong} is wrong. Again: {step} {right}."
    if symbol in INVERSE:
        undo = f"{right} {INVERSE[symbol]} {number} = {left}"
        return f"{step} {right}. Wait, let me check: {undo}. Good."
    tens, ones = left - left % 10, left % 10
    parts = f"{tens} * {number} = {tens * number} and {ones} * {number} = {ones * number}"
    total = f"{tens * number} + {ones * number} = {right}"
    return f"{step} {right}. Wait, let me check: {parts}, so {total}. Good."
