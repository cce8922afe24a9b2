"""Triton kernels of the family and their launchers, which take the arguments of the ops (op.py).

`gae_kernel`: one program per row, blocks of tokens from the end, an associative scan in each.
`select_kernel`: one program per prompt on the Gram matrix, which cuBLAS has made in float64.
Launched on CPU tensors only under the interpreter: TRITON_INTERPRET=1 before triton is imported.
"""

import torch
import triton
import triton.language as tl

from .._triton import check_dtype, check_launchable, kernel

SELECT_BLOCK, SELECT_OPTIONS = 1024, {"num_warps": 4}


# On an H200, [256, 8192] takes 74 us in blocks of 1024 tokens with 4 warps, 79 us in blocks of 4096
# with 8: it is the scans that cost, not the carry from block to block.
GAE_BLOCK, GAE_OPTIONS = 1024, {"num_warps": 4}


@triton.jit
def compose(decay_later, sum_later, decay, sum_):
    """The recurrence x -> sum + decay * x of some tokens after that of the tokens behind them."""
    return decay * decay_later, sum_ + decay * sum_later


@triton.jit
def nearest(found_later, value_later, found, value):
    """The value of the nearest token behind that counts."""
    return tl.maximum(found, found_later), tl.where(found > 0, value, value_later)


@triton.jit
def first_lane(x, lanes):
    return tl.sum(tl.where(lanes == 0, x, 0.0), 0)


@triton.jit
def scan(delta, decay, on, carry):
    """Advantages of a block: a masked token hands on what it was given."""
    decays, sums = tl.associative_scan(
        (tl.where(on, decay, 1.0), tl.where(on, delta, 0.0)), 0, compose, reverse=True
    )
    return sums + decays * carry


@kernel
def gae_kernel(
    reward, value, mask, row_decay, row_decay_value, bootstrap_value, truncated, advantage, returns,
    length: tl.int32, reward_stride: tl.int64, value_stride: tl.int64,
    gamma: tl.float32, decay: tl.float32, decay_value: tl.float32, bootstrap_last: tl.int32,
    SAME: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    reward += row * reward_stride
    value += row * value_stride
    out = row * length
    gamma = tl.cast(gamma, tl.float32)
    decay = tl.cast(decay, tl.float32) if row_decay is None else tl.load(row_decay + row)
    decay_value = tl.cast(decay_value, tl.float32)
    if row_decay_value is not None:
        decay_value = tl.load(row_decay_value + row)
    bootstrapped = True if truncated is None else tl.load(truncated + row)
    # What stands behind the last token: V of the next one, and whether there was a next one.
    following = tl.cast(0.0, tl.float32)
    if bootstrap_value is not None:
        following = tl.where(bootstrapped, tl.load(bootstrap_value + row), 0.0)
    at_end = bootstrapped & (bootstrap_last != 0)
    met = tl.cast(0.0, tl.float32)  # 1 once a token has been met
    carry = tl.cast(0.0, tl.float32)
    carry_value = tl.cast(0.0, tl.float32)
    lanes = tl.arange(0, BLOCK)
    blocks = tl.cdiv(length, BLOCK)
    for i in range(blocks):
        t = (blocks - 1 - i) * BLOCK + lanes
        on = t < length
        behind = t + 1 < length
        r = tl.load(reward + t, mask=on, other=0.0)
        v = tl.load(value + t, mask=on, other=0.0)
        v_next = tl.load(value + t + 1, mask=behind, other=0.0)
        if mask is not None:
            on = on & (tl.load(mask + out + t, mask=on, other=0) != 0)
            behind = behind & (tl.load(mask + out + t + 1, mask=behind, other=0) != 0)
            found, v_next = tl.associative_scan(
                (tl.where(behind, 1.0, 0.0), v_next), 0, nearest, reverse=True
            )
            v_next = tl.where(found > 0, v_next, following)
            known = tl.maximum(found, met)
        else:  # the next token is the next one that counts
            v_next = tl.where(behind, v_next, following)
            known = tl.where(behind, 1.0, 0.0)
        delta = r + gamma * tl.where(at_end & (known == 0.0), v, v_next) - v
        a = scan(delta, decay, on, carry)
        b = a if SAME else scan(delta, decay_value, on, carry_value)
        inside = t < length
        tl.store(advantage + out + t, tl.where(on, a, 0.0), mask=inside)
        tl.store(returns + out + t, tl.where(on, b + v, 0.0), mask=inside)
        carry = first_lane(a, lanes)
        carry_value = first_lane(b, lanes)
        following = first_lane(v_next, lanes)
        met = first_lane(known, lanes)


@kernel
def select_kernel(
    gram, score, factor, picks, count: tl.int32, k: tl.int32, BLOCK: tl.constexpr
):  # fmt: skip
    group = tl.program_id(0).to(tl.int64)
    gram += group * count * count
    score += group * count
    factor += group * count * k
    lanes = tl.arange(0, BLOCK)
    for j in range(k):
        best = tl.cast(-2.0, tl.float64)
        picked = 0
        for start in range(0, count, BLOCK):
            q = tl.load(score + start + lanes, mask=start + lanes < count, other=-2.0)
            top = tl.max(q, 0)
            if top > best:
                picked = start + tl.argmax(q, 0)  # the first one among equals
                best = top
        tl.store(picks + group * k + j, picked.to(tl.int64))
        pivot = tl.sqrt(1.0 + best)
        tl.debug_barrier()  # every thread has read the scores before they change
        for start in range(0, count, BLOCK):
            i = start + lanes
            inside = i < count
            q = tl.load(score + i, mask=inside, other=-1.0)
            column = tl.load(gram + picked.to(tl.int64) * count + i, mask=inside, other=0.0)
            for before in range(j):
                own = tl.load(factor + before * count + i, mask=inside, other=0.0)
                column -= own * tl.load(factor + before * count + picked)
            column = column / pivot
            tl.store(factor + j * count + i, column, mask=inside)
            left = q - column * column
            left = tl.where(left >= 0, left, 0.0)
            taken = (q < 0) | (i == picked)
            tl.store(score + i, tl.where(taken, -1.0, left), mask=inside)
        tl.debug_barrier()


# ---- launchers


def gae(
    reward, value, mask, row_lam, row_lam_value, bootstrap_value, truncated, gamma, lam, lam_value,
    bootstrap_last,
):  # fmt: skip
    check_dtype("gae", reward, (torch.float32,))
    check_launchable("gae", reward.device, gae_kernel)
    advantage, returns = (reward.new_empty(reward.shape) for _ in range(2))
    row_decay, row_decay_value = (
        None if x is None else gamma * x for x in (row_lam, row_lam_value)
    )
    batch, length = reward.shape
    same = row_lam is None and row_lam_value is None and lam == lam_value
    if batch * length:
        with torch.cuda.device_of(reward):
            gae_kernel[(batch,)](
                reward, value, mask, row_decay, row_decay_value, bootstrap_value, truncated,
                advantage, returns, length, reward.stride(0), value.stride(0), gamma, gamma * lam,
                gamma * lam_value, int(bootstrap_last), SAME=same, BLOCK=GAE_BLOCK,
                **GAE_OPTIONS,
            )  # fmt: skip
    return advantage, returns


def elliptical_select(features, k, lam):
    check_dtype("elliptical_select", features, (torch.float32, torch.float64))
    check_launchable("elliptical_select", features.device, select_kernel)
    groups, count, _ = features.shape
    picks = features.new_empty((groups, k), dtype=torch.int64)
    if groups * k:
        h = features.double()
        gram = (h @ h.mT) / lam
        score = gram.diagonal(dim1=1, dim2=2).clamp_min(0).contiguous()
        factor = gram.new_empty((groups, k, count))
        with torch.cuda.device_of(features):
            select_kernel[(groups,)](
                gram, score, factor, picks, count, k, BLOCK=SELECT_BLOCK, **SELECT_OPTIONS
            )
    return picks
