// Philox4x32-10 (Salmon et al., SC 2011): four random words as a pure function of a 128-bit counter
// and a 64-bit key. No state, so nothing depends on the order in which words are drawn.
#pragma once

#include <cstdint>

#include "host_device.h"

namespace reasonkern {

struct PhiloxWords {
  uint32_t w[4];
};

constexpr uint32_t kPhiloxM0 = 0xD2511F53u, kPhiloxM1 = 0xCD9E8D57u;  // multipliers
constexpr uint32_t kPhiloxW0 = 0x9E3779B9u, kPhiloxW1 = 0xBB67AE85u;  // steps of the key
constexpr int kPhiloxRounds = 10;

RK_HOST_DEVICE uint64_t wide_product(uint32_t a, uint32_t b) {
#if defined(__CUDA_ARCH__)
  uint64_t product;  // one instruction; of the C++ form the compiler adds a carry of 0 to each
  asm("mul.wide.u32 %0, %1, %2;" : "=l"(product) : "r"(a), "r"(b));
  return product;
#else
  return uint64_t(a) * b;
#endif
}

RK_HOST_DEVICE PhiloxWords philox4x32(PhiloxWords c, uint64_t key) {
  uint32_t k0 = uint32_t(key), k1 = uint32_t(key >> 32);
#if defined(__CUDACC__)
#pragma unroll
#endif
  for (int round = 0; round < kPhiloxRounds; ++round) {
    const uint64_t p0 = wide_product(kPhiloxM0, c.w[0]), p1 = wide_product(kPhiloxM1, c.w[2]);
    c = {{uint32_t(p1 >> 32) ^ c.w[1] ^ k0, uint32_t(p1), uint32_t(p0 >> 32) ^ c.w[3] ^ k1,
          uint32_t(p0)}};
    k0 += kPhiloxW0;
    k1 += kPhiloxW1;
  }
  return c;
}

}  // namespace reasonkern
