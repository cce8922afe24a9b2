// The noise contract compiled for the host and, in the simulator, for the device.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <array>

#include "cuda_sim.h"
#include "speculation/noise.h"

namespace py = pybind11;
using namespace reasonkern;

namespace {

struct Params {
  uint64_t seed, position;
  uint32_t stream;
  int64_t tokens;
  uint32_t* words;
  float* noise;
};

__global__ void noise_kernel(Params p) {
  for (int64_t v = blockIdx.x * blockDim.x + threadIdx.x; v < p.tokens;
       v += int64_t(gridDim.x) * blockDim.x) {
    p.words[v] = noise_word(p.seed, p.position, p.stream, uint32_t(v));
    p.noise[v] = gumbel_noise(p.seed, p.position, uint32_t(v), p.stream);
  }
}

template <class T>
T* pointer(std::uintptr_t p) {
  return reinterpret_cast<T*>(p);
}

}  // namespace

PYBIND11_MODULE(noise_sim, m) {
  m.def("philox", [](std::array<uint32_t, 4> c, uint64_t key) {
    const PhiloxWords out = philox4x32({{c[0], c[1], c[2], c[3]}}, key);
    return std::array<uint32_t, 4>{out.w[0], out.w[1], out.w[2], out.w[3]};
  });
  m.def("gumbel", [](std::uintptr_t words, std::uintptr_t out, int64_t n) {
    for (int64_t i = 0; i < n; ++i) {
      pointer<float>(out)[i] = noise::gumbel_of(pointer<const uint32_t>(words)[i]);
    }
  });
  m.def("exp", [](std::uintptr_t x, std::uintptr_t out, int64_t n) {
    for (int64_t i = 0; i < n; ++i) {
      pointer<float>(out)[i] = noise::exp_of(pointer<const float>(x)[i]);
    }
  });
  m.def("device_noise", [](uint64_t seed, uint64_t position, int stream, int depth, int64_t tokens,
                           std::uintptr_t words, std::uintptr_t noise) {
    const Params p{seed,
                   position,
                   stream_word(NoiseStream(stream), depth),
                   tokens,
                   pointer<uint32_t>(words),
                   pointer<float>(noise)};
    cuda_sim::launch(noise_kernel, 2, 64, 1, 0, cuda_sim::Order{}, 0, p);
  });
}
