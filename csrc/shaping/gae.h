// The reverse recurrence of generalised advantage estimation on CPU.
#pragma once

#include <algorithm>
#include <cstdint>

#include "../common/cpu_capability.h"
#include "shaping.h"

namespace reasonkern {
namespace cpu {

constexpr int kWindow = 16;  // tokens that one step takes

// Not beside the namespaces of other families.
namespace scan {
#define RK_KERNELS "../shaping/gae_simd.h"
#include "../common/each_capability.h"
}  // namespace scan

template <class T>
using GaeRow = void(const T* reward, const T* value, const uint8_t* mask, int64_t length, T next,
                    T gamma, T decay, T decay_value, T* advantage, T* returns, T* scratch);

template <class T>
GaeRow<T>* gae_row_kernel() {
#if defined(__x86_64__)
  if (capability() == Capability::kV4) return scan::v4::gae_row<T>;
  if (capability() == Capability::kV3) return scan::v3::gae_row<T>;
#endif
  return scan::baseline::gae_row<T>;
}

template <class T>
T bootstrap(const GaeParams<T>& p, int64_t row, const T* last_value) {
  if (p.truncated != nullptr && !p.truncated[row]) return 0;
  if (p.bootstrap_last) return *last_value;
  return p.bootstrap_value == nullptr ? T(0) : p.bootstrap_value[row];
}

// A row of the batch. Masked rows end with their last token that counts, so that padding changes no
// bit, and take scratch for a row and kWindow tokens.
template <class T>
void gae_row(const GaeParams<T>& p, int64_t row, T* scratch) {
  const T gamma = static_cast<T>(p.gamma);
  const T decay = static_cast<T>(p.gamma * (p.row_lam ? p.row_lam[row] : p.lam));
  const T decay_value =
      static_cast<T>(p.gamma * (p.row_lam_value ? p.row_lam_value[row] : p.lam_value));
  const T* reward = p.reward + row * p.reward_stride;
  const T* value = p.value + row * p.value_stride;
  const auto* mask = reinterpret_cast<const uint8_t*>(p.mask);
  if (mask != nullptr) mask += row * p.length;
  T* const advantage = p.advantage + row * p.length;
  T* const returns = p.returns + row * p.length;
  int64_t length = p.length;
  while (mask != nullptr && length > 0 && !mask[length - 1]) --length;
  std::fill(advantage + length, advantage + p.length, T(0));
  std::fill(returns + length, returns + p.length, T(0));
  if (length == 0) return;
  const T next = bootstrap(p, row, value + length - 1);
  static GaeRow<T>* const scan_row = gae_row_kernel<T>();
  scan_row(reward, value, mask, length, next, gamma, decay, decay_value, advantage, returns,
           scratch);
}

}  // namespace cpu
}  // namespace reasonkern
