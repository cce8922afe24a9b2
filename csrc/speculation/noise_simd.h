// noise_math.h over lanes, and the products that Philox takes. Included once per instruction set by
// cpu_row_simd.h and cpu_table_simd.h, under the rules of common/simd.h: no include guard, no
// includes of system headers.

typedef int32_t I __attribute__((vector_size(sizeof(U))));

#define RK_FN RK_INLINE
RK_FN F mul(F a, F b) { return a * b; }
RK_FN F add(F a, F b) { return a + b; }
RK_FN F from_word(U word) { return __builtin_convertvector(word, F); }
RK_FN F to_float(I n) { return __builtin_convertvector(n, F); }
RK_FN U word_of(F x) { return U(x); }
RK_FN F float_of(U x) { return F(x); }
RK_FN I signed_of(U x) { return I(x); }
RK_FN U unsigned_of(I x) { return U(x); }
RK_FN F select(I mask, F yes, F no) { return select(U(mask), yes, no); }
RK_FN U select(I mask, U yes, U no) { return (U(mask) & yes) | (~U(mask) & no); }
#include "noise_math.h"
#undef RK_FN

typedef uint64_t W __attribute__((vector_size(sizeof(U))));

// Products of the low halves of 64-bit lanes.
RK_INLINE W multiply_low(W a, W b) {
#if RK_SIMD == 4
  return W(_mm512_maskz_mul_epu32(0xff, __m512i(a), __m512i(b)));
#elif RK_SIMD == 3
  return W(_mm256_mul_epu32(__m256i(a), __m256i(b)));
#elif defined(__SSE2__)
  return W(_mm_mul_epu32(__m128i(a), __m128i(b)));
#else
  return (a & 0xffffffffu) * (b & 0xffffffffu);
#endif
}
