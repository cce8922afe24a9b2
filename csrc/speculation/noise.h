// The noise contract (VERIFY.md of the family): which Philox word belongs to which token, and the
// Gumbel noise of a word, bit for bit the same on every backend.
#pragma once

#include <cstdint>
#include <cstring>

#include "../common/philox.h"

namespace reasonkern {

// What a word is for; a stream's noise is independent of every other stream's.
enum NoiseStream : uint32_t { kTarget = 0, kDraft = 1, kCoin = 2, kResidual = 3 };

// Streams other than kTarget use the position of the root and tell levels apart here.
RK_HOST_DEVICE uint32_t stream_word(NoiseStream stream, int depth) {
  return uint32_t(stream) | uint32_t(depth) << 8;
}

// Words of the tokens 4 block … 4 block + 3.
RK_HOST_DEVICE PhiloxWords noise_block(uint64_t seed, uint64_t position, uint32_t stream,
                                       uint32_t block) {
  return philox4x32({{block, uint32_t(position), uint32_t(position >> 32), stream}}, seed);
}

RK_HOST_DEVICE uint32_t noise_word(uint64_t seed, uint64_t position, uint32_t stream,
                                   uint32_t token) {
  const PhiloxWords words = noise_block(seed, position, stream, token >> 2);
  const uint32_t low = (token & 1) != 0 ? words.w[1] : words.w[0];  // no index: in registers
  const uint32_t high = (token & 1) != 0 ? words.w[3] : words.w[2];
  return (token & 2) != 0 ? high : low;
}

namespace noise {

using F = float;
using U = uint32_t;
using I = int32_t;
#define RK_FN RK_HOST_DEVICE

RK_FN F splat(float x) { return x; }
RK_FN F select(bool condition, F yes, F no) { return condition ? yes : no; }
RK_FN U select(bool condition, U yes, U no) { return condition ? yes : no; }
RK_FN F to_float(I n) { return float(n); }
RK_FN F from_word(U word) { return float(word); }
RK_FN I signed_of(U x) { return I(x); }
RK_FN U unsigned_of(I x) { return U(x); }
#if defined(__CUDA_ARCH__)
RK_FN F mul(F a, F b) { return __fmul_rn(a, b); }
RK_FN F add(F a, F b) { return __fadd_rn(a, b); }
RK_FN F divide(F a, F b) { return __fdiv_rn(a, b); }
RK_FN U word_of(F x) { return __float_as_uint(x); }
RK_FN F float_of(U x) { return __uint_as_float(x); }
#else
RK_FN F mul(F a, F b) { return a * b; }
RK_FN F add(F a, F b) { return a + b; }
RK_FN F divide(F a, F b) { return a / b; }
RK_FN U word_of(F x) {
  U word;
  std::memcpy(&word, &x, sizeof word);
  return word;
}
RK_FN F float_of(U word) {
  F x;
  std::memcpy(&x, &word, sizeof x);
  return x;
}
#endif

#include "noise_math.h"

#undef RK_FN

}  // namespace noise

// Stream 0 is the noise of `sample`, of equality verification and of shared drafts.
RK_HOST_DEVICE float gumbel_noise(uint64_t seed, uint64_t position, uint32_t token,
                                  uint32_t stream = kTarget) {
  return noise::gumbel_of(noise_word(seed, position, stream, token));
}

}  // namespace reasonkern
