// Recursive rejection sampling without replacement (Jeon et al., arXiv 2402.14160) at one node, in
// IEEE double operations of a fixed order: the twin of reasonkern/speculation/rejection.py.
#pragma once

#include "row.h"

namespace reasonkern {

#if defined(__CUDA_ARCH__)
RK_HOST_DEVICE double add_rn(double a, double b) { return __dadd_rn(a, b); }
#else
RK_HOST_DEVICE double add_rn(double a, double b) { return a + b; }
#endif

// The coin of the child of a rank, in [0, 1).
RK_HOST_DEVICE double coin_of(uint64_t seed, uint64_t position, int depth, int rank) {
  return noise_word(seed, position, stream_word(kCoin, depth), uint32_t(rank)) * 0x1p-32;
}

// Slot i belongs to token ids[i]: s is the draft law of the tokens not yet rejected, r the residual
// law. Tokens outside have r = tail * p and tail_mass of p together.
struct Rejection {
  const int64_t* ids;
  int entry;
  double *s, *r;  // (entry) each
  double tail, tail_mass;
  double total;  // mass of all kept tokens
  bool patched;  // r differs from p
  bool live;     // further children may be tested

  RK_HOST_DEVICE double sum(const double* x) const {
    double total_of = 0;
    for (int i = 0; i < entry; ++i) total_of = add_rn(total_of, x[i]);
    return total_of;
  }

  // mass[i]: of token ids[i] among the kept, 0 where it is not one of them.
  RK_HOST_DEVICE void start(const float* q_logprob, const int64_t* mass, int64_t kept_mass) {
    int64_t rest = kept_mass;
    total = double(kept_mass);
    for (int i = 0; i < entry; ++i) {
      const float log = q_logprob[i] > 0 ? 0.0f : q_logprob[i];
      s[i] = ids[i] < 0 ? 0.0 : double(noise::exp_of(log));
      r[i] = double(mass[i]) / total;
      rest -= mass[i];
    }
    const double weight = sum(s);
    for (int i = 0; i < entry; ++i) s[i] = weight > 0 ? s[i] / weight : 0.0;
    tail = 1;
    tail_mass = double(rest) / total;
    patched = false;
    live = weight > 0;
  }

  // Whether the next drawn child is accepted; a rejected one leaves r and s.
  RK_HOST_DEVICE bool test(int64_t token, double coin) {
    if (!live || token < 0) return false;
    int slot = 0;
    while (slot < entry && ids[slot] != token) ++slot;
    if (slot == entry || !(s[slot] > 0)) return false;
    if (product(coin, s[slot]) < r[slot]) return true;
    reject(slot);
    return false;
  }

  RK_HOST_DEVICE double left(int i) const {
    const double x = add_rn(r[i], -s[i]);
    return x > 0 ? x : 0.0;
  }

  RK_HOST_DEVICE void reject(int slot) {
    double mass = 0;
    for (int i = 0; i < entry; ++i) mass = add_rn(mass, left(i));
    mass = add_rn(mass, product(tail, tail_mass));
    if (!(mass > 0)) {  // by rounding only, where p = q and a coin is next to 1: sample p
      patched = live = false;
      return;
    }
    for (int i = 0; i < entry; ++i) r[i] = left(i) / mass;
    tail = tail / mass;
    patched = true;
    s[slot] = 0;
    const double weight = sum(s);
    live = weight > 0;
    for (int i = 0; live && i < entry; ++i) s[i] = s[i] / weight;
  }

  // Log-weight of slot i on the scale of z/T, where the tail keeps its own; -inf: no mass.
  RK_HOST_DEVICE float log_weight(int i, float top) const {
    const double ratio = product(r[i], product(total, 0x1p-40) / tail);
    return ratio >= double(kTiny) ? noise::add(top, -noise::minus_log(float(ratio))) : -kInf;
  }
};

}  // namespace reasonkern
