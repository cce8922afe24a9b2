// 16-byte tiles of bf16, fp16, fp32 and fp64 rows: load, convert to the accumulation type, store.
// Under the simulator of tests/cuda_sim every vector access checks its alignment.
#pragma once

#include <cstdint>
#include <cstring>
#include <type_traits>

#include "element.h"

namespace reasonkern {

// Whole words, so that 16-bit lanes stay two to a register wherever they come from.
template <class T>
struct alignas(16) Vec {
  static constexpr int size = 16 / sizeof(T);
  std::uint32_t word[4];
};

template <class T>
__device__ __forceinline__ T get_lane(const Vec<T>& v, int i) {
  if constexpr (sizeof(T) == 2) {
    return recast<T>(std::uint16_t(v.word[i / 2] >> 16 * (i % 2)));
  } else if constexpr (sizeof(T) == 4) {
    return recast<T>(v.word[i]);
  } else {
    return recast<T>(v.word[2 * i] | std::uint64_t(v.word[2 * i + 1]) << 32);
  }
}

template <class T, class Lane>
__device__ __forceinline__ Vec<T> make_vec(Lane lane) {  // of lane(i), i in order
  Vec<T> v;
#pragma unroll
  for (int i = 0; i < Vec<T>::size; ++i) {
    if constexpr (sizeof(T) == 2) {
      const std::uint32_t bits = recast<std::uint16_t>(lane(i));
      v.word[i / 2] = i % 2 == 0 ? bits : v.word[i / 2] | bits << 16;
    } else if constexpr (sizeof(T) == 4) {
      v.word[i] = recast<std::uint32_t>(lane(i));
    } else {
      const auto bits = recast<std::uint64_t>(lane(i));
      v.word[2 * i] = std::uint32_t(bits);
      v.word[2 * i + 1] = std::uint32_t(bits >> 32);
    }
  }
  return v;
}

template <class T>
__device__ __forceinline__ void unpack(const Vec<T>& v, acc_t<T> (&out)[Vec<T>::size]) {
#pragma unroll
  for (int i = 0; i < Vec<T>::size; ++i) {
    if constexpr (std::is_same<T, bf16>::value) {  // the upper half of a float
      const std::uint32_t w = v.word[i / 2];
      out[i] = recast<float>(i % 2 == 0 ? w << 16 : w & 0xffff0000u);
    } else {
      out[i] = to_acc(get_lane(v, i));
    }
  }
}

template <class T>
__device__ __forceinline__ Vec<T> pack(const acc_t<T> (&in)[Vec<T>::size]) {
#if defined(__CUDACC__)
  if constexpr (sizeof(T) == 2) {
    Vec<T> v;
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      if constexpr (std::is_same<T, bf16>::value) {
        v.word[i] = recast<std::uint32_t>(__floats2bfloat162_rn(in[2 * i], in[2 * i + 1]));
      } else {
        v.word[i] = recast<std::uint32_t>(__floats2half2_rn(in[2 * i], in[2 * i + 1]));
      }
    }
    return v;
  } else
#endif
    return make_vec<T>([&](int i) { return from_acc<T>(in[i]); });
}

enum class Reuse { again, last };

// A coherent load, not ld.global.nc: the gradient may be written over the row just read.
// Reuse::again leaves the line to L2 for a second sweep, Reuse::last marks it for eviction.
template <Reuse reuse = Reuse::last, class T>
__device__ __forceinline__ Vec<T> load_global(const T* p) {
  Vec<T> v;
#if defined(__CUDACC__)
  uint4 w;
  if constexpr (reuse == Reuse::again) {
    asm volatile("ld.global.L1::no_allocate.v4.u32 {%0, %1, %2, %3}, [%4];"
                 : "=r"(w.x), "=r"(w.y), "=r"(w.z), "=r"(w.w)
                 : "l"(__cvta_generic_to_global(p)));
  } else {
    asm volatile("ld.global.cs.v4.u32 {%0, %1, %2, %3}, [%4];"
                 : "=r"(w.x), "=r"(w.y), "=r"(w.z), "=r"(w.w)
                 : "l"(__cvta_generic_to_global(p)));
  }
  std::memcpy(&v, &w, 16);
#else
  cuda_sim::copy16(&v, p, "load_global");
#endif
  return v;
}

template <class T>
__device__ __forceinline__ void store_global(T* p, const Vec<T>& v) {
#if defined(__CUDACC__)
  uint4 w;
  std::memcpy(&w, &v, 16);
  __stcs(reinterpret_cast<uint4*>(p), w);
#else
  cuda_sim::copy16(p, &v, "store_global");
#endif
}

template <class T>
__device__ __forceinline__ Vec<T> load_shared(const T* p) {
#if defined(__CUDACC__)
  return *reinterpret_cast<const Vec<T>*>(p);
#else
  Vec<T> v;
  cuda_sim::copy16(&v, p, "load_shared");
  return v;
#endif
}

template <class T>
__device__ __forceinline__ void store_shared(T* p, const Vec<T>& v) {
#if defined(__CUDACC__)
  *reinterpret_cast<Vec<T>*>(p) = v;
#else
  cuda_sim::copy16(p, &v, "store_shared");
#endif
}

}  // namespace reasonkern
