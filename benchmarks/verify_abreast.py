"""`python -m benchmarks.verify_abreast`: verification with rows abreast against rows in turn.

On a GPU: correctness first (every output against the CPU's kernels), then interleaved pairs, as
`python -m benchmarks` does. A provider is a shape of REASONKERN_VERIFY_ABREAST: rows at once x
threads of the block that draws one. All nodes have rows of their kind: those off the walks are
drawn, too. The walks of `first` are the benchmark's, 2 to 5 rows along first children; those of
`typical` go to the children of each rank as often as the default tree expects. `--count` needs no
GPU: it says how many rounds the walks take, and how many rows are drawn for nothing.
"""

from __future__ import annotations

import argparse
import os
from collections.abc import Callable
from functools import lru_cache
from pathlib import Path
from unittest import mock

import torch
from torch import Tensor

import reasonkern as rk
from benchmarks import engine, machine, report
from benchmarks.case import DTYPES, Case, Family, Provider, Runner, Tolerance, Truth
from benchmarks.peers.ours import on_gpu
from benchmarks.speculation_verify import (
    TEMPERATURE,
    TREE,
    VISITS,
    VOCAB,
    Step,
    draw,
    first_children,
    row_logits,
    verify,
)
from reasonkern.speculation.tree import RANK_RATES

Walk = list[int]
IN_TURN, WISH = "in turn", "REASONKERN_VERIFY_ABREAST"
SHAPES = {
    1: ("5x256", "5x512", "8x512"),
    32: ("2x512", "3x512", "4x512", "3x256", "4x256", "5x256", "6x256", "7x256"),
    256: ("1x256", "1x512", "2x256", "2x512", "3x256"),
}
EXACT = ("tokens", "length", "path", "topk_ids", "topk_logits", "status")


def first(tree: rk.DraftTree, request: int, _: torch.Generator) -> Walk:
    """As long as the benchmark's, along first children."""
    return first_children(tree, VISITS[request % len(VISITS)])


def typical(tree: rk.DraftTree, _: int, g: torch.Generator) -> Walk:
    """To the child of rank r with the chance that `DraftTree.default` is built for."""
    pointers, index = (t.tolist() for t in tree.children)
    rates = torch.tensor(RANK_RATES)
    walk = [0]
    while True:
        children = index[pointers[walk[-1]] : pointers[walk[-1] + 1]]
        u = torch.rand((), generator=g)
        rank = int((rates.cumsum(0) <= u).sum())
        if rank >= min(len(children), len(rates)):
            return walk
        walk.append(children[rank])


WALKS: dict[str, Callable[[rk.DraftTree, int, torch.Generator], Walk]] = {
    "first": first,
    "typical": typical,
}


def walks_of(case: Case, tree: rk.DraftTree, seed: int) -> list[Walk]:
    g = torch.Generator().manual_seed(seed)
    return [WALKS[case.label.split("/")[1]](tree, b, g) for b in range(case.shape[0])]


def rounds_of(tree: rk.DraftTree, walk: Walk, rows: int) -> tuple[int, int]:
    """(rounds, rows drawn) of a walk of which `rows` are drawn at once."""
    rounds = drawn = start = 0
    while start < len(walk):
        path = likeliest_path(tree, walk[start], rows)
        visited = 1
        while walk[start + visited : start + visited + 1] == path[visited : visited + 1] != []:
            visited += 1
        rounds, drawn, start = rounds + 1, drawn + len(path), start + visited
    return rounds, drawn


def likeliest_path(tree: rk.DraftTree, node: int, rows: int) -> Walk:
    """A node and its first children's first children, `rows` in all or fewer."""
    pointers, index = tree.children
    path = [node]
    while len(path) < rows and pointers[path[-1]] < pointers[path[-1] + 1]:
        path.append(int(index[pointers[path[-1]]]))
    return path


def count(seeds: int = 20) -> None:
    """Prints the counts of every case, means over steps; in turn a row is a round."""
    print("batch  walks    rows at once  rounds of the longest walk  rows drawn  visited")
    tree = rk.DraftTree.default(TREE)
    for case in (case for case in CASES if case.label.startswith("peaked")):
        batches = [walks_of(case, tree, seed) for seed in range(seeds)]
        visited = sum(len(walk) for walks in batches for walk in walks) / seeds
        for rows in sorted({1, *(int(shape.split("x")[0]) for shape in SHAPES[case.shape[0]])}):
            counts = [[rounds_of(tree, walk, rows) for walk in walks] for walks in batches]
            longest = sum(max(rounds for rounds, _ in one) for one in counts) / seeds
            drawn = sum(drawn for one in counts for _, drawn in one) / seeds
            start = f"{case.shape[0]:5}  {case.label.split('/')[1]:7}"
            print(f"{start}{rows:14}{longest:28.2f}{drawn:12.0f}{visited:9.0f}")


@lru_cache(maxsize=8)  # the providers of a case share its inputs
def inputs(case: Case, seed: int) -> Step:
    batch, nodes, vocab = case.shape
    tree, device = rk.DraftTree.default(nodes), torch.device(case.device)
    g = torch.Generator(device).manual_seed(seed)
    logits = torch.empty(case.shape, dtype=DTYPES[case.dtype], device=device)
    for b in range(batch):
        for node in range(0, nodes, 16):
            logits[b, node : node + 16] = row_logits(
                case.label, logits[b, node : node + 16].shape, g
            )
    logits[..., 0] = -40.0  # token 0 is drafted off the walks and never drawn
    walks, seeds = walks_of(case, tree, seed), rk.request_seeds(seed, batch)
    tokens = drafts(logits, walks, seeds)
    visited = torch.tensor([(b, node) for b, walk in enumerate(walks) for node in walk])
    seeds, off = seeds.to(device), torch.zeros(batch, device=device)
    filters = {"top_k": torch.zeros_like(seeds), "top_p": off + 1, "min_p": off}
    draft = rk.Draft(tokens.to(device), torch.ones(batch, nodes, dtype=torch.bool, device=device))
    return Step(
        logits, draft, tree, seeds, off + TEMPERATURE, torch.zeros_like(seeds), [], visited, filters
    )


def drafts(logits: Tensor, walks: list[Walk], seeds: Tensor) -> Tensor:
    """(B, N): along the walks what is drawn, elsewhere token 0."""
    tokens = torch.zeros(logits.shape[:2], dtype=torch.int64)
    for depth in range(max(map(len, walks)) - 1):
        on = [b for b, walk in enumerate(walks) if len(walk) > depth + 1]
        rows = logits[on, [walks[b][depth] for b in on]].cpu()
        tokens[on, [walks[b][depth + 1] for b in on]] = draw(rows, seeds[on], depth)
    return tokens


def truth(case: Case, step: Step) -> Truth:
    """The CPU's kernels; and that the walks are those that were meant."""
    cpu = Step(
        step.logits.cpu(), rk.Draft(*(t.cpu() for t in step.draft[:2])), step.tree,
        step.seed.cpu(), TEMPERATURE, 0, [], step.visited,
    )  # fmt: skip
    out = verify(cpu)
    walks = [path[path >= 0].tolist() for path in out.path]
    if walks != walks_of(case, step.tree, 0):
        raise ValueError("walks: not those that the drafts were made for")
    values = {name: getattr(out, name).double().to(case.device) for name in (*EXACT, "lse")}
    tolerance = dict.fromkeys(EXACT, Tolerance(0.0, 0.0)) | {"lse": Tolerance(1e-6, 1e-6)}
    return Truth(without_infinity(values), tolerance)


def without_infinity(values: dict[str, Tensor]) -> dict[str, Tensor]:
    """-inf, where no row was visited, as a number that is no logit."""
    return {name: x.clamp(min=-1e9) for name, x in values.items()}


def ours(shape: str) -> Callable[[Case, Step], Runner]:
    """The call in that shape; it is chosen when the call is launched, or captured."""

    def build(_: Case, step: Step) -> Runner:
        def call() -> rk.Verified:
            with mock.patch.dict(os.environ):
                os.environ.pop(WISH, None)
                if shape != IN_TURN:
                    os.environ[WISH] = shape
                return verify(step)

        names = (*EXACT, "lse")
        return Runner(
            call, lambda out: without_infinity({n: getattr(out, n).double() for n in names})
        )

    return build


def case_of(batch: int, label: str) -> Case:
    rows = {"first": sum(VISITS) / len(VISITS), "typical": 3.7}[label.split("/")[1]]
    return Case(
        "verify_abreast", (batch, TREE, VOCAB), "bfloat16", "cuda", passes=1, label=label,
        providers=(IN_TURN, *SHAPES[batch]), input_shape=(round(rows * batch), VOCAB),
        rotate=2 if batch == 256 else 8,
    )  # fmt: skip


CASES = (
    *(case_of(batch, f"peaked/{walks}") for batch in SHAPES for walks in WALKS),
    case_of(32, "flat/first"),
)
FAMILY = Family(
    "verify_abreast",
    CASES,
    {
        shape: Provider(shape, {"verify_abreast": on_gpu("cuda", ours(shape))})
        for shape in (IN_TURN, *sum(SHAPES.values(), ()))
    },
    inputs,
    truth,
)


def main() -> None:
    parser = argparse.ArgumentParser("python -m benchmarks.verify_abreast", description=__doc__)
    parser.add_argument("--json", type=Path, metavar="FILE", help="write results here")
    parser.add_argument("--case", default="", help="part of a case's id")
    parser.add_argument("--seconds", type=float, default=2.0, help="for a pair of providers")
    parser.add_argument("--count", action="store_true", help="count rounds and rows, time nothing")
    options = parser.parse_args()
    if options.count:
        return count()
    facts = machine.describe()
    print(machine.line(facts), report.head(), sep="\n", flush=True)
    store = engine.Store(options.json, facts)
    for case in CASES:
        if options.case in case.id:
            record = engine.run_case(FAMILY, case, engine.Effort(options.seconds), facts)
            store.add(record)
            print(report.table(record), flush=True)


if __name__ == "__main__":
    main()
