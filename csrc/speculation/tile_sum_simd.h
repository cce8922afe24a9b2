// The largest value of each tile of a row and, in the same sweep, sum exp(x - top). Included once per
// instruction set by cpu_row_simd.h, under the rules of common/simd.h.

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

// The largest value of a tile; `bad`: one is NaN or +inf.
RK_INLINE float tile_maximum(const float* x, bool& bad) {
  F tops[kGroup];
  NanWatch nan;
  RK_EACH tops[k] = splat(-kInf);
  for (int64_t i = 0; i < kTile; i += kGroup * kLanes) {
    F v[kGroup];
    load(x + i, v);
    RK_EACH keep(v[k]);
    nan.see(v);
    RK_EACH tops[k] = max(v[k], tops[k]);
  }
  const float top = max_lane(max(max(tops[0], tops[1]), max(tops[2], tops[3])));
  bad |= nan.saw() | !(top < kInf);
  return top;
}

// x = ln2 (octaves - n / kSteps) + r with a whole number n: a table has the powers of two, and of
// exp(r) a short polynomial suffices. kPowers[j] is the bits of kExpScale 2^(-j / kSteps), plus j in
// the lowest places of the exponent, where n takes it away again. Exact are kOctaves below 2^octaves.
constexpr int kOctaves = 128;
#if RK_SIMD == 4
constexpr int kSteps = 32, kStepShift = 18;
constexpr double kExpUnit = 0.5018175135;
constexpr uint32_t kPowers[32] = {
    0x4f800000, 0x4f7e83b3, 0x4f7d257d, 0x4f7be4ba, 0x4f7ac0c7, 0x4f79b907, 0x4f78ccdf, 0x4f77fbb8,
    0x4f7744fd, 0x4f76a81e, 0x4f76248c, 0x4f75b9be, 0x4f75672a, 0x4f752c4d, 0x4f7508a4, 0x4f74fbaf,
    0x4f7504f3, 0x4f7523f6, 0x4f75583f, 0x4f75a15b, 0x4f75fed7, 0x4f767043, 0x4f76f532, 0x4f778d3a,
    0x4f7837f0, 0x4f78f4f0, 0x4f79c3d3, 0x4f7aa43a, 0x4f7b95c2, 0x4f7c980f, 0x4f7daac3, 0x4f7ecd87};
#elif RK_SIMD == 3
constexpr int kSteps = 8, kStepShift = 20;
constexpr double kExpUnit = 1;
constexpr uint32_t kPowers[8] = {0x4f800000, 0x4f7ac0c7, 0x4f7744fd, 0x4f75672a,
                                 0x4f7504f3, 0x4f75fed7, 0x4f7837f0, 0x4f7b95c2};
#else
constexpr int kSteps = 1, kStepShift = 23;
constexpr double kExpUnit = 1;
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

// Sum of exp(x - offset) over a tile, times kExpScale / 2^octaves, at most 4 ulp wrong a token, and
// the tile's largest value `top`; NaN where a value is NaN or not within kOctaves below
// 2^octaves. With `clamp` values far below the offset count as exp(-88), and only NaN gives NaN.
RK_INLINE double tile_sum(const float* x, float offset, float octaves, bool clamp, float& top) {
  constexpr int64_t kBlock = 16 * kGroup * kLanes;  // few enough for sums in single precision
  constexpr float kShift = 12582912.0f / kSteps;    // adding it rounds n, which the lowest bits show
  const F start = splat(kShift + octaves);
  F tops[kGroup];
  U seen = {};
  RK_EACH tops[k] = splat(-kInf);
  double total = 0;
  for (int64_t block = 0; block < kTile; block += kBlock) {
    F sum[kGroup] = {};
    for (int64_t i = block; i < block + kBlock; i += kGroup * kLanes) {
      F v[kGroup], n[kGroup], r[kGroup], p[kGroup];
      load(x + i, v);
      RK_EACH keep(v[k]);
      RK_EACH tops[k] = max(v[k], tops[k]);
      if (clamp) RK_EACH v[k] = max(splat(-88.0f), v[k] - splat(offset));
      RK_EACH n[k] = fma(v[k], splat(-1.44269504f), start);
      seen |= (U(n[0]) | U(n[1])) | (U(n[2]) | U(n[3]));
#if RK_SIMD == 4
      RK_EACH r[k] = fma(n[k] - (start - 1.4375f), splat(0.693147182f), v[k]);
      RK_EACH p[k] = fma(r[k], r[k], splat(0.999944985f));
#elif RK_SIMD == 3
      RK_EACH r[k] = fma(n[k] - start, splat(0.693147182f), v[k]);
      exp_series(r, p);
      RK_EACH p[k] = fma(p[k], r[k], splat(1.0f));
#else
      RK_EACH r[k] = n[k] - start;
      RK_EACH v[k] = fma(r[k], splat(0.693359375f), v[k]);  // nine bits: the product is exact
      RK_EACH r[k] = fma(r[k], splat(-2.12194440e-4f), v[k]);
      exp_series(r, p);
      RK_EACH p[k] = fma(p[k], r[k], splat(1.0f));
#endif
      RK_EACH sum[k] = fma(power_down(U(n[k])), p[k], sum[k]);
    }
    total += sum_lanes((sum[0] + sum[1]) + (sum[2] + sum[3]));
  }
  top = max_lane(max(max(tops[0], tops[1]), max(tops[2], tops[3])));
  const U within = U(splat(kShift)) | uint32_t(kOctaves * kSteps - 1);
  return any(I(seen & ~within) != 0) ? __builtin_nan("") : total * kExpUnit;
}

// The sum of a tile of next to no weight, at most kCoarse of it wrong, for top <= from and
// |from| < kSteady: 2.5 times that of the largest of every four tokens, with exp as the float whose
// bits are linear in the exponent (Schraudolph, Neural Computation 11, 1999). NaN where x has one.
constexpr float kCoarse = 0.66f, kSteady = 0x1p15f;

RK_INLINE double coarse_tile_sum(const float* x, float from, float& top) {
  constexpr float kSlope = 12102203.2f;                     // 2^23 / ln 2
  constexpr float kAtZero = (127 + 32) * 0x1p23f - 366393;  // 2^32, less what centres the error
  const F slope = splat(kSlope), at_zero = splat(kAtZero - from * kSlope);
  F sum = {}, tops = splat(-kInf);
  NanWatch nan;
  for (int64_t i = 0; i < kTile; i += kGroup * kLanes) {
    F v[kGroup];
    load(x + i, v);
    RK_EACH keep(v[k]);
    nan.see(v);
    const F largest = max(max(v[0], v[1]), max(v[2], v[3]));
    tops = max(largest, tops);
    I bits = __builtin_convertvector(fma(largest, slope, at_zero), I);
    bits = bits > 0 ? bits : I{};  // what is too small converts to negative ones
    sum += F(bits);
  }
  top = max_lane(tops);
  return nan.saw() ? __builtin_nan("") : 2.5f * sum_lanes(sum);
}

// The largest value of each tile; false when one is NaN or +inf. With `sum`, also sum exp(x - top),
// in the same sweep: relative to the largest value so far, and coarsely after a tile that weighed
// little. A tile for which that was wrong is swept again while it is at hand.
static bool tile_maxima(const float* x, int64_t n, float* maxima, ExpSum* sum) {
  // Coarse sums of all tiles that weigh so little make a sum above 1 less than 2^-23 wrong.
  const double little = double(kExpScale) * (0x1p-23 / double(kCoarse)) * double(kTile) / double(n);
  bool coarse = false, clamp = false, bad = false;
  for (int64_t at = 0; at < n; at += kTile) {
    float& top = maxima[at / kTile];
    if (sum == nullptr) {
      top = tile_maximum(x + at, bad);
      continue;
    }
    double part;
    if (coarse) {
      part = coarse_tile_sum(x + at, sum->top, top);
    } else if (clamp) {
      part = tile_sum(x + at, sum->top, 0, true, top);
    } else {
      part = tile_sum(x + at, 0, sum->octaves, false, top) * sum->unit;
    }
    if (!(top <= sum->top && part <= (coarse ? little : part))) {  // NaN is not <= itself
      clamp |= !coarse && top <= sum->top;
      top = tile_maximum(x + at, bad);
      if (!(top > -kInf)) continue;
      if (top > sum->top) sum->raise(top);
      clamp |= !(__builtin_fabsf(sum->top) < kSteady);
      part = tile_sum(x + at, sum->top, 0, true, top);
    }
    sum->value += part * (1.0 / double(kExpScale));
    coarse = part <= little && __builtin_fabsf(sum->top) < kSteady;
  }
  return !bad;
}
