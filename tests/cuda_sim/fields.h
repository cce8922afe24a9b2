// What the simulator's modules share: the fields that Python hands over.
#pragma once

#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <cstdint>

namespace cuda_sim {

// A dict of numbers and pointers; pointers come as integers, a missing key is null.
struct Fields {
  const pybind11::dict& dict;

  template <class T>
  T number(const char* name) const {
    return dict[name].cast<T>();
  }
  template <class T>
  void point(T*& field, const char* name) const {
    const std::uintptr_t p = dict.contains(name) ? number<std::uintptr_t>(name) : 0;
    field = reinterpret_cast<T*>(p);
  }
};

}  // namespace cuda_sim
