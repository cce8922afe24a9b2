"""A Triton kernel that shows which tokens the filters keep."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from reasonkern.speculation.reference_row import Filters
from reasonkern.speculation.triton_rows import (
    Request,
    Row,
    filter_cut,
    find_top,
    order_of,
    value_of,
)

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


@triton.jit
def _kept_kernel(
    logits, temperature, top_k, top_p, min_p, out, vocab: tl.int32, BLOCK: tl.constexpr
):
    b = tl.program_id(0)
    row = Row(logits + b * vocab, None, vocab)
    r = Request(
        tl.load(temperature + b), tl.load(top_k + b), tl.load(top_p + b), tl.load(min_p + b),
        None, None,
    )  # fmt: skip
    top = tl.div_rn(find_top(row, BLOCK).value, r.temperature)
    cut = filter_cut(row, r, top, BLOCK)
    for start in tl.range(0, vocab, BLOCK):
        cols = start + tl.arange(0, BLOCK)
        kept = order_of(value_of(row, cols, r.temperature), cols) >= cut
        tl.store(out + b * vocab + cols, kept, mask=cols < vocab)


def kept(logits: Tensor, filters: Filters, block: int) -> Tensor:
    """(R, V) bool of contiguous logits."""
    out = torch.empty(logits.shape, dtype=torch.bool, device=DEVICE)
    given = (x.to(DEVICE) for x in (logits, *filters))
    _kept_kernel[(len(logits),)](*given, out, logits.shape[1], block, enable_fp_fusion=False)
    return out.cpu()
