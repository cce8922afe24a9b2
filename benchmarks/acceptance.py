"""How often a drafted child is accepted, on empirical laws of a real model, by mode.

``python -m benchmarks.acceptance RESAMPLED.jsonl.gz``: each line holds ``continuations``, sampled
sentences after one prefix. Every prefix of their tokens that at least 20 samples of each half share
is a node: the first half is the target's law p, the second fills the table's entry q (top 10).
Drafts come from `NgramTable.draft`, the target from the noise contract.
"""

from __future__ import annotations

import argparse
from collections import Counter
from pathlib import Path

import torch
from torch import Tensor

from reasonkern import DraftTree, NgramTable
from reasonkern._jsonl import read_records
from reasonkern.speculation import noise
from reasonkern.speculation.tokenizers import load_tokenizer

TOPK, ENOUGH, CHILDREN, SEEDS = 10, 20, (1, 2, 4), 64
COLUMNS = ("deterministic", "membership", "rejection", "shared")
GROUPS = (("all", 0.0), ("entropy >= 0.05", 0.05), ("entropy >= 0.7", 0.7))


def collect(path: Path, tokenizer: str) -> list[tuple[Counter[int], Counter[int]]]:
    """Counts of the next token in both halves, by node."""
    encode = load_tokenizer(tokenizer).encode
    nodes = []
    for _, record in read_records(path):
        halves: list[dict[tuple[int, ...], Counter[int]]] = [{}, {}]
        for k, text in enumerate(record["continuations"]):
            ids = encode(text)
            for end in range(len(ids)):
                halves[k % 2].setdefault(tuple(ids[:end]), Counter())[ids[end]] += 1
        for prefix, counts in halves[0].items():
            other = halves[1].get(prefix, Counter())
            if min(counts.total(), other.total()) >= ENOUGH:
                nodes.append((counts, other))
    return nodes


def laws(counts: list[Counter[int]], width: int) -> tuple[Tensor, Tensor]:
    """(nodes, width) ids, -1 = none, and probabilities; the most frequent ones."""
    ids = torch.full((len(counts), width), -1, dtype=torch.int64)
    p = torch.zeros(len(counts), width, dtype=torch.float64)
    for row, counter in enumerate(counts):
        ranked = sorted(counter.items(), key=lambda item: (-item[1], item[0]))[:width]
        for column, (token, n) in enumerate(ranked):
            ids[row, column], p[row, column] = token, n / counter.total()
    return ids, p


def mass_of(tokens: Tensor, ids: Tensor, p: Tensor) -> Tensor:
    """(rows, k) tokens -> their probabilities."""
    return ((ids[:, None, :] == tokens[..., None]) * p[:, None, :]).sum(-1)


def rejection_rate(
    children: Tensor, valid: Tensor, ids: Tensor, p: Tensor, q_ids: Tensor, q: Tensor
) -> Tensor:
    """Chance, over the coins, that recursive rejection accepts a child; children in draw order."""
    at = (q_ids[..., None] == ids[:, None, :]) & (q_ids >= 0)[..., None]
    outside = ~at.any(-1) & (q_ids >= 0)  # proposed, but not in the target's support
    s = torch.cat([(at * q[..., None]).sum(1), q * outside], 1)
    r = torch.cat([p, torch.zeros_like(q)], 1)
    every = torch.cat([ids, torch.where(outside, q_ids, -2)], 1)
    reject = torch.ones(len(p), dtype=p.dtype)
    for k in range(children.shape[1]):
        here = (every == children[:, k, None]) & valid[:, k, None]
        s_x, r_x = (s * here).sum(1), (r * here).sum(1)
        accept = torch.where(s_x > 0, (r_x / s_x.clamp_min(1e-300)).clamp_max(1), 0)
        reject = reject * (1 - accept)
        residual = (r - s).clamp_min(0)
        drawn = s_x > 0
        r = torch.where(drawn[:, None], residual / residual.sum(1, True).clamp_min(1e-12), r)
        s = torch.where(here, 0, s)
        s = s / s.sum(1, True).clamp_min(1e-300)
    return 1 - reject


def measure(nodes: list[tuple[Counter[int], Counter[int]]]) -> tuple[Tensor, Tensor]:
    """(nodes, children, columns) acceptance, and the entropy of p in nats."""
    width = max(len(p) for p, _ in nodes)
    ids, p = laws([p for p, _ in nodes], width)
    q_ids, q = laws([q for _, q in nodes], TOPK)
    count = len(nodes)
    table = NgramTable(1 << 18, orders=(1,), topk=TOPK)
    context = torch.arange(count)[:, None]  # each node its own context
    table.update(context, q_ids, torch.where(q_ids >= 0, q, 1).log())
    rates = torch.zeros(count, len(CHILDREN), len(COLUMNS), dtype=torch.float64)
    row = torch.arange(count)
    for column, k in enumerate(CHILDREN):
        tree = DraftTree([-1] + [0] * k)
        best = table.draft(context, tree, temperature=0.0, seed=0, position=0)
        chosen = torch.where(best.valid, best.tokens, -3)[:, 1:]
        rates[:, column, 0] = mass_of(chosen, ids, p).sum(1)
        for seed in range(SEEDS):
            options = {"temperature": 1.0, "seed": row * SEEDS + seed, "position": 0}
            drawn = table.draft(context, tree, mode="rejection", **options)
            children = torch.where(drawn.valid, drawn.tokens, -3)[:, 1:]
            rates[:, column, 1] += mass_of(children, ids, p).sum(1) / SEEDS
            law = drawn.q_logprob[:, 0].double().exp()
            rates[:, column, 2] += (
                rejection_rate(children, drawn.valid[:, 1:], ids, p, drawn.q_ids[:, 0], law) / SEEDS
            )
            shared = table.draft(context, tree, **options)
            g = noise.gumbel_noise(options["seed"][:, None], torch.tensor(0), ids.clamp_min(0))
            score = torch.where(ids >= 0, p.float().log() + g, -torch.inf)
            target = ids.gather(1, score.argmax(1, keepdim=True))
            rates[:, column, 3] += ((shared.tokens == target) & shared.valid)[:, 1:].any(
                1
            ).double() / SEEDS
    entropy = -(p * p.clamp_min(1e-300).log()).sum(1)
    return rates, entropy


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.acceptance", description=__doc__)
    parser.add_argument("resampled", type=Path)
    parser.add_argument("--tokenizer", default="mistral-common")
    args = parser.parse_args()
    rates, entropy = measure(collect(args.resampled, args.tokenizer))
    print("| nodes | children | " + " | ".join(COLUMNS) + " |\n|---|---|" + "---|" * len(COLUMNS))
    for name, least in GROUPS:
        rows = rates[entropy >= least]
        for column, k in enumerate(CHILDREN):
            values = " | ".join(f"{x:.3f}" for x in rows[:, column].mean(0).tolist())
            print(f"| {name} ({len(rows):,}) | {k} | {values} |")


if __name__ == "__main__":
    main()
