"""Hashes, storage codes and the order of candidates, with the bits of ``reference_table.py``."""

import triton
import triton.language as tl

from . import reference_table

PACKED, WIDE, EXACT = tl.constexpr(0), tl.constexpr(1), tl.constexpr(2)
WAYS = tl.constexpr(reference_table.WAYS)
LANES = tl.constexpr(16)  # slots of an entry, padded


@triton.jit
def hash_step(h, x):
    h = (h ^ x.to(tl.uint64)) * tl.full((), 0x9E3779B97F4A7C15, tl.uint64)
    return h ^ (h >> 32)


@triton.jit
def hash_key(h, order):
    h = h ^ tl.full((), order, tl.uint64) * tl.full((), 0xD1342543DE82EF95, tl.uint64)
    h = (h ^ (h >> 30)) * tl.full((), 0xBF58476D1CE4E5B9, tl.uint64)
    h = (h ^ (h >> 27)) * tl.full((), 0x94D049BB133111EB, tl.uint64)
    h = h ^ (h >> 31)
    one = tl.full((), 1, tl.uint64)
    return tl.where(h + one <= one, one, h)


@triton.jit
def hash_start(scope, epoch):
    start = scope.to(tl.uint64) * 0 + tl.full((), 0x243F6A8885A308D3, tl.uint64)
    return hash_step(hash_step(start, scope), epoch.to(tl.int64))


@triton.jit
def set_of(key, sets):
    return (((key >> 33) * sets.to(tl.uint64)) >> 31).to(tl.int64)


@triton.jit
def decode(code):
    exponent = code >> 10
    mantissa = code & 1023
    shift = tl.where(exponent == 0, 0, exponent - 1)
    return tl.where(exponent == 0, mantissa, (mantissa + 1024) << shift)


@triton.jit
def encode(total, n):
    mean = ((total + 32 * n) // (64 * n)).to(tl.int32)
    # The exponent of the float is that of the integer: below 2^24 conversion is exact, and the
    # rounding of larger ones, at most 1.001 * 2^24, does not carry into it.
    length = (mean.to(tl.float32).to(tl.int32, bitcast=True) >> 23) - 126
    shift = tl.maximum(tl.where(mean == 0, 0, length) - 11, 0)
    half = (1 << shift) >> 1
    return (shift << 10) + ((mean + half) >> shift)


@triton.jit
def exp_of(x):
    x = tl.maximum(x, -100.0)  # below -80 the result is 0
    t = x * 1.44269504 + 12582912.0
    steps = t - 12582912.0
    r = x + steps * -0.693359375
    r = r + steps * 2.12194440e-4
    q = r * 0.0001984127011382952332496643066 + 0.001388888922519981861114501953
    q = q * r + 0.008333333767950534820556640625
    q = q * r + 0.041666667908430099487304687500
    q = q * r + 0.166666671633720397949218750000
    q = q * r + 0.5
    q = q * r + 1.0
    q = q * r + 1.0
    n = t.to(tl.int32, bitcast=True) - 0x4B400000
    p = (q.to(tl.int32, bitcast=True) + (n << 23)).to(tl.float32, bitcast=True)
    return tl.where(x < -80.0, 0.0, p)


@triton.jit
def fixed(p):
    scaled = p * 1073741824.0
    low = (scaled + 8388608.0).to(tl.int32, bitcast=True) - 0x4B000000
    return tl.where(scaled >= 8388608.0, scaled.to(tl.int64), low.to(tl.int64))


@triton.jit
def goes_before(score, token, other_score, other_token):
    return (score > other_score) | ((score == other_score) & (token < other_token))
