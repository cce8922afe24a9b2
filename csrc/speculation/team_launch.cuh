// Launching the kernels of teams: the element type, the grid.
#pragma once

#include "../common/stream.h"
#include "team_logits.cuh"
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

// E: the type of the rows that the kernel was compiled for.
template <class Shared, class E, class Params>
void launch_teams(void (*kernel)(Params), Params p, int32_t device, Reads reads = Reads::walk) {
  const LaunchScope scope(device);
  const TeamShape shape =
      team_shape(p.rows.batch, p.rows.vocab, element_bytes(p.rows.type), stage_offset<Shared>(),
                 blocks_inside<E>(), describe(kernel, device), reads);
  p.rows.slice = int(slice_tokens(p.rows.vocab, shape.blocks)), p.rows.stages = shape.stages;
  const unsigned teams = unsigned(p.rows.batch < (1 << 20) ? p.rows.batch : 1 << 20);
  launch(kernel, teams * shape.blocks, kTeamThreads, shape.blocks, shape.shared, scope.stream, p);
}

}  // namespace reasonkern
