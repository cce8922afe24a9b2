// noise_math.h over lanes. Included once per instruction set by cpu_row_simd.h and
// cpu_table_simd.h, under the rules of common/simd.h: no include guard, no includes of system
// headers.

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
