// Checks of raw operator calls, and the addresses behind them. The Python fronts validate what
// users pass and raise ValueError; these keep a direct call of an operator from reading or writing
// out of bounds.
#pragma once

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>

#include <cstdint>
#include <optional>
#include <sstream>
#include <string>

namespace reasonkern {

using torch::headeronly::IntHeaderOnlyArrayRef;
using torch::headeronly::ScalarType;
using torch::stable::Tensor;
using MaybeTensor = std::optional<Tensor>;

inline std::string shape_text(IntHeaderOnlyArrayRef sizes) {
  std::ostringstream text;
  text << '(';
  for (size_t k = 0; k < sizes.size(); ++k) text << (k ? ", " : "") << sizes[k];
  text << ')';
  return text.str();
}

inline bool same_shape(IntHeaderOnlyArrayRef a, IntHeaderOnlyArrayRef b) {
  if (a.size() != b.size()) return false;
  for (size_t k = 0; k < a.size(); ++k) {
    if (a[k] != b[k]) return false;
  }
  return true;
}

inline void check_same_device(const Tensor& t, const char* name, const Tensor& reference) {
  STD_TORCH_CHECK(t.device() == reference.device(), name,
                  ": expected it on the device of the first argument");
}

inline void check_dtype(const Tensor& t, const char* name, ScalarType dtype) {
  STD_TORCH_CHECK(t.scalar_type() == dtype, name, ": expected dtype ", dtype, ", got ",
                  t.scalar_type());
}

inline void check_shape(const Tensor& t, const char* name, IntHeaderOnlyArrayRef sizes) {
  STD_TORCH_CHECK(same_shape(t.sizes(), sizes), name, ": expected shape ", shape_text(sizes),
                  ", got ", shape_text(t.sizes()));
}

inline void check_contiguous(const Tensor& t, const char* name) {
  STD_TORCH_CHECK(t.is_contiguous(), name, ": expected a contiguous tensor, got strides ",
                  shape_text(t.strides()));
}

// A contiguous tensor of known dtype and shape on the device of `reference`.
inline void check_tensor(const Tensor& t, const char* name, ScalarType dtype,
                         IntHeaderOnlyArrayRef sizes, const Tensor& reference) {
  check_same_device(t, name, reference);
  check_dtype(t, name, dtype);
  check_shape(t, name, sizes);
  check_contiguous(t, name);
}

inline void check_last_contiguous(const Tensor& t, const char* name) {
  const int64_t last = t.dim() - 1;
  STD_TORCH_CHECK(t.numel() == 0 || t.size(last) <= 1 || t.stride(last) == 1, name,
                  ": expected a contiguous last dimension, got strides ", shape_text(t.strides()));
}

// Writing through a tensor whose rows share memory would depend on the order of the rows.
inline void check_rows_apart(const Tensor& t, const char* name) {
  const int64_t width = t.size(t.dim() - 1);
  for (int64_t k = 0; k + 1 < t.dim(); ++k) {
    STD_TORCH_CHECK(t.size(k) <= 1 || t.stride(k) >= width, name,
                    ": expected rows that do not overlap for writing in place, got strides ",
                    shape_text(t.strides()), " for shape ", shape_text(t.sizes()));
  }
}

// An undefined or empty tensor has no address worth passing on.
template <class T>
T* data(const Tensor& t) {
  return t.numel() == 0 ? nullptr : static_cast<T*>(t.data_ptr());
}

// The address of a checked tensor, null where none is given.
template <class T>
const T* maybe_data(const MaybeTensor& t, const char* name, ScalarType dtype,
                    IntHeaderOnlyArrayRef sizes, const Tensor& reference) {
  if (!t.has_value()) return nullptr;
  check_tensor(*t, name, dtype, sizes, reference);
  return data<const T>(*t);
}

}  // namespace reasonkern
