"""The definition of the table in torch: hashing, storage codes, look-up, drafting, merging.

``table_draft`` is vectorised and never synchronises; ``table_update_`` is a loop over the keys of
the call, written to be read. The compiled twins are in ``csrc/speculation`` and Triton.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from .. import _checks
from . import noise

WAYS = 8  # keys per set
ONE = 1 << 30  # probability 1 in the fixed point of sums
TOTAL_LIMIT = ONE + ONE // 1000  # of a row's probabilities
LARGEST_ID = (1 << 31) - 1  # of a context; larger numbers count as missing
ID_BITS = 18  # of an id in a packed word; the rest is the 14-bit code of its probability
HITS, MISSES, EVICTIONS, REJECTED, ROWS, COUNTERS = 0, 4, 5, 6, 7, 8  # counters; hits per order
NO_NOISE, SHARED, REJECTION = 0, 1, 2  # kinds of drafts


class Storage(NamedTuple):
    """The table's tensors; E entries in sets of 8, K slots per entry."""

    keys: Tensor
    """(E / 8, 8) int64, 0 = empty."""
    slots: Tensor
    """(E, K) int32: id and code of the probability in one word (extra of int64: the id)."""
    extra: Tensor
    """(0,) uint8, or (E, K) uint8: bits of the ids above the word's, or (E, K) int64: sums."""
    counts: Tensor
    """(E,) int16: occurrences n, at most max_count."""
    ages: Tensor
    """(E,) int32: the call that updated the entry last, modulo 2^32."""
    clock: Tensor
    """() int64: calls so far."""
    epochs: Tensor
    """(max_scopes,) int32: resets of each scope."""
    counters: Tensor
    """(8,) int64."""


# ---- hashing: int64 arithmetic wraps, as uint64 does


_STEP = _checks.signed(0x9E3779B97F4A7C15)
_MIX1, _MIX2 = _checks.signed(0xBF58476D1CE4E5B9), _checks.signed(0x94D049BB133111EB)
_START, _ORDER = 0x243F6A8885A308D3, _checks.signed(0xD1342543DE82EF95)


def _shift(x: Tensor, bits: int) -> Tensor:
    """Logical right shift."""
    return (x >> bits) & ((1 << (64 - bits)) - 1)


def _step(h: Tensor, x: Tensor) -> Tensor:
    h = (h ^ x) * _STEP
    return h ^ _shift(h, 32)


def _key(h: Tensor, order: int) -> Tensor:
    h = h ^ _checks.signed(order * (_ORDER & ((1 << 64) - 1)) % (1 << 64))
    h = (h ^ _shift(h, 30)) * _MIX1
    h = (h ^ _shift(h, 27)) * _MIX2
    h = h ^ _shift(h, 31)
    return torch.where((h == 0) | (h == -1), 1, h)


def keys_of(
    context: Tensor, scope: Tensor, epochs: Tensor, orders: Sequence[int]
) -> tuple[Tensor, Tensor]:
    """(…, W) contexts and (…) scopes -> (…, orders) keys, and whether the context is that long."""
    known = (scope >= 0) & (scope < epochs.numel())
    epoch = epochs[scope.clamp(0, epochs.numel() - 1)].to(torch.int64)
    h = _step(_step(torch.full_like(scope, _START), scope), epoch)
    present, keys, fits = known, {}, {}
    for order in range(1, max(orders) + 1):
        token = context[..., -order]
        present = present & (token >= 0)
        h = _step(h, token)  # from the newest token to the oldest
        keys[order], fits[order] = _key(h, order), present
    return torch.stack([keys[o] for o in orders], -1), torch.stack([fits[o] for o in orders], -1)


def set_of(key: Tensor, sets: int) -> Tensor:
    """Increasing in the key read as unsigned, so rows sorted by key are sorted by set."""
    return (_shift(key, 33) * sets) >> 31


# ---- probabilities: 14-bit codes of 4 exponent and 10 mantissa bits; sums in units of 2^-30


def decode(code: Tensor) -> Tensor:
    """Units of 2^-24, int64."""
    exponent = (code >> 10).to(torch.int64)
    mantissa = (code & 1023).to(torch.int64)
    shifted = (mantissa + 1024) << (exponent - 1).clamp_min(0)
    return torch.where(exponent == 0, mantissa, shifted)


def encode(total: int, n: int) -> int:
    """The code of the mean total / n, rounded half up: to 2^-24, then to 11 bits."""
    mean = (total + 32 * n) // (64 * n)
    shift = max(mean.bit_length() - 11, 0)
    return (shift << 10) + ((mean + (1 << shift >> 1)) >> shift)


def exp(x: Tensor) -> Tensor:
    """e^x in fp32 by fixed steps, for x <= 1; 0 below -80."""
    magic = 12582912.0  # adding it rounds to an integer
    t = x.clamp(-80.0, 1.0) * 1.44269504 + magic
    steps = t - magic
    r = x.clamp(-80.0, 1.0) + steps * -0.693359375
    r = r + steps * 2.12194440e-4
    q = torch.full_like(r, 1 / 5040)
    for divisor in (720, 120, 24, 6, 2, 1, 1):
        q = q * r + 1 / divisor
    n = t.view(torch.int32) - 0x4B400000
    return torch.where(x < -80.0, 0.0, (q.view(torch.int32) + (n << 23)).view(torch.float32))


def fixed(p: Tensor) -> Tensor:
    """Fp32 probabilities to units of 2^-30, int64; to nearest, ties to even."""
    return (p * 2.0**30).round().to(torch.int64)


def row_values(logits: Tensor, lse: Tensor | None, ids: Tensor) -> tuple[Tensor, Tensor]:
    """(M, K) -> values of the ids in 2^-30, and (M,) whether the row is a distribution."""
    x = logits if lse is None else logits - lse.unsqueeze(-1)
    used = ids >= 0
    fine = ~used | (x <= 1.0)  # False for NaN
    values = torch.where(used & fine, fixed(exp(torch.where(fine, x, 0.0))), 0)
    return values, fine.all(-1) & (values.sum(-1) <= TOTAL_LIMIT)


def _known(context: Tensor, scope: Tensor, vocab_size: int, epochs: Tensor) -> Tensor:
    inside = ((context >= -1) & (context < vocab_size)).all(-1)
    return inside & (scope >= 0) & (scope < epochs.numel())


# ---- look-up and drafting


def _probabilities(table: Storage, entry: Tensor) -> tuple[Tensor, Tensor]:
    """(…) entries -> (…, K) ids, -1 = empty, and fp32 probabilities."""
    word = table.slots[entry]
    if table.extra.dtype == torch.int64:
        total, n = table.extra[entry], table.counts[entry].unsqueeze(-1)
        p = total.to(torch.float32) / n.to(torch.float32).clamp_min(1.0) * 2.0**-30
        return torch.where(total > 0, word, -1).to(torch.int64), p
    code = (word >> ID_BITS) & 0x3FFF
    ids = (word & ((1 << ID_BITS) - 1)).to(torch.int64)
    if table.extra.numel():
        ids = ids | table.extra[entry].to(torch.int64) << ID_BITS
    return torch.where(code > 0, ids, -1), decode(code).to(torch.float32) * 2.0**-24


def look_up(table: Storage, keys: Tensor, fits: Tensor) -> tuple[Tensor, Tensor]:
    """(…, orders) keys -> entry of the first order that is in the table, and its index or -1."""
    sets = table.keys.shape[0]
    where = set_of(keys, sets)
    match = (table.keys[where] == keys.unsqueeze(-1)) & fits.unsqueeze(-1)
    hit = match.any(-1)
    first = hit.to(torch.int8).argmax(-1, keepdim=True)
    way = match.to(torch.int8).argmax(-1).gather(-1, first).squeeze(-1)
    entry = where.gather(-1, first).squeeze(-1) * WAYS + way
    return entry, torch.where(hit.any(-1), first.squeeze(-1), -1)


def _windows(context: Tensor, tokens: Tensor, parents: Tensor) -> Tensor:
    """(B, N, W): the last W tokens up to each node."""
    width = context.shape[1]
    steps: list[Tensor] = []
    node = torch.arange(parents.numel(), device=parents.device)
    above = torch.zeros_like(node)  # steps beyond the root
    for _ in range(width):
        inside = node >= 0
        drafted = tokens[:, node.clamp_min(0)]
        committed = context[:, (width - 1 - above).clamp_min(0)]
        steps.insert(0, torch.where(inside, drafted, committed))
        node = torch.where(inside, parents[node.clamp_min(0)].to(torch.int64), -1)
        above = above + (node < 0)
    return torch.stack(steps, -1)


def _ranked(
    ids: Tensor, p: Tensor, depth: Tensor, temperature: Tensor, seed: Tensor, position: Tensor,
    kind: int,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """(B, N, K) -> ids in the order in which children take them, and q_logprob by slot."""
    used = ids >= 0
    temperature = temperature[:, None, None]
    log_p = -noise.minus_log(torch.where(used, p, 1.0))
    cold = ~(temperature > 0)
    tempered = torch.where(cold, log_p, log_p / torch.where(cold, 1.0, temperature))
    score = log_p
    if kind != NO_NOISE:
        where = position[:, None, None] + (depth[:, None] if kind == SHARED else 0)
        stream, level = (noise.TARGET, 0) if kind == SHARED else (noise.DRAFT, depth[:, None])
        token = ids.clamp_min(0)
        g = noise.gumbel_noise(seed[:, None, None], where, token, stream, level)
        score = torch.where(cold, log_p, tempered + g)
    score = torch.where(used, score, -torch.inf)
    by_id = torch.where(used, ids, 1 << 40).argsort(dim=-1, stable=True)
    by_score = score.gather(-1, by_id).argsort(dim=-1, descending=True, stable=True)
    ranked = ids.gather(-1, by_id.gather(-1, by_score))
    return ranked, _normalised(tempered, used, cold, ids, ranked[..., :1])


def _normalised(z: Tensor, used: Tensor, cold: Tensor, ids: Tensor, best: Tensor) -> Tensor:
    """Z minus its log-sum-exp over the used slots; one-hot on the best id at temperature 0."""
    z = torch.where(used, z, -torch.inf)
    top = z.amax(-1, keepdim=True).clamp_min(-1e30)
    total = torch.zeros_like(top)
    for k in range(z.shape[-1]):  # in slot order
        total = total + exp(z[..., k : k + 1] - top)
    out = z - (top - noise.minus_log(total.clamp_min(1.0)))
    one_hot = torch.where(ids == best, 0.0, -torch.inf)
    return torch.where(used, torch.where(cold, one_hot, out), -torch.inf)


def table_draft(
    context: Tensor, keys: Tensor, slots: Tensor, extra: Tensor, counts: Tensor, epochs: Tensor,
    counters: Tensor, orders: Sequence[int], parents: Tensor, ranks: Tensor, depths: Tensor,
    child_ptr: Tensor, child_index: Tensor, level_ptr: Tensor, level_nodes: Tensor,
    scope: Tensor | None, temperature: Tensor, seed: Tensor, position: Tensor, kind: int,
    vocab_size: int, strict: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """See `NgramTable.draft`; each level computes all nodes and keeps its own."""
    unused = counts.new_empty(0)
    table = Storage(keys, slots, extra, counts, unused, unused, epochs, counters)
    batch, nodes, topk = context.shape[0], parents.numel(), slots.shape[1]
    scope = context.new_zeros(batch) if scope is None else scope
    if strict and not bool(_known(context, scope, vocab_size, epochs).all()):
        raise RuntimeError("table_draft: a context or scope is out of range")
    context = torch.where(context <= LARGEST_ID, context, -1)
    root = context[:, -1:].clamp_min(0)
    tokens = root.repeat(1, nodes)
    valid = torch.zeros((batch, nodes), dtype=torch.bool, device=context.device)
    valid[:, 0] = context[:, -1] >= 0
    internal = child_ptr.diff() > 0
    ids = context.new_full((batch, nodes, topk), -1)
    log_q = torch.full((batch, nodes, topk), -torch.inf, device=context.device)
    for level in range(level_ptr.numel() - 1):
        here = (internal & (depths == level)) & valid
        windows = _windows(context, tokens, parents)
        found = keys_of(windows, scope[:, None].expand(batch, nodes), epochs, orders)
        entry, order = look_up(table, *found)
        hit = here & (order >= 0)
        slot_ids, p = _probabilities(table, entry)
        slot_ids = torch.where(hit.unsqueeze(-1), slot_ids, -1)
        ranked, q = _ranked(slot_ids, p, depths, temperature, seed, position, kind)
        for index in range(len(orders)):
            counters[HITS + index] += (here & (order == index)).sum()
        counters[MISSES] += (here & (order < 0)).sum()
        ids = torch.where(hit.unsqueeze(-1), slot_ids, ids)
        log_q = torch.where(hit.unsqueeze(-1), q, log_q)
        if nodes > 1:
            rank = ranks.to(torch.int64)
            up = parents.clamp_min(0).to(torch.int64)
            best = torch.nn.functional.pad(ranked, (0, 1), value=-1)[:, up, rank.clamp_max(topk)]
            new = (depths == level + 1) & valid[:, up] & (best >= 0)
            tokens = torch.where(new, best, tokens)
            valid = valid | new
    if kind != REJECTION:
        return tokens, valid, context.new_empty(0), log_q.new_empty(0)
    return tokens, valid, ids, log_q


# ---- merging


def table_update_(
    context: Tensor, keys: Tensor, slots: Tensor, extra: Tensor, counts: Tensor, ages: Tensor,
    clock: Tensor, epochs: Tensor, counters: Tensor, orders: Sequence[int], max_count: int,
    vocab_size: int, ids: Tensor, logits: Tensor, lse: Tensor | None, scope: Tensor | None,
    strict: bool,
) -> None:  # fmt: skip
    """See `NgramTable.update`."""
    table = Storage(keys, slots, extra, counts, ages, clock, epochs, counters)
    scope = context.new_zeros(context.shape[0]) if scope is None else scope
    active = (context[:, -1] != -1) & (ids != -1).any(-1)
    values, fine = row_values(logits, lse, ids)
    fine = fine & ((ids >= -1) & (ids < vocab_size)).all(-1)
    fine = fine & _known(context, scope, vocab_size, epochs)
    if strict and bool((active & ~fine).any()):
        raise RuntimeError("table_update_: a row is not a distribution of a scope")
    clock += 1
    counters[REJECTED] += (active & ~fine).sum()
    counters[ROWS] += (active & fine).sum()
    rows = (active & fine).nonzero().flatten().tolist()
    row_keys, fits = keys_of(context, scope, epochs, orders)
    members: dict[int, list[int]] = {}  # key as unsigned -> rows
    for row in rows:
        for key, fit in zip(row_keys[row].tolist(), fits[row].tolist(), strict=True):
            if fit:
                members.setdefault(key % (1 << 64), []).append(row)
    row_ids, row_sums = ids.tolist(), values.tolist()
    for key in sorted(members):
        sums: dict[int, int] = {}
        for row in members[key]:
            for token, value in zip(row_ids[row], row_sums[row], strict=True):
                if token >= 0:
                    sums[token] = sums.get(token, 0) + value
        _merge(table, key, sums, len(members[key]), max_count)


def _merge(table: Storage, key: int, sums: dict[int, int], m: int, max_count: int) -> None:
    signed = _checks.signed(key)
    where = ((key >> 33) * table.keys.shape[0]) >> 31
    ways = table.keys[where].tolist()
    now = int(table.clock)
    first = where * WAYS
    if signed in ways:
        entry = first + ways.index(signed)
        n = int(table.counts[entry])
        for token, total in _entry_sums(table, entry, n):
            sums[token] = sums.get(token, 0) + total
    else:
        used = range(first, first + WAYS)
        age = [(int(table.ages[e]) - now) % (1 << 32) for e in used]
        entry, n = min(used, key=lambda e: _victim(table, e, age[e - first])), 0
        table.counters[EVICTIONS] += int(table.keys[where, entry - first]) != 0
        table.keys[where, entry - first] = signed
    top = sorted(((t, s) for t, s in sums.items() if s > 0), key=lambda item: (-item[1], item[0]))
    _store(table, entry, top[: table.slots.shape[1]], n + m, max_count)
    table.counts[entry] = min(n + m, max_count)
    table.ages[entry] = (now + (1 << 31)) % (1 << 32) - (1 << 31)


def _victim(table: Storage, entry: int, age: int) -> tuple[int, int, int, int]:
    """Order of eviction: empty ways, then last update, count, slot.

    `age` counts from the present modulo 2^32, of which the present itself (0) is the youngest.
    """
    empty = int(table.keys.view(-1)[entry]) == 0
    return (not empty, age if age else 1 << 32, int(table.counts[entry]), entry)


def _entry_sums(table: Storage, entry: int, n: int) -> list[tuple[int, int]]:
    where = torch.tensor(entry, device=table.keys.device)
    ids = _probabilities(table, where)[0].tolist()
    if table.extra.dtype == torch.int64:
        totals = table.extra[entry].tolist()
    else:
        codes = (table.slots[entry] >> ID_BITS) & 0x3FFF
        totals = [64 * mean * n for mean in decode(codes).tolist()]
    return [(token, total) for token, total in zip(ids, totals, strict=True) if token >= 0]


def _store(table: Storage, entry: int, top: list[tuple[int, int]], n: int, max_count: int) -> None:
    exact = table.extra.dtype == torch.int64
    table.slots[entry] = 0
    if table.extra.numel():
        table.extra[entry] = 0
    for slot, (token, total) in enumerate(top):
        if exact:
            kept = total
            if n > max_count:
                whole, rest = divmod(total, n)
                kept = whole * max_count + (rest * max_count + n // 2) // n
            table.slots[entry, slot] = token if kept else 0
            table.extra[entry, slot] = kept
        elif code := encode(total, n):
            word = (token & ((1 << ID_BITS) - 1)) | code << ID_BITS
            table.slots[entry, slot] = word - (1 << 32) if word >> 31 else word
            if table.extra.numel():
                table.extra[entry, slot] = token >> ID_BITS
