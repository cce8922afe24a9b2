// The reverse recurrence of generalised advantage estimation on CPU.
#pragma once

#include <cstdint>

#include "../common/cpu_capability.h"
#include "shaping.h"

namespace reasonkern {
namespace cpu {

constexpr int64_t kChunk = 512;  // tokens at a time: their buffers stay in the first cache
constexpr int kWindow = 16;      // chains side by side

// Not beside the namespaces of other families.
namespace scan {
#define RK_KERNELS "../shaping/gae_simd.h"
#include "../common/each_capability.h"
}  // namespace scan

template <class T>
using GaeRow = void(const T* reward, const T* value, int64_t length, T next, T gamma, T decay,
                    T decay_value, T* advantage, T* returns);

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

// A row of the batch. Masked tokens are cut out before and become zeros afterwards; `scratch` is
// four rows long.
template <class T>
void gae_row(const GaeParams<T>& p, int64_t row, T* scratch) {
  const T gamma = static_cast<T>(p.gamma);
  const T decay = static_cast<T>(p.gamma * (p.row_lam ? p.row_lam[row] : p.lam));
  const T decay_value =
      static_cast<T>(p.gamma * (p.row_lam_value ? p.row_lam_value[row] : p.lam_value));
  const T* reward = p.reward + row * p.reward_stride;
  const T* value = p.value + row * p.value_stride;
  T* const advantage = p.advantage + row * p.length;
  T* const returns = p.returns + row * p.length;
  static GaeRow<T>* const scan_row = gae_row_kernel<T>();
  if (p.mask == nullptr) {
    const T next = bootstrap(p, row, value + p.length - 1);
    scan_row(reward, value, p.length, next, gamma, decay, decay_value, advantage, returns);
    return;
  }
  const bool* mask = p.mask + row * p.length;
  T *r = scratch, *v = r + p.length, *a = v + p.length, *b = a + p.length;
  int64_t count = 0;
  for (int64_t t = 0; t < p.length; ++t) {
    r[count] = reward[t];
    v[count] = value[t];
    count += mask[t];
  }
  if (count > 0) {
    const T next = bootstrap(p, row, v + count - 1);
    scan_row(r, v, count, next, gamma, decay, decay_value, a, b);
  }
  int64_t from = 0;
  for (int64_t t = 0; t < p.length; ++t) {
    const T x = a[from], y = b[from];  // read in any case: no branch
    advantage[t] = mask[t] ? x : T(0);
    returns[t] = mask[t] ? y : T(0);
    from += mask[t];
  }
}

}  // namespace cpu
}  // namespace reasonkern
