// The reverse recurrence of generalised advantage estimation on CPU.
#pragma once

#include <cstdint>

#include "shaping.h"

namespace reasonkern {
namespace cpu {

template <class T>
double bootstrap(const GaeParams<T>& p, int64_t row) {
  if (p.truncated != nullptr && !p.truncated[row]) return 0;
  if (!p.bootstrap_last) return p.bootstrap_value == nullptr ? 0 : p.bootstrap_value[row];
  for (int64_t t = p.length; t-- > 0;) {
    if (p.mask == nullptr || p.mask[row * p.length + t]) return p.value[row * p.value_stride + t];
  }
  return 0;
}

// kRows rows side by side: the recurrence of one row is a chain of dependent operations, several
// chains fill the processor. The arithmetic of a row does not depend on its neighbours.
template <class T, int kRows>
void gae_rows(const GaeParams<T>& p, int64_t first) {
  const T *reward[kRows], *value[kRows];
  double next[kRows], decay[kRows], decay_value[kRows], advantage[kRows] = {}, target[kRows] = {};
  for (int k = 0; k < kRows; ++k) {
    const int64_t row = first + k;
    reward[k] = p.reward + row * p.reward_stride;
    value[k] = p.value + row * p.value_stride;
    next[k] = bootstrap(p, row);
    decay[k] = p.gamma * (p.row_lam == nullptr ? p.lam : p.row_lam[row]);
    decay_value[k] = p.gamma * (p.row_lam_value == nullptr ? p.lam_value : p.row_lam_value[row]);
  }
  const bool* mask = p.mask == nullptr ? nullptr : p.mask + first * p.length;
  T* const out = p.advantage + first * p.length;
  T* const returns = p.returns + first * p.length;
  for (int64_t t = p.length; t-- > 0;) {
    for (int k = 0; k < kRows; ++k) {
      const int64_t at = k * p.length + t;
      const bool on = mask == nullptr || mask[at];
      const double v = value[k][t];
      const double delta = reward[k][t] + p.gamma * next[k] - v;
      const double a = delta + decay[k] * advantage[k];
      const double b = delta + decay_value[k] * target[k];
      next[k] = on ? v : next[k];
      advantage[k] = on ? a : advantage[k];
      target[k] = on ? b : target[k];
      out[at] = on ? static_cast<T>(a) : T(0);
      returns[at] = on ? static_cast<T>(b + v) : T(0);
    }
  }
}

}  // namespace cpu
}  // namespace reasonkern
