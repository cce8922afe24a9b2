// exp and tanh of groups of vectors; included after simd.h, under the same rules.

// The exponentials of a row come multiplied by 2^32, which keeps them normal numbers down to the
// smallest denormal: no slow arithmetic, no rounding to 0. Callers undo it once per row.
constexpr float kExpScale = 0x1p32f;
constexpr float kExpZero = -110.210403f;  // -159 ln 2, where the exponent's bits run out: exp is 0

// exp(d) = 2^n exp(r), r = d - n ln 2, with n rounded to a multiple of 1 / kExpSteps so that a
// short polynomial suffices for exp(r): 1 + r + kExp2 r^2 + kExp3 r^3. kExpTable has kExpScale 2^(j
// / kExpSteps) as bits, less j in the lowest places of the exponent, where the steps of n add it
// again.
#if RK_SIMD == 4
constexpr int kExpSteps = 16, kExpShift = 19;
constexpr float kExp2 = 0.500016212f, kExp3 = 0.166667178f;
constexpr uint32_t kExpTable[16] = {
    0x4f800000, 0x4f7daac3, 0x4f7b95c2, 0x4f79c3d3, 0x4f7837f0, 0x4f76f532, 0x4f75fed7, 0x4f75583f,
    0x4f7504f3, 0x4f7508a4, 0x4f75672a, 0x4f76248c, 0x4f7744fd, 0x4f78ccdf, 0x4f7ac0c7, 0x4f7d257d};
#elif RK_SIMD == 3
constexpr int kExpSteps = 8, kExpShift = 20;
constexpr float kExp2 = 0.500064611f, kExp3 = 0.166668594f;
constexpr uint32_t kExpTable[8] = {0x4f800000, 0x4f7b95c2, 0x4f7837f0, 0x4f75fed7,
                                   0x4f7504f3, 0x4f75672a, 0x4f7744fd, 0x4f7ac0c7};
#else
constexpr int kExpSteps = 1, kExpShift = 23;
constexpr uint32_t kExpTable[1] = {0x4f800000};
#endif

RK_INLINE F scaled_power_of_two(U steps) {  // only the lowest bits of `steps` choose the entry
#if RK_SIMD == 4
  const __m512i table = _mm512_loadu_si512(kExpTable);
  const U entry = U(_mm512_maskz_permutexvar_epi32(kAll, __m512i(steps), table));
#elif RK_SIMD == 3
  const __m256i table = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(kExpTable));
  const U entry = U(_mm256_permutevar8x32_epi32(table, __m256i(steps)));
#else
  const U entry = splat(kExpTable[0]);
#endif
  return F(entry + (steps << kExpShift));
}

// p where exp(r) = 1 + p r.
RK_INLINE void exp_series(const F (&r)[kGroup], F (&p)[kGroup]) {
#if RK_SIMD == 0
  RK_EACH p[k] = fma(splat(0.00138145406f), r[k], splat(0.00836874545f));
  RK_EACH p[k] = fma(p[k], r[k], splat(0.041668389f));
  RK_EACH p[k] = fma(p[k], r[k], splat(0.166665211f));
  RK_EACH p[k] = fma(p[k], r[k], splat(0.49999994f));
#else
  RK_EACH p[k] = fma(splat(kExp3), r[k], splat(kExp2));
#endif
  RK_EACH p[k] = fma(p[k], r[k], splat(1.0f));
}

// kExpScale exp(d) for d in [kExpZero, 20], at most 1.2 ulp wrong; exact at 0 and at kExpZero; NaN
// stays NaN.
RK_INLINE void scaled_exp(const F (&d)[kGroup], F (&e)[kGroup]) {
  // Adding `shift` rounds n to a multiple of 1 / kExpSteps and leaves its steps in the lowest bits.
  const F shift = splat(12582912.0f / kExpSteps);
  F power[kGroup], n[kGroup], r[kGroup], p[kGroup];
  RK_EACH power[k] = fma(d[k], splat(1.44269504f), shift);
  RK_EACH n[k] = power[k] - shift;
  RK_EACH r[k] = fma(n[k], splat(-0.693359375f), d[k]);  // nine bits: n times it is exact
  RK_EACH r[k] = fma(n[k], splat(2.12194440e-4f), r[k]);
  exp_series(r, p);
  RK_EACH power[k] = scaled_power_of_two(U(power[k]));
  RK_EACH p[k] = p[k] * r[k];
  RK_EACH e[k] = fma(power[k], p[k], power[k]);
}

// At most 1.2 ulp wrong: an odd polynomial below 1, 1 - 2 / (1 + exp(2|x|)) above.
RK_INLINE void tanh(const F (&x)[kGroup], F (&y)[kGroup]) {
  F t[kGroup], p[kGroup], d[kGroup], e[kGroup];
  RK_EACH t[k] = x[k] * x[k];
  RK_EACH p[k] = fma(splat(0.000121469951f), t[k], splat(-0.000841134344f));
  RK_EACH p[k] = fma(p[k], t[k], splat(0.00307859015f));
  RK_EACH p[k] = fma(p[k], t[k], splat(-0.00859511178f));
  RK_EACH p[k] = fma(p[k], t[k], splat(0.0217847303f));
  RK_EACH p[k] = fma(p[k], t[k], splat(-0.0539531f));
  RK_EACH p[k] = fma(p[k], t[k], splat(0.133331999f));
  RK_EACH p[k] = fma(p[k], t[k], splat(-0.333333284f));
  RK_EACH p[k] = fma(p[k] * t[k], x[k], x[k]);
  RK_EACH d[k] = max(splat(kExpZero), -2.0f * F(U(x[k]) & 0x7fffffffu));
  scaled_exp(d, e);
  RK_EACH e[k] = e[k] * (1.0f / kExpScale);
  RK_EACH e[k] = 1.0f - 2.0f * e[k] / (1.0f + e[k]);
  RK_EACH e[k] = F(U(e[k]) | (U(x[k]) & 0x80000000u));
  RK_EACH y[k] = select(U(t[k] < splat(1.0f)), p[k], e[k]);
}

RK_INLINE void scaled_exp(const double (&d)[kGroup], double (&e)[kGroup]) {
  RK_EACH e[k] = __builtin_exp(d[k]);
}

RK_INLINE void tanh(const double (&x)[kGroup], double (&y)[kGroup]) {
  RK_EACH y[k] = __builtin_tanh(x[k]);
}
