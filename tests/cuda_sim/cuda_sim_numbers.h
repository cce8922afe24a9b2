// The arithmetic of device code: its functions, and the 16-bit formats.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>

// The fast functions are exact here, so no test may depend on their error. Macros where the host's
// mathematics library reserves, or newly declares, the name.
#define __expf(x) std::exp(static_cast<float>(x))
#define __logf(x) std::log(static_cast<float>(x))
#define rsqrtf(x) (1.0f / std::sqrt(static_cast<float>(x)))
inline float __fdividef(float x, float y) { return x / y; }
inline float __fmul_rn(float x, float y) { return x * y; }
inline float __fmaf_rn(float x, float y, float z) { return std::fma(x, y, z); }
inline double __fma_rn(double x, double y, double z) { return std::fma(x, y, z); }
inline float max(float x, float y) { return std::fmax(x, y); }
inline float min(float x, float y) { return std::fmin(x, y); }
inline int max(int x, int y) { return std::max(x, y); }
inline int min(int x, int y) { return std::min(x, y); }
inline unsigned min(unsigned x, unsigned y) { return std::min(x, y); }
inline int __popc(unsigned x) { return __builtin_popcount(x); }
inline int __ffs(int x) { return __builtin_ffs(x); }
inline int __clz(int x) { return x == 0 ? 32 : __builtin_clz(static_cast<unsigned>(x)); }
inline unsigned __umulhi(unsigned x, unsigned y) { return std::uint64_t{x} * y >> 32; }
inline int __float_as_int(float x) { return __builtin_bit_cast(int, x); }
inline unsigned __float_as_uint(float x) { return __builtin_bit_cast(unsigned, x); }
inline float __int_as_float(int x) { return __builtin_bit_cast(float, x); }
inline float __uint_as_float(unsigned x) { return __builtin_bit_cast(float, x); }

using __half = _Float16;
inline float __half2float(__half x) { return x; }
inline __half __float2half_rn(float x) { return static_cast<__half>(x); }

namespace cuda_sim {
// As good as the device's first guess of a reciprocal.
inline double rough(double x) {
  return __builtin_bit_cast(double, __builtin_bit_cast(std::uint64_t, x) >> 32 << 32);
}
}  // namespace cuda_sim
enum class __nv_bfloat16 : std::uint16_t {};
inline float __bfloat162float(__nv_bfloat16 x) { return __uint_as_float(unsigned(x) << 16); }
inline __nv_bfloat16 __float2bfloat16_rn(float x) {
  const unsigned bits = __float_as_uint(x), half = 0x7fff + (bits >> 16 & 1);
  return static_cast<__nv_bfloat16>(std::isnan(x) ? 0x7fff : (bits + half) >> 16);
}
