"""Cases of the n-gram table: drafting and updating, alone and against suffix tree and look-up."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

import reasonkern as rk
from benchmarks.case import Case, Gate, Provider, Runner, Skip, Tolerance, Truth
from benchmarks.peers import ours
from reasonkern import _load
from reasonkern._jsonl import read_records
from reasonkern.demo import arithmetic
from reasonkern.speculation.tokenizers import TokenizerError, load_tokenizer

TRACES = Path(__file__).parents[2] / "shared" / "data" / "traces" / "traces.jsonl.gz"
TEMPERATURE, EMITTED, LEAST_HITS = 0.6, 3, 0.6
TREE = 80


@dataclass
class Step:
    """One step of B requests: contexts, and the rows that a verification would hand back."""

    table: rk.NgramTable
    tree: rk.DraftTree
    context: Tensor  # (B, 4)
    seed: Tensor  # (B,)
    position: Tensor  # (B,)
    rows: tuple[Tensor, Tensor, Tensor, Tensor]  # of update: context, ids, logits, lse
    temperature: float | Tensor
    history: list[np.ndarray]  # tokens up to the step, by request
    emitted: list[list[int]]
    hit_rate: float = 0.0

    def to(self, device: str) -> Step:
        """The temperature becomes a tensor: a decoding loop on a GPU keeps it there."""
        batch = len(self.context)
        return dataclasses.replace(
            self,
            table=on_device(self.table, device),
            context=self.context.to(device),
            seed=self.seed.to(device),
            position=self.position.to(device),
            rows=tuple(x.to(device) for x in self.rows),
            temperature=torch.full((batch,), TEMPERATURE, device=device),
        )


# ---- inputs


@cache
def corpus() -> tuple[list[np.ndarray], int]:
    """Token ids of reasoning traces and their vocabulary; generated ones where there are none."""
    try:
        tokenizer = load_tokenizer("mistral-common")
    except TokenizerError:
        tokenizer = load_tokenizer("bytes")
    if TRACES.exists():
        texts = [record["prompt"] + record["text"] for _, record in read_records(TRACES)]
    else:
        texts = [trace.prompt + trace.text for trace in arithmetic.generate(seed=0)]
    return [np.array(tokenizer.encode(t), np.int64) for t in texts], tokenizer.vocab_size


def candidates(following: Tensor, vocab: int, seed: int) -> tuple[Tensor, Tensor, Tensor]:
    """Top-12 ids, logits and log-sum-exp of laws whose likeliest token follows."""
    g = torch.Generator().manual_seed(seed)
    rows = len(following)
    others = torch.randint(0, vocab, (rows, 11), generator=g)
    ids = torch.cat((following[:, None], others), 1)
    logits = torch.cat((torch.full((rows, 1), 12.0), 8 - 6 * torch.rand(rows, 11, generator=g)), 1)
    return ids, logits, logits.logsumexp(-1) + 0.01


def windows_of(sequence: np.ndarray) -> Tensor:
    padded = np.concatenate((np.full(4, -1), sequence))
    return torch.from_numpy(np.lib.stride_tricks.sliding_window_view(padded, 4)[:-1].copy())


@cache
def replayed_table() -> rk.NgramTable:
    """A table that has read all traces, token by token."""
    sequences, vocab = corpus()
    table = rk.NgramTable(1 << 20, vocab_size=max(vocab, 1 << 17))
    for sequence in sequences:
        tokens = torch.from_numpy(sequence)
        table.update(windows_of(sequence)[1:], tokens[1:, None], torch.zeros(len(tokens) - 1, 1))
    return table


def replayed(batch: int, seed: int) -> Step:
    """Requests in the midst of the traces."""
    sequences, vocab = corpus()
    random = np.random.default_rng(seed)
    places = []
    for _ in range(batch):
        sequence = sequences[random.integers(len(sequences))]
        places.append((sequence, int(random.integers(len(sequence) // 2, len(sequence) - EMITTED))))
    return step_at(replayed_table(), places, vocab, seed)


@cache
def million_table() -> tuple[rk.NgramTable, Tensor]:
    """A full table of walks on a graph, 600 tokens with 12 successors each, and the last walks."""
    g = torch.Generator().manual_seed(0)
    nodes, length = 600, 400
    successors = torch.randint(0, nodes, (nodes, 12), generator=g)
    table = rk.NgramTable(1 << 20, vocab_size=1 << 17)
    for _ in range(8):
        walks = torch.empty(500, length, dtype=torch.int64)
        walks[:, 0] = torch.randint(0, nodes, (500,), generator=g)
        for t in range(1, length):
            pick = torch.randint(0, 12, (500,), generator=g)
            walks[:, t] = successors[walks[:, t - 1], pick]
        logits = 2 * torch.randn(500, length, 12, generator=g)
        table.update_from_sequence(walks, successors[walks], logits, lse=logits.logsumexp(-1) + 0.1)
    return table, walks


def million(batch: int, seed: int) -> Step:
    table, walks = million_table()
    random = np.random.default_rng(seed)
    places = [(walks[int(random.integers(500))].numpy(), 200) for _ in range(batch)]
    return step_at(table, places, 1 << 17, seed)


def step_at(
    table: rk.NgramTable, places: list[tuple[np.ndarray, int]], vocab: int, seed: int
) -> Step:
    context, following, history, emitted = [], [], [], []
    for sequence, place in places:
        rows = windows_of(sequence)[place : place + EMITTED]
        context.append(rows)
        following.append(torch.from_numpy(sequence[place : place + EMITTED]))
        history.append(sequence[:place].astype(np.int32))
        emitted.append(sequence[place : place + EMITTED].tolist())
    stacked = torch.stack(context)
    rows = (stacked.reshape(-1, 4), *candidates(torch.cat(following), vocab, seed))
    batch = len(places)
    step = Step(
        table, rk.DraftTree.default(TREE), stacked[:, 0].contiguous(),
        rk_seeds(batch, seed), torch.tensor([place for _, place in places]), rows, TEMPERATURE,
        history, emitted,
    )  # fmt: skip
    table.state_dict()["counters"].zero_()
    draft(step)
    step.hit_rate = table.stats()["hit_rate"]
    if step.hit_rate < LEAST_HITS:
        raise ValueError(f"only {step.hit_rate:.0%} of the look-ups hit: not the case to measure")
    return step


def rk_seeds(batch: int, seed: int) -> Tensor:
    return torch.randint(-(2**62), 2**62, (batch,), generator=torch.Generator().manual_seed(seed))


def inputs(case: Case, seed: int) -> Step:
    step = (million if case.label == "1M-entries" else replayed)(case.shape[0], seed)
    return step if case.device == "cpu" else step.to(case.device)


# ---- ours


def draft(step: Step) -> rk.Draft:
    return step.table.draft(
        step.context, step.tree, temperature=step.temperature, seed=step.seed,
        position=step.position,
    )  # fmt: skip


def update(step: Step) -> None:
    context, ids, logits, lse = step.rows
    step.table.update(context, ids, logits, lse=lse)


def about(step: Step) -> dict[str, Any]:
    return {"hit_rate": round(step.hit_rate, 3), "entries": len(step.table)}


def per(items: int, case: Case) -> int:
    """What a time stands for: an item on a CPU, the call on a GPU, where items run side by side."""
    return items if case.device == "cpu" else 1


def ours_draft(case: Case, step: Step) -> Runner:
    outputs = lambda d: {"tokens": d.tokens.double(), "valid": d.valid.double()}  # noqa: E731
    return Runner(lambda: draft(step), outputs, repeat=per(case.shape[0], case), about=about(step))


def ours_update(case: Case, step: Step) -> Runner:
    """Outputs: the table after the first call, from the one that the inputs hold."""
    mine = dataclasses.replace(step, table=on_device(step.table, case.device))

    def outputs(_: None) -> dict[str, Tensor]:
        return entries(mine.table.state_dict())

    items = per(len(step.rows[0]), case)
    return Runner(lambda: update(mine), outputs, repeat=items, about=about(step))


def ours_both(case: Case, step: Step) -> Runner:
    mine = dataclasses.replace(step, table=on_device(step.table, case.device))

    def call() -> rk.Draft:
        drafted = draft(mine)
        update(mine)
        return drafted

    outputs = lambda d: {"tokens": d.tokens.double(), "valid": d.valid.double()}  # noqa: E731
    return Runner(call, outputs, repeat=per(case.shape[0], case), about=about(step))


def entries(state: dict[str, Any]) -> dict[str, Tensor]:
    """All candidates and counts, in few rows: they are compared some rows at a time."""
    return {name: state[name].double().reshape(64, -1) for name in ("slots", "counts")}


def on_device(table: rk.NgramTable, device: str) -> rk.NgramTable:
    """A copy."""
    copy = rk.NgramTable(table.capacity, vocab_size=table.vocab_size, device=device)
    copy.load_state_dict(table.state_dict())
    return copy


# ---- peers: their own proposals, so there is nothing to compare


def arctic(case: Case, step: Step) -> Runner:
    """Suffix trees: propose a tree of as many tokens, then take the emitted ones in."""
    try:
        from arctic_inference.suffix_decoding import SuffixDecodingCache
    except ImportError as error:
        raise Skip(f"arctic-inference: {error}") from error
    cache = SuffixDecodingCache(max_tree_depth=64, max_cached_requests=-1)
    for request, history in enumerate(step.history):
        cache.start_request(request, history[:16])
        cache.add_active_response(request, history[16:].tolist())
    contexts = [history[-64:] for history in step.history]

    def call() -> list[Any]:
        drafts = []
        for request, context in enumerate(contexts):
            drafts.append(
                cache.speculate(request, context, max_spec_tokens=TREE - 1, use_tree_spec=True)
            )
            cache.add_active_response(request, step.emitted[request])
        return drafts

    return Runner(call, repeat=case.shape[0])


def prompt_lookup(case: Case, step: Step) -> Runner:
    """transformers: a scan of the request's own tokens for the last n-gram."""
    try:
        from transformers.generation.candidate_generator import PromptLookupCandidateGenerator
    except ImportError as error:
        raise Skip(f"transformers: {error}") from error
    generator = PromptLookupCandidateGenerator(
        num_output_tokens=10, max_matching_ngram_size=3, max_length=1 << 30
    )
    histories = [torch.from_numpy(h.astype(np.int64))[None] for h in step.history]
    call = lambda: [generator.get_candidates(ids) for ids in histories]  # noqa: E731
    return Runner(call, repeat=case.shape[0])


# ---- truth: the reference implementation


def truth(case: Case, step: Step) -> Truth:
    """On the CPU: its definition in torch."""
    copy = on_device(step.table, "cpu")
    state = copy.state_dict()
    rows = [x.cpu() for x in step.rows]
    if case.op == "table_update":
        names = ("keys", "slots", "extra", "counts", "ages", "clock", "epochs", "counters")
        _load.implementation("table_update_", "reference")(
            rows[0], *(state[n] for n in names), list(copy.orders), copy.max_count,
            copy.vocab_size, *rows[1:], None, True,
        )  # fmt: skip
        values = entries(state)
    else:
        names = ("keys", "slots", "extra", "counts", "epochs", "counters")
        tokens, valid, _, _ = _load.implementation("table_draft", "reference")(
            step.context.cpu(), *(state[n] for n in names), list(copy.orders),
            *step.tree.tensors(torch.device("cpu")), None,
            torch.full((len(step.context),), TEMPERATURE), step.seed.cpu(), step.position.cpu(), 1,
            copy.vocab_size, True,
        )  # fmt: skip
        values = {"tokens": tokens.double(), "valid": valid.double()}
    values = {name: value.to(case.device) for name, value in values.items()}
    return Truth(values, dict.fromkeys(values, Tolerance(0.0, 0.0)))


def case_of(op: str, batch: int, label: str, *gates: Gate, peers: bool = False) -> Case:
    providers = ("reasonkern", *(("arctic", "prompt-lookup") if peers else ()))
    return Case(
        op, (batch, TREE), "float32", "cpu", passes=1, providers=providers, threads=1,
        label=label, gates=gates, quick=batch == 1,
    )  # fmt: skip


def cuda_case(op: str, batch: int) -> Case:
    """A call on contexts of its own each time, in the full table, which does not fit the L2."""
    return Case(
        op, (batch, TREE), "float32", "cuda", passes=1, providers=("ours-cuda", "ours-triton"),
        label="1M-entries", gates=(Gate("microseconds", 20.0),), quick=batch == 32, rotate=10,
    )  # fmt: skip


PEER_GATES = (
    Gate("time", 1.0, "arctic", needs="arctic-inference"),
    Gate("time", 1.0, "prompt-lookup", needs="transformers"),
)
CPU_CASES = (
    case_of("table_draft", 64, "replayed", Gate("microseconds", 10.0)),
    case_of("table_draft", 64, "1M-entries", Gate("microseconds", 20.0)),
    case_of("table_draft", 1, "replayed"),
    case_of("table_update", 64, "replayed", Gate("microseconds", 3.0)),
    case_of("table_step", 64, "replayed", *PEER_GATES, peers=True),
    case_of("table_step", 1, "replayed", peers=True),
)
CUDA_CASES = tuple(
    cuda_case(op, batch) for op in ("table_draft", "table_update") for batch in (1, 32, 256)
)
CASES = CPU_CASES + CUDA_CASES
OURS = {"table_draft": ours_draft, "table_update": ours_update, "table_step": ours_both}
PROVIDERS = {
    "reasonkern": Provider("reasonkern", OURS),
    **ours.gpu_providers(OURS),
    "arctic": Provider("arctic", {"table_step": arctic}, checked=False),
    "prompt-lookup": Provider("prompt-lookup", {"table_step": prompt_lookup}, checked=False),
}
