"""Triton kernels of the sampler under control, and their launchers (sampler_op.py).

Rows under control are copied to float32 once and modulated by the family's own kernel; a kernel
then draws and describes, one program per row. The walk down a tree is that of the definition, level
by level, without a synchronisation.
"""

import torch
import triton
import triton.language as tl

from .._triton import kernel
from ..speculation import triton_verify
from ..speculation.reference_row import CONFIDENCE_TOKENS, allowed
from ..speculation.reference_verify import Rows, Told
from ..speculation.triton_noise import exp_of
from ..speculation.triton_rows import (
    INF,
    Request,
    Row,
    draw,
    filter_cut,
    find_top,
    id_of,
    load_logits,
    masked,
    order_at,
    order_of,
    sum_of_thread,
    without,
    write_statistics,
)
from . import reference_sampler, triton_modulation

TOKENS = tl.constexpr(CONFIDENCE_TOKENS)


@triton.jit
def add_moments(total, weighted, d):
    """Adds exp(d) and exp(d) d; -inf adds nothing."""
    e = exp_of(d)
    product = tl.where(e > 0, e * d, 0.0)
    total += sum_of_thread(e.to(tl.float64))
    return total, weighted + sum_of_thread(product.to(tl.float64))


@triton.jit
def moments(row, top, BLOCK: tl.constexpr):
    """Of the allowed tokens at temperature 1."""
    lanes = tl.arange(0, BLOCK)
    total = tl.zeros((BLOCK // 4,), tl.float64)
    weighted = total
    for start in tl.range(0, row.vocab, BLOCK):
        cols = start + lanes
        x = masked(row, cols, load_logits(row, cols))
        total, weighted = add_moments(total, weighted, x - top)
    return tl.sum(total, 0), tl.sum(weighted, 0)


@triton.jit
def kept_entropy(row, temperature, top, cut, BLOCK: tl.constexpr):
    lanes = tl.arange(0, BLOCK)
    total = tl.zeros((BLOCK // 4,), tl.float64)
    weighted = total
    for start in tl.range(0, row.vocab, BLOCK):
        cols = start + lanes
        value = tl.div_rn(masked(row, cols, load_logits(row, cols)), temperature)
        value = tl.where(order_of(value, cols) >= cut, value, -INF)
        total, weighted = add_moments(total, weighted, value - top)
    total = tl.sum(total, 0)
    return tl.log(total) - tl.sum(weighted, 0) / total


@triton.jit
def confidence_of(row, top, log_sum, BLOCK: tl.constexpr):
    """-mean(log p) of the most likely tokens."""
    firsts = tl.full((BLOCK,), -1, tl.int64)
    for start in tl.range(0, row.vocab, BLOCK):
        firsts = tl.maximum(firsts, order_at(row, start + tl.arange(0, BLOCK)))
    total, count = tl.cast(0.0, tl.float64), tl.cast(0, tl.int32)
    for _ in tl.range(0, TOKENS):
        best = tl.max(firsts, 0)
        if best >= 0:
            value = tl.load(row.logits + id_of(best)).to(tl.float64)
            total += value - top.to(tl.float64) - log_sum
            count += 1
            firsts = without(row, firsts, best, BLOCK)
    return (0.0 - total) / tl.maximum(count, 1).to(tl.float64)


@kernel
def describe_kernel(
    raw, logits, mask, temperature, top_k, top_p, min_p, seed, position, token_out, bad_out,
    logprob, entropy, entropy_raw, confidence, max_prob, vocab: tl.int32, raw_stride: tl.int64,
    stride: tl.int64, mask_stride: tl.int64, STATS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    b = tl.program_id(0).to(tl.int64)
    row = Row(logits + b * stride, None if mask is None else mask + b * mask_stride, vocab)
    top = find_top(row, BLOCK)
    r = Request(
        tl.load(temperature + b), tl.load(top_k + b), tl.load(top_p + b), tl.load(min_p + b),
        tl.load(seed + b), tl.load(position + b),
    )  # fmt: skip
    greedy = r.temperature == 0
    value = tl.where(greedy, top.value, tl.div_rn(top.value, tl.where(greedy, 1.0, r.temperature)))
    bad = (top.bad != 0) | ((tl.abs(value) < INF) == 0)
    tl.store(bad_out + b, bad)
    token = top.id
    if (bad == 0) & (greedy == 0):
        cut = filter_cut(row, r, value, BLOCK)
        token = draw(row, r, value, cut, BLOCK)
        if STATS:
            kept = kept_entropy(row, r.temperature, value, cut, BLOCK)
            tl.store(entropy + b, kept.to(tl.float32))
    tl.store(token_out + b, token.to(tl.int64))
    if STATS:
        own = Row(raw + b * raw_stride, None, vocab)
        raw_top = find_top(own, BLOCK)
        if (raw_top.bad == 0) & (raw_top.value > -INF):
            total, weighted = moments(own, raw_top.value, BLOCK)
            tl.store(entropy_raw + b, (tl.log(total) - weighted / total).to(tl.float32))
        if bad == 0:
            total, weighted = moments(row, top.value, BLOCK)
            log_sum = tl.log(total)
            chosen = tl.load(row.logits + token).to(tl.float32).to(tl.float64)
            law = chosen - top.value.to(tl.float64) - log_sum
            tl.store(logprob + b, law.to(tl.float32))
            tl.store(max_prob + b, (1.0 / total).to(tl.float32))
            mean = confidence_of(row, top.value, log_sum, BLOCK)
            tl.store(confidence + b, mean.to(tl.float32))
            if greedy:
                tl.store(entropy + b, 0.0)


@kernel
def raw_statistics_kernel(
    logits, ids, values, lse, vocab: tl.int32, stride: tl.int64, topk: tl.int32,
    BLOCK: tl.constexpr,
):  # fmt: skip
    b = tl.program_id(0).to(tl.int64)
    row = Row(logits + b * stride, None, vocab)
    top = find_top(row, BLOCK)
    if (top.bad == 0) & (top.value > -INF):
        write_statistics(row, top.value, ids + b * topk, values + b * topk, lse + b, topk, BLOCK)


# ---- rows and slots of the walk


class TritonRows(Rows):
    """Rows drawn and described by a kernel."""

    def choose(self, raw, mask, depth=0, drafts=None, entry=None):
        x, batch = raw, raw.shape[0]
        if self.control is not None:
            x, mask = self.control.apply(allowed(raw, mask), self.filters.temperature), None
        token = raw.new_empty(batch, dtype=torch.int64)
        bad = raw.new_empty(batch, dtype=torch.bool)
        told = [raw.new_full((batch,), -torch.inf, dtype=torch.float32) for _ in range(5)]
        if batch:
            with torch.cuda.device_of(raw):
                describe_kernel[(batch,)](
                    raw, x, mask, *self.filters, self.seed, self.position + depth, token, bad,
                    *told, raw.shape[1], raw.stride(0), x.stride(0),
                    0 if mask is None else mask.stride(0), STATS=self.stats,
                    BLOCK=triton_verify.BLOCK, **triton_verify.OPTIONS,
                )  # fmt: skip
        return token, bad, Told(*told, self.trigger(told[1])) if self.stats else None

    def raw_statistics(self, rows, k):
        batch, vocab = rows.shape
        ids = rows.new_full((batch, k), -1, dtype=torch.int64)
        values = rows.new_full((batch, k), -torch.inf, dtype=torch.float32)
        lse = rows.new_full((batch,), -torch.inf, dtype=torch.float32)
        if batch:
            with torch.cuda.device_of(rows):
                raw_statistics_kernel[(batch,)](
                    rows, ids, values, lse, vocab, rows.stride(0), k,
                    BLOCK=triton_verify.BLOCK, **triton_verify.OPTIONS,
                )  # fmt: skip
        return ids, values, lse


class TritonSlots(reference_sampler.Slots):
    """Slots whose rows are modulated, and whose tokens are committed, by kernels."""

    modulate = staticmethod(triton_modulation.modulate_logits_)
    commit = staticmethod(triton_modulation.commit_)


def sample_controlled(*args):
    triton_verify.check_runnable("sample_controlled", args[0])
    return reference_sampler.sample_controlled(*args, rows=TritonRows, slots=TritonSlots)


def verify_controlled(*args):
    triton_verify.check_runnable("verify_controlled", args[0])
    if args[3] is not None:
        raise NotImplementedError("verify_controlled: the Triton backend verifies by equality only")
    return reference_sampler.verify_controlled(*args, rows=TritonRows, slots=TritonSlots)
