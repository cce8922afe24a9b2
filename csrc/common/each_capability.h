// Compiles the file RK_KERNELS, a path as seen from here, for every instruction set: namespace
// baseline, and v3 and v4 on x86-64. Included inside the namespace that is to hold them.

namespace baseline {
#define RK_SIMD 0
#include "simd.h"
#include "simd_math.h"
#include RK_KERNELS
#undef RK_SIMD
}  // namespace baseline

#if defined(__x86_64__)

#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx2,fma,f16c"))), apply_to = function)
#else
#pragma GCC push_options
#pragma GCC target("avx2,fma,f16c")
#endif
namespace v3 {
#define RK_SIMD 3
#include "simd.h"
#include "simd_math.h"
#include RK_KERNELS
#undef RK_SIMD
}  // namespace v3
#if defined(__clang__)
#pragma clang attribute pop
#pragma clang attribute push(__attribute__((target("avx512f,avx512bw,avx512dq,avx512vl"))), \
                             apply_to = function)
#else
#pragma GCC pop_options
#pragma GCC push_options
#pragma GCC target("avx512f,avx512bw,avx512dq,avx512vl,avx2,fma,f16c")
#endif
namespace v4 {
#define RK_SIMD 4
#include "simd.h"
#include "simd_math.h"
#include RK_KERNELS
#undef RK_SIMD
}  // namespace v4
#if defined(__clang__)
#pragma clang attribute pop
#else
#pragma GCC pop_options
#endif

#endif  // __x86_64__

#undef RK_KERNELS
