// The reverse recurrence of generalised advantage estimation on CPU.
#pragma once

#include <algorithm>
#include <cstdint>
#include <vector>

#include "shaping.h"

namespace reasonkern {
namespace cpu {

constexpr int64_t kChunk = 1024;  // tokens at a time: three buffers of them stay in the first cache
constexpr int kWindow = 8;        // chains side by side

// x[t] = delta[t] + decay * x[t + 1], a chain of one multiply and one add per token. Here it is cut
// into kWindow chains that vectors hold: first delta[t] becomes the sum of kWindow terms
// delta[t + k] decay^k, by doubling, then x[t] = sum[t] + decay^kWindow * x[t + kWindow].
template <class T>
class Chain {
 public:
  explicit Chain(T decay) : decay_(decay) {}

  // `delta` holds `count` tokens and behind them the kWindow first ones of the chunk behind. The
  // results lie in `x`; its first kWindow values are kept for the chunk before.
  void run(const T* __restrict__ delta, int64_t count, T* __restrict__ x) {
    static_assert(kWindow == 8, "three doublings");
    const T power2 = decay_ * decay_, power4 = power2 * power2, power8 = power4 * power4;
    for (int64_t t = 0; t < count + 7; ++t) x[t] = delta[t] + decay_ * delta[t + 1];
    for (int64_t t = 0; t < count + 5; ++t) x[t] += power2 * x[t + 2];
    for (int64_t t = 0; t < count; ++t) x[t] += power4 * x[t + 4];
    T later[kWindow];
    std::copy(behind_, behind_ + kWindow, later);
    const int64_t rest = count % kWindow;
    for (int64_t t = count - kWindow; t >= rest; t -= kWindow) {
      for (int k = 0; k < kWindow; ++k) later[k] = x[t + k] + power8 * later[k];
      std::copy(later, later + kWindow, x + t);
    }
    for (int64_t t = rest; t-- > 0;) {
      x[t] += power8 * (t + kWindow < count ? x[t + kWindow] : behind_[t + kWindow - count]);
    }
    // A chunk shorter than that is the first one of its row: nothing comes after it.
    if (count >= kWindow) std::copy(x, x + kWindow, behind_);
  }

 private:
  T decay_, behind_[kWindow] = {};
};

// One row without holes: `next` stands for V behind its last token.
template <class T>
void gae_row(const T* __restrict__ reward, const T* __restrict__ value, int64_t length, T next,
             T gamma, T decay, T decay_value, T* __restrict__ advantage, T* __restrict__ returns) {
  T delta[kChunk + 2 * kWindow] = {}, x[kChunk + 2 * kWindow], y[kChunk + 2 * kWindow];
  Chain<T> policy(decay), critic(decay_value);
  for (int64_t end = length; end > 0;) {
    const int64_t count = std::min(kChunk, end), first = end - count;
    std::copy_backward(delta, delta + kWindow, delta + count + kWindow);
    const T *r = reward + first, *v = value + first;
    for (int64_t t = 0; t < count - 1; ++t) delta[t] = r[t] + gamma * v[t + 1] - v[t];
    delta[count - 1] = r[count - 1] + gamma * (end == length ? next : v[count]) - v[count - 1];
    policy.run(delta, count, x);
    std::copy(x, x + count, advantage + first);
    const T* target = x;
    if (decay_value != decay) critic.run(delta, count, y), target = y;
    for (int64_t t = 0; t < count; ++t) returns[first + t] = target[t] + v[t];
    end = first;
  }
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
  if (p.mask == nullptr) {
    const T next = bootstrap(p, row, value + p.length - 1);
    gae_row(reward, value, p.length, next, gamma, decay, decay_value, advantage, returns);
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
    gae_row(r, v, count, next, gamma, decay, decay_value, a, b);
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
