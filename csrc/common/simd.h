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
constexpr int kLanes = RK_SIMD_BYTES / 4;

// Loops handle vectors in groups, one step for the whole group before the next step: a dependent
// chain of 60 cycles fills the processor's scheduler before it finds the next vector's chain.
constexpr int kGroup = 4;
#define RK_EACH for (int k = 0; k < kGroup; ++k)

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
#elif defined(__SSE2__)
  return _mm_max_ps(a, b);
#else
  return a > b ? a : b;
#endif
}

RK_INLINE F select(U mask, F yes, F no) { return F((mask & U(yes)) | (~mask & U(no))); }

RK_INLINE float first_lane(F x) { return x[0]; }

RK_INLINE F load_one(const float* p) {
  F x;
  __builtin_memcpy(&x, p, sizeof x);
  return x;
}

RK_INLINE void store_one(float* p, F x) { __builtin_memcpy(p, &x, sizeof x); }

// Not loops: GCC 12 would make them calls of memcpy through the stack.
RK_INLINE void load(const float* p, F (&x)[kGroup]) {
  x[0] = load_one(p);
  x[1] = load_one(p + kLanes);
  x[2] = load_one(p + 2 * kLanes);
  x[3] = load_one(p + 3 * kLanes);
}

RK_INLINE void store(float* p, const F (&x)[kGroup]) {
  store_one(p, x[0]);
  store_one(p + kLanes, x[1]);
  store_one(p + 2 * kLanes, x[2]);
  store_one(p + 3 * kLanes, x[3]);
}

// Two bfloat16 to a 32-bit word: even elements go to one vector, odd ones to the next. No result
// depends on which lane an element is in.
RK_INLINE void load(const BFloat16* p, F (&x)[kGroup]) {
  for (int k = 0; k < kGroup; k += 2) {
    U words;
    __builtin_memcpy(&words, p + k * kLanes, sizeof words);
    x[k] = F(words << 16);
    x[k + 1] = F(words & 0xffff0000u);
  }
}

// Nearest even in the upper half. The NaNs that arithmetic makes stay NaN: their lower half is 0.
RK_INLINE U rounded_to_bfloat16(F x) { return U(x) + 0x7fffu + ((U(x) >> 16) & 1u); }

RK_INLINE void store(BFloat16* p, const F (&x)[kGroup]) {
  for (int k = 0; k < kGroup; k += 2) {
    const U words =
        (rounded_to_bfloat16(x[k]) >> 16) | (rounded_to_bfloat16(x[k + 1]) & 0xffff0000u);
    __builtin_memcpy(p + k * kLanes, &words, sizeof words);
  }
}

RK_INLINE void load(const Half* p, F (&x)[kGroup]) {
  for (int k = 0; k < kGroup; ++k, p += kLanes) {
#if RK_SIMD == 4
    x[k] = _mm512_maskz_cvtph_ps(kAll, _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)));
#elif RK_SIMD == 3
    x[k] = _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
#else
    float lanes[kLanes];
    for (int lane = 0; lane < kLanes; ++lane) lanes[lane] = static_cast<float>(p[lane]);
    x[k] = load_one(lanes);
#endif
  }
}

RK_INLINE void store(Half* p, const F (&x)[kGroup]) {
  for (int k = 0; k < kGroup; ++k, p += kLanes) {
#if RK_SIMD == 4
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(p),
                        _mm512_maskz_cvtps_ph(kAll, x[k], _MM_FROUND_TO_NEAREST_INT));
#elif RK_SIMD == 3
    _mm_storeu_si128(reinterpret_cast<__m128i*>(p),
                     _mm256_cvtps_ph(x[k], _MM_FROUND_TO_NEAREST_INT));
#else
    float lanes[kLanes];
    store_one(lanes, x[k]);
    for (int lane = 0; lane < kLanes; ++lane) p[lane] = static_cast<Half>(lanes[lane]);
#endif
  }
}

// Doubles go one by one: float64 logits are for gradient checks, not for speed.
RK_INLINE double splat(double x) { return x; }
RK_INLINE double fma(double a, double b, double c) { return a * b + c; }
RK_INLINE double max(double a, double b) { return a > b ? a : b; }
RK_INLINE void store_one(double* p, double x) { *p = x; }
RK_INLINE double first_lane(double x) { return x; }
RK_INLINE void load(const double* p, double (&x)[kGroup]) {
  x[0] = p[0], x[1] = p[1], x[2] = p[2], x[3] = p[3];
}
RK_INLINE void store(double* p, const double (&x)[kGroup]) {
  p[0] = x[0], p[1] = x[1], p[2] = x[2], p[3] = x[3];
}

#undef RK_SIMD_BYTES
