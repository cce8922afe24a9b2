"""Triton kernels that show the noise contract: words, noise of tokens and words, exponentials."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from reasonkern.speculation.triton_noise import exp_of, philox4x32, word_of_token
from reasonkern.speculation.triton_noise import gumbel as gumbel_of

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
BLOCK = 4096


@triton.jit
def _philox_kernel(counter, out, seed: tl.int64):
    one = tl.arange(0, 1)
    a, b, c, d = philox4x32(
        tl.load(counter + one).to(tl.uint32), tl.load(counter + 1 + one).to(tl.uint32),
        tl.load(counter + 2 + one).to(tl.uint32), tl.load(counter + 3 + one).to(tl.uint32), seed,
    )  # fmt: skip
    tl.store(out + one, a.to(tl.int64))
    tl.store(out + 1 + one, b.to(tl.int64))
    tl.store(out + 2 + one, c.to(tl.int64))
    tl.store(out + 3 + one, d.to(tl.int64))


@triton.jit
def _noise_kernel(words, noise, n, seed: tl.int64, position: tl.int64, tag, BLOCK: tl.constexpr):
    token = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    word = word_of_token(token, position, tag, seed)
    tl.store(words + token, word.to(tl.int64), mask=token < n)
    tl.store(noise + token, gumbel_of(word), mask=token < n)


@triton.jit
def _gumbel_kernel(words, out, n, BLOCK: tl.constexpr):
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    word = tl.load(words + i, mask=i < n, other=1).to(tl.uint32)
    tl.store(out + i, gumbel_of(word), mask=i < n)


@triton.jit
def _exp_kernel(x, out, n, BLOCK: tl.constexpr):
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.store(out + i, exp_of(tl.load(x + i, mask=i < n, other=0.0)), mask=i < n)


def philox(counter: list[int], seed: int) -> list[int]:
    out = torch.empty(4, dtype=torch.int64, device=DEVICE)
    _philox_kernel[(1,)](torch.tensor(counter, device=DEVICE), out, seed)
    return out.tolist()


def noise(n: int, seed: int, position: int, stream: int, depth: int) -> tuple[Tensor, Tensor]:
    words = torch.empty(n, dtype=torch.int64, device=DEVICE)
    out = torch.empty(n, device=DEVICE)
    grid = (triton.cdiv(n, BLOCK),)
    _noise_kernel[grid](
        words, out, n, seed, position, stream | depth << 8, BLOCK, enable_fp_fusion=False
    )
    return words.cpu(), out.cpu()


def gumbel(words: Tensor) -> Tensor:
    out = torch.empty(len(words), device=DEVICE)
    grid = (triton.cdiv(len(words), BLOCK),)
    _gumbel_kernel[grid](words.to(DEVICE), out, len(words), BLOCK, enable_fp_fusion=False)
    return out.cpu()


def exp(x: Tensor) -> Tensor:
    out = torch.empty(len(x), device=DEVICE)
    grid = (triton.cdiv(len(x), BLOCK),)
    _exp_kernel[grid](x.to(DEVICE), out, len(x), BLOCK, enable_fp_fusion=False)
    return out.cpu()
