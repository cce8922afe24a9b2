// The passes of cpu_row_simd.h compiled for several instruction sets, and the choice among them.
#pragma once

#include <cmath>
#include <cstdint>

#include "../common/cpu_capability.h"
#include "row.h"

namespace reasonkern {
namespace cpu {

// Rows are handled in whole tiles; the last one is padded with -inf.
constexpr int64_t kTile = 1024;

// What Philox needs of a row besides the token, round keys included.
struct NoiseKey {
  uint64_t seed, position;
  uint32_t stream;
  uint32_t round[kPhiloxRounds][2];

  NoiseKey(uint64_t seed, uint64_t position, uint32_t stream)
      : seed(seed), position(position), stream(stream) {
    uint32_t k0 = uint32_t(seed), k1 = uint32_t(seed >> 32);
    for (auto& k : round) {
      k[0] = k0, k[1] = k1;
      k0 += kPhiloxW0;
      k1 += kPhiloxW1;
    }
  }
};

// A draw from the kept tokens of a row. Tokens in `skip` are offered by the caller.
struct Choice {
  float temperature, top;  // top: the largest z/T
  Cut cut;
  NoiseKey key;
  const int64_t* skip;
  int skip_count;

  void offer(float logit, uint32_t word, int token, Best& best) const {
    const float value = noise::divide(logit, temperature);
    if (!cut.keeps(value, token)) return;
    for (int i = 0; i < skip_count; ++i) {
      if (skip[i] == token) return;
    }
    best.offer(noise::add(value, noise::gumbel_of(word)), token);
  }

  // Below this logit no token is kept, or none weighs anything in a sum over the law.
  float least_weight(double negligible) const {
    const float least = std::max(cut.value, top - float(negligible)) * temperature;
    return least - 1e-6f * std::fabs(least) - 1e-30f * std::max(1.0f, temperature);
  }

  // What rounding can add to a perturbed value, to its bounds, and to z times 1/T.
  static float slack(float best) { return 2e-3f + 1e-6f * std::fabs(best); }

  // Below this bound of its perturbed value no token wins.
  float least_bound(float best) const { return best - slack(best); }

  // Below this logit no token wins, whatever its noise.
  float least_logit(float best) const {
    const float least = (best - kMaxNoise - slack(best)) * temperature;
    return least - 1e-6f * std::fabs(least) - 1e-30f;
  }
};

// Smaller logits are steps of an octave and a rest, which single precision holds.
constexpr float kSteady = 0x1p15f;

// sum exp(x - base) of what was seen so far, none of it above `limit`, which is `base` rounded.
struct ExpSum {
  float limit = -kInf, octaves = 0;
  double base = 0, value = 0;
  bool steady = true;  // the base is 2^octaves

  // The base is a power of two, and above what is to come if that is little larger.
  void raise(float top) {
    constexpr double kLn2 = 0.6931471805599453;
    const double last = base;
    octaves = std::ceil(top * float(1 / kLn2)) + 8;
    steady = std::fabs(top) < kSteady;
    base = steady ? octaves * kLn2 : top;
    limit = float(base);
    if (value > 0) value *= std::exp(last - base);
  }

  double logarithm() const { return base + std::log(value); }
};

inline double exponential(double x) { return std::exp(x); }

inline float float_of_bits(uint32_t bits) { return noise::float_of(bits); }

// The bits of a float as an integer of the same order.
inline int32_t ordered_bits(float x) {
  const auto bits = int32_t(noise::word_of(x));
  return bits < 0 ? bits ^ 0x7fffffff : bits;
}

inline float float_of_order(int32_t bits) {
  return noise::float_of(uint32_t(bits < 0 ? bits ^ 0x7fffffff : bits));
}

// So far below the top, 2^22 tokens add less than 2^-40 to sums over a law.
constexpr double kNegligible = 48;

struct RowPasses {
  void (*widen_bf16)(const BFloat16* x, int64_t n, float* out);
  void (*widen_fp16)(const Half* x, int64_t n, float* out);
  float (*tile_maxima)(const float* x, int64_t n, float* maxima, ExpSum* sum);
  float (*reached_by)(const float* x, int64_t n, int64_t k, float top);
  int64_t (*collect)(const float* x, int64_t n, const float* maxima, float least, int32_t* ids);
  int64_t (*sum_of_masses)(const float* x, int64_t n, int64_t first, const Choice&);
  void (*tile_moments)(const float* x, float top, double* s, double* u);
  void (*kept_moments)(const float* x, int64_t n, const float* maxima, int64_t first, const Choice&,
                       double* s, double* u);
  void (*choose)(const float* x, int64_t n, const float* maxima, int64_t first, const Choice&,
                 Best& best);
};

#define RK_KERNELS "../speculation/cpu_row_simd.h"
#include "../common/each_capability.h"

inline const RowPasses& passes() {
  static const RowPasses chosen = [] {
#if defined(__x86_64__)
    if (capability() == Capability::kV4) return v4::row_passes();
    if (capability() == Capability::kV3) return v3::row_passes();
#endif
    return baseline::row_passes();
  }();
  return chosen;
}

}  // namespace cpu
}  // namespace reasonkern
