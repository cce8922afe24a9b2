// The kernels of cpu_table_simd.h for the instruction set of this processor.
#pragma once

#include "../common/cpu_capability.h"
#include "table.h"

namespace reasonkern {
namespace cpu {

// Not beside the namespaces of cpu_passes.h.
namespace table {
#define RK_KERNELS "../speculation/cpu_table_simd.h"
#include "../common/each_capability.h"
}  // namespace table

struct CandidateKernels {
  void (*unpack)(const int32_t*, int32_t*, float*);
  void (*score)(const ChildDraw&, int, const int32_t*, const float*, float*);
};

inline CandidateKernels candidate_kernels() {
#if defined(__x86_64__)
  if (capability() == Capability::kV4)
    return {table::v4::unpack_words, table::v4::score_candidates};
  if (capability() == Capability::kV3)
    return {table::v3::unpack_words, table::v3::score_candidates};
#endif
  return {table::baseline::unpack_words, table::baseline::score_candidates};
}

}  // namespace cpu
}  // namespace reasonkern
