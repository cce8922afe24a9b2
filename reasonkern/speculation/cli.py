"""``python -m reasonkern tune``: replays traces, tunes a tree, says what to expect of it."""

from __future__ import annotations

import importlib.util
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from .._jsonl import TraceError, read_records, show
from .._progress import counted, progress
from .replay import Ids, Replayed, TokenTrace, replay
from .tokenizers import Tokenizer, TokenizerError, load_tokenizer
from .tree import DraftTree
from .tune import big_tree, tune_tree

__all__ = ["TokenizerError", "TraceError", "TuneConfig", "TuneError", "run"]

SIZES = (1, 4, 8, 16, 32, 80)


class TuneError(ValueError):
    """Options that do not fit together."""


@dataclass(frozen=True)
class TuneConfig:
    """The command line, as values."""

    traces: Path
    tokenizer: str = "bytes"
    nodes: int = 80
    orders: tuple[int, ...] = (4, 3, 2)
    out: Path | None = None
    png: Path | None = None


@dataclass
class Findings:
    """What the replays showed; tokens per step count the one after the draft."""

    tree: DraftTree
    tuned: Replayed
    default: Replayed  # the default tree of the same size
    held_out: float | None  # tokens per step of trees fitted to the other half of the problems
    by_orders: dict[tuple[int, ...], Replayed]
    by_nodes: dict[int, Replayed]


def run(config: TuneConfig) -> int:
    """Reads, replays, prints and writes; the exit status is 0."""
    if not 1 <= config.nodes <= 625:
        raise TuneError(f"--nodes: expected 1 to 625, got {config.nodes}")
    if config.png is not None and importlib.util.find_spec("matplotlib") is None:
        raise TuneError("--png needs matplotlib (pip install 'reasonkern[demo]')")
    if config.png is not None and config.png.suffix.lower() != ".png":
        raise TuneError(f"--png: expected a name that ends in .png, got {config.png}")
    for option, path in (("--out", config.out), ("--png", config.png)):  # before a long replay
        if path is not None and path.is_dir():
            raise TuneError(f"{option} {path}: expected the name of a file, got a folder")
        if path is not None and not path.parent.is_dir():
            raise TuneError(f"{option} {path}: there is no folder {path.parent}")
    tokenizer = load_tokenizer(config.tokenizer)
    traces = read_traces(config.traces, tokenizer)
    vocab = _vocabulary(traces, tokenizer)
    print(_heading(traces, tokenizer, vocab, config.nodes))
    findings = investigate(traces, vocab, config)
    print(report(findings))
    if config.out is not None:
        findings.tree.save(config.out)
        print(f"\ntree written to {config.out}; rk.DraftTree.load({str(config.out)!r}) reads it")
    if config.png is not None:
        from .tune_plot import draw

        draw(findings, config.png)
        print(f"picture written to {config.png}")
    return 0


# ---- reading


def read_traces(path: Path, tokenizer: Tokenizer) -> list[TokenTrace]:
    """One trace per line: ``text`` or ``tokens``, optionally a prompt, a group and logits.

    Fields: ``tokens`` (ids) or ``text``; ``prompt_tokens`` or ``prompt``; ids win; ``problem_id``
    groups the trajectories of one problem (without it, equal prompts do); ``topk_ids`` and
    ``topk_logprobs``: for each token the model's top candidates before it, -1 = none. A field that
    is null is not there.
    """
    traces = [_trace(record, where, tokenizer) for where, record in read_records(path)]
    if not traces:
        raise TraceError(f"{path}: holds no traces (expected one JSON object per line)")
    return traces


def _trace(record: dict[str, Any], where: str, tokenizer: Tokenizer) -> TokenTrace:
    record = {name: value for name, value in record.items() if value is not None}
    tokens = _ids(record, "tokens", "text", where, tokenizer)
    if tokens is None or not len(tokens):
        raise TraceError(f"{where}: expected a non-empty 'tokens' (ids) or 'text'")
    prompt = _ids(record, "prompt_tokens", "prompt", where, tokenizer)
    prompt = np.empty(0, np.int64) if prompt is None else prompt
    group = record.get("problem_id")
    if group is None:
        group = tuple(prompt.tolist()) if len(prompt) else where
    elif not isinstance(group, int | str):
        raise TraceError(f"{where}: field 'problem_id' must be an integer or a string")
    trace = TokenTrace(tokens, prompt, group, from_text="tokens" not in record)
    if "topk_ids" in record:
        _add_laws(trace, record, where)
    return trace


def _ids(
    record: dict[str, Any], id_field: str, text_field: str, where: str, tokenizer: Tokenizer
) -> Ids | None:
    if id_field in record:
        ids = record[id_field]
        if not isinstance(ids, list) or not all(type(i) is int and 0 <= i < 1 << 26 for i in ids):
            raise TraceError(f"{where}: field '{id_field}' must be token ids, got {show(ids)}")
        return np.array(ids, dtype=np.int64)
    if text_field in record:
        text = record[text_field]
        if not isinstance(text, str):
            raise TraceError(f"{where}: field '{text_field}' must be a string, got {show(text)}")
        return np.array(tokenizer.encode(text), dtype=np.int64)
    return None


def _add_laws(trace: TokenTrace, record: dict[str, Any], where: str) -> None:
    must = f"{where}: 'topk_ids' and 'topk_logprobs' must"
    try:
        ids, logprobs = (np.array(record.get(name)) for name in ("topk_ids", "topk_logprobs"))
    except ValueError as error:
        raise TraceError(f"{must} have rows of one length") from error
    tokens = len(trace.tokens)
    if ids.ndim != 2 or len(ids) != tokens or not ids.size or logprobs.shape != ids.shape:
        shapes = f"{ids.shape} and {logprobs.shape}"
        raise TraceError(f"{must} have one row per token, ({tokens}, k), got {shapes}")
    if ids.dtype.kind not in "iu" or logprobs.dtype.kind not in "iuf":
        raise TraceError(f"{must} be integers and numbers")
    logprobs = np.where(ids >= 0, logprobs, -np.inf)
    if not (np.exp(logprobs).sum(1) <= 1.001).all() or ids.min() < -1 or ids.max() >= 1 << 26:
        raise TraceError(
            f"{where}: 'topk_logprobs' must be log-probabilities of ids (sum at most 1 per token)"
        )
    keep = min(12, ids.shape[1])
    best = np.argsort(-logprobs, axis=1, kind="stable")[:, :keep]
    trace.topk_ids = np.take_along_axis(ids, best, 1)
    trace.topk_logprobs = np.take_along_axis(logprobs, best, 1).astype(np.float32)


def _vocabulary(traces: Sequence[TokenTrace], tokenizer: Tokenizer) -> int:
    largest = max(
        int(ids.max(initial=0))
        for trace in traces
        for ids in (trace.tokens, trace.prompt, trace.topk_ids)
        if ids is not None
    )
    known = tokenizer.vocab_size if any(trace.from_text for trace in traces) else 0
    return max(known, largest + 1)


# ---- replaying


def investigate(traces: list[TokenTrace], vocab: int, config: TuneConfig) -> Findings:
    """The tree, and replays that differ from it in the orders or in the size."""
    tokens = sum(len(trace.tokens) for trace in traces)
    orders = [config.orders[k:] for k in range(1, len(config.orders))]
    sizes = sorted({min(size, config.nodes) for size in SIZES} - {config.nodes})
    halves = _halves(traces)
    replays = len(halves) + 2 + len(orders) + len(sizes)
    with progress("replaying", tokens * replays) as update:

        def run_once(
            what: str, tree: DraftTree, orders: tuple[int, ...] = config.orders,
            some: list[TokenTrace] = traces,
        ) -> Replayed:  # fmt: skip
            return replay(
                some, tree, vocab_size=vocab, orders=orders,
                advance=lambda n: update(what, n),
            )  # fmt: skip

        def fitted(counts: Ids) -> DraftTree:
            return tune_tree(torch.from_numpy(counts), config.nodes, tree=big)

        big = big_tree()
        counts = [run_once("625 nodes", big, some=half).accepted for half in halves]
        held_out = None
        if len(halves) == 2:
            pairs = zip(halves, reversed(counts), strict=True)
            held_out = _rate([run_once("held out", fitted(c), some=half) for half, c in pairs])
        tree = fitted(np.sum(counts, axis=0))
        tuned = run_once(f"{tree.nodes} nodes", tree)
        default = run_once("default", DraftTree.default(tree.nodes))
        by_orders = {o: run_once(f"orders {o}", tree, o) for o in orders} | {config.orders: tuned}
        by_nodes = {n: run_once(f"{n} nodes", tree.prefix(n)) for n in sizes} | {tree.nodes: tuned}
    return Findings(tree, tuned, default, held_out, by_orders, by_nodes)


def _halves(traces: list[TokenTrace]) -> list[list[TokenTrace]]:
    """Every second problem, and the others; all traces where there is one problem."""
    place = {group: n for n, group in enumerate(dict.fromkeys(trace.group for trace in traces))}
    halves = [[trace for trace in traces if place[trace.group] % 2 == half] for half in (0, 1)]
    return [half for half in halves if half]


def _rate(parts: Sequence[Replayed]) -> float:
    """Tokens per step over several replays."""
    return float(sum(p.tokens.sum() for p in parts) / sum(p.steps.sum() for p in parts))


# ---- reporting


def _heading(traces: Sequence[TokenTrace], tokenizer: Tokenizer, vocab: int, nodes: int) -> str:
    tokens = sum(len(trace.tokens) for trace in traces)
    groups = len({trace.group for trace in traces})
    logged = sum(trace.topk_ids is not None for trace in traces)
    head = f"{counted(len(traces), 'trace')} of {counted(groups, 'problem')}, "
    head += f"{counted(tokens, 'token')} "
    kinds = {trace.from_text for trace in traces}
    named = [name for name, kind in ((tokenizer.name, True), ("token ids", False)) if kind in kinds]
    head += f"({' and '.join(named)}, vocabulary {vocab:,})"
    if True not in kinds and tokenizer.name != "bytes":
        head += "\n--tokenizer encodes no trace: all of them are token ids"
    if tokens < nodes:
        head += (
            f"\nwarning: {counted(tokens, 'token')}, fewer than the {nodes} nodes of the tree, "
            "most of which no text has chosen"
        )
    if logged < len(traces):
        head += (
            f"\n{len(traces) - logged} of them without logits: their tokens are counted as certain "
            "(probability 1), and the\ncandidates of a context are ranked by how often they "
            "followed. With logits, drafts know more."
        )
    return head


def report(findings: Findings) -> str:
    """Tokens per step by orders, by nodes and by trajectory, as text."""
    tuned, tree = findings.tuned, findings.tree
    lines = [f"\ntuned tree: {tree.draw().splitlines()[0]}", "\norders        tokens per step"]
    for orders, result in sorted(findings.by_orders.items(), key=lambda item: len(item[0])):
        lines.append(f"{','.join(map(str, orders)):12}  {result.tokens_per_step:15.2f}")
    answered = sum(tuned.hits.values()) + tuned.misses
    shares = [f"order {o}: {100 * n / max(1, answered):.0f} %" for o, n in tuned.hits.items()]
    shares.append(f"none: {100 * tuned.misses / max(1, answered):.0f} %")
    lines.append("look-ups answered by " + ", ".join(shares))
    lines.append("\nnodes         tokens per step")
    for nodes, result in sorted(findings.by_nodes.items()):
        lines.append(f"{nodes:<12}  {result.tokens_per_step:15.2f}")
    lines += _compared(findings)
    lines.append("\ntrajectory    tokens per step")
    for k, (steps, tokens) in enumerate(zip(tuned.steps, tuned.tokens, strict=True), start=1):
        lines.append(f"{k:<12}  {tokens / steps:15.2f}")
    return "\n".join(lines)


def _compared(findings: Findings) -> list[str]:
    """The tuned tree beside the default one, on traces that it was fitted to and on others."""
    nodes = findings.tree.nodes
    rows = [
        (f"DraftTree.default({nodes})", findings.default.tokens_per_step),
        ("tuned, on the traces it is fitted to", findings.tuned.tokens_per_step),
    ]
    if findings.held_out is not None:
        rows.append(("tuned on one half of the problems, on the other", findings.held_out))
    lines = [f"\n{f'tree of {nodes} nodes':47}  tokens per step"]
    lines += [f"{name:47}  {rate:15.2f}" for name, rate in rows]
    if findings.held_out is None:
        lines.append("(one problem: what the tree brings on another is not measured)")
    return lines
