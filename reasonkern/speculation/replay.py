"""Replays recorded traces through a table: what speculation would have accepted.

A step drafts a tree from what the table has learnt, walks it along the recorded tokens, emits the
accepted ones and one more, and lets the table learn from them. The text is given, so drafts are
ranked by probability; noise would have to be that of the recorded run.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any

import numpy as np
import torch
from numpy.lib.stride_tricks import sliding_window_view
from numpy.typing import NDArray

from .. import _checks
from .table import NgramTable
from .tree import DraftTree

Ids = NDArray[np.int64]
Advance = Callable[[int], None]  # told the number of tokens replayed
TOGETHER = 64  # groups replayed side by side


@dataclass
class TokenTrace:
    """A recorded sequence; traces of one group share a scope of the table, in their order."""

    tokens: Ids
    prompt: Ids = field(default_factory=lambda: np.empty(0, np.int64))
    group: Hashable = 0
    # (tokens, k): what the model's output before each token was; None = not recorded
    topk_ids: Ids | None = None
    topk_logprobs: NDArray[np.float32] | None = None
    from_text: bool = False  # by a tokenizer


@dataclass
class Replayed:
    """Counts of a replay."""

    accepted: Ids  # by node of the tree; the root counts the steps
    steps: Ids  # by position of the trace in its group
    tokens: Ids  # likewise
    hits: dict[int, int]  # look-ups by the order that answered them
    misses: int

    @property
    def tokens_per_step(self) -> float:
        """Emitted tokens per step, the one after the draft included."""
        return float(self.tokens.sum() / max(1, self.steps.sum()))


class _Row:
    """One group under replay: a row of the batch."""

    def __init__(self, traces: Sequence[TokenTrace], scope: int, width: int) -> None:
        self.scope, self._traces, self._width = scope, traces, width
        self.index = -1
        self.open_next()

    def open_next(self) -> None:
        self.index += 1
        self.position = 0
        if self.done:
            return
        trace = self.trace = self._traces[self.index]
        prompt = len(trace.prompt)
        before = np.full(self._width, -1)
        whole = np.concatenate((before, trace.prompt, trace.tokens))
        windows = sliding_window_view(whole, self._width)  # [i]: what precedes token i
        self.prompt_windows = windows[1:prompt]
        self.windows = windows[prompt:]

    @property
    def done(self) -> bool:
        return self.index >= len(self._traces)


def replay(
    traces: Sequence[TokenTrace],
    tree: DraftTree,
    *,
    vocab_size: int,
    orders: Sequence[int] = (4, 3, 2),
    topk: int = 12,
    capacity: int = 1 << 20,
    advance: Advance = lambda tokens: None,
) -> Replayed:
    """Replays all traces; groups are independent of each other."""
    groups: dict[Hashable, list[TokenTrace]] = {}
    for trace in traces:
        if len(trace.tokens):
            groups.setdefault(trace.group, []).append(trace)
    longest = max(map(len, groups.values()), default=0)
    total = Replayed(
        np.zeros(tree.nodes, np.int64), np.zeros(longest, np.int64), np.zeros(longest, np.int64),
        dict.fromkeys(orders, 0), 0,
    )  # fmt: skip
    members = list(groups.values())
    for first in range(0, len(members), TOGETHER):
        table = NgramTable(
            capacity, vocab_size=vocab_size, orders=orders, topk=topk, max_scopes=TOGETHER
        )
        rows = [
            _Row(group, scope, orders[0])
            for scope, group in enumerate(members[first : first + TOGETHER])
        ]
        _replay_rows(rows, table, tree, total, advance)
        stats = table.stats()
        for order in orders:
            total.hits[order] += stats["hits"][order]
        total.misses += stats["misses"]
    return total


def _replay_rows(
    rows: list[_Row], table: NgramTable, tree: DraftTree, total: Replayed, advance: Advance
) -> None:
    pointers, index = (t.tolist() for t in tree.children)
    children = [index[a:b] for a, b in pairwise(pointers)]
    for row in rows:
        _learn(table, [(row, row.prompt_windows, _one_hot(row.trace.prompt[1:]))])
    while rows:
        contexts = torch.from_numpy(np.stack([row.windows[row.position] for row in rows]))
        scopes = contexts.new_tensor([row.scope for row in rows])
        draft = table.draft(
            contexts, tree, temperature=0.0, seed=0, position=0, mode="target-only", scope=scopes
        )
        tokens, valid = draft.tokens.numpy(), draft.valid.numpy()
        lessons, emitted = [], 0
        for b, row in enumerate(rows):
            path = _walk(tokens[b], valid[b], children, row.trace.tokens[row.position :])
            total.accepted[path] += 1
            begin, end = row.position, min(row.position + len(path), len(row.trace.tokens))
            lessons.append((row, row.windows[begin:end], _laws(row.trace, begin, end)))
            total.steps[row.index] += 1
            total.tokens[row.index] += end - begin
            emitted += end - begin
            row.position = end
        _learn(table, lessons)
        for row in rows:
            if row.position == len(row.trace.tokens):
                row.open_next()
        rows = [row for row in rows if not row.done]
        advance(emitted)


def _walk(
    tokens: Ids, valid: NDArray[np.bool_], children: list[list[int]], future: Ids
) -> list[int]:
    """The nodes from the root whose tokens are the recorded ones."""
    path = [0]
    for token in future:
        below = children[path[-1]]
        match = [node for node in below if valid[node] and tokens[node] == token]
        if not match:
            break
        path.append(match[0])
    return path


Law = tuple[Ids, NDArray[np.float32]]


def _one_hot(tokens: Ids) -> Law:
    return tokens[:, None], np.zeros((len(tokens), 1), np.float32)


def _laws(trace: TokenTrace, begin: int, end: int) -> Law:
    if trace.topk_ids is None or trace.topk_logprobs is None:
        return _one_hot(trace.tokens[begin:end])
    return trace.topk_ids[begin:end], trace.topk_logprobs[begin:end]


def _learn(table: NgramTable, lessons: list[tuple[_Row, Ids, Law]]) -> None:
    width = max(law[0].shape[1] for _, _, law in lessons)

    def pad(x: NDArray[Any], value: int) -> NDArray[Any]:
        if x.shape[1] == width:
            return x
        return np.pad(x, ((0, 0), (0, width - x.shape[1])), constant_values=value)

    contexts = np.concatenate([windows for _, windows, _ in lessons])
    ids = np.concatenate([pad(law[0], -1) for _, _, law in lessons])
    logprobs = np.concatenate([pad(law[1], 0) for _, _, law in lessons])
    scopes = np.repeat([row.scope for row, _, _ in lessons], [len(w) for _, w, _ in lessons])
    table.update(
        torch.from_numpy(contexts), torch.from_numpy(ids), torch.from_numpy(logprobs),
        scope=torch.from_numpy(scopes),
    )  # fmt: skip


def token_traces(sequences: Sequence[Any]) -> list[TokenTrace]:
    """Traces as they are, sequences of ids as traces of one group; the empty ones left out."""
    traces = [
        s if isinstance(s, TokenTrace) else TokenTrace(_token_ids(i, s))
        for i, s in enumerate(sequences)
    ]
    traces = [trace for trace in traces if len(trace.tokens)]
    if not traces:
        _checks.fail("source", "at least one sequence of token ids", "none")
    return traces


def _token_ids(index: int, sequence: Any) -> Ids:
    ids = np.asarray(sequence)
    if ids.ndim != 1 or (ids.size and (ids.dtype.kind not in "iu" or int(ids.min()) < 0)):
        _checks.fail(f"source[{index}]", "a sequence of token ids", repr(sequence))
    return ids.astype(np.int64)
