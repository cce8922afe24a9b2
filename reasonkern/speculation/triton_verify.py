"""Triton kernels of `sample` and of `verify_tree` by equality, and their launchers (verify_op.py).

One program per request. Lengths and strides are run-time arguments that nothing specialises on;
nothing is contracted (`enable_fp_fusion=False`), so that the noise has the contract's bits.

Launched on CPU tensors only under the interpreter: TRITON_INTERPRET=1 before triton is imported.
"""

import torch
import triton
import triton.language as tl

from .._triton import check_dtype, check_launchable, kernel
from . import reference_verify as reference
from .tree import check_rows
from .triton_rows import INF, Request, Row, choose, find_top, write_statistics

EOS, BAD_ROW, CAPPED = (
    tl.constexpr(bit) for bit in (reference.EOS, reference.BAD_ROW, reference.CAPPED)
)
BLOCK = 2048


@triton.jit
def load_request(temperature, top_k, top_p, min_p, seed, position, b, depth):
    return Request(
        tl.load(temperature + b), tl.load(top_k + b), tl.load(top_p + b), tl.load(min_p + b),
        tl.load(seed + b), tl.load(position + b) + depth,
    )  # fmt: skip


@kernel
def sample_kernel(
    logits, mask, temperature, top_k, top_p, min_p, seed, position, out,
    vocab: tl.int32, stride: tl.int64, mask_stride: tl.int64, BLOCK: tl.constexpr,
):  # fmt: skip
    b = tl.program_id(0).to(tl.int64)
    row = Row(logits + b * stride, None if mask is None else mask + b * mask_stride, vocab)
    r = load_request(temperature, top_k, top_p, min_p, seed, position, b, 0)
    token, _ = choose(row, find_top(row, BLOCK), r, BLOCK)
    tl.store(out + b, token.to(tl.int64))


@triton.jit
def find_child(tokens, valid, child_ptr, child_index, node, used, token, WIDTH: tl.constexpr):
    """The lowest-ranked usable child that holds the token, -1 when there is none."""
    first, last = tl.load(child_ptr + node), tl.load(child_ptr + node + 1)
    slots = first + tl.arange(0, WIDTH)
    child = tl.load(child_index + slots, mask=slots < last, other=0)
    usable = (slots < last) & (child < used) & (tl.load(valid + child) != 0)
    hit = usable & (tl.load(tokens + child) == token)
    slot = tl.min(tl.where(hit, slots, 2147483647), 0)
    found = slot < last
    return tl.where(found, tl.load(child_index + slot, mask=found, other=0), -1)


@kernel
def verify_kernel(
    logits, mask, tokens, valid, child_ptr, child_index,
    temperature, top_k, top_p, min_p, seed, position, eos, max_length, num_nodes,
    out_tokens, out_length, path, topk_ids, topk_logits, lse, out_status,
    nodes: tl.int32, vocab: tl.int32, stride_b: tl.int64, stride_n: tl.int64,
    mask_stride_b: tl.int64, mask_stride_n: tl.int64, depth: tl.int32, topk: tl.int32,
    eos_count: tl.int32, WIDTH: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    b = tl.program_id(0).to(tl.int64)
    tokens += b * nodes
    valid += b * nodes
    active = tl.load(valid) != 0
    limit = tl.load(max_length + b) if max_length is not None else (depth + 1).to(tl.int64)
    used = tl.load(num_nodes + b) if num_nodes is not None else nodes.to(tl.int64)
    length, status = tl.cast(0, tl.int32), tl.cast(0, tl.int32)
    node = tl.cast(0, tl.int32)
    going = active & (limit > 0)
    while going:
        at = node.to(tl.int64)
        words = None if mask is None else mask + b * mask_stride_b + at * mask_stride_n
        row = Row(logits + b * stride_b + at * stride_n, words, vocab)
        r = load_request(temperature, top_k, top_p, min_p, seed, position, b, length)
        top = find_top(row, BLOCK)
        token, bad = choose(row, top, r, BLOCK)
        status |= tl.where(bad, BAD_ROW, 0)
        going = token >= 0
        if going:
            out = b * (depth + 1) + length
            tl.store(out_tokens + out, token.to(tl.int64))
            tl.store(path + out, at)
            if (top.bad_raw == 0) & (top.raw > -INF):
                write_statistics(row, top.raw, topk_ids + out * topk, topk_logits + out * topk,
                                 lse + out, topk, BLOCK)  # fmt: skip
            length += 1
            if eos is not None:
                for i in tl.range(0, eos_count):
                    status |= tl.where(tl.load(eos + i) == token, EOS, 0)
            node = find_child(tokens, valid, child_ptr, child_index, node, used, token, WIDTH)
            going = (node >= 0) & (length < limit) & ((status & EOS) == 0) & (length <= depth)
    if max_length is not None:
        status |= tl.where(active & (length >= limit), CAPPED, 0)
    tl.store(out_length + b, length.to(tl.int64))
    tl.store(out_status + b, status)


# ---- launchers

OPTIONS = {"num_warps": 16, "enable_fp_fusion": False}


def check_runnable(name, logits):
    check_dtype(name, logits)
    check_launchable(name, logits.device, sample_kernel)


def strides(x, dims):
    return [0 if x is None else x.stride(d) for d in range(dims)]


def sample(logits, mask, *requests):
    check_runnable("sample", logits)
    out = logits.new_empty(logits.shape[:1], dtype=torch.int64)
    if logits.shape[0]:
        with torch.cuda.device_of(logits):
            sample_kernel[(logits.shape[0],)](
                logits, mask, *requests, out, logits.shape[1], *strides(logits, 1),
                *strides(mask, 1), BLOCK=BLOCK, **OPTIONS,
            )  # fmt: skip
    return out


def verify_tree(
    logits, tokens, valid, q_ids, q_logprob, child_ptr, child_index, temperature, top_k, top_p,
    min_p, seed, position, eos, max_length, node_mask, num_nodes, depth, max_children, topk,
):  # fmt: skip
    check_runnable("verify_tree", logits)
    check_rows(logits)
    if q_ids is not None:
        raise NotImplementedError("verify_tree: the Triton backend verifies by equality only")
    batch, nodes, vocab = logits.shape
    rows = (batch, depth + 1)
    path = logits.new_full(rows, -1, dtype=torch.int64)
    path[:, :1] = 0
    out = (
        logits.new_full(rows, -1, dtype=torch.int64),
        logits.new_zeros(rows[:1], dtype=torch.int64),
        path,
        logits.new_full((*rows, topk), -1, dtype=torch.int64),
        logits.new_full((*rows, topk), -torch.inf, dtype=torch.float32),
        logits.new_full(rows, -torch.inf, dtype=torch.float32),
        logits.new_zeros(rows[:1], dtype=torch.int32),
    )
    if batch:
        with torch.cuda.device_of(logits):
            verify_kernel[(batch,)](
                logits, node_mask, tokens, valid, child_ptr, child_index, temperature, top_k,
                top_p, min_p, seed, position, eos, max_length, num_nodes, *out, nodes, vocab,
                *strides(logits, 2), *strides(node_mask, 2), depth, topk,
                0 if eos is None else len(eos),
                WIDTH=triton.next_power_of_2(max(max_children, 1)), BLOCK=BLOCK, **OPTIONS,
            )  # fmt: skip
    return out
