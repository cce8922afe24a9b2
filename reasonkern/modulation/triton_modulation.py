"""Triton kernels of `modulate_logits_` and `commit_`, and their launchers (op.py).

A program takes several rows, an element of its tensors each. Nothing is contracted, so that the
results are those of ``reference.py``.

Launched on CPU tensors only under the interpreter: TRITON_INTERPRET=1 before triton is imported.
"""

import torch
import triton
import triton.language as tl

from .._triton import check_launchable, kernel
from . import layout as at
from .triton_control import (
    DEEPCONF,
    Rows,
    apply_force,
    control_of,
    forced_id,
    move_to_wait,
    raise_end,
    write_sets,
)
from .triton_fold import (
    PARTS,
    Progress,
    find_slots,
    fold,
    fold_chain,
    fold_tree,
    load_progress,
    number,
    store_progress,
)

TRIGGER = tl.constexpr(at.TRIGGER)
CONFIDENCE_WINDOW, ENTROPY_WINDOW = (
    tl.constexpr(k) for k in (at.CONFIDENCE_WINDOW, at.ENTROPY_WINDOW)
)
CONFIDENCE_THRESHOLD = tl.constexpr(at.CONFIDENCE_THRESHOLD)
CONFIDENCE_PUSHED, ENTROPY_PUSHED = (
    tl.constexpr(k) for k in (at.CONFIDENCE_PUSHED, at.ENTROPY_PUSHED)
)
CONFIDENCE_SUM = tl.constexpr(at.CONFIDENCE_SUM)
RECORD_WIDTH = tl.constexpr(at.RECORD_WIDTH)
CONFIDENCE_RING, ENTROPY_RING = tl.constexpr(at.CONFIDENCE_RING), tl.constexpr(at.ENTROPY_RING)
OPTIONS = {"num_warps": 4, "enable_fp_fusion": False}


def config(dense):
    """(rows of a program, entries of a row at a time): whole rows are read by more programs."""
    return (4, 128) if dense else (16, 32)


@kernel
def modulate_kernel(
    logits, slot_ptr, local_pos, draft_tokens, parents, temperature, records, sets,
    num_rows: tl.int32, vocab: tl.int32, stride: tl.int64, slots: tl.int32, nodes: tl.int32,
    DENSE: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    inside = row < num_rows
    request = row if parents is None else row // nodes
    slot = tl.load(slot_ptr + request, mask=inside, other=-1)
    on, record = find_slots(slot, records, slots)
    p = load_progress(record)
    if parents is not None:
        node = (row % nodes).to(tl.int32)
        p = fold_tree(record, sets, p, node, on, parents, draft_tokens + request * nodes)
    elif local_pos is not None:
        drafts = tl.load(local_pos + row, mask=on, other=0)
        drafts = tl.where(drafts <= row + 1, drafts, 0)
        p = fold_chain(record, sets, p, row, drafts, draft_tokens)
    c = control_of(record, p)
    rows = Rows(logits + row * stride, sets, vocab, on)
    forced = apply_force(rows, c.force)
    on = on & (forced == 0)
    rows = Rows(logits + row * stride, sets, vocab, on)
    write_sets(rows, c, BLOCK)
    tl.debug_barrier()
    heat = tl.full((ROWS,), 1.0, tl.float32)
    if temperature is not None:
        heat = tl.load(temperature + row, mask=inside, other=1.0)
    move_to_wait(rows, c, heat)
    if DENSE:
        tl.debug_barrier()
        raise_end(rows, c, 4 * BLOCK)


@triton.jit
def stop(p, where):
    return Progress(
        p.t, p.spent, p.switched, p.phase, p.phrase, p.wait, p.ignore,
        tl.where(where, 1, p.stopped),
    )  # fmt: skip


@kernel
def commit_kernel(
    slot_ptr, tokens, length_ptr, entropy, confidence, records, rings, sets, batch: tl.int32,
    steps: tl.int32, slots: tl.int32, ROWS: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    slot = tl.load(slot_ptr + row, mask=row < batch, other=-1)
    on, record = find_slots(slot, records, slots)
    ring = rings + tl.where(on, slot, 0) * (2 * RECORD_WIDTH)
    length = tl.minimum(tl.load(length_ptr + row, mask=on, other=0), steps)
    p = load_progress(record)
    parts = tl.load(record + PARTS)
    watched = tl.load(record + CONFIDENCE_PUSHED)
    total = number(record + CONFIDENCE_SUM)
    seen = tl.load(record + ENTROPY_PUSHED)
    alive = on
    for j in tl.range(0, tl.max(length)):
        alive = alive & (j < length)
        token = tl.load(tokens + row * steps + j, mask=alive, other=-1)
        alive = alive & (token >= 0)
        # The law of a forced row is not the model's; a token that was due came by force.
        free = alive & (token != forced_id(record, parts, p))
        p = fold(record, sets, p, token, alive)
        if confidence is not None:
            value = tl.load(confidence + row * steps + j, mask=alive, other=float("inf"))
            pushed = free & ((parts & DEEPCONF) != 0) & (value - value == 0)
            window = tl.maximum(tl.load(record + CONFIDENCE_WINDOW), 1)
            place = ring + 2 * CONFIDENCE_RING + watched % window
            old = tl.load(place, mask=pushed & (watched >= window), other=0.0)
            tl.debug_barrier()
            tl.store(place, value, mask=pushed)
            total = tl.where(pushed, total + (value.to(tl.float64) - old.to(tl.float64)), total)
            watched += pushed.to(tl.int64)
            low = total < number(record + CONFIDENCE_THRESHOLD) * window.to(tl.float64)
            p = stop(p, pushed & (watched >= window) & low)
        if entropy is not None:
            value = tl.load(entropy + row * steps + j, mask=alive, other=float("inf"))
            pushed = free & ((parts & TRIGGER) != 0) & (value - value == 0)
            window = tl.maximum(tl.load(record + ENTROPY_WINDOW), 1)
            tl.store(ring + 2 * ENTROPY_RING + seen % window, value, mask=pushed)
            seen += pushed.to(tl.int64)
        tl.debug_barrier()  # a value may come back at the next step
    store_progress(record, p, on)
    tl.store(record + CONFIDENCE_PUSHED, watched, mask=on)
    tl.store(record + ENTROPY_PUSHED, seen, mask=on)
    tl.store(record + CONFIDENCE_SUM, total.to(tl.int64, bitcast=True), mask=on)


# ---- launchers


def modulate_logits_(
    logits, slot, local_pos, draft_tokens, parents, temperature, records, sets, dense
):
    check_launchable("modulate_logits_", logits.device, modulate_kernel)
    rows, block = config(dense)
    if logits.shape[0]:
        with torch.cuda.device_of(logits):
            modulate_kernel[(triton.cdiv(logits.shape[0], rows),)](
                logits, slot, local_pos, draft_tokens, parents, temperature, records, sets,
                *logits.shape, logits.stride(0), len(records),
                1 if parents is None else len(parents), DENSE=dense, ROWS=rows, BLOCK=block,
                **OPTIONS,
            )  # fmt: skip


def commit_(slot, tokens, length, entropy, confidence, records, sets):
    check_launchable("commit_", slot.device, commit_kernel)
    rows, _ = config(dense=False)
    if tokens.shape[0]:
        with torch.cuda.device_of(tokens):
            commit_kernel[(triton.cdiv(tokens.shape[0], rows),)](
                slot, tokens, length, entropy, confidence, records, records.view(torch.float32),
                sets, *tokens.shape, len(records), ROWS=rows, **OPTIONS,
            )  # fmt: skip
