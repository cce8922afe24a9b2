"""The noise contract in Triton; the steps are those of ``noise.py`` and ``csrc/speculation``."""

import triton
import triton.language as tl


@triton.jit
def philox4x32(c0, c1, c2, c3, seed):
    """Four words per counter; the counter's words are uint32 of one shape, the seed an int64."""
    k0 = seed.to(tl.uint32)
    k1 = (seed >> 32).to(tl.uint32)
    m0 = tl.full((), 0xD2511F53, tl.uint32)
    m1 = tl.full((), 0xCD9E8D57, tl.uint32)
    w0 = tl.full((), 0x9E3779B9, tl.uint32)
    w1 = tl.full((), 0xBB67AE85, tl.uint32)
    for _ in tl.static_range(10):
        low0, high0 = c0 * m0, tl.umulhi(c0, m0)
        low1, high1 = c2 * m1, tl.umulhi(c2, m1)
        c0, c1, c2, c3 = high1 ^ c1 ^ k0, low1, high0 ^ c3 ^ k1, low0
        k0 = k0 + w0
        k1 = k1 + w1
    return c0, c1, c2, c3


@triton.jit
def word_of_token(token, position, tag, seed):
    """The word of each token (int32), as uint32; position and seed are int64 scalars."""
    block = (token >> 2).to(tl.uint32)
    zero = block * 0
    a, b, c, d = philox4x32(
        block,
        zero + position.to(tl.uint32),
        zero + (position >> 32).to(tl.uint32),
        zero + tag.to(tl.uint32),
        seed,
    )
    lane = token & 3
    return tl.where(lane < 2, tl.where(lane == 0, a, b), tl.where(lane == 2, c, d))


@triton.jit
def _log_series(f):
    q = f * 0.08734750747680664 - 0.14307482540607452
    q = q * f + 0.14917989075183868
    q = q * f - 0.165705144405365
    q = q * f + 0.19962070882320404
    q = q * f - 0.25001755356788635
    q = q * f + 0.33333951234817505
    q = q * f - 0.49999991059303284
    return f * f * q + f


@triton.jit
def _binade(x):
    return (x.to(tl.int32, bitcast=True) - 0x3F3504F3) >> 23


@triton.jit
def _mantissa(x, n):
    return (x.to(tl.int32, bitcast=True) - (n << 23)).to(tl.float32, bitcast=True)


@triton.jit
def _minus_log(n, f):
    steps = n.to(tl.float32)
    low = steps * -2.12194440e-4 + _log_series(f)
    return -(steps * 0.693359375 + low)


@triton.jit
def minus_log(x):
    """-log(x) of normal x > 0."""
    n = _binade(x)
    return _minus_log(n, _mantissa(x, n) - 1.0)


@triton.jit
def gumbel(word):
    """Standard Gumbel noise of words (uint32); compile with enable_fp_fusion=False."""
    word = tl.where(word == 0, 1, word).to(tl.uint32)
    u = word.to(tl.float32) * 2.3283064365386963e-10
    u = tl.minimum(u, 0.999999940395355224609375)
    w = 1.0 - u
    n = _binade(w)
    return minus_log(_minus_log(n, tl.where(n == 0, -u, _mantissa(w, n) - 1.0)))


@triton.jit
def words_of_block(first, position, tag, seed, BLOCK: tl.constexpr):
    """(BLOCK,) the words of the tokens from `first`, a multiple of 4, on."""
    block = (first // 4 + tl.arange(0, BLOCK // 4)).to(tl.uint32)
    zero = block * 0
    a, b, c, d = philox4x32(
        block,
        zero + position.to(tl.uint32),
        zero + (position >> 32).to(tl.uint32),
        zero + tl.cast(tag, tl.uint32),
        seed,
    )
    return tl.interleave(tl.interleave(a, c), tl.interleave(b, d))


@triton.jit
def exp_of(x):
    """The exponential of x <= 0; 0 below -87 and for NaN."""
    n = (x * 1.44269504 + 12582912.0) - 12582912.0
    n = tl.where(x > -87.0, n, 0.0)
    r = (x - n * 0.693359375) + n * 2.12194440e-4
    e = r * 0.0013813142431899905 + 0.008369418792426586
    e = e * r + 0.04166845604777336
    e = e * r + 0.16666515171527863
    e = e * r + 0.4999999403953552
    e = 1.0 + (r * r * e + r)
    power = e.to(tl.int32, bitcast=True) + (n.to(tl.int32) << 23)
    return tl.where(x > -87.0, power.to(tl.float32, bitcast=True), 0.0)
