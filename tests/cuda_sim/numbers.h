// Scalar intrinsics and the 16-bit number formats, by the host's mathematics: the fast intrinsics
// are exact here, so no test may depend on their error.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>

namespace cuda_sim {
template <class To, class From>
To bit_cast(From from) {
  static_assert(sizeof(To) == sizeof(From), "same size");
  To to;
  std::memcpy(&to, &from, sizeof(To));
  return to;
}
}  // namespace cuda_sim

// Macros: the host's mathematics library reserves, or newly declares, these names.
#define __expf(x) std::exp(static_cast<float>(x))
#define __logf(x) std::log(static_cast<float>(x))
#define rsqrtf(x) (1.0f / std::sqrt(static_cast<float>(x)))
inline float __fdividef(float x, float y) { return x / y; }
inline float __fmul_rn(float x, float y) { return x * y; }
inline float __fmaf_rn(float x, float y, float z) { return std::fma(x, y, z); }
inline int __popc(unsigned x) { return __builtin_popcount(x); }
inline int __ffs(int x) { return __builtin_ffs(x); }
inline int __clz(int x) { return x == 0 ? 32 : __builtin_clz(static_cast<unsigned>(x)); }
inline unsigned __umulhi(unsigned x, unsigned y) {
  return static_cast<unsigned>(static_cast<std::uint64_t>(x) * y >> 32);
}
inline int __float_as_int(float x) { return cuda_sim::bit_cast<int>(x); }
inline unsigned __float_as_uint(float x) { return cuda_sim::bit_cast<unsigned>(x); }
inline float __int_as_float(int x) { return cuda_sim::bit_cast<float>(x); }
inline float __uint_as_float(unsigned x) { return cuda_sim::bit_cast<float>(x); }
inline float max(float x, float y) { return std::fmax(x, y); }
inline float min(float x, float y) { return std::fmin(x, y); }
inline double max(double x, double y) { return std::fmax(x, y); }
inline double min(double x, double y) { return std::fmin(x, y); }
using std::max;
using std::min;

struct __nv_bfloat16 {
  std::uint16_t bits;
};
struct __half {
  std::uint16_t bits;
};
inline float __bfloat162float(__nv_bfloat16 x) { return __uint_as_float(unsigned{x.bits} << 16); }
inline __nv_bfloat16 __float2bfloat16_rn(float x) {
  const unsigned bits = __float_as_uint(x);
  if (std::isnan(x)) return {0x7fff};
  return {static_cast<std::uint16_t>((bits + 0x7fff + (bits >> 16 & 1)) >> 16)};
}
inline float __half2float(__half x) {
  const int exponent = x.bits >> 10 & 31, fraction = x.bits & 1023;
  const float magnitude =
      exponent == 31 ? (fraction != 0 ? NAN : INFINITY)
                     : std::ldexp(static_cast<float>(exponent != 0 ? fraction + 1024 : fraction),
                                  std::max(exponent, 1) - 25);
  return std::copysign(magnitude, x.bits >> 15 != 0 ? -1.0f : 1.0f);
}
inline __half __float2half_rn(float x) {
  const float magnitude = std::fabs(x);
  const int sign = std::signbit(x) ? 0x8000 : 0;
  int bits = 0x7fff;
  if (magnitude >= 65520.0f) bits = sign | 0x7c00;
  if (magnitude < 65520.0f) {  // in units of the last place, 2^-24 and up
    const int unit = magnitude < 0x1p-14f ? -24 : std::ilogb(magnitude) - 10;
    bits =
        sign | (((unit + 24) << 10) + static_cast<int>(std::lrint(std::ldexp(magnitude, -unit))));
  }
  return {static_cast<std::uint16_t>(bits)};
}
