// What the CUDA library says of itself.
#include <torch/csrc/stable/library.h>

#include <cstdint>
#include <vector>

namespace reasonkern {
namespace {

// The architectures that its code was written in: 90 is sm_90. On others run those of the same
// generation before them, and what the driver compiles of PTX.
std::vector<int64_t> compiled_for() {
  std::vector<int64_t> architectures{__CUDA_ARCH_LIST__};
  for (int64_t& architecture : architectures) architecture /= 10;
  return architectures;
}

}  // namespace
}  // namespace reasonkern

STABLE_TORCH_LIBRARY_IMPL(reasonkern_cuda, CompositeExplicitAutograd, m) {
  m.impl("compiled_for", TORCH_BOX(&reasonkern::compiled_for));
}
