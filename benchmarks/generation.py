"""Benchmarks of generation: the demo's model solves problems, by what drafts.

Three models: "demo" as `python -m reasonkern demo` fine-tunes it (60 steps, V = 32,768);
"learnt", the same model with the columns of its tokenizer's pieces alone, which ten times the steps
teach to write traces like those it was trained on; and, on a GPU, "deep", of three times the layers
and 150 steps. On a CPU times are gated on "demo" alone: a pass of "learnt" takes about as long as
the loop's own Python. On a GPU the passes of all three are bound by their launches.
"""

from __future__ import annotations

from collections import Counter
from contextlib import redirect_stderr, redirect_stdout
from copy import deepcopy
from dataclasses import dataclass, field
from functools import cache
from io import StringIO
from pathlib import Path
from tempfile import mkdtemp
from time import perf_counter
from typing import Any, NamedTuple

import torch
from torch import Tensor

import reasonkern as rk
from benchmarks.case import DTYPES, Case, Family, Gate, Provider, Runner, Tolerance, Truth
from benchmarks.peers.drafters import PromptLookup, SuffixTree
from reasonkern.demo import arithmetic
from reasonkern.demo.context import Config, prepare
from reasonkern.demo.model import Decoding, Transformer, seeded
from reasonkern.demo.tokenizer import BOS, EOS, FIRST_PIECE
from reasonkern.demo.train import fine_tune
from reasonkern.generation import SlotCache, Statistics, generate
from reasonkern.generation.passes import tree_pass

TEMPERATURE, NODES, CAPACITY = 0.6, 80, 1 << 16


class Training(NamedTuple):
    """How a model comes about."""

    steps: int
    layers: int = 4
    pieces: bool = False  # the columns of its tokenizer's pieces alone


MODELS = {"demo": Training(60), "learnt": Training(600, pieces=True), "deep": Training(150, 12)}


# ---- inputs


@cache
def trained(label: str, device: str) -> tuple[Transformer, Any]:
    """The model and its tokenizer; once per process: minutes on a CPU."""
    steps, layers, pieces = MODELS[label]
    config = Config(out=Path(mkdtemp()), steps=steps, layers=layers, minutes=1e6, device=device)
    context = prepare(config)
    if pieces:
        columns = FIRST_PIECE + len(context.tokenizer.pieces)
        sizes = config.window, config.width, config.layers
        context.model = seeded(columns, *sizes, config.seed).to(context.device)
    with redirect_stdout(StringIO()), redirect_stderr(StringIO()):  # its progress
        fine_tune(context)
    return context.model.eval(), context.tokenizer


@dataclass
class Work:
    """Problems, the texts of plain decoding, and how they are to be generated."""

    model: Decoding
    prompts: list[list[int]]
    batch: int
    trajectories: int
    texts: list[list[int]] = field(default_factory=list)

    @property
    def tokens(self) -> int:
        """Of all texts."""
        return sum(map(len, self.texts))


def inputs(case: Case, seed: int) -> Work:
    """New problems of the kind the model was trained on."""
    model, tokenizer = trained(case.label, case.device)
    if case.dtype != "float32":
        model = deepcopy(model).to(DTYPES[case.dtype])
    batch, trajectories, problems = case.shape[:3]
    made = arithmetic.generate(problems, samples=2, seed=1000 + seed)
    prompts = [[BOS, *tokenizer.encode(p)] for p in dict.fromkeys(t.prompt for t in made)]
    work = Work(Decoding(model), prompts, batch, trajectories)
    work.texts = solve(work)[0]
    return work


def solve(
    work: Work,
    table: rk.NgramTable | None = None,
    tree: rk.DraftTree | str = "auto",
    drafter: Any = None,
) -> tuple[list[list[int]], list[Statistics]]:
    """All texts, and the statistics of each round: of one trajectory of every problem, or of all.

    With a batch of 1 the trajectories of a problem follow one another, as one request does another;
    else they are one batch.
    """
    each = 1 if work.batch == 1 else work.trajectories
    rounds = [Statistics() for _ in range(work.trajectories // each)]
    texts, run = [], 0
    for problem, prompt in enumerate(work.prompts):
        seeds = rk.request_seeds(problem, work.trajectories)
        for j, statistics in enumerate(rounds):
            run += 1
            if drafter is not None:
                drafter.open(run)
            texts += generate(
                work.model, [prompt], temperature=TEMPERATURE, eos=(EOS,), table=table, tree=tree,
                max_new_tokens=work.model.window - len(prompt), drafter=drafter,
                seed=seeds[j * each : (j + 1) * each], num_trajectories=each, statistics=statistics,
            ).texts  # fmt: skip
    return texts, rounds


# ---- providers: every call starts with an empty table or suffix tree


def table_of(model: Decoding) -> rk.NgramTable:
    return rk.NgramTable(CAPACITY, vocab_size=model.vocab_size, device=model.device)


def runner(case: Case, work: Work, drafts: Any) -> Runner:
    """`drafts` makes the keywords of `solve`; what was accepted goes into the provider's row."""
    about: dict[str, Any] = {}

    def call() -> list[list[int]]:
        begin = perf_counter()
        texts, rounds = solve(work, **drafts())
        about["tokens_per_second"] = round(work.tokens / (perf_counter() - begin), 1)
        about["equal"] = sum(a == b for a, b in zip(texts, work.texts, strict=True))
        about["texts"] = len(texts)
        tokens = steps = 0
        about["accepted_by_trajectory"] = sofar = []
        for statistics in rounds:
            tokens, steps = tokens + statistics.tokens, steps + statistics.steps
            sofar.append(round(tokens / steps, 3))
        about["accepted"] = sofar[-1]
        sizes = sum((statistics.sizes for statistics in rounds), Counter())
        about["nodes"] = dict(sorted(sizes.items()))
        return texts

    outputs = lambda texts: {"texts": _padded(texts)}  # noqa: E731
    return Runner(call, outputs, repeat=max(1, work.tokens), about=about)


def _padded(texts: list[list[int]]) -> Tensor:
    longest = max(map(len, texts))
    return torch.tensor([text + [-1] * (longest - len(text)) for text in texts]).double()


def ours(case: Case, work: Work) -> Runner:
    tree: rk.DraftTree | str = "auto" if case.op == "generate" else rk.DraftTree.default(NODES)
    return runner(case, work, lambda: {"table": table_of(work.model), "tree": tree})


def plain(case: Case, work: Work) -> Runner:
    return runner(case, work, dict)


def prompt_lookup(case: Case, work: Work) -> Runner:
    PromptLookup(NODES)  # raises Skip where there is none
    return runner(case, work, lambda: {"drafter": PromptLookup(NODES)})


def arctic(case: Case, work: Work) -> Runner:
    nodes = None if case.op == "generate" else NODES
    SuffixTree(nodes)
    return runner(case, work, lambda: {"drafter": SuffixTree(nodes)})


# ---- how often a tree's pass flips a token


def flips(case: Case, work: Work) -> Runner:
    """Texts by a tree of 80 nodes; then each token again from a pass over one node per request."""
    about: dict[str, Any] = {}
    table = table_of(work.model)

    def call() -> None:
        texts, _ = solve(work, table, rk.DraftTree.default(NODES))
        count = 0
        for problem, prompt in enumerate(work.prompts):
            rows = texts[problem * work.trajectories : (problem + 1) * work.trajectories]
            count += _differences(work, prompt, rows, rk.request_seeds(problem, len(rows)))
        about["flips"], about["tokens"] = count, sum(map(len, texts))

    return Runner(call, about=about)


@torch.no_grad()
def _differences(work: Work, prompt: list[int], texts: list[list[int]], seeds: Tensor) -> int:
    """Tokens that `sample` would draw otherwise from passes over a single node, the text given."""
    model, chain = work.model, rk.DraftTree.chain(1)
    cache, count = SlotCache(len(texts), model.device), 0
    longest = max(map(len, texts))
    rows = [prompt + text + [EOS] * (longest - len(text)) for text in texts]
    ends = torch.tensor([len(prompt) + len(text) for text in texts], device=model.device)
    ids, seeds = torch.tensor(rows, device=model.device), seeds.to(model.device)
    for n in range(ids.shape[1] - 1):
        logits = model(tree_pass(ids[:, n : n + 1], chain, cache, n))[:, 0]
        cache.lengths = cache.lengths + 1
        if n + 1 >= len(prompt):
            token = rk.sample(logits, temperature=TEMPERATURE, seed=seeds, position=n + 1)
            count += int(((token != ids[:, n + 1]) & (n + 1 < ends)).sum())
    return count


# ---- cases


def truth(case: Case, work: Work) -> Truth:
    """Plain decoding, token for token."""
    return Truth({"texts": _padded(work.texts)}, {"texts": Tolerance(0.0, 0.0)})


PEERS = {"prompt-lookup": "transformers", "arctic": "arctic-inference"}  # packages they need


def case_of(
    op: str, label: str, batch: int, trajectories: int, problems: int, *gates: Gate,
    providers: tuple[str, ...] = ("reasonkern",), dtype: str = "float32", device: str = "cpu",
) -> Case:  # fmt: skip
    """Shape: requests at a time, trajectories per problem, problems."""
    pairs = 1 if op != "generate" else 3 if device == "cuda" else None  # there a call takes seconds
    return Case(
        op, (batch, trajectories, problems), dtype, device, passes=1, providers=providers,
        threads=1 if device == "cpu" else None, label=label, gates=gates, memory=False, pairs=pairs,
    )  # fmt: skip


FASTER = Gate("time", 1.0, "plain")
FASTER_THAN_PEERS = tuple(Gate("time", 1.0, name, needs=package) for name, package in PEERS.items())


def cases_of(label: str) -> tuple[Case, ...]:
    accepted = (
        Gate("accepted", 1.25, "prompt-lookup", needs=PEERS["prompt-lookup"]),
        Gate("accepted", 1.0, "arctic", needs=PEERS["arctic"]),
    )
    faster = (FASTER, *FASTER_THAN_PEERS) if label == "demo" else ()
    return (
        case_of("accepted", label, 1, 4, 4, *accepted, providers=("reasonkern", *PEERS)),
        case_of("generate", label, 1, 4, 2, *faster, providers=("reasonkern", "plain", *PEERS)),
        case_of("generate", label, 16, 16, 1, *faster[:1], providers=("reasonkern", "plain")),
        case_of("accepted", label, 1, 16, 2),
        case_of("flips", label, 4, 4, 4, providers=("tree",), dtype="bfloat16"),
        case_of("flips", label, 4, 4, 4, providers=("tree",)),
    )


def gpu_cases_of(label: str) -> tuple[Case, ...]:
    """Where a pass is bound by its launches 80 nodes take about the time of one."""
    twice = Gate("speedup", 2.0, "plain", min_pairs=3)
    peers = FASTER_THAN_PEERS if label == "demo" else ()
    pair, every = ("reasonkern", "plain"), ("reasonkern", "plain", *PEERS)
    return (
        case_of(
            "generate",
            label,
            1,
            16,
            1,
            twice,
            *peers,
            providers=every if peers else pair,
            device="cuda",
        ),
        case_of("generate", label, 16, 16, 1, FASTER, providers=pair, device="cuda"),
        case_of("flips", label, 4, 4, 4, providers=("tree",), dtype="bfloat16", device="cuda"),
        case_of("flips", label, 4, 4, 4, providers=("tree",), device="cuda"),
    )


OPS = ("accepted", "generate")
PROVIDERS = (
    Provider("reasonkern", dict.fromkeys(OPS, ours)),
    Provider("tree", {"flips": flips}, checked=False),
    Provider("plain", {"generate": plain}),
    Provider("prompt-lookup", dict.fromkeys(OPS, prompt_lookup)),
    Provider("arctic", dict.fromkeys(OPS, arctic)),
)
CASES = [case for label in ("demo", "learnt") for case in cases_of(label)]
CASES += [case for label in MODELS for case in gpu_cases_of(label)]
FAMILY = Family("generation", tuple(CASES), {p.name: p for p in PROVIDERS}, inputs, truth)
