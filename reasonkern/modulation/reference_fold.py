"""The definition of a fold: what a token does to a request, for R rows at once."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from . import layout as at


class Sets(NamedTuple):
    """Entries of all sets, see `layout.Storage`."""

    ids: Tensor
    member: Tensor


class Progress(NamedTuple):
    """Columns of progress, each (R,)."""

    t: Tensor
    spent: Tensor
    switched: Tensor
    phase: Tensor
    phrase: Tensor
    wait: Tensor
    ignore: Tensor
    stopped: Tensor


def sets_of(state: at.Storage) -> Sets:
    return Sets(state.set_ids, state.set_member)


def load(records: Tensor, slot: Tensor) -> Progress:
    return Progress(*records[slot, : len(Progress._fields)].unbind(1))


def holds(sets: Sets, index: Tensor, token: Tensor) -> Tensor:
    """(R,): set index[r] holds token[r]."""
    inside = (sets.member >> index.clamp_min(0).unsqueeze(-1)) & 1
    return ((sets.ids == token.unsqueeze(-1)) & (inside != 0) & (index >= 0).unsqueeze(-1)).any(-1)


def has(record: Tensor, part: int) -> Tensor:
    return (record[:, at.PARTS] & part) != 0


def entry(record: Tensor, column: int, index: Tensor) -> Tensor:
    """Element index[r] of the array of row r that begins at a column."""
    return record.gather(1, (column + index.clamp_min(0)).unsqueeze(-1)).squeeze(-1)


# ---- what a token does


def fold(record: Tensor, sets: Sets, p: Progress, token: Tensor, where: Tensor) -> Progress:
    """Progress after one more generated token, in the rows of `where`."""
    wait, ignore = _fold_wait(record, p, token)
    phrase = _fold_phrase(record, p, token)
    thinking = p.phase == at.THINKING
    closes = thinking & (token == record[:, at.THINK_END])
    opens = (p.phase == at.BEFORE) & (token == record[:, at.THINK_START])
    phase = torch.where(closes, at.CLOSED, torch.where(opens, at.THINKING, p.phase))
    spent = torch.where(opens, 0, p.spent + (thinking & ~closes))
    t = p.t + 1
    switches = has(record, at.TIP) & holds(sets, record[:, at.ADDED_SETS + 1], token)
    switched = torch.where(switches, t, p.switched)
    new = Progress(t, spent, switched, phase, phrase, wait, ignore, p.stopped)
    return Progress(*(torch.where(where, a, b) for a, b in zip(new, p, strict=True)))


def must_think(record: Tensor, p: Progress) -> Tensor:
    few = p.spent < record[:, at.MIN_TOKENS]
    return has(record, at.MIN_THINK) & (p.phase == at.THINKING) & (few | (p.ignore > 0))


def _fold_wait(record: Tensor, p: Progress, token: Tensor) -> tuple[Tensor, Tensor]:
    length = record[:, at.WAIT_LENGTH]
    continues = (p.wait > 0) & (token == entry(record, at.WAIT, p.wait))
    starts = ~continues & must_think(record, p) & (token == record[:, at.WAIT])
    following = torch.where(p.wait + 1 == length, 0, p.wait + 1)
    wait = torch.where(continues, following, (starts & (length > 1)).to(p.wait.dtype))
    return wait, p.ignore - (starts & (p.ignore > 0)).to(p.ignore.dtype)


def _fold_phrase(record: Tensor, p: Progress, token: Tensor) -> Tensor:
    """A Knuth-Morris-Pratt automaton that runs from that many spent tokens, TRACK_FROM, on.

    Once thinking has ended there is nothing left to enforce and a mismatch gives the phrase up.
    """
    thinking = p.phase == at.THINKING
    runs = has(record, at.BUDGET) & (p.phrase != at.DONE) & (p.spent >= record[:, at.TRACK_FROM])
    runs &= thinking | (p.phrase > 0)
    matched = torch.where(runs, p.phrase, 0)
    while True:
        falls = (matched > 0) & (entry(record, at.END, matched) != token)
        if not falls.any():
            break
        matched = torch.where(falls, entry(record, at.FAILURE, matched - 1), matched)
    matched = matched + (entry(record, at.END, matched) == token)
    stays_open = thinking & (token != record[:, at.THINK_END])
    given_up = ~stays_open & (matched != p.phrase + 1)
    done = given_up | (matched == record[:, at.END_LENGTH])
    return torch.where(runs, torch.where(done, at.DONE, matched), p.phrase)


def paths(
    where: Tensor, local_pos: Tensor | None, draft: Tensor | None, parents: Tensor | None
) -> Tensor:
    """(R, P) draft tokens before each row's logits, oldest first, -1 from the first -1 on.

    Outside `where`, in padding, a chain may have any length; one of more than the rows counts none.
    """
    rows = len(where)
    if draft is None or (local_pos is None and parents is None) or rows == 0:
        return torch.empty(rows, 0, dtype=torch.int64, device=where.device)
    if parents is None:
        assert local_pos is not None
        last = torch.arange(rows, device=draft.device)
        drafts = torch.where(where & (local_pos <= last + 1), local_pos, 0)
        step = torch.arange(int(drafts.max().clamp_min(0)), device=draft.device)
        index = (last + 1 - drafts).unsqueeze(-1) + step
        inside = step < drafts.unsqueeze(-1)
        tokens = draft.reshape(-1)[index.clamp(0, rows - 1)]
    else:
        nodes = _ancestors(parents.tolist()).to(draft.device)  # (N, depth)
        inside = (nodes >= 0).repeat(len(draft), 1)
        tokens = draft[:, nodes.clamp_min(0)].flatten(0, 1)
    tokens = torch.where(inside, tokens, -1)
    return torch.where((tokens < 0).cummax(-1).values, -1, tokens) if tokens.numel() else tokens


def _ancestors(parents: list[int]) -> Tensor:
    """(N, depth) nodes from below the root to each node, -1 beyond."""
    chains: list[list[int]] = [[]]
    for node, parent in enumerate(parents[1:], start=1):
        chains.append([*chains[parent], node])
    depth = max(map(len, chains))
    padded = [chain + [-1] * (depth - len(chain)) for chain in chains]
    return torch.tensor(padded, dtype=torch.int64, device="cpu").reshape(len(parents), depth)


def fold_path(record: Tensor, sets: Sets, p: Progress, path: Tensor) -> Progress:
    for token in path.unbind(1):
        p = fold(record, sets, p, token, token >= 0)
    return p
