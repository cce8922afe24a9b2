// The largest value of each tile of a row and, in the same sweep, sum exp(x - top). Included once
// per instruction set by cpu_row_simd.h, under the rules of common/simd.h.

// Holds a loaded vector in its register: GCC would load it anew for every use.
RK_INLINE void keep(F& x) {
#if defined(__x86_64__)
  asm("" : "+v"(x));
#endif
}

// Lanes in four columns: what is left of a reduction costs no loop.
typedef float Quad __attribute__((vector_size(16)));

RK_INLINE float max_lane(F x) {
  Quad rows[kLanes / 4];
  __builtin_memcpy(rows, &x, sizeof x);
  for (int width = kLanes / 8; width > 0; width /= 2) {
    for (int i = 0; i < width; ++i) rows[i] = rows[i + width] > rows[i] ? rows[i + width] : rows[i];
  }
  const float a = rows[0][0] > rows[0][1] ? rows[0][0] : rows[0][1];
  const float b = rows[0][2] > rows[0][3] ? rows[0][2] : rows[0][3];
  return a > b ? a : b;
}

RK_INLINE float sum_lanes(F x) {
  Quad rows[kLanes / 4];
  __builtin_memcpy(rows, &x, sizeof x);
  for (int width = kLanes / 8; width > 0; width /= 2) {
    for (int i = 0; i < width; ++i) rows[i] += rows[i + width];
  }
  return (rows[0][0] + rows[0][1]) + (rows[0][2] + rows[0][3]);
}

// Whether a NaN, or both infinities, were among the vectors it saw: a sum with them is NaN. Of all
// ways to look for one this alone leaves the ports that maxima need.
struct NanWatch {
  F sum[kGroup] = {};

  RK_INLINE void see(const F (&v)[kGroup]) {
    RK_EACH sum[k] = fma(v[k], splat(0x1p-10f), sum[k]);  // too small to overflow
  }
  RK_INLINE bool saw() const {
    const F all = (sum[0] + sum[1]) + (sum[2] + sum[3]);
    return any(all != all);
  }
};

RK_INLINE float largest(const F (&tops)[kGroup]) {
  return max_lane(max(max(tops[0], tops[1]), max(tops[2], tops[3])));
}

// The largest values of a tile, lane by lane; true when one is NaN.
RK_INLINE bool tile_tops(const float* x, F (&tops)[kGroup]) {
  NanWatch nan;
  RK_EACH tops[k] = splat(-kInf);
  for (int64_t i = 0; i < kTile; i += kGroup * kLanes) {
    F v[kGroup];
    load(x + i, v);
    RK_EACH keep(v[k]);
    nan.see(v);
    RK_EACH tops[k] = max(v[k], tops[k]);
  }
  return nan.saw();
}

// What the sum of a tile of next to no weight is taken for, over 2^octaves: it is between the sum
// of its lanes' largest and that of as many of them as there are tokens, so this is at most kCoarse
// of itself wrong. exp is the float whose bits are linear in the exponent (Schraudolph, Neural
// Computation 11, 1999).
constexpr double kCoarse = 3.2;

RK_INLINE double coarse_sum(const F (&tops)[kGroup], float octaves) {
  constexpr int kTokens = kTile / (kGroup * kLanes);  // of a lane
  constexpr float kSlope = 12102203.2f;               // 2^23 / ln 2
  const F at_zero = splat((127 + 32 - octaves) * 0x1p23f);
  F sum = {};
  RK_EACH {
    const I bits = __builtin_convertvector(fma(tops[k], splat(kSlope), at_zero), I);
    sum += F(bits > 0 ? bits : I{});  // what is too small converts to negative ones
  }
  return double(sum_lanes(sum)) * (kTokens / 4 / double(kExpScale));
}

// x = ln2 (octaves - n / kSteps) + r with a whole number n: a table has the powers of two, and of
// exp(r) a short polynomial suffices. kPowers[j] is the bits of kExpScale 2^(-j / kSteps), plus j
// in the lowest places of the exponent, where n takes it away again.
#if RK_SIMD == 4
constexpr int kSteps = 32, kStepShift = 18;
constexpr uint32_t kPowers[32] = {
    0x4f800000, 0x4f7e83b3, 0x4f7d257d, 0x4f7be4ba, 0x4f7ac0c7, 0x4f79b907, 0x4f78ccdf, 0x4f77fbb8,
    0x4f7744fd, 0x4f76a81e, 0x4f76248c, 0x4f75b9be, 0x4f75672a, 0x4f752c4d, 0x4f7508a4, 0x4f74fbaf,
    0x4f7504f3, 0x4f7523f6, 0x4f75583f, 0x4f75a15b, 0x4f75fed7, 0x4f767043, 0x4f76f532, 0x4f778d3a,
    0x4f7837f0, 0x4f78f4f0, 0x4f79c3d3, 0x4f7aa43a, 0x4f7b95c2, 0x4f7c980f, 0x4f7daac3, 0x4f7ecd87};
#elif RK_SIMD == 3
constexpr int kSteps = 8, kStepShift = 20;
constexpr uint32_t kPowers[8] = {0x4f800000, 0x4f7ac0c7, 0x4f7744fd, 0x4f75672a,
                                 0x4f7504f3, 0x4f75fed7, 0x4f7837f0, 0x4f7b95c2};
#else
constexpr int kSteps = 1, kStepShift = 23;
constexpr uint32_t kPowers[1] = {0x4f800000};
#endif

RK_INLINE F power_down(U n) {  // only the lowest bits of n choose the entry
#if RK_SIMD == 4
  const __m512i low = _mm512_loadu_si512(kPowers), high = _mm512_loadu_si512(kPowers + 16);
  const U entry = U(_mm512_permutex2var_epi32(low, __m512i(n), high));
#elif RK_SIMD == 3
  const __m256i table = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(kPowers));
  const U entry = U(_mm256_permutevar8x32_epi32(table, __m256i(n)));
#else
  const U entry = splat(kPowers[0]);
#endif
  return F(entry - (n << kStepShift));
}

// Adds exp(v) / kExpUnit of a group over 2^octaves, n being kShift + octaves - v / ln 2 rounded to
// steps, which leaves |r| <= ln2 / 2 kSteps. Two of AVX-512's ports multiply and bound this loop:
// there the polynomial is one square, of r + 1.4375 ln2 (1 would be best; a whole number of steps
// is free), 2.3 ulp wrong.
constexpr float kShift = 12582912.0f / kSteps;  // adding it rounds to steps, which the bits count

RK_INLINE void add_exp(const F (&v)[kGroup], const F (&n)[kGroup], F start, F (&sum)[kGroup]) {
  F r[kGroup], p[kGroup];
#if RK_SIMD == 4
  RK_EACH r[k] = fma(n[k] - (start - 1.4375f), splat(0.693147182f), v[k]);
  RK_EACH p[k] = fma(r[k], r[k], splat(0.999944985f));
#else
#if RK_SIMD == 3
  RK_EACH r[k] = fma(n[k] - start, splat(0.693147182f), v[k]);
#else
  RK_EACH r[k] = fma(n[k] - start, splat(0.693359375f), v[k]);  // nine bits: an exact product
  RK_EACH r[k] = fma(n[k] - start, splat(-2.12194440e-4f), r[k]);
#endif
  exp_series(r, p);
  RK_EACH p[k] = fma(p[k], r[k], splat(1.0f));
#endif
  RK_EACH sum[k] = fma(power_down(U(n[k])), p[k], sum[k]);
}
#if RK_SIMD == 4
constexpr double kExpUnit = 0.5018175135 / double(kExpScale);
#else
constexpr double kExpUnit = 1 / double(kExpScale);
#endif

// Tokens to a sum in single precision: an accumulator takes no more than 16 addends.
constexpr int64_t kBlock = 16 * kGroup * kLanes;

// Sum of exp(x) over a tile and over 2^octaves, at most 5 ulp wrong a token, and the tile's largest
// value `top`; NaN where a value is NaN or not within kOctaves below 2^octaves.
constexpr int kOctaves = 128;

RK_INLINE double tile_sum(const float* x, float octaves, float& top) {
  const F start = splat(kShift + octaves);
  F tops[kGroup];
  U seen = {};
  RK_EACH tops[k] = splat(-kInf);
  double total = 0;
  for (int64_t block = 0; block < kTile; block += kBlock) {
    F sum[kGroup] = {};
    for (int64_t i = block; i < block + kBlock; i += kGroup * kLanes) {
      F v[kGroup], n[kGroup];
      load(x + i, v);
      RK_EACH keep(v[k]);
      RK_EACH tops[k] = max(v[k], tops[k]);
      RK_EACH n[k] = fma(v[k], splat(-1.44269504f), start);
      seen |= (U(n[0]) | U(n[1])) | (U(n[2]) | U(n[3]));
      add_exp(v, n, start, sum);
    }
    total += sum_lanes((sum[0] + sum[1]) + (sum[2] + sum[3]));
  }
  top = largest(tops);
  const U within = U(splat(kShift)) | uint32_t(kOctaves * kSteps - 1);
  return any(I(seen & ~within) != 0) ? __builtin_nan("") : total * kExpUnit;
}

// Sums of exp(d) and exp(d) d, times kExpScale, lane by lane.
struct MomentSums {
  F s[kGroup] = {}, u[kGroup] = {};

  RK_INLINE void add(const F (&d)[kGroup], const F (&e)[kGroup]) {
    RK_EACH s[k] = s[k] + e[k];
    RK_EACH u[k] = fma(e[k], d[k], u[k]);
  }

  RK_INLINE void add_to(double* sum, double* product) const {
    *sum += sum_lanes((s[0] + s[1]) + (s[2] + s[3])) * (1.0 / double(kExpScale));
    *product += sum_lanes((u[0] + u[1]) + (u[2] + u[3])) * (1.0 / double(kExpScale));
  }
};

// Moments of a tile whose largest value is `top`.
static void tile_moments(const float* x, float top, double* s, double* u) {
  *s = *u = 0;
  for (int64_t block = 0; block < kTile; block += kBlock) {
    MomentSums sums;
    for (int64_t i = block; i < block + kBlock; i += kGroup * kLanes) {
      F d[kGroup], e[kGroup];
      load(x + i, d);
      RK_EACH d[k] = max(splat(kExpZero), d[k] - splat(top));
      scaled_exp(d, e);
      sums.add(d, e);
    }
    sums.add_to(s, u);
  }
}

// The sum of a tile above -inf whose lanes' largest values are `tops`, as ExpSum has it: coarse if
// that is no more than `little` of the sum so far, otherwise to 1.2 ulp a token.
RK_INLINE double other_tile_sum(const float* x, const F (&tops)[kGroup], float top, bool coarse,
                                double little, ExpSum& sum) {
  if (coarse && sum.steady && top <= sum.limit) {
    const double part = coarse_sum(tops, sum.octaves);
    if (part <= little * sum.value) return part;
  }
  if (!(top <= sum.limit)) sum.raise(top);
  double part, product;
  tile_moments(x, top, &part, &product);
  return part * exponential(double(top) - sum.base);
}

// The largest value of each tile; returns that of all, NaN when one is NaN or +inf. With `sum`,
// also the sum of their exponentials, in the same sweep: coarsely after a tile that weighed little,
// fast elsewhere. A tile for which that was wrong, or that weighs more than all before it, is
// summed again while it is at hand, to 1.2 ulp a token.
static float tile_maxima(const float* x, int64_t n, float* maxima, ExpSum* sum) {
  // Coarse sums of all tiles that weigh so little leave the sum within 2^-24, and that of a row,
  // whose unfinished last tile is measured by itself, within 2^-23.
  const double little = 0x1p-24 / kCoarse * double(kTile) / double(n);
  bool bad = false, coarse = true, fast = true;
  float all = -kInf;
  for (int64_t at = 0; at < n; at += kTile) {
    float& top = maxima[at / kTile];
    double part = __builtin_nan("");
    const bool try_fast = sum != nullptr && sum->steady && fast && !coarse;
    if (try_fast) part = tile_sum(x + at, sum->octaves, top);
    if (!(try_fast && part <= sum->value && top <= sum->limit)) {
      F tops[kGroup];
      bad |= tile_tops(x + at, tops);
      top = largest(tops);
      if (sum != nullptr && top > -kInf) {
        if (try_fast && part != part) fast = !(top <= sum->limit);  // others are as far below
        part = other_tile_sum(x + at, tops, top, coarse, little, *sum);
      } else {
        part = 0;
      }
    }
    all = top > all ? top : all;
    if (sum == nullptr) continue;
    sum->value += part;
    // Behind the first tile nothing is known: a look costs little.
    coarse = part == sum->value || part <= little * sum->value;
  }
  return bad || !(all < kInf) ? __builtin_nanf("") : all;
}
