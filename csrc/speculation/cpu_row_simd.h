// Passes over a row of floats, compiled for several instruction sets by cpu_passes.h under the
// rules of common/simd.h: no include guard, no system headers, no template of another header.

#include "noise_simd.h"
#include "philox_simd.h"

RK_INLINE bool any(I mask) {
#if RK_SIMD == 4
  return _mm512_movepi32_mask(__m512i(mask)) != 0;
#elif RK_SIMD == 3
  return _mm256_movemask_ps(__m256(mask)) != 0;
#else
  int32_t all = 0;
  for (int lane = 0; lane < kLanes; ++lane) all |= mask[lane];
  return all != 0;
#endif
}

RK_INLINE uint32_t bits_of(I mask) {
#if RK_SIMD == 4
  return _mm512_movepi32_mask(__m512i(mask));
#elif RK_SIMD == 3
  return uint32_t(_mm256_movemask_ps(__m256(mask)));
#else
  uint32_t bits = 0;
  for (int lane = 0; lane < kLanes; ++lane) bits |= uint32_t(mask[lane] & 1) << lane;
  return bits;
#endif
}

#include "tile_sum_simd.h"

// 16-bit logits as floats, in order, unlike load().
typedef uint16_t Words __attribute__((vector_size(sizeof(U) / 2)));

static void widen_bf16(const BFloat16* x, int64_t n, float* out) {
  int64_t i = 0;
  for (; i + kLanes <= n; i += kLanes) {
    Words words;
    __builtin_memcpy(&words, x + i, sizeof words);
    store_one(out + i, F(__builtin_convertvector(words, U) << 16));
  }
  for (; i < n; ++i) out[i] = float_of_bits(uint32_t(x[i].x) << 16);
}

static void widen_fp16(const Half* x, int64_t n, float* out) {
  int64_t i = 0;
  for (; i + kGroup * kLanes <= n; i += kGroup * kLanes) {
    F v[kGroup];
    load(x + i, v);
    store(out + i, v);
  }
  for (; i < n; ++i) out[i] = static_cast<float>(x[i]);
}

// Ids of the values from `least` up, in order; returns how many. Tiles below it are not read.
static int64_t collect(const float* x, int64_t n, const float* maxima, float least, int32_t* ids) {
  const F bound = splat(least);
  int64_t count = 0;
  for (int64_t at = 0; at < n; at += kTile) {
    if (maxima[at / kTile] < least) continue;
    for (int64_t i = at; i < at + kTile; i += kGroup * kLanes) {
      F v[kGroup];
      load(x + i, v);
      if (!any(max(max(v[0], v[1]), max(v[2], v[3])) >= bound)) continue;
      uint64_t bits = 0;
      RK_EACH bits |= uint64_t(bits_of(v[k] >= bound)) << (k * kLanes);
      for (; bits != 0; bits &= bits - 1) ids[count++] = int32_t(i + __builtin_ctzll(bits));
    }
  }
  return count;
}

// A bound that just k of n values reach, or more where they are equal, top being the largest: by
// bisection of the floats' bits, whose order is theirs, without a branch that depends on a value.
// n is a multiple of kLanes.
static float reached_by(const float* x, int64_t n, int64_t k, float top) {
  F lanes = load_one(x);
  for (int64_t i = kLanes; i < n; i += kLanes) lanes = max(load_one(x + i), lanes);
  float start = lanes[0];  // reached by one value of each lane
  for (int lane = 1; lane < kLanes; ++lane) start = lanes[lane] < start ? lanes[lane] : start;
  int64_t low = ordered_bits(k > kLanes ? -kInf : start);
  int64_t high = int64_t(ordered_bits(top)) + 1;
  for (int64_t reached = -1; reached != k && high - low > 1;) {
    const int64_t middle = (low + high) >> 1;
    const F bound = splat(float_of_order(int32_t(middle)));
    I count = {};
    for (int64_t i = 0; i < n; i += kLanes) count -= load_one(x + i) >= bound;
    const auto above = int64_t(sum_lanes(__builtin_convertvector(count, F)));
    low = above < k ? low : middle;
    high = above < k ? middle : high;
    reached = above;
  }
  return float_of_order(int32_t(low));
}

// Masses of the kept tokens, added: each at most 2^40, so that a row stays below 2^63.
static int64_t sum_of_masses(const float* x, int64_t n, int64_t first, const Choice& c) {
  int64_t total = 0;
  for (int64_t i = 0; i < n; i += kLanes) {
    const F value = load_one(x + i) / splat(c.temperature);
    if (!any(value >= splat(c.cut.value))) continue;
    const F mass = mul(exp_of(value - splat(c.top)), splat(0x1p40f));
    for (int lane = 0; lane < kLanes; ++lane) {
      if (c.cut.keeps(value[lane], int(first + i) + lane)) total += int64_t(mass[lane]);
    }
  }
  return total;
}

// Adds the moments of the kept tokens; x has n tokens from `first` on. Tiles that hold none, or
// none with a weight, are not read.
static void kept_moments(const float* x, int64_t n, const float* maxima, int64_t first,
                         const Choice& c, double* s, double* u) {
  const float lowest = c.least_weight(kNegligible);
  const F temperature = splat(c.temperature), top = splat(c.top), bound = splat(c.cut.value);
  const I last = I{} + c.cut.id;
  I lanes;
  for (int lane = 0; lane < kLanes; ++lane) lanes[lane] = lane;
  for (int64_t at = 0; at < n; at += kTile) {
    if (maxima[at / kTile] < lowest) continue;
    MomentSums sums;
    for (int64_t i = at; i < at + kTile; i += kGroup * kLanes) {
      F d[kGroup], e[kGroup];
      I live[kGroup];
      load(x + i, d);
      RK_EACH live[k] = d[k] >= splat(lowest);
      if (!any((live[0] | live[1]) | (live[2] | live[3]))) continue;
      RK_EACH d[k] = d[k] / temperature;
      RK_EACH {
        const I ids = lanes + int32_t(first + i + k * kLanes);
        live[k] = (d[k] > bound) | ((d[k] == bound) & (ids <= last));
      }
      RK_EACH d[k] = max(splat(kExpZero), d[k] - top);
      scaled_exp(d, e);
      RK_EACH e[k] = F(U(e[k]) & U(live[k]));
      sums.add(d, e);
    }
    sums.add_to(s, u);
  }
}

// Offers every kept token of a group that may win.
RK_INLINE void offer_group(const F (&v)[kGroup], const U (&words)[kGroup], int64_t token, F inverse,
                           F least, F bar, const Choice& c, Best& best) {
  I live[kGroup];
  RK_EACH live[k] = (v[k] >= least) & ~(fma(v[k], inverse, noise_bound(words[k])) < bar);
  if (!any((live[0] | live[1]) | (live[2] | live[3]))) return;
  RK_EACH {
    for (uint32_t bits = bits_of(live[k]); bits != 0; bits &= bits - 1) {
      const int lane = __builtin_ctz(bits);
      c.offer(v[k][lane], words[k][lane], int(token) + k * kLanes + lane, best);
    }
  }
}

// Offers every kept token that may win to `best`; x has n tokens from `first` on. A token is passed
// over only if a bound of its perturbed value is below the best one's; tiles of such tokens are not
// read.
static void choose(const float* x, int64_t n, const float* maxima, int64_t first, const Choice& c,
                   Best& best) {
  constexpr int64_t kStep = kBlocks * kGroup * kLanes;
  const F inverse = splat(inverse_temperature(c.temperature));
  for (int64_t i = 0; i < n; i += kStep) {
    const float lowest = c.least_logit(best.score);
    if (maxima[i / kTile] < lowest) {
      i = (i / kTile + 1) * kTile - kStep;
      continue;
    }
    const F least = splat(lowest), bar = splat(c.least_bound(best.score));
    F v[kBlocks][kGroup];
    I live = {};
    for (int g = 0; g < kBlocks; ++g) {
      load(x + i + g * kGroup * kLanes, v[g]);
      RK_EACH live |= v[g][k] >= least;
    }
    if (!any(live)) continue;
    U words[kBlocks][4];
    philox_words(c.key, uint32_t((first + i) / 4), words);
    for (int g = 0; g < kBlocks; ++g) {
      offer_group(v[g], words[g], first + i + g * kGroup * kLanes, inverse, least, bar, c, best);
    }
  }
}

static RowPasses row_passes() {
  return {widen_bf16,    widen_fp16,   tile_maxima,  reached_by, collect,
          sum_of_masses, tile_moments, kept_moments, choose};
}
