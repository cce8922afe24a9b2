"""Products with the language-model head, a chunk of rows at a time: no (N, V) tensor ever exists.

`HeadChunks` yields the logits of one chunk after the other in one buffer. Its user overwrites them
with their gradient and gives the chunk to `HeadChunks.add_gradient`, which adds it to the gradients
of the hidden states, the weight and the bias before the buffer is filled again.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from .reference import accumulator_dtype

# Size of the logits buffer when `chunk_rows` is None. On a GPU it must amortise reading and writing
# the float32 gradient of the weight once per chunk.
CPU_BYTES, GPU_BYTES = 96 << 20, 5 << 28
# Rows of a default chunk are a multiple of this: whole tiles of a matrix product.
CPU_TILE, GPU_TILE = 16, 128
UPCAST_COLUMNS = 4096  # of the gradient of half-precision logits, on devices without out_dtype


class Plan(NamedTuple):
    """How a call is cut: `chunk_rows` and `num_active` of the fronts, -1 where they are None."""

    dtype: torch.dtype
    chunk_rows: int
    compact: bool
    num_active: int


class Needs(NamedTuple):
    """Which gradients are wanted."""

    hidden: bool
    weight: bool
    bias: bool


NOTHING = Needs(False, False, False)


@dataclass(frozen=True, eq=False)
class Selection:
    """The rows that go through the products: all of them, or the active ones."""

    active: Tensor | None  # (N,) bool; None = all
    index: Tensor | None  # (M,) rows in the products; None = all N, in order
    count: int

    @classmethod
    def of(cls, active: Tensor | None, rows: int, plan: Plan) -> Selection:
        """`num_active` < 0 counts the active rows, which synchronises."""
        if active is not None:
            active = active.reshape(-1)
        if active is None or not plan.compact:
            return cls(active, None, rows)
        if plan.num_active < 0:
            index = active.nonzero().squeeze(1)
        else:
            order = torch.argsort(active.to(torch.uint8), descending=True, stable=True)
            index = order[: plan.num_active]
        return cls(active, index, index.numel())

    def take(self, x: Tensor | None) -> Tensor | None:
        """(1, M) of a tensor of N elements."""
        if x is None:
            return None
        x = x.reshape(-1)
        return (x if self.index is None else x[self.index]).unsqueeze(0)

    def put(self, x: Tensor, shape: torch.Size, missing: float = 0.0) -> Tensor:
        """(1, M) back to N rows of `shape`: 0 where inactive, `missing` if active and left out."""
        if self.index is None or self.active is None:
            return x.view(shape)
        full = torch.where(self.active, missing, 0.0).to(x.dtype)
        return full.index_copy_(0, self.index, x.squeeze(0)).view(shape)


class Chunk(NamedTuple):
    """One step of the loop."""

    span: slice  # among the selected rows
    hidden: Tensor  # (rows, D), zero where inactive
    logits: Tensor  # (1, rows, V), free to be overwritten


class HeadChunks:
    """hidden @ weight.T + bias over chunks of the selected rows, and the gradients of the three."""

    def __init__(
        self,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        selection: Selection,
        plan: Plan,
        needs: Needs = NOTHING,
    ) -> None:
        """Operands (N, D), (V, D), (V,); a cast to `plan.dtype` happens here, once."""
        self.hidden, self.selection, self.dtype = hidden, selection, plan.dtype
        self.weight = weight.to(plan.dtype)
        self.bias = None if bias is None else bias.to(plan.dtype)
        self.rows = chunk_size(selection.count, weight.shape[0], plan, hidden.device)
        wide = accumulator_dtype(plan.dtype)
        fresh = torch.zeros if selection.index is not None else torch.empty
        self.grad_hidden = fresh(
            hidden.shape if needs.hidden else 0, dtype=plan.dtype, device=hidden.device
        )
        # Written by the first chunk; without one they stay 0.
        make = torch.empty if selection.count else torch.zeros
        self.grad_weight = make(
            weight.shape if needs.weight else 0, dtype=wide, device=hidden.device
        )
        vocab = weight.shape[0] if needs.bias else 0
        self.grad_bias = torch.zeros(vocab, dtype=wide, device=hidden.device)
        self.needs = needs

    def __iter__(self) -> Iterator[Chunk]:
        """Chunks in order; every product has the same shape, the rows that fill it up are zero."""
        (vocab, width), rows = self.weight.shape, self.rows
        hidden, logits = (
            aligned_rows(rows, columns, self.dtype, self.hidden.device)
            for columns in (width, vocab)
        )
        for start in range(0, self.selection.count, rows):
            span = slice(start, min(start + rows, self.selection.count))
            used = span.stop - start
            self._load(hidden[:used], span)
            hidden[used:].zero_()
            if self.bias is None:
                torch.mm(hidden, self.weight.t(), out=logits)
            else:
                torch.addmm(self.bias, hidden, self.weight.t(), out=logits)
            yield Chunk(span, hidden[:used], logits[:used].unsqueeze(0))

    def _load(self, chunk: Tensor, span: slice) -> None:
        """Inactive rows become 0: whatever they hold, 0 times it must not reach the weight."""
        active, index = self.selection.active, self.selection.index
        rows = span if index is None else index[span]
        chunk.copy_(self.hidden[rows])
        if active is not None:
            chunk.masked_fill_(~active[rows].unsqueeze(1), 0.0)

    def add_gradient(self, chunk: Chunk, logprob: Tensor) -> None:
        """`chunk.logits` hold the gradient; rows without a finite `logprob` (1, rows) have none."""
        gradient = chunk.logits.squeeze(0)
        if self.needs.hidden:
            index = self.selection.index
            if index is None:
                torch.mm(gradient, self.weight, out=self.grad_hidden[chunk.span])
            else:
                # Into `out`, which autocast leaves in the dtype it has.
                product = torch.mm(gradient, self.weight, out=torch.empty_like(chunk.hidden))
                self.grad_hidden.index_copy_(0, index[chunk.span], product)
        if self.needs.weight:
            # 0 times a NaN among the hidden states would be NaN in the whole weight.
            chunk.hidden.masked_fill_(~torch.isfinite(logprob).view(-1, 1), 0.0)
            add_product(self.grad_weight, gradient.t(), chunk.hidden, chunk.span.start == 0)
        if self.needs.bias:
            for columns in column_blocks(gradient):
                total = gradient[:, columns].sum(0, dtype=self.grad_bias.dtype)
                self.grad_bias[columns] += total


def aligned_rows(rows: int, columns: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """Uninitialised (rows, columns) with aligned rows, whatever the vocabulary, and zeros between.

    A bfloat16 product of oneDNN reads one element past a row of odd length, times 0: NaN there, or
    in a neighbouring row, would come through.
    """
    pitch = -(-columns // 64) * 64
    room = torch.empty(rows, pitch, dtype=dtype, device=device)
    room[:, columns:].zero_()
    return room[:, :columns]


def chunk_size(rows: int, vocab: int, plan: Plan, device: torch.device) -> int:
    """Rows of a chunk; the default cuts all rows into chunks of the same size."""
    if plan.chunk_rows > 0:
        return plan.chunk_rows
    on_cpu = device.type == "cpu"
    tile = CPU_TILE if on_cpu else GPU_TILE
    most = max(tile, (CPU_BYTES if on_cpu else GPU_BYTES) // (vocab * plan.dtype.itemsize))
    chunks = max(1, -(-rows // most))
    return -(-max(1, -(-rows // chunks)) // tile) * tile


def add_product(total: Tensor, a: Tensor, b: Tensor, first: bool) -> None:
    """``total += a @ b`` in the dtype of `total` without rounding the product; `first` overwrites.

    Products of each chunk rounded to bfloat16 would bias the sum over chunks.
    """
    beta = 0 if first else 1
    if a.dtype == total.dtype:
        total.addmm_(a, b, beta=beta)
    elif a.device.type == "cuda":
        torch.addmm(total, a, b, out_dtype=total.dtype, beta=beta, out=total)
    else:
        wide = b.to(total.dtype)
        for rows in column_blocks(a.t()):
            total[rows].addmm_(a[rows].to(total.dtype), wide, beta=beta)


def column_blocks(x: Tensor) -> Iterator[slice]:
    """Columns of x in pieces small enough to be upcast; all at once where nothing is."""
    step = x.shape[1] if x.dtype.itemsize >= 4 or x.device.type == "cuda" else UPCAST_COLUMNS
    for start in range(0, x.shape[1], step):
        yield slice(start, start + step)
