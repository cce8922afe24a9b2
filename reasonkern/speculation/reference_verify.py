"""The definition of `sample` and `verify_tree` in torch: the walk down the tree, row by row."""

from __future__ import annotations

from typing import Any, Protocol

import torch
from torch import Tensor

from . import noise, rejection
from .reference_row import (
    INF,
    Filters,
    Law,
    Scores,
    allowed,
    choose,
    choose_residual,
    entropy_of,
    law_statistics,
    scores,
    statistics,
)

EOS, BAD_ROW, CAPPED = 1, 2, 4  # bits of the status


class Control(Protocol):
    """What changes the logits of a batch of requests, and follows the tokens along a path."""

    def apply(self, logits: Tensor, temperature: Tensor) -> Tensor:
        """(B, V) float32 logits after control."""

    def trigger(self, entropy: Tensor) -> Tensor:
        """(B,) bool: the row's entropy stands out."""

    def advance(self, token: Tensor, law: Law | None, taken: Tensor) -> None:
        """Requests where `taken` have emitted a token from a row, perhaps with statistics."""


def sample(
    logits: Tensor, mask: Tensor | None, temperature: Tensor, top_k: Tensor, top_p: Tensor,
    min_p: Tensor, seed: Tensor, position: Tensor,
) -> Tensor:  # fmt: skip
    filters = Filters(temperature, top_k, top_p, min_p)
    return choose(scores(logits, mask, filters), filters, seed, position)


def sample_controlled(
    control: Control | None, logits: Tensor, mask: Tensor | None, temperature: Tensor,
    top_k: Tensor, top_p: Tensor, min_p: Tensor, seed: Tensor, position: Tensor,
) -> tuple[Tensor, ...]:  # fmt: skip
    filters = Filters(temperature, top_k, top_p, min_p)
    x = controlled(logits, mask, filters, control)
    s = scores(x, None, filters)
    token = choose(s, filters, seed, position)
    law = law_statistics(x, s, filters, token)
    return token, *_epilogue(logits, law, control)


def controlled(
    logits: Tensor, mask: Tensor | None, filters: Filters, control: Control | None
) -> Tensor:
    """(R, V) float32: what is not allowed is -inf before control sees the row."""
    x = allowed(logits, mask)
    return x if control is None else control.apply(x, filters.temperature)


def verify_tree(*args: Any) -> tuple[Tensor, ...]:
    return walk(None, False, *args)[:7]


def walk(
    control: Control | None, stats: bool, logits: Tensor, tokens: Tensor, valid: Tensor,
    q_ids: Tensor | None, q_logprob: Tensor | None, child_ptr: Tensor, child_index: Tensor,
    temperature: Tensor, top_k: Tensor, top_p: Tensor, min_p: Tensor, seed: Tensor,
    position: Tensor, eos: Tensor | None, max_length: Tensor | None, node_mask: Tensor | None,
    num_nodes: Tensor | None, depth: int, max_children: int, topk: int,
) -> tuple[Tensor, ...]:  # fmt: skip
    batch = torch.arange(logits.shape[0], device=logits.device)
    filters = Filters(temperature, top_k, top_p, min_p)
    children = _child_table(child_ptr, child_index, max_children)
    usable = valid if num_nodes is None else valid & _below(valid, num_nodes)
    rows = [t.new_full((len(batch), depth + 1), -1) for t in (tokens, tokens)]
    out_tokens, path = rows
    path[:, 0] = 0
    epilogue = _empty_epilogue(logits, depth + 1 if stats else 0)
    length, status = torch.zeros_like(batch), torch.zeros_like(batch)
    node, alive = torch.zeros_like(batch), valid[:, 0]
    if max_length is not None:
        alive = alive & (max_length > 0)
    for d in range(depth + 1):
        mask = None if node_mask is None else node_mask[batch, node]
        x = controlled(logits[batch, node], mask, filters, control)
        s = scores(x, None, filters)
        below = children[node]
        offered = (below >= 0) & usable.gather(-1, below.clamp_min(0)) & alive.unsqueeze(-1)
        drafts = torch.where(offered, tokens.gather(-1, below.clamp_min(0)), -1)
        if q_ids is None or q_logprob is None:
            token = choose(s, filters, seed, position + d)
        else:
            entry = q_ids[batch, node], q_logprob[batch, node]
            token = _choose_by_rejection(s, filters, entry, drafts, seed, position, d)
        status |= torch.where(alive & s.bad, BAD_ROW, 0)
        alive = alive & (token >= 0)
        path[:, d] = torch.where(alive, node, path[:, d])
        out_tokens[:, d] = torch.where(alive, token, -1)
        length += alive
        law = law_statistics(x, s, filters, token) if stats else None
        if law is not None:
            values = _epilogue(logits[batch, node], law, control)
            for column, value in zip(epilogue, values, strict=True):
                column[:, d] = torch.where(alive, value, column[:, d])
        if control is not None:
            control.advance(token, law, alive)
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
    return *_outputs(logits, out_tokens, length, path, status, topk), *epilogue


def _empty_epilogue(logits: Tensor, rows: int) -> tuple[Tensor, ...]:
    """(B, rows) each, as `_epilogue` fills them: -inf and no trigger where there is no row."""
    shape = (logits.shape[0], rows)
    numbers = [logits.new_full(shape, -INF, dtype=torch.float32) for _ in range(5)]
    return *numbers, logits.new_zeros(shape, dtype=torch.bool)


def _epilogue(raw: Tensor, law: Law, control: Control | None) -> tuple[Tensor, ...]:
    """logprob, entropy, entropy_raw, confidence, max_prob, trigger."""
    entropy_raw = entropy_of(raw.to(torch.float32)).to(torch.float32)
    trigger = torch.zeros_like(law.entropy, dtype=torch.bool)
    if control is not None:
        trigger = control.trigger(law.entropy)
    return law.logprob, law.entropy, entropy_raw, law.confidence, law.max_prob, trigger


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


def _outputs(
    logits: Tensor, tokens: Tensor, length: Tensor, path: Tensor, status: Tensor, topk: int
) -> tuple[Tensor, ...]:
    """Adds the statistics of the rows on the path; rows from `length` on are empty."""
    rows = logits.gather(1, path.clamp_min(0).unsqueeze(-1).expand(-1, -1, logits.shape[-1]))
    ids, values, lse = statistics(rows, topk)
    used = torch.arange(path.shape[1], device=path.device) < length.unsqueeze(-1)
    ids = torch.where(used.unsqueeze(-1), ids, -1)
    values = torch.where(used.unsqueeze(-1), values, -INF)
    lse = torch.where(used, lse, -INF)
    return tokens, length, path, ids, values, lse, status.to(torch.int32)
