// Launching the kernels of teams: the element type, the grid.
#pragma once

#include "../common/stream.h"
#include "team.cuh"
#include "verify_launch.h"

namespace reasonkern {

template <class E>
struct Element {
  using type = E;
};

// Kernels of their own for the types that models compute in; the others share one.
template <class Body>
void dispatch_row(ElementType type, const Body& body) {
  switch (type) {
    case ElementType::kFloat32:
      return body(Element<float>());
    case ElementType::kBFloat16:
      return body(Element<bf16>());
    default:
      return body(Element<AnyElement>());
  }
}

template <class Params>
void launch_teams(void (*kernel)(Params), std::size_t shared_bytes, const Params& p,
                  int32_t device) {
  const LaunchScope scope(device);
  const int arch = 10 * device_attribute(cudaDevAttrComputeCapabilityMajor, device) +
                   device_attribute(cudaDevAttrComputeCapabilityMinor, device);
  const int units = device_attribute(cudaDevAttrMultiProcessorCount, device);
  const unsigned blocks = team_blocks(p.rows.batch, units, arch);
  const unsigned grid = unsigned(p.rows.batch < (1 << 20) ? p.rows.batch : 1 << 20) * blocks;
  launch(kernel, grid, kTeamThreads, blocks, shared_bytes, scope.stream, p);
}

}  // namespace reasonkern
