"""The definition of the operators in torch, for all rows at once.

`control_of` is what a request asks of its row, `apply` what that does to the logits.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from . import layout as at
from .reference_fold import (
    Progress,
    Sets,
    entry,
    fold,
    fold_path,
    has,
    load,
    must_think,
    paths,
    sets_of,
)

INF = float("inf")
FORCED = 3e4  # above 2e4, finite in float16


class Control(NamedTuple):
    """What is done to R rows; an id or set of -1 asks for nothing."""

    force: Tensor
    added: Tensor  # (R, 4) float64: cyclic, TIP, constant, schedule
    sets: Tensor  # (R, 4)
    ban: Tensor
    end: Tensor
    wait: Tensor
    soft: Tensor
    weight: Tensor
    margin: Tensor


# ---- what a request asks of its row


def wave(amplitude: Tensor, period: Tensor, shift: Tensor, t: Tensor) -> Tensor:
    """0 at t = 0, +A at a quarter of the period, -A at three quarters; float64."""
    r = torch.fmod(t.double(), period)
    u = torch.fmod(r + shift * period + 0.75 * period, period)
    return amplitude * (4 * u / period - 2).abs() - amplitude


def control_of(record: Tensor, p: Progress) -> Control:
    numbers = record.view(torch.float64)
    thinking = p.phase == at.THINKING
    added = _added(record, numbers, p) * thinking.unsqueeze(-1)
    sets = record[:, at.ADDED_SETS : at.ADDED_SETS + len(at.ADDERS)]
    minimum = must_think(record, p)
    ramps = (p.spent >= record[:, at.TRACK_FROM]) & (p.spent < record[:, at.BUDGET_TOKENS])
    ramps &= thinking & has(record, at.SOFT) & (p.phrase != at.DONE)
    start = numbers[:, at.SOFT_FROM]
    share = (p.spent.double() - start) / (record[:, at.BUDGET_TOKENS].double() - start)
    return Control(
        force=_forced_id(record, p),
        added=added,
        sets=torch.where(added != 0, sets, -1),
        ban=torch.where(thinking & has(record, at.BAN), record[:, at.BAN_SET], -1),
        end=torch.where(minimum, record[:, at.THINK_END], -1),
        wait=torch.where(minimum, record[:, at.WAIT], -1),
        soft=torch.where(ramps, entry(record, at.END, p.phrase), -1),
        weight=torch.where(ramps, share, 0.0),
        margin=numbers[:, at.SOFT_MARGIN],
    )


def _forced_id(record: Tensor, p: Progress) -> Tensor:
    stops = has(record, at.DEEPCONF) & (p.stopped != 0) & (record[:, at.EOS] >= 0)
    spent = has(record, at.BUDGET) & (p.spent >= record[:, at.BUDGET_TOKENS])
    spent &= (p.phrase != at.DONE) & ((p.phase == at.THINKING) | (p.phrase > 0))
    waits = has(record, at.MIN_THINK) & (p.wait > 0)
    force = torch.where(waits, entry(record, at.WAIT, p.wait), -1)
    force = torch.where(spent, entry(record, at.END, p.phrase), force)
    return torch.where(stops, record[:, at.EOS], force)


def _added(record: Tensor, numbers: Tensor, p: Progress) -> Tensor:
    """(R, 4), 0 where a part is absent or outside its window."""
    t = p.t
    pairs = record[:, at.WINDOW : at.POINT].unflatten(1, (-1, 2))
    used = torch.arange(at.MAX_WINDOWS, device=t.device) < record[:, at.WINDOWS, None]
    inside = (t[:, None] >= pairs[..., 0]) & (t[:, None] < pairs[..., 1]) & used
    inside = inside.any(-1) | (record[:, at.WINDOWS] == 0)
    period = torch.where(has(record, at.CYCLIC), numbers[:, at.PERIOD], 1.0)
    cyclic = wave(numbers[:, at.AMPLITUDE], period, numbers[:, at.SHIFT], t)
    near = t < p.switched + record[:, at.TIP_SPAN]
    parts = (
        torch.where(inside, cyclic, 0.0),
        torch.where(near, -numbers[:, at.ALPHA], 0.0),
        numbers[:, at.BIAS],
        _scheduled(record, numbers, t),
    )
    rows = [torch.where(has(record, k), x, 0.0) for k, x in zip(at.ADDERS, parts, strict=True)]
    return torch.stack(rows, -1)


def _scheduled(record: Tensor, numbers: Tensor, t: Tensor) -> Tensor:
    """Linear between the points, constant outside them."""
    times, values = (x[:, at.POINT : at.END] for x in (record, numbers))
    times, values = times[:, ::2], values[:, 1::2]
    last = (record[:, at.POINTS, None] - 1).clamp_min(0)
    used = torch.arange(at.MAX_POINTS, device=t.device) <= last
    left = ((times <= t[:, None]) & used).sum(-1, keepdim=True) - 1
    low, high = left.clamp_min(0), torch.minimum((left + 1).clamp_min(0), last)
    t0, t1 = times.gather(1, low), times.gather(1, high)
    v0, v1 = values.gather(1, low), values.gather(1, high)
    share = (t[:, None] - t0).double() / (t1 - t0).clamp_min(1).double()
    inner = v0 + share * (v1 - v0)
    return torch.where((left < 0) | (low == high), v0, inner).squeeze(-1)


# ---- what that does to the logits


def apply(
    logits: Tensor, c: Control, sets: Sets, temperature: Tensor | None, dense: bool, where: Tensor
) -> None:
    """Modulates the rows of `where` in place."""
    real = torch.float64 if logits.dtype == torch.float64 else torch.float32
    forced = _force(logits, c, where)
    where = where & ~forced
    _apply_sets(logits, c, sets, where, real)
    _apply_minimum(logits, c, temperature, where)
    if dense:
        _apply_soft(logits, c, where)


def _force(logits: Tensor, c: Control, where: Tensor) -> Tensor:
    """NaN and -inf are not forced."""
    vocab = logits.shape[1]
    asked = where & (c.force >= 0) & (c.force < vocab)
    column = torch.where(asked, c.force, 0).unsqueeze(-1)
    forced = asked & (logits.gather(1, column).squeeze(-1) > -INF)
    rows = forced.nonzero().squeeze(-1)
    logits[rows, c.force[rows]] = FORCED
    return forced


def _apply_sets(logits: Tensor, c: Control, sets: Sets, where: Tensor, real: torch.dtype) -> None:
    """An id of several sets gets the sum of what is added, in double, rounded once; a ban wins."""
    inside = sets.ids < logits.shape[1]
    ids, member = sets.ids[inside].long(), sets.member[inside]

    def of(index: Tensor) -> Tensor:
        """(R, K): the entry's id is in the row's set."""
        bit = (member >> index.clamp_min(0).unsqueeze(-1)) & 1
        return (bit != 0) & (index >= 0).unsqueeze(-1)

    total = torch.zeros(len(logits), len(ids), dtype=torch.float64, device=logits.device)
    for k in range(len(at.ADDERS)):
        total = torch.where(of(c.sets[:, k]), total + c.added[:, k, None], total)
    banned = of(torch.where(_survives_ban(logits, ids, of(c.ban)), c.ban, -1))
    old = logits[:, ids]
    new = (old.to(real) + total.to(real)).to(logits.dtype)
    new = torch.where(banned, torch.where(old.isnan(), old, -INF), new)
    changes = where.unsqueeze(-1) & (banned | (total != 0))
    logits[:, ids] = torch.where(changes, new, old)


def _survives_ban(logits: Tensor, ids: Tensor, banned: Tensor) -> Tensor:
    """(R,): something finite is left without the banned ids."""
    left = logits.isfinite()
    for row in banned.any(-1).nonzero().squeeze(-1).tolist():
        left[row, ids[banned[row]]] = False
    return left.any(-1)


def _apply_minimum(logits: Tensor, c: Control, temperature: Tensor | None, where: Tensor) -> None:
    """Gives the mass of the end to the wait, as if every end drawn were replaced by a wait."""
    vocab = logits.shape[1]
    rows = (where & (c.end >= 0) & (c.end < vocab) & (c.wait < vocab)).nonzero().squeeze(-1)
    rows = rows[logits[rows, c.wait[rows]] != -INF]
    wait, end = logits[rows, c.wait[rows]].double(), logits[rows, c.end[rows]].double()
    t = torch.ones_like(wait) if temperature is None else temperature[rows].double()
    high, low = torch.maximum(wait, end), torch.minimum(wait, end)
    soft = high + t * torch.log1p(torch.exp((low - high) / t))
    plain = (t == 0) | (low == -INF) | (high == INF) | high.isnan()
    logits[rows, c.wait[rows]] = torch.where(plain, high, soft).to(logits.dtype)
    logits[rows, c.end[rows]] = -INF


def _apply_soft(logits: Tensor, c: Control, where: Tensor) -> None:
    """Raises the budget's next id towards the largest finite logit less the margin."""
    rows = (where & (c.soft >= 0) & (c.soft < logits.shape[1])).nonzero().squeeze(-1)
    lines = logits[rows]
    top = torch.where(lines.isfinite(), lines, -INF).amax(-1).double()
    z = logits[rows, c.soft[rows]]
    gap = top - c.margin[rows] - z.double()
    raised = (z.double() + c.weight[rows] * gap).to(logits.dtype)
    logits[rows, c.soft[rows]] = torch.where(z.isfinite() & (gap > 0), raised, z)


def modulate_logits_(
    logits: Tensor, slot: Tensor, local_pos: Tensor | None, draft_tokens: Tensor | None,
    parents: Tensor | None, temperature: Tensor | None, records: Tensor, sets: Tensor, dense: bool,
) -> None:  # fmt: skip
    entries = sets_of(at.Storage(records, sets))
    if parents is not None:
        slot = slot.repeat_interleave(len(parents))
    where, slot = controlled(records, slot)
    path = paths(where, local_pos, draft_tokens, parents).to(logits.device)
    record = records[slot, : at.ROW_WIDTH]
    p = fold_path(record, entries, load(records, slot), path)
    apply(logits, control_of(record, p), entries, temperature, dense, where)


def controlled(records: Tensor, slot: Tensor) -> tuple[Tensor, Tensor]:
    """(rows of slots in use, slots with 0 instead of padding)."""
    inside = (slot >= 0) & (slot < len(records))
    slot = torch.where(inside, slot, 0)
    return inside & ((records[slot, at.PARTS] & at.ACTIVE) != 0), slot


# ---- accepted tokens


def commit_(
    slot: Tensor, tokens: Tensor, length: Tensor, entropy: Tensor | None,
    confidence: Tensor | None, records: Tensor, sets: Tensor,
) -> None:  # fmt: skip
    state = at.Storage(records, sets)
    entries = sets_of(state)
    where, _ = controlled(records, slot)
    kept = where.nonzero().squeeze(-1)
    slot, tokens, length = slot[kept], tokens[kept], length[kept]
    rows = records[slot, : at.ROW_WIDTH]
    p, alive = load(records, slot), torch.ones_like(kept, dtype=torch.bool)
    for j in range(tokens.shape[1]):
        alive = alive & (j < length) & (tokens[:, j] >= 0)
        # The law of a forced row is not the model's; a token that was due came by force.
        free = alive & (tokens[:, j] != _forced_id(rows, p))
        p = fold(rows, entries, p, tokens[:, j], alive)
        if confidence is not None:
            pushed = free & has(rows, at.DEEPCONF) & confidence[kept, j].isfinite()
            _push_confidence(state, slot[pushed], confidence[kept, j][pushed])
            p = p._replace(stopped=records[slot, at.STOPPED])
        if entropy is not None:
            pushed = free & has(rows, at.TRIGGER) & entropy[kept, j].isfinite()
            _push_entropy(state, slot[pushed], entropy[kept, j][pushed])
    records[slot, : at.STOPPED] = torch.stack(p[: at.STOPPED], -1)


def _push_confidence(state: at.Storage, slot: Tensor, value: Tensor) -> None:
    """The running mean of DeepConf; once it is below the threshold the request stays stopped."""
    records, numbers, ring = state.records, state.numbers, state.confidence
    window, pushed = records[slot, at.CONFIDENCE_WINDOW], records[slot, at.CONFIDENCE_PUSHED]
    place = pushed % window
    old = torch.where(pushed < window, 0.0, ring[slot, place].double())
    total = numbers[slot, at.CONFIDENCE_SUM] + (value.double() - old)
    numbers[slot, at.CONFIDENCE_SUM] = total
    ring[slot, place] = value
    records[slot, at.CONFIDENCE_PUSHED] = pushed + 1
    low = total < numbers[slot, at.CONFIDENCE_THRESHOLD] * window.double()
    records[slot, at.STOPPED] |= ((pushed + 1 >= window) & low).long()


def _push_entropy(state: at.Storage, slot: Tensor, value: Tensor) -> None:
    pushed = state.records[slot, at.ENTROPY_PUSHED]
    state.entropy[slot, pushed % state.records[slot, at.ENTROPY_WINDOW]] = value
    state.records[slot, at.ENTROPY_PUSHED] = pushed + 1


def entropy_threshold(state: at.Storage) -> Tensor:
    """(S,) float64: entropy above which a row of each slot, one with TRIGGER, triggers."""
    records, numbers, ring = state.records, state.numbers, state.entropy
    window = records[:, at.ENTROPY_WINDOW].clamp_min(2)
    used = torch.arange(at.MAX_ENTROPY, device=ring.device) < window.unsqueeze(-1)
    values = torch.where(used, ring.double(), 0.0)
    mean = values.sum(-1) / window
    squares = torch.where(used, (values - mean.unsqueeze(-1)) ** 2, 0.0)
    deviation = (squares.sum(-1) / (window - 1)).sqrt()
    spread = torch.maximum(deviation, numbers[:, at.ENTROPY_STD])
    high = torch.maximum(
        mean + numbers[:, at.ENTROPY_FACTOR] * spread, numbers[:, at.ENTROPY_FLOOR]
    )
    return torch.where(records[:, at.ENTROPY_PUSHED] < window, numbers[:, at.ENTROPY_FIRST], high)
