"""Triton kernel of GTPO's conflict tokens; the launcher takes the operator's arguments (op.py)."""

import torch
import triton.language as tl

from .._triton import check_launchable, kernel

BLOCK = 256


@kernel
def conflict_kernel(
    tokens, mask, sign, members, spans, runs,
    width: tl.int32, stride: tl.int64, BLOCK: tl.constexpr,
):  # fmt: skip
    # Program 2 * row is the forward run of a row, the next one its backward run.
    row = (tl.program_id(0) // 2).to(tl.int64)
    backward = tl.program_id(0) % 2
    own_sign = tl.load(sign + row)
    begin, end = tl.load(spans + 4 * row), tl.load(spans + 4 * row + 1)
    start, stop = tl.load(spans + 4 * row + 2), tl.load(spans + 4 * row + 3)
    run = start * 0
    base = start * 0
    while (run == base) & (base < stop - start) & (own_sign != 0):
        position = base + tl.arange(0, BLOCK)
        inside = position < stop - start
        column = tl.where(backward != 0, stop - 1 - position, start + position)
        token = tl.load(tokens + row * stride + column, inside, 0)
        trained = tl.load(mask + row * width + column, inside, 0) != 0
        found = position < 0
        at = begin
        while at < end:
            other = tl.load(members + at)
            if tl.load(sign + other) * own_sign < 0:
                first, last = tl.load(spans + 4 * other + 2), tl.load(spans + 4 * other + 3)
                there = tl.where(backward != 0, last - 1 - position, first + position)
                both = inside & (position < last - first)
                same = tl.load(tokens + other * stride + there, both, 0) == token
                found = found | (same & (tl.load(mask + other * width + there, both, 0) != 0))
            at += 1
        conflict = found & trained & inside
        run += tl.min(tl.where(conflict, BLOCK, tl.arange(0, BLOCK)), 0)
        base += BLOCK
    tl.store(runs + tl.program_id(0), run)


def conflict_runs(tokens, mask, sign, members, spans):
    check_launchable("conflict_runs", tokens.device, conflict_kernel)
    rows, width = tokens.shape
    runs = tokens.new_empty(rows, 2)
    if rows:
        with torch.cuda.device_of(tokens):
            conflict_kernel[(2 * rows,)](
                tokens, mask, sign, members, spans, runs, width, tokens.stride(0),
                BLOCK=BLOCK, num_warps=4,
            )  # fmt: skip
    return runs
