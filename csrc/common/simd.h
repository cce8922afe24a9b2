// Vectors of floats for one instruction set. Included once per instruction set, inside that set's
// namespace and target region, with RK_SIMD set to 4 (AVX-512), 3 (AVX2, FMA, F16C) or 0 (whatever
// the compiler's default is: SSE2 on x86-64, NEON on AArch64). Hence no include guard, no includes,
// and nothing here may instantiate a template of another header: that copy would be shared with
// code that runs on older processors.

#if RK_SIMD == 4
#define RK_SIMD_BYTES 64
#elif RK_SIMD == 3
#define RK_SIMD_BYTES 32
#else
#define RK_SIMD_BYTES 16
#endif

typedef float F __attribute__((vector_size(RK_SIMD_BYTES)));
typedef uint32_t U __attribute__((vector_size(RK_SIMD_BYTES)));
typedef uint16_t Narrow __attribute__((vector_size(RK_SIMD_BYTES / 2)));
constexpr int kLanes = RK_SIMD_BYTES / 4;
#if RK_SIMD == 4
// GCC 12 warns about its own unmasked intrinsics; a full mask leaves no trace in the code.
constexpr __mmask16 kAll = 0xffff;
#endif

RK_INLINE F splat(float x) { return x - F{}; }  // exact for every x, signed zeros included
RK_INLINE U splat(uint32_t x) { return x - U{}; }

RK_INLINE F fma(F a, F b, F c) {
#if RK_SIMD == 4
  return _mm512_fmadd_ps(a, b, c);
#elif RK_SIMD == 3
  return _mm256_fmadd_ps(a, b, c);
#elif defined(__aarch64__)
  return vfmaq_f32(c, a, b);
#else
  return a * b + c;
#endif
}

// b when either is NaN.
RK_INLINE F max(F a, F b) {
#if RK_SIMD == 4
  return _mm512_maskz_max_ps(kAll, a, b);
#elif RK_SIMD == 3
  return _mm256_max_ps(a, b);
#else
  return a > b ? a : b;
#endif
}

RK_INLINE F select(U mask, F yes, F no) { return F((mask & U(yes)) | (~mask & U(no))); }

RK_INLINE F load(const float* p) {
  F x;
  __builtin_memcpy(&x, p, sizeof x);
  return x;
}

RK_INLINE void store(float* p, F x) { __builtin_memcpy(p, &x, sizeof x); }

RK_INLINE F load(const BFloat16* p) {
  Narrow bits;
  __builtin_memcpy(&bits, p, sizeof bits);
  return F(__builtin_convertvector(bits, U) << 16);
}

// Round to nearest even. The NaNs that arithmetic makes stay NaN: their low half is empty.
RK_INLINE void store(BFloat16* p, F x) {
  const U bits = U(x);
  const U rounded = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;
  const Narrow narrow = __builtin_convertvector(rounded, Narrow);
  __builtin_memcpy(p, &narrow, sizeof narrow);
}

RK_INLINE F load(const Half* p) {
#if RK_SIMD == 4
  return _mm512_maskz_cvtph_ps(kAll, _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)));
#elif RK_SIMD == 3
  return _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
#else
  F x;
  for (int k = 0; k < kLanes; ++k) x[k] = static_cast<float>(p[k]);
  return x;
#endif
}

RK_INLINE void store(Half* p, F x) {
#if RK_SIMD == 4
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(p),
                      _mm512_maskz_cvtps_ph(kAll, x, _MM_FROUND_TO_NEAREST_INT));
#elif RK_SIMD == 3
  _mm_storeu_si128(reinterpret_cast<__m128i*>(p), _mm256_cvtps_ph(x, _MM_FROUND_TO_NEAREST_INT));
#else
  for (int k = 0; k < kLanes; ++k) p[k] = static_cast<Half>(x[k]);
#endif
}

// exp for d in [-104, 0.3], at most 1.1 ulp wrong; exactly 1 at 0 and 0 at -104; NaN stays NaN.
// exp(d) = 2^n exp(r) with n = round(d / ln 2), found in the low bits of d / ln 2 + 1.5 * 2^23.
RK_INLINE F exp(F d) {
  const F shift = splat(12582912.0f);
  const F shifted = fma(d, splat(1.44269504f), shift);
  const F n = shifted - shift;
  F r = fma(n, splat(-0.693359375f), d);  // nine bits: n times it is exact
  r = fma(n, splat(2.12194440e-4f), r);
  F p = fma(splat(0.00138145406f), r, splat(0.00836874545f));
  p = fma(p, r, splat(0.041668389f));
  p = fma(p, r, splat(0.166665211f));
  p = fma(p, r, splat(0.49999994f));
  p = fma(p, r, splat(1.0f));
  p = fma(p, r, splat(1.0f));
#if RK_SIMD == 4
  return _mm512_maskz_scalef_ps(kAll, p, n);
#else
  // n is at least -150: 2^(n + 64) is a normal number, and the last factor rounds only once.
  return p * F((U(shifted) << 23) + ((127u + 64u) << 23)) * splat(0x1p-64f);
#endif
}

// At most 2 ulp wrong: an odd polynomial near 0, 1 - 2 / (1 + exp(2|x|)) elsewhere.
RK_INLINE F tanh(F x) {
  const F magnitude = F(U(x) & 0x7fffffffu);
  const F t = x * x;
  F p = fma(splat(-0.00627420424f), t, splat(0.0210716557f));
  p = fma(p, t, splat(-0.0538523048f));
  p = fma(p, t, splat(0.13332586f));
  p = fma(p, t, splat(-0.333333164f));
  const F near_zero = fma(p * t, x, x);
  const F e = exp(max(splat(-104.0f), -2.0f * magnitude));
  const F far = 1.0f - 2.0f * e / (1.0f + e);
  return select(U(magnitude < splat(0.55f)), near_zero, F(U(far) | (U(x) & 0x80000000u)));
}

// Doubles go one by one: float64 logits are for gradient checks, not for speed.
RK_INLINE double splat(double x) { return x; }
RK_INLINE double fma(double a, double b, double c) { return a * b + c; }
RK_INLINE double max(double a, double b) { return a > b ? a : b; }
RK_INLINE double load(const double* p) { return *p; }
RK_INLINE void store(double* p, double x) { *p = x; }
RK_INLINE double exp(double d) { return __builtin_exp(d); }
RK_INLINE double tanh(double x) { return __builtin_tanh(x); }

#undef RK_SIMD_BYTES
