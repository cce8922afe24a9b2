"""The noise contract in torch: Philox4x32-10 words and the fp32 Gumbel noise of a word.

The words of a token depend on (seed, position, stream, token) alone, never on a batch row or on
what was drawn before. The floating-point steps are IEEE single operations in a fixed order; the
compiled backends (``csrc/speculation/noise.h``) take the same ones and get the same bits.
"""

from __future__ import annotations

import torch
from torch import Tensor

TARGET, DRAFT, COIN, RESIDUAL = range(4)  # streams

_M0, _M1 = 0xD2511F53, 0xCD9E8D57
_W0, _W1 = 0x9E3779B9, 0xBB67AE85
_MASK = 0xFFFFFFFF

# log(1 + f) = f + f^2 Q(f) for 1 + f in [sqrt(1/2), sqrt(2)); highest power first.
_Q = (
    0.08734750747680664, -0.14307482540607452, 0.14917989075183868, -0.165705144405365,
    0.19962070882320404, -0.25001755356788635, 0.33333951234817505, -0.49999991059303284,
)  # fmt: skip
_LN2_HIGH, _LN2_LOW = 0.693359375, -2.12194440e-4
# exp(r) = 1 + r + r^2 E(r) for |r| <= ln(2) / 2; highest power first.
_E = (
    0.0013813142431899905, 0.008369418792426586, 0.04166845604777336, 0.16666515171527863,
    0.4999999403953552,
)  # fmt: skip
_MAGIC = 12582912.0  # adding it rounds to an integer


def philox(counter: tuple[Tensor, Tensor, Tensor, Tensor], key: Tensor) -> tuple[Tensor, ...]:
    """Four words per counter, as int64 tensors of values below 2^32; `key` int64 read as uint64."""
    c0, c1, c2, c3 = counter
    k0, k1 = key & _MASK, (key >> 32) & _MASK
    for _ in range(10):
        # The products wrap as int64, which keeps their 64 bits.
        p0, p1 = c0 * _M0, c2 * _M1
        c0, c1 = ((p1 >> 32) & _MASK) ^ c1 ^ k0, p1 & _MASK
        c2, c3 = ((p0 >> 32) & _MASK) ^ c3 ^ k1, p0 & _MASK
        k0, k1 = (k0 + _W0) & _MASK, (k1 + _W1) & _MASK
    return c0, c1, c2, c3


def words(
    seed: Tensor, position: Tensor, token: Tensor, stream: int = TARGET, depth: Tensor | int = 0
) -> Tensor:
    """The word of each token, int64 below 2^32; all arguments broadcast.

    Streams other than TARGET take the position of the root and the depth of the node.
    """
    shape = torch.broadcast_shapes(seed.shape, position.shape, token.shape)
    tag = depth << 8 | stream
    # Filled on the device: a copy from the host would synchronise.
    tag = tag.to(torch.int64) if isinstance(tag, Tensor) else torch.full_like(token, tag)
    counter = (token >> 2, position & _MASK, (position >> 32) & _MASK, tag)
    block = torch.stack([w.expand(shape) for w in philox(counter, seed)], -1)
    return block.gather(-1, (token & 3).expand(shape).unsqueeze(-1)).squeeze(-1)


def row_words(
    seed: Tensor, position: Tensor, vocab: int, stream: int = TARGET, depth: int = 0
) -> Tensor:
    """(R, vocab) the words of all tokens, a block of four at a time; seed and position (R,)."""
    block = torch.arange((vocab + 3) // 4, device=seed.device)
    low, high = (position & _MASK).unsqueeze(-1), ((position >> 32) & _MASK).unsqueeze(-1)
    tag = torch.full_like(block, depth << 8 | stream)
    parts = philox((block, low, high, tag), seed.unsqueeze(-1))
    shape = torch.broadcast_shapes(*(p.shape for p in parts))
    return torch.stack([p.expand(shape) for p in parts], -1).flatten(-2)[..., :vocab]


def gumbel(word: Tensor) -> Tensor:
    """Standard Gumbel noise -log(-log1p(-u)), fp32, of words; u = max(word, 1) / 2^32 in fp32."""
    u = (word.clamp_min(1).to(torch.float32) * 2.0**-32).clamp_max(1 - 2.0**-24)
    w = 1.0 - u
    n = _binade(w)
    # Where 1 - u needs no scaling f = -u, which keeps the relative accuracy of a small u.
    exponential = _minus_log(n, torch.where(n == 0, -u, _mantissa(w, n) - 1.0))
    return minus_log(exponential)


def gumbel_noise(
    seed: Tensor, position: Tensor, token: Tensor, stream: int = TARGET, depth: Tensor | int = 0
) -> Tensor:
    """`gumbel` of `words`."""
    return gumbel(words(seed, position, token, stream, depth))


def minus_log(x: Tensor) -> Tensor:
    """-log(x) of normal fp32 x > 0, by the fixed steps of the contract."""
    n = _binade(x)
    return _minus_log(n, _mantissa(x, n) - 1.0)


def exp(x: Tensor) -> Tensor:
    """e^x of fp32 x <= 0 by the fixed steps of the contract; 0 below -87 and for NaN."""
    n = (x * 1.44269504 + _MAGIC) - _MAGIC
    r = (x + n * -_LN2_HIGH) + n * -_LN2_LOW
    e = torch.full_like(r, _E[0])
    for coefficient in _E[1:]:
        e = e * r + coefficient
    e = 1.0 + (r * r * e + r)
    steps = torch.where(x > -87.0, n, 0.0).to(torch.int32) << 23
    return torch.where(x > -87.0, (e.view(torch.int32) + steps).view(torch.float32), 0.0)


def _binade(x: Tensor) -> Tensor:
    return (x.view(torch.int32) - 0x3F3504F3) >> 23


def _mantissa(x: Tensor, n: Tensor) -> Tensor:
    return (x.view(torch.int32) - (n << 23)).view(torch.float32)


def _minus_log(n: Tensor, f: Tensor) -> Tensor:
    q = torch.full_like(f, _Q[0])
    for coefficient in _Q[1:]:
        q = q * f + coefficient
    steps = n.to(torch.float32)
    low = steps * _LN2_LOW + (f * f * q + f)
    return -(steps * _LN2_HIGH + low)
