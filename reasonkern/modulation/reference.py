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


def control_of(spec: Tensor, numbers: Tensor, p: Progress) -> Control:
    thinking = p.phase == at.THINKING
    added = _added(spec, numbers, p) * thinking.unsqueeze(-1)
    sets = spec[:, at.ADDED_SETS : at.ADDED_SETS + len(at.ADDERS)]
    minimum = must_think(spec, p)
    ramps = (p.spent >= spec[:, at.TRACK_FROM]) & (p.spent < spec[:, at.BUDGET_TOKENS])
    ramps &= thinking & has(spec, at.SOFT) & (p.phrase != at.DONE)
    start = numbers[:, at.SOFT_FROM]
    share = (p.spent.double() - start) / (spec[:, at.BUDGET_TOKENS].double() - start)
    return Control(
        force=_forced_id(spec, p),
        added=added,
        sets=torch.where(added != 0, sets, -1),
        ban=torch.where(thinking & has(spec, at.BAN), spec[:, at.BAN_SET], -1),
        end=torch.where(minimum, spec[:, at.THINK_END], -1),
        wait=torch.where(minimum, spec[:, at.WAIT], -1),
        soft=torch.where(ramps, entry(spec, at.END, p.phrase), -1),
        weight=torch.where(ramps, share, 0.0),
        margin=numbers[:, at.SOFT_MARGIN],
    )


def _forced_id(spec: Tensor, p: Progress) -> Tensor:
    stops = has(spec, at.DEEPCONF) & (p.stopped != 0) & (spec[:, at.EOS] >= 0)
    spent = has(spec, at.BUDGET) & (p.spent >= spec[:, at.BUDGET_TOKENS]) & (p.phrase != at.DONE)
    spent &= (p.phase == at.THINKING) | (p.phrase > 0)
    waits = has(spec, at.MIN_THINK) & (p.wait > 0)
    force = torch.where(waits, entry(spec, at.WAIT, p.wait), -1)
    force = torch.where(spent, entry(spec, at.END, p.phrase), force)
    return torch.where(stops, spec[:, at.EOS], force)


def _added(spec: Tensor, numbers: Tensor, p: Progress) -> Tensor:
    """(R, 4), 0 where a part is absent or outside its window."""
    t = p.t
    pairs = spec[:, at.WINDOW : at.POINT_T].unflatten(1, (-1, 2))
    used = torch.arange(at.MAX_WINDOWS, device=t.device) < spec[:, at.WINDOWS, None]
    inside = (t[:, None] >= pairs[..., 0]) & (t[:, None] < pairs[..., 1]) & used
    inside = inside.any(-1) | (spec[:, at.WINDOWS] == 0)
    period = torch.where(has(spec, at.CYCLIC), numbers[:, at.PERIOD], 1.0)
    cyclic = wave(numbers[:, at.AMPLITUDE], period, numbers[:, at.SHIFT], t)
    near = t < p.switched + spec[:, at.TIP_SPAN]
    parts = (
        torch.where(inside, cyclic, 0.0),
        torch.where(near, -numbers[:, at.ALPHA], 0.0),
        numbers[:, at.BIAS],
        _scheduled(spec, numbers, t),
    )
    rows = [torch.where(has(spec, k), x, 0.0) for k, x in zip(at.ADDERS, parts, strict=True)]
    return torch.stack(rows, -1)


def _scheduled(spec: Tensor, numbers: Tensor, t: Tensor) -> Tensor:
    """Linear between the points, constant outside them."""
    times = spec[:, at.POINT_T : at.POINT_T + at.MAX_POINTS]
    values = numbers[:, at.POINT_VALUE :]
    last = (spec[:, at.POINTS, None] - 1).clamp_min(0)
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
    """Gives the mass of the end to the wait: what "an end is replaced by a wait" comes to."""
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
    parents: Tensor | None, temperature: Tensor | None, spec: Tensor, numbers: Tensor,
    progress: Tensor, set_offsets: Tensor, set_ids: Tensor, set_member: Tensor, dense: bool,
) -> None:  # fmt: skip
    sets = Sets(set_offsets, set_ids, set_member)
    if parents is not None:
        slot = slot.repeat_interleave(len(parents))
    where, slot = controlled(spec, slot)
    path = paths(len(logits), local_pos, draft_tokens, parents).to(logits.device)
    p = fold_path(spec[slot], sets, load(progress, slot), path)
    apply(logits, control_of(spec[slot], numbers[slot], p), sets, temperature, dense, where)


def controlled(spec: Tensor, slot: Tensor) -> tuple[Tensor, Tensor]:
    """(rows of slots in use, slots with 0 instead of padding)."""
    inside = (slot >= 0) & (slot < len(spec))
    slot = torch.where(inside, slot, 0)
    return inside & has(spec[slot], at.ACTIVE), slot


# ---- accepted tokens


def commit_(
    slot: Tensor, tokens: Tensor, length: Tensor, entropy: Tensor | None,
    confidence: Tensor | None, spec: Tensor, numbers: Tensor, progress: Tensor,
    set_offsets: Tensor, set_ids: Tensor, set_member: Tensor, confidence_ring: Tensor,
    entropy_ring: Tensor, confidence_sum: Tensor,
) -> None:  # fmt: skip
    sets = Sets(set_offsets, set_ids, set_member)
    where, _ = controlled(spec, slot)
    kept = where.nonzero().squeeze(-1)
    slot, tokens, length = slot[kept], tokens[kept], length[kept]
    rows = spec[slot]
    p, alive = load(progress, slot), torch.ones_like(kept, dtype=torch.bool)
    for j in range(tokens.shape[1]):
        alive = alive & (j < length) & (tokens[:, j] >= 0)
        # The law of a forced row is not the model's; a token that was due came by force.
        free = alive & (tokens[:, j] != _forced_id(rows, p))
        p = fold(rows, sets, p, tokens[:, j], alive)
        if confidence is not None:
            pushed = free & has(rows, at.DEEPCONF) & confidence[kept, j].isfinite()
            _push_confidence(slot[pushed], confidence[kept, j][pushed], spec, numbers, progress,
                             confidence_ring, confidence_sum)  # fmt: skip
            p = p._replace(stopped=progress[slot, at.STOPPED])
        if entropy is not None:
            pushed = free & has(rows, at.TRIGGER) & entropy[kept, j].isfinite()
            _push_entropy(slot[pushed], entropy[kept, j][pushed], spec, progress, entropy_ring)
    progress[slot, : at.STOPPED] = torch.stack(p[: at.STOPPED], -1)


def _push_confidence(
    slot: Tensor, value: Tensor, spec: Tensor, numbers: Tensor, progress: Tensor, ring: Tensor,
    total: Tensor,
) -> None:  # fmt: skip
    """The running mean of DeepConf; once it is below the threshold the request stays stopped."""
    window, pushed = spec[slot, at.CONFIDENCE_WINDOW], progress[slot, at.CONFIDENCE_PUSHED]
    place = pushed % window
    old = torch.where(pushed < window, 0.0, ring[slot, place].double())
    total[slot] += value.double() - old
    ring[slot, place] = value
    progress[slot, at.CONFIDENCE_PUSHED] = pushed + 1
    low = total[slot] < numbers[slot, at.CONFIDENCE_THRESHOLD] * window.double()
    progress[slot, at.STOPPED] |= ((pushed + 1 >= window) & low).long()


def _push_entropy(
    slot: Tensor, value: Tensor, spec: Tensor, progress: Tensor, ring: Tensor
) -> None:
    pushed = progress[slot, at.ENTROPY_PUSHED]
    ring[slot, pushed % spec[slot, at.ENTROPY_WINDOW]] = value
    progress[slot, at.ENTROPY_PUSHED] = pushed + 1


def entropy_threshold(spec: Tensor, numbers: Tensor, ring: Tensor, pushed: Tensor) -> Tensor:
    """(R,) float64: entropy above which a row triggers; of rows of slots with TRIGGER."""
    window = spec[:, at.ENTROPY_WINDOW].clamp_min(2)
    used = torch.arange(at.MAX_ENTROPY, device=ring.device) < window.unsqueeze(-1)
    values = torch.where(used, ring.double(), 0.0)
    mean = values.sum(-1) / window
    squares = torch.where(used, (values - mean.unsqueeze(-1)) ** 2, 0.0)
    deviation = (squares.sum(-1) / (window - 1)).sqrt()
    spread = torch.maximum(deviation, numbers[:, at.ENTROPY_STD])
    high = torch.maximum(
        mean + numbers[:, at.ENTROPY_FACTOR] * spread, numbers[:, at.ENTROPY_FLOOR]
    )
    return torch.where(pushed < window, numbers[:, at.ENTROPY_FIRST], high)
