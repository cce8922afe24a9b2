"""Triton kernels of the table, with the bits of ``table_reference.py``, and their launchers.

Drafting: one program per request, level by level, sixteen nodes at a time. Merging: rows to keys,
a sort by torch (``table_sorted.py``), then the program at the first item of a set merges the keys
of the set in order. Every launch switches the contraction of a*b+c off.
"""

import torch
import triton
import triton.language as tl

from ..policy_loss.triton_rows import kernel
from . import table_sorted
from .triton_noise import gumbel, minus_log, word_of_token

OPTIONS = {"num_warps": 4, "enable_fp_fusion": False}
PACKED, WIDE, EXACT = tl.constexpr(0), tl.constexpr(1), tl.constexpr(2)
SHARED, REJECTION = tl.constexpr(1), tl.constexpr(2)
WAYS = tl.constexpr(8)
LANES = tl.constexpr(16)  # slots of an entry, padded
NODES = tl.constexpr(16)  # nodes drafted together
ROWS = tl.constexpr(16)  # rows read together
MISSES, EVICTIONS, REJECTED, MERGED = (tl.constexpr(k) for k in (4, 5, 6, 7))
TOTAL_LIMIT = tl.constexpr((1 << 30) + (1 << 30) // 1000)
LEFT_OUT = tl.constexpr((1 << 63) - 1)  # sorts behind every key
PAIR_ID_BITS = tl.constexpr(table_sorted.PAIR_ID_BITS)
NO_CANDIDATE = tl.constexpr(table_sorted.NO_CANDIDATE)
INF = tl.constexpr(float("inf"))


# ---- hashing and codes


@triton.jit
def _step(h, x):
    h = (h ^ x.to(tl.uint64)) * tl.full((), 0x9E3779B97F4A7C15, tl.uint64)
    return h ^ (h >> 32)


@triton.jit
def _key(h, order):
    h = h ^ tl.full((), order, tl.uint64) * tl.full((), 0xD1342543DE82EF95, tl.uint64)
    h = (h ^ (h >> 30)) * tl.full((), 0xBF58476D1CE4E5B9, tl.uint64)
    h = (h ^ (h >> 27)) * tl.full((), 0x94D049BB133111EB, tl.uint64)
    h = h ^ (h >> 31)
    one = tl.full((), 1, tl.uint64)
    return tl.where(h + one <= one, one, h)


@triton.jit
def _start(scope, epoch):
    start = scope.to(tl.uint64) * 0 + tl.full((), 0x243F6A8885A308D3, tl.uint64)
    return _step(_step(start, scope), epoch.to(tl.int64))


@triton.jit
def _set_of(key, sets):
    return (((key >> 33) * sets.to(tl.uint64)) >> 31).to(tl.int64)


@triton.jit
def _decode(code):
    exponent = code >> 10
    mantissa = code & 1023
    shift = tl.where(exponent == 0, 0, exponent - 1)
    return tl.where(exponent == 0, mantissa, (mantissa + 1024) << shift)


@triton.jit
def _encode(total, n):
    mean = ((total + 32 * n) // (64 * n)).to(tl.int32)
    # The exponent of the float is that of the integer: below 2^24 conversion is exact, and the
    # rounding of larger ones, at most 1.001 * 2^24, does not carry into it.
    length = (mean.to(tl.float32).to(tl.int32, bitcast=True) >> 23) - 126
    shift = tl.maximum(tl.where(mean == 0, 0, length) - 11, 0)
    half = (1 << shift) >> 1
    return (shift << 10) + ((mean + half) >> shift)


@triton.jit
def _exp(x):
    x = tl.maximum(x, -100.0)  # below -80 the result is 0
    t = x * 1.44269504 + 12582912.0
    steps = t - 12582912.0
    r = x + steps * -0.693359375
    r = r + steps * 2.12194440e-4
    q = r * 0.0001984127011382952332496643066 + 0.001388888922519981861114501953
    q = q * r + 0.008333333767950534820556640625
    q = q * r + 0.041666667908430099487304687500
    q = q * r + 0.166666671633720397949218750000
    q = q * r + 0.5
    q = q * r + 1.0
    q = q * r + 1.0
    n = t.to(tl.int32, bitcast=True) - 0x4B400000
    p = (q.to(tl.int32, bitcast=True) + (n << 23)).to(tl.float32, bitcast=True)
    return tl.where(x < -80.0, 0.0, p)


@triton.jit
def _fixed(p):
    scaled = p * 1073741824.0
    low = (scaled + 8388608.0).to(tl.int32, bitcast=True) - 0x4B000000
    return tl.where(scaled >= 8388608.0, scaled.to(tl.int64), low.to(tl.int64))


@triton.jit
def _goes_before(score, token, other_score, other_token):
    return (score > other_score) | ((score == other_score) & (token < other_token))


# ---- drafting


@triton.jit
def _load_slots(slots, extra, counts, entry, used, topk, STORAGE: tl.constexpr):
    """(NODES,) entries -> (NODES, LANES) ids, -1 = empty, and probabilities."""
    lane = tl.arange(0, LANES)
    at = entry[:, None] * topk + lane[None, :]
    mask = used[:, None] & (lane < topk)[None, :]
    word = tl.load(slots + at, mask=mask, other=0)
    if STORAGE == EXACT:
        total = tl.load(extra + at, mask=mask, other=0)
        n = tl.load(counts + entry, mask=used, other=1).to(tl.float32)[:, None]
        p = (
            tl.div_rn(total.to(tl.float32), n + total.to(tl.float32) * 0)
            * 9.31322574615478515625e-10
        )
        return tl.where(total > 0, word, -1), p
    code = (word >> 18) & 0x3FFF
    token = word & 0x3FFFF
    if STORAGE == WIDE:
        token = token | (tl.load(extra + at, mask=mask, other=0).to(tl.int32) << 18)
    p = _decode(code).to(tl.float32) * 5.9604644775390625e-08
    return tl.where(code > 0, token, -1), p


@triton.jit
def _look_up(
    keys, parents, tokens, context, node, mask, scope, epoch, sets,
    WINDOW: tl.constexpr, ORDERS: tl.constexpr, NUM_ORDERS: tl.constexpr,
):  # fmt: skip
    """(NODES,) nodes -> entries and the index of the order that found them, or -1."""
    h = _start(scope, epoch) + (node * 0).to(tl.uint64)
    present = mask
    at = node * 0 + (WINDOW - 1)
    entry = (node * 0).to(tl.int64)
    found = node * 0 - 1
    way = tl.arange(0, WAYS)
    order: tl.constexpr = NUM_ORDERS
    for i in tl.static_range(WINDOW):
        inside = node > 0
        drafted = tl.load(tokens + node, mask=present & inside, other=-1)
        committed = tl.load(context + at, mask=present & (node == 0), other=-1)
        token = tl.where(inside, drafted, committed)
        at = tl.where(inside, at, at - 1)
        node = tl.where(inside, tl.load(parents + node, mask=present & inside, other=0), node)
        present = present & (token >= 0)
        h = _step(h, token)
        if (ORDERS >> i) & 1:
            order = order - 1
            key = _key(h, i + 1)
            first = _set_of(key, sets) * WAYS
            held = tl.load(keys + first[:, None] + way[None, :], mask=present[:, None], other=0)
            same = held.to(tl.uint64) == key[:, None]
            hit = present & (tl.max(same.to(tl.int32), 1) > 0)
            here = first + tl.argmax(same.to(tl.int32), 1)
            entry = tl.where(hit, here, entry)
            found = tl.where(hit, order, found)
    return entry, found


@triton.jit
def _store_law(q_ids, q_logprob, base, node, topk, used, token, z, rank, temperature):
    lane = tl.arange(0, LANES)
    z = tl.where(used, z, -INF)
    top = tl.maximum(tl.max(z, 1), -1e30)
    mass = _exp(z - top[:, None])
    total = top * 0.0
    for k in tl.static_range(LANES):  # in slot order
        total = total + tl.sum(tl.where(lane[None, :] == k, mass, 0.0), 1)
    lse = top - minus_log(tl.maximum(total, 1.0))
    q = z - lse[:, None]
    one_hot = tl.where(rank == 0, 0.0, -INF)
    q = tl.where(temperature > 0, q, one_hot)
    at = (base + node)[:, None] * topk + lane[None, :]
    tl.store(q_ids + at, token.to(tl.int64), mask=used)
    tl.store(q_logprob + at, q, mask=used)


@kernel
def draft_kernel(
    context, context_stride: tl.int64, keys, slots, extra, counts, epochs, counters, sets: tl.int64,
    topk: tl.int32, scopes: tl.int64,
    parents, depths, child_ptr, child_index, level_ptr, level_nodes,
    levels: tl.int32, nodes: tl.int32,
    scope_ptr, temperature_ptr, seed_ptr, position_ptr, tokens, valid, q_ids, q_logprob,
    KIND: tl.constexpr, STORAGE: tl.constexpr, WINDOW: tl.constexpr, ORDERS: tl.constexpr,
    NUM_ORDERS: tl.constexpr,
):  # fmt: skip
    request = tl.program_id(0).to(tl.int64)
    base = request * nodes
    context = context + request * context_stride
    tokens_row, valid_row = tokens + base, valid + base
    last = tl.load(context + WINDOW - 1)
    lane = tl.arange(0, LANES)
    step = tl.arange(0, NODES)
    for start in range(0, nodes, NODES):
        node = start + step
        tl.store(tokens_row + node, tl.maximum(last, 0) + (node * 0), mask=node < nodes)
        tl.store(valid_row + node, ((node == 0) & (last >= 0)).to(tl.int8), mask=node < nodes)
        if KIND == REJECTION:
            at = (base + node)[:, None] * topk + lane[None, :]
            mask = (node < nodes)[:, None] & (lane < topk)[None, :]
            tl.store(q_ids + at, tl.full((NODES, LANES), -1, tl.int64), mask=mask)
            tl.store(q_logprob + at, tl.full((NODES, LANES), -INF, tl.float32), mask=mask)
    scope = tl.load(scope_ptr + request) if scope_ptr is not None else request * 0
    known = (scope >= 0) & (scope < scopes)
    epoch = tl.load(epochs + scope, mask=known, other=0)
    temperature = tl.load(temperature_ptr + request)
    seed = tl.load(seed_ptr + request)
    position = tl.load(position_ptr + request)
    tl.debug_barrier()
    for level in range(levels):
        begin = tl.load(level_ptr + level)
        end = tl.load(level_ptr + level + 1)
        for start in range(begin, end, NODES):
            mask = start + step < end
            node = tl.load(level_nodes + start + step, mask=mask, other=0)
            mask = mask & (tl.load(valid_row + node, mask=mask, other=0) != 0)
            entry, found = _look_up(
                keys, parents, tokens_row, context, node, mask & known, scope, epoch, sets,
                WINDOW, ORDERS, NUM_ORDERS,
            )  # fmt: skip
            for k in tl.static_range(NUM_ORDERS):
                hits = tl.sum((mask & (found == k)).to(tl.int64), 0)
                tl.atomic_add(counters + k, hits, sem="relaxed")
            missed = tl.sum((mask & (found < 0)).to(tl.int64), 0)
            tl.atomic_add(counters + MISSES, missed, sem="relaxed")
            token, p = _load_slots(slots, extra, counts, entry, mask & (found >= 0), topk, STORAGE)
            used = token >= 0
            log_p = -minus_log(tl.where(used, p, 1.0))
            hot = temperature > 0
            z = tl.where(hot, tl.div_rn(log_p, tl.where(hot, temperature, 1.0) + p * 0), log_p)
            depth = tl.load(depths + node, mask=mask, other=0)
            score = log_p
            if KIND > 0:
                where = position + (node * 0).to(tl.int64)
                tag = depth * 0
                if KIND == SHARED:
                    where = where + depth
                else:
                    tag = 1 | (depth << 8)
                word = word_of_token(tl.where(used, token, 0), where[:, None], tag[:, None], seed)
                score = tl.where(hot, z + gumbel(word), log_p)
            ahead = _goes_before(
                score[:, None, :], token[:, None, :], score[:, :, None], token[:, :, None]
            )
            rank = tl.sum((ahead & used[:, None, :]).to(tl.int32), 2)
            child = tl.load(child_ptr + node, mask=mask, other=0)
            below = tl.load(child_ptr + node + 1, mask=mask, other=0) - child
            takes = used & (rank < below[:, None])
            place = tl.load(child_index + child[:, None] + rank, mask=takes, other=0)
            tl.store(tokens_row + place, token.to(tl.int64), mask=takes)
            tl.store(valid_row + place, (place * 0 + 1).to(tl.int8), mask=takes)
            if KIND == REJECTION:
                _store_law(q_ids, q_logprob, base, node, topk, used, token, z, rank, temperature)
        tl.debug_barrier()


# ---- merging


@kernel
def keys_kernel(
    context, context_stride: tl.int64, ids, logits, lse, scope_ptr, epochs, counters, clock, items,
    values, rows: tl.int64, width: tl.int32, scopes: tl.int64, vocab: tl.int64,
    WINDOW: tl.constexpr, ORDERS: tl.constexpr, NUM_ORDERS: tl.constexpr,
):  # fmt: skip
    """Rows to values in units of 2^-30 and to keys with the sign bit flipped."""
    if tl.program_id(0) == 0:
        tl.store(clock, tl.load(clock) + 1)
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    inside = row < rows
    lane = tl.arange(0, LANES)
    at = row[:, None] * width + lane[None, :]
    mask = inside[:, None] & (lane < width)[None, :]
    token = tl.load(ids + at, mask=mask, other=-1)
    x = tl.load(logits + at, mask=mask, other=0.0)
    if lse is not None:
        x = x - tl.load(lse + row, mask=inside, other=0.0)[:, None]
    good = (token >= -1) & (token < vocab) & ((token < 0) | (x <= 1.0))
    value = tl.where(good & (token >= 0), _fixed(_exp(tl.where(x <= 1.0, x, 0.0))), 0)
    tl.store(values + at, value.to(tl.int32), mask=mask)
    fine = (tl.min(good.to(tl.int32), 1) > 0) & (tl.sum(value, 1) <= TOTAL_LIMIT)
    active = inside & (tl.max((token != -1).to(tl.int32), 1) > 0)
    newest = tl.load(context + row * context_stride + WINDOW - 1, mask=inside, other=-1)
    active = active & (newest != -1)
    scope = row * 0
    if scope_ptr is not None:
        scope = tl.load(scope_ptr + row, mask=inside, other=0)
    known = (scope >= 0) & (scope < scopes)
    for i in tl.static_range(WINDOW):
        seen = tl.load(context + row * context_stride + i, mask=inside, other=0)
        known = known & (seen >= -1) & (seen < vocab)
    fine = fine & known
    merged = tl.sum((active & fine).to(tl.int64), 0)
    rejected = tl.sum((active & (fine == 0)).to(tl.int64), 0)
    tl.atomic_add(counters + MERGED, merged, sem="relaxed")
    tl.atomic_add(counters + REJECTED, rejected, sem="relaxed")
    h = _start(scope, tl.load(epochs + scope, mask=inside & known, other=0))
    present = active & fine
    order: tl.constexpr = NUM_ORDERS
    for i in tl.static_range(WINDOW):
        seen = tl.load(context + row * context_stride + WINDOW - 1 - i, mask=inside, other=-1)
        present = present & (seen >= 0)
        h = _step(h, seen)
        if (ORDERS >> i) & 1:
            order = order - 1
            key = (_key(h, i + 1) ^ tl.full((), 1 << 63, tl.uint64)).to(tl.int64, bitcast=True)
            key = tl.where(present, key, LEFT_OUT)
            tl.store(items + row * NUM_ORDERS + order, key, mask=inside)


@triton.jit
def _claim(keys, counts, ages, counters, key, now, sets):
    """The entry of a key, whether it was there, after taking a way for it."""
    way = tl.arange(0, WAYS)
    first = _set_of(key, sets) * WAYS
    held = tl.load(keys + first + way).to(tl.uint64)
    same = held == key
    found = tl.max(same.to(tl.int32), 0) > 0
    age = (tl.load(ages + first + way) - now.to(tl.int32) - 1).to(tl.uint32, bitcast=True)
    n = tl.load(counts + first + way).to(tl.int64)
    order = tl.where(held == 0, 0, 1 + ((age.to(tl.int64) << 16) | n))
    chosen = tl.where(found, tl.argmax(same.to(tl.int32), 0), tl.argmin(order, 0))
    taken = (way == chosen) & (found == 0)
    evicted = tl.sum((taken & (held != 0)).to(tl.int64), 0)
    tl.atomic_add(counters + EVICTIONS, evicted, sem="relaxed")
    tl.store(keys + first + way, (held * 0 + key).to(tl.int64, bitcast=True), mask=taken)
    return first + chosen, found


@triton.jit
def _insert(best_token, best_sum, topk, token, total):
    """A candidate into the list of the best, sorted; total 0 = an empty place."""
    lane = tl.arange(0, LANES)
    stays = (lane < topk) & (best_sum > 0) & _goes_before(best_sum, best_token, total, token)
    rank = tl.sum(stays.to(tl.int32), 0)
    above = lane[None, :] == lane[:, None] - 1  # the element one place before
    token_above = tl.sum(tl.where(above, best_token[None, :], 0), 1)
    sum_above = tl.sum(tl.where(above, best_sum[None, :], 0), 1)
    best_token = tl.where(lane < rank, best_token, tl.where(lane == rank, token, token_above))
    best_sum = tl.where(lane < rank, best_sum, tl.where(lane == rank, total, sum_above))
    return best_token, best_sum


@triton.jit
def _load_sums(slots, extra, entry, found, n, topk, STORAGE: tl.constexpr):
    lane = tl.arange(0, LANES)
    mask = (lane < topk) & found
    word = tl.load(slots + entry * topk + lane, mask=mask, other=0)
    if STORAGE == EXACT:
        total = tl.load(extra + entry * topk + lane, mask=mask, other=0)
        return tl.where(total > 0, word, -1).to(tl.int64), total
    code = (word >> 18) & 0x3FFF
    token = (word & 0x3FFFF).to(tl.int64)
    if STORAGE == WIDE:
        high = tl.load(extra + entry * topk + lane, mask=mask, other=0)
        token = token | (high.to(tl.int64) << 18)
    return tl.where(code > 0, token, -1), _decode(code).to(tl.int64) * 64 * n


@triton.jit
def _store_sums(slots, extra, entry, token, total, n, max_count, topk, STORAGE: tl.constexpr):
    lane = tl.arange(0, LANES)
    at = entry * topk + lane
    mask = lane < topk
    if STORAGE == EXACT:
        scaled = total // n * max_count + (total % n * max_count + n // 2) // n
        total = tl.where(n > max_count, scaled, total)
        tl.store(slots + at, tl.where(total > 0, token, 0).to(tl.int32), mask=mask)
        tl.store(extra + at, total, mask=mask)
    else:
        code = tl.where(total > 0, _encode(total, n), 0)
        word = (token & 0x3FFFF).to(tl.int32) | (code << 18)
        tl.store(slots + at, tl.where(code > 0, word, 0), mask=mask)
        if STORAGE == WIDE:
            high = tl.where(code > 0, token >> 18, 0)
            tl.store(extra + at, high.to(tl.uint8), mask=mask)


@triton.jit
def _merge_key(
    keys, slots, extra, counts, ages, counters, items, pairs, totals, begin, end, now, sets, topk,
    width, max_count, STORAGE: tl.constexpr,
):  # fmt: skip
    key = tl.load(items + begin).to(tl.uint64, bitcast=True) ^ tl.full((), 1 << 63, tl.uint64)
    entry, found = _claim(keys, counts, ages, counters, key, now, sets)
    n = tl.load(counts + entry, mask=found, other=0).to(tl.int64)
    total = n + end - begin
    old_token, old_sum = _load_sums(slots, extra, entry, found, n, topk, STORAGE)
    lane = tl.arange(0, LANES)
    best_token = old_token * 0 - 1
    best_sum = old_sum * 0
    at = begin * width
    stop = end * width
    while at < stop:
        pair = tl.load(pairs + at)
        added = tl.load(totals + at)
        at += 1
        while tl.load(pairs + at, mask=at < stop, other=-1) == pair:
            added += tl.load(totals + at)
            at += 1
        token = pair & NO_CANDIDATE
        same = old_token == token
        added += tl.sum(tl.where(same, old_sum, 0), 0)
        if (token != NO_CANDIDATE) & (added > 0):
            old_token = tl.where(same, -1, old_token)
            best_token, best_sum = _insert(best_token, best_sum, topk, token, added)
    for k in range(topk):
        token = tl.sum(tl.where(lane == k, old_token, 0), 0)
        kept = tl.sum(tl.where(lane == k, old_sum, 0), 0)
        if token >= 0:
            best_token, best_sum = _insert(best_token, best_sum, topk, token, kept)
    _store_sums(slots, extra, entry, best_token, best_sum, total, max_count, topk, STORAGE)
    tl.store(counts + entry, tl.minimum(total, max_count).to(tl.int16))
    tl.store(ages + entry, now.to(tl.int32))
    tl.debug_barrier()


@triton.jit
def _set_at(items, item, sets):
    key = tl.load(items + item).to(tl.uint64, bitcast=True) ^ tl.full((), 1 << 63, tl.uint64)
    return _set_of(key, sets)


@kernel
def merge_kernel(
    keys, slots, extra, counts, ages, clock, counters, items, pairs, totals, num_items: tl.int64,
    sets: tl.int64, topk: tl.int32, width: tl.int32, max_count: tl.int32, STORAGE: tl.constexpr,
):  # fmt: skip
    item = tl.program_id(0).to(tl.int64)
    here = _set_at(items, item, sets)
    if item > 0:
        if _set_at(items, item - 1, sets) == here:
            return
    now = tl.load(clock)
    begin = item
    while begin < num_items:
        if _set_at(items, begin, sets) != here:
            begin = num_items
        else:
            key = tl.load(items + begin)
            end = begin + 1
            while tl.load(items + end, mask=end < num_items, other=0) == key:
                end += 1
            if key != LEFT_OUT:
                _merge_key(
                    keys, slots, extra, counts, ages, counters, items, pairs, totals, begin, end,
                    now, sets, topk, width, max_count, STORAGE,
                )  # fmt: skip
            begin = end


# ---- launchers, with the arguments of the operators


def _storage(extra):
    return 2 if extra.dtype == torch.int64 else 1 if extra.numel() else 0


def _orders(orders):
    return {
        "WINDOW": orders[0],
        "ORDERS": sum(1 << (order - 1) for order in orders),
        "NUM_ORDERS": len(orders),
    }


def table_draft(
    context, keys, slots, extra, counts, epochs, counters, orders, parents, ranks, depths,
    child_ptr, child_index, level_ptr, level_nodes, scope, temperature, seed, position, kind,
    vocab_size, strict,
):  # fmt: skip
    batch, nodes, topk = context.shape[0], parents.numel(), slots.shape[1]
    law = (batch, nodes, topk) if kind == 2 else (0,)
    tokens = context.new_empty((batch, nodes))
    valid = context.new_empty((batch, nodes), dtype=torch.bool)
    q_ids = context.new_empty(law)
    q_logprob = context.new_empty(law, dtype=torch.float32)
    if batch:
        draft_kernel[(batch,)](
            context, context.stride(0), keys, slots, extra, counts, epochs, counters,
            keys.shape[0], topk, epochs.numel(), parents, depths, child_ptr, child_index,
            level_ptr, level_nodes, level_ptr.numel() - 1, nodes, scope, temperature, seed,
            position, tokens, valid.view(torch.int8), q_ids, q_logprob,
            KIND=kind, STORAGE=_storage(extra), **_orders(orders), **OPTIONS,
        )  # fmt: skip
    return tokens, valid, q_ids, q_logprob


def _keys_step(
    context, keys, slots, extra, counts, ages, clock, epochs, counters, orders, max_count,
    vocab_size, ids, logits, lse, scope, strict,
):  # fmt: skip
    rows, width = ids.shape
    items = context.new_empty(rows * len(orders))
    values = ids.new_empty(ids.shape, dtype=torch.int32)
    keys_kernel[(max(1, triton.cdiv(rows, 16)),)](
        context, context.stride(0), ids, logits, lse, scope, epochs, counters, clock, items,
        values, rows, width, epochs.numel(), vocab_size, **_orders(orders),
        **OPTIONS,
    )  # fmt: skip
    return items, values


def _merge_step(
    context, keys, slots, extra, counts, ages, clock, epochs, counters, orders, max_count,
    vocab_size, ids, logits, lse, scope, strict, items, pairs, totals,
):  # fmt: skip
    merge_kernel[(items.numel(),)](
        keys, slots, extra, counts, ages, clock, counters, items, pairs, totals, items.numel(),
        keys.shape[0], slots.shape[1], ids.shape[1], max_count, STORAGE=_storage(extra),
        num_warps=1, enable_fp_fusion=False,
    )  # fmt: skip


def table_update_(*args):
    table_sorted.update(_keys_step, _merge_step, *args)
