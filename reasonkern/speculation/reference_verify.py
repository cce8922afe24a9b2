"""The definition of `sample` and `verify_tree` in torch: the walk down the tree, row by row."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

from . import noise, rejection
from .reference_row import (
    INF,
    Filters,
    Scores,
    allowed,
    choose,
    choose_residual,
    entropy_of,
    law_statistics,
    scores,
    statistics,
)
from .tree import check_rows

EOS, BAD_ROW, CAPPED = 1, 2, 4  # bits of the status


class Control(Protocol):
    """What changes the logits of a batch of requests, and follows the tokens along a path."""

    def apply(self, logits: Tensor, temperature: Tensor) -> Tensor:
        """(B, V) float32 logits after control, perhaps in the same memory."""

    def trigger(self, entropy: Tensor) -> Tensor:
        """(B,) bool: the row's entropy stands out."""

    def advance(self, token: Tensor, told: Told | None, taken: Tensor) -> None:
        """Requests where `taken` have emitted a token from a row, perhaps with statistics."""


class Told(NamedTuple):
    """Statistics of rows, each (R,): see `reasonkern.Sampled`."""

    logprob: Tensor
    entropy: Tensor
    entropy_raw: Tensor
    confidence: Tensor
    max_prob: Tensor
    trigger: Tensor


class Rows:
    """How tokens are drawn from the rows of B requests, one row of each at a time.

    This is the definition; a backend overrides `choose` and `raw_statistics`.
    """

    def __init__(
        self, filters: Filters, seed: Tensor, position: Tensor, control: Control | None = None,
        stats: bool = False,
    ) -> None:  # fmt: skip
        self.filters, self.seed, self.position = filters, seed, position
        self.control, self.stats = control, stats

    def choose(
        self, raw: Tensor, mask: Tensor | None, depth: int = 0, drafts: Tensor | None = None,
        entry: tuple[Tensor, Tensor] | None = None,
    ) -> tuple[Tensor, Tensor, Told | None]:  # fmt: skip
        """Tokens, whether the row is bad, and with `stats` what there is to tell."""
        x = allowed(raw, mask)  # -inf before control sees the row
        if self.control is not None:
            x = self.control.apply(x, self.filters.temperature)
        s = scores(x, None, self.filters)
        if drafts is None or entry is None:
            token = choose(s, self.filters, self.seed, self.position + depth)
        else:
            where = self.seed, self.position, depth
            token = _choose_by_rejection(s, self.filters, entry, drafts, *where)
        if not self.stats:
            return token, s.bad, None
        law = law_statistics(x, s, self.filters, token)
        entropy_raw = entropy_of(raw.to(torch.float32)).to(torch.float32)
        told = (law.logprob, law.entropy, entropy_raw, law.confidence, law.max_prob)
        return token, s.bad, Told(*told, self.trigger(law.entropy))

    def trigger(self, entropy: Tensor) -> Tensor:
        if self.control is None:
            return torch.zeros_like(entropy, dtype=torch.bool)
        return self.control.trigger(entropy)

    def raw_statistics(self, rows: Tensor, k: int) -> tuple[Tensor, Tensor, Tensor]:
        """Ids and logits of the k largest, and the log-sum-exp."""
        return statistics(rows, k)


def sample(
    logits: Tensor, mask: Tensor | None, temperature: Tensor, top_k: Tensor, top_p: Tensor,
    min_p: Tensor, seed: Tensor, position: Tensor,
) -> Tensor:  # fmt: skip
    filters = Filters(temperature, top_k, top_p, min_p)
    return Rows(filters, seed, position).choose(logits, mask)[0]


def verify_tree(*args: Any) -> tuple[Tensor, ...]:
    return walk(rows_of(args), *args)


def rows_of(args: Sequence[Any], *more: Any, kind: type[Rows] = Rows) -> Rows:
    """The rows of verify_tree's arguments."""
    return kind(Filters(*args[7:11]), args[11], args[12], *more)


def walk(
    rows: Rows, logits: Tensor, tokens: Tensor, valid: Tensor, q_ids: Tensor | None,
    q_logprob: Tensor | None, child_ptr: Tensor, child_index: Tensor, temperature: Tensor,
    top_k: Tensor, top_p: Tensor, min_p: Tensor, seed: Tensor, position: Tensor,
    eos: Tensor | None, max_length: Tensor | None, node_mask: Tensor | None,
    num_nodes: Tensor | None, depth: int, max_children: int, topk: int,
) -> tuple[Tensor, ...]:  # fmt: skip
    check_rows(logits)
    batch = torch.arange(logits.shape[0], device=logits.device)
    children = _child_table(child_ptr, child_index, max_children)
    usable = valid if num_nodes is None else valid & _below(valid, num_nodes)
    out = _empty_outputs(logits, depth + 1, topk)
    out.path[:, 0] = 0
    told = nothing_told(logits, depth + 1) if rows.stats else ()
    length, status = torch.zeros_like(batch), torch.zeros_like(batch)
    node, alive = torch.zeros_like(batch), valid[:, 0]
    if max_length is not None:
        alive = alive & (max_length > 0)
    for d in range(depth + 1):
        raw = logits[batch, node]
        mask = None if node_mask is None else node_mask[batch, node]
        below = children[node]
        offered = (below >= 0) & usable.gather(-1, below.clamp_min(0)) & alive.unsqueeze(-1)
        drafts = torch.where(offered, tokens.gather(-1, below.clamp_min(0)), -1)
        law = None
        if q_ids is not None and q_logprob is not None:
            law = q_ids[batch, node], q_logprob[batch, node]
        token, bad, values = rows.choose(raw, mask, d, drafts, law)
        status |= torch.where(alive & bad, BAD_ROW, 0)
        alive = alive & (token >= 0)
        length += alive
        emitted = (token, node, *rows.raw_statistics(raw, topk), *(values or ()))
        for columns, value in zip((*out, *told), emitted, strict=True):
            where = alive.unsqueeze(-1) if value.ndim > 1 else alive
            columns[:, d] = torch.where(where, value, columns[:, d])
        if rows.control is not None:
            rows.control.advance(token, values, alive)
        match = (drafts == token.unsqueeze(-1)) & alive.unsqueeze(-1)
        slot = match.to(torch.int8).argmax(-1, keepdim=True) if max_children else None
        if eos is not None:
            ended = alive & (token.unsqueeze(-1) == eos).any(-1)
            status |= torch.where(ended, EOS, 0)
            alive = alive & ~ended
        if max_length is not None:
            alive = alive & (length < max_length)
        if slot is None:
            break
        alive = alive & match.any(-1)
        node = torch.where(alive, below.gather(-1, slot).squeeze(-1), node)
    if max_length is not None:
        status |= torch.where(valid[:, 0] & (length >= max_length), CAPPED, 0)
    return out.tokens, length, *out[1:], status.to(torch.int32), *told


class _Outputs(NamedTuple):
    """Columns by depth, empty where nothing is emitted."""

    tokens: Tensor
    path: Tensor
    topk_ids: Tensor
    topk_logits: Tensor
    lse: Tensor


def _empty_outputs(logits: Tensor, columns: int, topk: int) -> _Outputs:
    rows = (logits.shape[0], columns)
    tokens, path = (logits.new_full(rows, -1, dtype=torch.int64) for _ in range(2))
    ids = logits.new_full((*rows, topk), -1, dtype=torch.int64)
    values = logits.new_full((*rows, topk), -INF, dtype=torch.float32)
    lse = logits.new_full(rows, -INF, dtype=torch.float32)
    return _Outputs(tokens, path, ids, values, lse)


def nothing_told(logits: Tensor, columns: int) -> Told:
    """(B, columns) each: -inf and no trigger, as where there is no row."""
    shape = (logits.shape[0], columns)
    numbers = [logits.new_full(shape, -INF, dtype=torch.float32) for _ in range(5)]
    return Told._make((*numbers, logits.new_zeros(shape, dtype=torch.bool)))


def _choose_by_rejection(
    s: Scores, filters: Filters, entry: tuple[Tensor, Tensor], drafts: Tensor, seed: Tensor,
    position: Tensor, depth: int,
) -> Tensor:  # fmt: skip
    """The accepted child's token, else a draw from the residual; greedy rows need no coins."""
    state = rejection.start(s, *entry)
    active = ~s.bad & (filters.temperature > 0)
    accepted = torch.full_like(drafts[:, :1].sum(-1), -1)
    for rank in range(drafts.shape[-1]):
        word = noise.words(seed, position, torch.full_like(seed, rank), noise.COIN, depth)
        coin = word.double() * 2.0**-32
        hit = rejection.test(state, drafts[:, rank], coin, active & (accepted < 0))
        accepted = torch.where(hit, drafts[:, rank], accepted)
    value = rejection.log_weights(state, s)
    drawn = choose_residual(s, filters, value, seed, position, depth)
    return torch.where(accepted >= 0, accepted, drawn)


def _child_table(child_ptr: Tensor, child_index: Tensor, width: int) -> Tensor:
    """(N, width) children of each node by rank, -1 beyond the last."""
    slot = child_ptr[:-1, None].long() + torch.arange(width, device=child_ptr.device)
    inside = slot < child_ptr[1:, None]
    if child_index.numel() == 0:
        return torch.full_like(slot, -1)
    return torch.where(inside, child_index.long()[slot.clamp_max(len(child_index) - 1)], -1)


def _below(valid: Tensor, num_nodes: Tensor) -> Tensor:
    return torch.arange(valid.shape[1], device=valid.device) < num_nodes.unsqueeze(-1)
