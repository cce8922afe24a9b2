// Trees as raw calls bring them, on the CPU: the Python fronts build theirs from parents.
#pragma once

#include <algorithm>
#include <cstdint>

namespace reasonkern {
namespace cpu {

// Places ptr[0] <= ptr[1] <= … <= ptr[rows], the first 0 and the last `size`.
inline bool are_bounds(const int32_t* ptr, int64_t rows, int64_t size) {
  return ptr[0] == 0 && ptr[rows] == size && std::is_sorted(ptr, ptr + rows + 1);
}

inline bool are_within(const int32_t* x, int64_t count, int64_t low, int64_t high) {
  return std::all_of(x, x + count, [=](int32_t v) { return v >= low && v <= high; });
}

// Compressed rows: the children of `nodes` nodes, of which the root is none.
inline bool are_children(const int32_t* ptr, const int32_t* index, int64_t nodes) {
  return are_bounds(ptr, nodes, nodes - 1) && are_within(index, nodes - 1, 1, nodes - 1);
}

}  // namespace cpu
}  // namespace reasonkern
