// Greedy elliptical selection on CPU: pivoted Cholesky of the Gram matrix, one column per pick.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <vector>

#include "shaping.h"

namespace reasonkern {
namespace cpu {

// Several sums at once: one would wait for each addition.
template <class T>
double dot(const T* a, const T* b, int64_t n) {
  constexpr int kSums = 8;
  double sums[kSums] = {};
  int64_t i = 0;
  for (; i + kSums <= n; i += kSums) {
    for (int k = 0; k < kSums; ++k) sums[k] += static_cast<double>(a[i + k]) * b[i + k];
  }
  for (; i < n; ++i) sums[0] += static_cast<double>(a[i]) * b[i];
  for (int step = kSums / 2; step > 0; step /= 2) {
    for (int k = 0; k < step; ++k) sums[k] += sums[k + step];
  }
  return sums[0];
}

constexpr double kTaken = -1;

// score[i] = h_i' inverse(lam I + sum over the picks of h h') h_i, kept up to date with one column
// c of the factor per pick: score -= c^2.
template <class T>
class Selection {
 public:
  explicit Selection(const SelectParams<T>& p)
      : p_(p),
        score_(p.groups * p.count),
        factor_(p.groups * p.count * std::max<int64_t>(0, p.picks - 1)) {}

  void start(int64_t i) {
    const T* h = features(i / p_.count, i % p_.count);
    const double norm = dot(h, h, p_.width) / p_.lam;
    score_[i] = norm >= 0 ? norm : 0;  // NaN
  }

  // The largest score of a prompt, the first one among equals.
  void pick(int64_t group, int64_t j) {
    double* const score = score_.data() + group * p_.count;
    const int64_t best = std::max_element(score, score + p_.count) - score;
    p_.out[group * p_.picks + j] = best;
    pivots_[group] = std::sqrt(1 + score[best]);
    score[best] = kTaken;
  }

  void update(int64_t i, int64_t j) {
    if (score_[i] == kTaken) return;
    const int64_t group = i / p_.count, picked = p_.out[group * p_.picks + j];
    const double* other = factor_.data() + (group * p_.count + picked) * (p_.picks - 1);
    double* const own = factor_.data() + i * (p_.picks - 1);
    const double kernel =
        dot(features(group, i % p_.count), features(group, picked), p_.width) / p_.lam;
    const double c = (kernel - dot(own, other, j)) / pivots_[group];
    own[j] = c;
    const double left = score_[i] - c * c;
    score_[i] = left >= 0 ? left : 0;
  }

 private:
  const T* features(int64_t group, int64_t row) const {
    return p_.features + group * p_.group_stride + row * p_.row_stride;
  }

  const SelectParams<T>& p_;
  std::vector<double> score_, factor_, pivots_ = std::vector<double>(p_.groups);
};

}  // namespace cpu
}  // namespace reasonkern
