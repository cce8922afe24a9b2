"""Drafting from the table: one program per request, level by level, sixteen nodes at a time."""

import triton
import triton.language as tl

from .._triton import kernel
from . import reference_table as reference
from .triton_noise import gumbel, minus_log, word_of_token
from .triton_table_entry import (
    EXACT,
    LANES,
    WAYS,
    WIDE,
    decode,
    exp_of,
    goes_before,
    hash_key,
    hash_start,
    hash_step,
    set_of,
)

SHARED, REJECTION = tl.constexpr(reference.SHARED), tl.constexpr(reference.REJECTION)
NODES = tl.constexpr(16)  # nodes drafted together
MISSES = tl.constexpr(reference.MISSES)
LARGEST_ID = tl.constexpr(reference.LARGEST_ID)
INF = tl.constexpr(float("inf"))


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
    p = decode(code).to(tl.float32) * 5.9604644775390625e-08
    return tl.where(code > 0, token, -1), p


@triton.jit
def _look_up(
    keys, parents, tokens, context, node, mask, scope, epoch, sets,
    WINDOW: tl.constexpr, ORDERS: tl.constexpr, NUM_ORDERS: tl.constexpr,
):  # fmt: skip
    """(NODES,) nodes -> entries and the index of the order that found them, or -1."""
    h = hash_start(scope, epoch) + (node * 0).to(tl.uint64)
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
        h = hash_step(h, token)
        if (ORDERS >> i) & 1:
            order = order - 1
            key = hash_key(h, i + 1)
            first = set_of(key, sets) * WAYS
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
    mass = exp_of(z - top[:, None])
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
    last = tl.where(last <= LARGEST_ID, last, -1)
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
            present = (mask & known) != 0  # in the interpreter `&` with a scalar: an int32
            entry, found = _look_up(
                keys, parents, tokens_row, context, node, present, scope, epoch, sets,
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
            ahead = goes_before(
                score[:, None, :], token[:, None, :], score[:, :, None], token[:, :, None]
            )
            slot = tl.arange(0, token.shape[1])  # a loaded entry may have a token twice
            twin = score[:, None, :] == score[:, :, None]
            twin = twin & (token[:, None, :] == token[:, :, None])
            ahead = ahead | (twin & (slot[None, None, :] < slot[None, :, None]))
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
