// Instruction sets of this processor, and what code compiled for one of them needs.
#pragma once

#include <torch/headeronly/util/BFloat16.h>
#include <torch/headeronly/util/Half.h>

#include <cstdint>
#include <cstdlib>
#include <cstring>

#if defined(__x86_64__)
#include <immintrin.h>
#elif defined(__aarch64__)
#include <arm_neon.h>
#endif

#define RK_INLINE inline __attribute__((always_inline))

namespace reasonkern {
namespace cpu {

using torch::headeronly::BFloat16;
using torch::headeronly::Half;

// Levels of the x86-64 psABI; anything else is the baseline the compiler was given.
enum class Capability { kBaseline, kV3, kV4 };

inline const char* name_of(Capability c) {
  return c == Capability::kV4 ? "v4" : c == Capability::kV3 ? "v3" : "baseline";
}

inline Capability processor_capability() {
#if defined(__x86_64__)
  __builtin_cpu_init();
  // F16C, which clang cannot ask for, is older than AVX2 and came with every processor that has it.
  const bool v3 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
  const bool v4 = v3 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                  __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
  return v4 ? Capability::kV4 : v3 ? Capability::kV3 : Capability::kBaseline;
#else
  return Capability::kBaseline;
#endif
}

// What the processor has, or less when REASONKERN_CPU names it; read once.
inline Capability capability() {
  static const Capability chosen = [] {
    const Capability best = processor_capability();
    const char* wish = std::getenv("REASONKERN_CPU");
    for (Capability c : {Capability::kBaseline, Capability::kV3, Capability::kV4}) {
      if (wish != nullptr && c <= best && std::strcmp(wish, name_of(c)) == 0) return c;
    }
    return best;
  }();
  return chosen;
}

}  // namespace cpu
}  // namespace reasonkern
