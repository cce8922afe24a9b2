"""Triton kernels of the table, with the bits of ``reference_table.py``, and their launchers.

Drafting is in ``triton_table_draft.py``. Merging: rows to keys, a sort by torch
(``table_sorted.py``), then the program at the first item of a set merges the keys of the set in
order. Every launch switches the contraction of a*b+c off.
"""

import torch
import triton
import triton.language as tl

from .._triton import kernel
from . import reference_table as reference
from . import table_sorted
from .triton_table_draft import draft_kernel
from .triton_table_entry import (
    EXACT,
    LANES,
    PACKED,
    WAYS,
    WIDE,
    decode,
    encode,
    exp_of,
    fixed,
    goes_before,
    hash_key,
    hash_start,
    hash_step,
    set_of,
)

OPTIONS = {"num_warps": 4, "enable_fp_fusion": False}
ROWS = tl.constexpr(16)  # rows read together
EVICTIONS, REJECTED, MERGED = (
    tl.constexpr(k) for k in (reference.EVICTIONS, reference.REJECTED, reference.ROWS)
)
TOTAL_LIMIT = tl.constexpr(reference.TOTAL_LIMIT)
LEFT_OUT = tl.constexpr((1 << 63) - 1)  # sorts behind every key
NO_CANDIDATE = tl.constexpr(table_sorted.NO_CANDIDATE)


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
    value = tl.where(good & (token >= 0), fixed(exp_of(tl.where(x <= 1.0, x, 0.0))), 0)
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
    h = hash_start(scope, tl.load(epochs + scope, mask=inside & known, other=0))
    present = active & fine
    order: tl.constexpr = NUM_ORDERS
    for i in tl.static_range(WINDOW):
        seen = tl.load(context + row * context_stride + WINDOW - 1 - i, mask=inside, other=-1)
        present = present & (seen >= 0)
        h = hash_step(h, seen)
        if (ORDERS >> i) & 1:
            order = order - 1
            key = (hash_key(h, i + 1) ^ tl.full((), 1 << 63, tl.uint64)).to(tl.int64, bitcast=True)
            key = tl.where(present, key, LEFT_OUT)
            tl.store(items + row * NUM_ORDERS + order, key, mask=inside)


@triton.jit
def _claim(keys, counts, ages, counters, key, now, sets):
    """The entry of a key, whether it was there, after taking a way for it."""
    way = tl.arange(0, WAYS)
    first = set_of(key, sets) * WAYS
    held = tl.load(keys + first + way).to(tl.uint64)
    same = held == key
    found = tl.max(same.to(tl.int32), 0) > 0
    age = (tl.load(ages + first + way) - now.to(tl.int32) - 1).to(tl.uint32, bitcast=True)
    n = tl.load(counts + first + way).to(tl.int64)
    order = tl.where(held == 0, 0, 1 + ((age.to(tl.int64) << 16) | n))
    chosen = tl.where(found, tl.argmax(same.to(tl.int32), 0), tl.argmin(order, 0))
    taken = ((way == chosen) & (found == 0)) != 0  # in the interpreter `&` with a scalar: an int32
    evicted = tl.sum((taken & (held != 0)).to(tl.int64), 0)
    tl.atomic_add(counters + EVICTIONS, evicted, sem="relaxed")
    tl.store(keys + first + way, (held * 0 + key).to(tl.int64, bitcast=True), mask=taken)
    return first + chosen, found


@triton.jit
def _insert(best_token, best_sum, topk, token, total):
    """A candidate into the list of the best, sorted; total 0 = an empty place."""
    lane = tl.arange(0, LANES)
    stays = (lane < topk) & (best_sum > 0) & goes_before(best_sum, best_token, total, token)
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
    mask = ((lane < topk) & found) != 0  # as `taken` of _claim
    word = tl.load(slots + entry * topk + lane, mask=mask, other=0)
    if STORAGE == EXACT:
        total = tl.load(extra + entry * topk + lane, mask=mask, other=0)
        return tl.where(total > 0, word, -1).to(tl.int64), total
    code = (word >> 18) & 0x3FFF
    token = (word & 0x3FFFF).to(tl.int64)
    if STORAGE == WIDE:
        high = tl.load(extra + entry * topk + lane, mask=mask, other=0)
        token = token | (high.to(tl.int64) << 18)
    return tl.where(code > 0, token, -1), decode(code).to(tl.int64) * 64 * n


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
        code = tl.where(total > 0, encode(total, n), 0)
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
    return set_of(key, sets)


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
    return (EXACT if extra.dtype == torch.int64 else WIDE if extra.numel() else PACKED).value


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
    law = (batch, nodes, topk) if kind == reference.REJECTION else (0,)
    tokens = context.new_empty((batch, nodes))
    valid = context.new_empty((batch, nodes), dtype=torch.bool)
    q_ids = context.new_empty(law)
    q_logprob = context.new_empty(law, dtype=torch.float32)
    if batch:
        with torch.cuda.device_of(context):
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
    with torch.cuda.device_of(context):
        keys_kernel[(max(1, triton.cdiv(rows, ROWS.value)),)](
            context, context.stride(0), ids, logits, lse, scope, epochs, counters, clock, items,
            values, rows, width, epochs.numel(), vocab_size, **_orders(orders), **OPTIONS,
        )  # fmt: skip
    return items, values


def _merge_step(
    context, keys, slots, extra, counts, ages, clock, epochs, counters, orders, max_count,
    vocab_size, ids, logits, lse, scope, strict, items, pairs, totals,
):  # fmt: skip
    with torch.cuda.device_of(context):
        merge_kernel[(items.numel(),)](
            keys, slots, extra, counts, ages, clock, counters, items, pairs, totals, items.numel(),
            keys.shape[0], slots.shape[1], ids.shape[1], max_count, STORAGE=_storage(extra),
            num_warps=1, enable_fp_fusion=False,
        )  # fmt: skip


def table_update_(*args):
    table_sorted.update(_keys_step, _merge_step, *args)
