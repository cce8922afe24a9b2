// The kernels of cpu_table_simd.h for the instruction set of this processor.
#pragma once

#include "../common/cpu_capability.h"
#include "table.h"

namespace reasonkern {
namespace cpu {

namespace table_baseline {
#define RK_SIMD 0
#include "../common/simd.h"
#include "cpu_table_simd.h"
#undef RK_SIMD
}  // namespace table_baseline

#if defined(__x86_64__)
#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx2,fma,f16c"))), apply_to = function)
#else
#pragma GCC push_options
#pragma GCC target("avx2,fma,f16c")
#endif
namespace table_v3 {
#define RK_SIMD 3
#include "../common/simd.h"
#include "cpu_table_simd.h"
#undef RK_SIMD
}  // namespace table_v3
#if defined(__clang__)
#pragma clang attribute pop
#pragma clang attribute push(__attribute__((target("avx512f,avx512bw,avx512dq,avx512vl"))), \
                             apply_to = function)
#else
#pragma GCC pop_options
#pragma GCC push_options
#pragma GCC target("avx512f,avx512bw,avx512dq,avx512vl,avx2,fma,f16c")
#endif
namespace table_v4 {
#define RK_SIMD 4
#include "../common/simd.h"
#include "cpu_table_simd.h"
#undef RK_SIMD
}  // namespace table_v4
#if defined(__clang__)
#pragma clang attribute pop
#else
#pragma GCC pop_options
#endif
#endif

struct CandidateKernels {
  void (*unpack)(const int32_t*, int32_t*, float*);
  void (*score)(const Draw&, int, const int32_t*, const float*, float*);
};

inline CandidateKernels candidate_kernels() {
#if defined(__x86_64__)
  if (capability() == Capability::kV4) return {table_v4::unpack_words, table_v4::score_candidates};
  if (capability() == Capability::kV3) return {table_v3::unpack_words, table_v3::score_candidates};
#endif
  return {table_baseline::unpack_words, table_baseline::score_candidates};
}

}  // namespace cpu
}  // namespace reasonkern
