// Arguments of the family's kernels: plain pointers, sizes, numbers.
#pragma once

#include <cstdint>

namespace reasonkern {

// Generalised advantage estimation of `rows` sequences of `length` tokens; outputs are contiguous.
template <class T>
struct GaeParams {
  const T *reward, *value;
  int64_t rows, length, reward_stride, value_stride;
  const bool* mask;                  // contiguous; null: every token counts
  const T *row_lam, *row_lam_value;  // one per row; null: the numbers below
  const T* bootstrap_value;          // one per row; null: 0
  const bool* truncated;             // one per row; null: every row is bootstrapped
  double gamma, lam, lam_value;
  bool bootstrap_last;  // V of the last token instead of bootstrap_value
  T *advantage, *returns;
};

// Greedy choice of `picks` of the `count` feature vectors of each of `groups` prompts.
template <class T>
struct SelectParams {
  const T* features;  // the last dimension is contiguous
  int64_t groups, count, width, group_stride, row_stride;
  int64_t picks;
  double lam;
  int64_t* out;  // (groups, picks)
};

}  // namespace reasonkern
