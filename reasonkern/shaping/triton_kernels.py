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

# Eight tokens per thread. With sixteen the kernel spills where there is a mask.
GAE_BLOCK, GAE_OPTIONS = 2048, {"num_warps": 8}


# ---- gae
# A block is [n, 4]: quads from its end, each four neighbouring tokens, in order, of one thread.


@triton.jit
def row_start(x, offset, alignment: tl.constexpr):
    # Only this lets the compiler use wide loads: it knows nothing of the strides.
    return tl.multiple_of(x + offset, alignment)


@triton.jit
def tokens_of(quads):
    even, odd = tl.split(tl.reshape(quads, [quads.shape[0], 2, 2]))
    first, third = tl.split(even)
    second, fourth = tl.split(odd)
    return first, second, third, fourth


@triton.jit
def quads_of(first, second, third, fourth):
    pairs = tl.join(tl.join(first, third), tl.join(second, fourth))
    return tl.reshape(pairs, [first.shape[0], 4])


@triton.jit
def next_of(quads, after):
    """What the next token has; `after` is that of the tokens behind the quads."""
    _, second, third, fourth = tokens_of(quads)
    return quads_of(second, third, fourth, after)


@triton.jit
def from_the_end(quads):
    first, second, third, fourth = tokens_of(quads)
    return tl.reshape(quads_of(fourth, third, second, first), [4 * quads.shape[0]])


@triton.jit
def in_quads(tokens):
    fourth, third, second, first = tokens_of(tl.reshape(tokens, [tokens.shape[0] // 4, 4]))
    return quads_of(first, second, third, fourth)


@triton.jit
def compose(decay_later, sum_later, decay, sum_):
    """The recurrence x -> sum + decay * x of some tokens after that of the tokens behind them."""
    return decay * decay_later, sum_ + decay * sum_later


@triton.jit
def nearer(a, b):
    return tl.minimum(a, b)


@triton.jit
def scan(delta, decay, on, carry):
    """Advantages of a block: a masked token hands on what it was given."""
    # Not with reverse=True, which turns the lanes of every operand around by ten shuffles.
    decays = from_the_end(tl.where(on, decay, 1.0))
    decays, sums = tl.associative_scan((decays, from_the_end(tl.where(on, delta, 0.0))), 0, compose)
    return in_quads(sums + decays * carry)


@kernel
def gae_kernel(
    reward, value, mask, row_decay, row_decay_value, bootstrap_value, truncated, advantage, returns,
    length: tl.int32, reward_stride: tl.int64, value_stride: tl.int64,
    gamma: tl.float32, decay: tl.float32, decay_value: tl.float32, bootstrap_last: tl.int32,
    SAME: tl.constexpr, ALIGNED: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    reward = row_start(reward, row * reward_stride, 16 if ALIGNED else 1)
    value = row_start(value, row * value_stride, 16 if ALIGNED else 1)
    advantage = row_start(advantage, row * length, 16 if ALIGNED else 1)
    returns = row_start(returns, row * length, 16 if ALIGNED else 1)
    if mask is not None:
        mask = row_start(mask, row * length, 4 if ALIGNED else 1)
    gamma = tl.cast(gamma, tl.float32)
    decay = tl.cast(decay, tl.float32) if row_decay is None else tl.load(row_decay + row)
    decay_value = tl.cast(decay_value, tl.float32)
    if row_decay_value is not None:
        decay_value = tl.load(row_decay_value + row)
    bootstrapped = True if truncated is None else tl.load(truncated + row)
    # What stands behind the last token that counts: its own V or a given one.
    own = bootstrapped & (bootstrap_last != 0)
    given = tl.cast(0.0, tl.float32)
    if bootstrap_value is not None:
        given = tl.where(bootstrapped, tl.load(bootstrap_value + row), 0.0)
    nearest = length + 0  # the first token behind the block that counts
    carry = tl.cast(0.0, tl.float32)
    carry_value = tl.cast(0.0, tl.float32)
    quads = BLOCK - 4 - 4 * tl.arange(0, BLOCK // 4)
    blocks = tl.cdiv(length, BLOCK)
    for i in range(blocks):
        start = (blocks - 1 - i) * BLOCK
        t = (start + quads)[:, None] + tl.arange(0, 4)[None, :]
        after = start + quads + 4
        on = t < length
        inside = (start + quads < length)[:, None] if ALIGNED else on
        r = tl.load(reward + t, mask=inside, other=0.0)
        v = tl.load(value + t, mask=inside, other=0.0)
        if mask is not None:
            counts = tl.load(mask + t, mask=inside, other=0).to(tl.int8)
            counts_after = tl.load(mask + after, mask=after < length, other=0).to(tl.int8)
            on = counts != 0
            behind = tl.where(next_of(counts, counts_after) != 0, t + 1, length)
            behind = in_quads(tl.associative_scan(from_the_end(behind), 0, nearer))
            behind = tl.minimum(behind, nearest)
            v_next = tl.load(value + behind, mask=behind < length, other=0.0)
            nearest = tl.minimum(nearest, tl.min(tl.where(on, t, length)))
        else:  # the next token is the next one that counts
            behind = t + 1
            v_next = next_of(v, tl.load(value + after, mask=after < length, other=0.0))
        v_next = tl.where(behind < length, v_next, tl.where(own, v, given))
        delta = r + gamma * v_next - v
        a = scan(delta, decay, on, carry)
        b = a if SAME else scan(delta, decay_value, on, carry_value)
        tl.store(advantage + t, tl.where(on, a, 0.0), mask=inside)
        tl.store(returns + t, tl.where(on, b + v, 0.0), mask=inside)
        carry = tl.sum(tl.where(t == start, a, 0.0))
        carry_value = tl.sum(tl.where(t == start, b, 0.0))


# ---- elliptical_select


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


def quads_are_aligned(reward, value, mask):
    """Whether every row starts at a quad and ends with one; the outputs are contiguous."""
    starts = [x.data_ptr() % 16 == 0 and x.stride(0) % 4 == 0 for x in (reward, value)]
    return reward.shape[1] % 4 == 0 and all(starts) and (mask is None or mask.data_ptr() % 4 == 0)


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
                gamma * lam_value, int(bootstrap_last), SAME=same,
                ALIGNED=quads_are_aligned(reward, value, mask), BLOCK=GAE_BLOCK, **GAE_OPTIONS,
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
