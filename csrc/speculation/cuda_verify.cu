// CUDA operators of verification: one launch per call; compact_kv_ makes one for keys, one for
// values.
#include <numeric>

#include "team_launch.cuh"
#include "verify_abreast.cuh"
#include "verify_operators.h"

namespace reasonkern {
namespace {

template <class Word>
void launch_compact(const CompactParams& p, int32_t device) {
  const LaunchScope scope(device);
  const int64_t words = p.batch * p.heads * p.head_dim * p.element_bytes / int64_t(sizeof(Word));
  const int64_t blocks = (words + kTeamThreads - 1) / kTeamThreads;
  launch(compact_kernel<Word>, unsigned(blocks < (1 << 20) ? blocks : 1 << 20), kTeamThreads, 1, 0,
         scope.stream, p);
}

template <class E>
void launch_abreast(const AbreastShape& shape, VerifyParams p, const LaunchScope& scope) {
  p.rows = whole_rows(p.rows);
  const auto kernel = shape.threads == kWideThreads ? verify_abreast_kernel<E, kWideThreads>
                                                    : verify_abreast_kernel<E, kTeamThreads>;
  const unsigned clusters = unsigned(p.rows.batch < (1 << 20) ? p.rows.batch : 1 << 20);
  launch(kernel, clusters * shape.rows, shape.threads, shape.rows,
         abreast_bytes<E>(p.rows, shape.threads), scope.stream, p);
}

struct CudaBackend {
  static void sample(const SampleParams& p, int32_t device) {
    dispatch_row(p.rows.type, [&](auto element) {
      using E = typename decltype(element)::type;
      // What single rows gain was measured of the types that models compute in.
      const Reads reads = knows_type<E>() ? Reads::row : Reads::walk;
      launch_teams<TeamShared, E>(sample_kernel<E>, p, device, reads);
    });
  }

  static void verify(const VerifyParams& p, int32_t device) {
    dispatch_row(p.rows.type, [&](auto element) {
      using E = typename decltype(element)::type;
      if constexpr (knows_type<E>()) {
        const LaunchScope scope(device);
        const Device about = describe(verify_kernel<E>, device);
        if (draws_abreast<E>(p, about)) {
          return launch_abreast<E>(abreast_shape(p.rows.batch, p.depth, about), p, scope);
        }
      }
      launch_teams<TeamShared, E>(verify_kernel<E>, p, device);
    });
  }

  static void compact(const CompactParams& p, int32_t device) {
    int64_t alignment = int64_t(reinterpret_cast<std::uintptr_t>(p.cache));
    for (const int64_t stride : {p.stride_block, p.stride_slot, p.stride_head}) {
      alignment = std::gcd(alignment, stride * p.element_bytes);
    }
    switch (word_bytes(p.head_dim * p.element_bytes, alignment)) {
      case 16:
        return launch_compact<uint4>(p, device);
      case 8:
        return launch_compact<uint64_t>(p, device);
      case 4:
        return launch_compact<uint32_t>(p, device);
      case 2:
        return launch_compact<uint16_t>(p, device);
      default:
        return launch_compact<uint8_t>(p, device);
    }
  }
};

}  // namespace
}  // namespace reasonkern

STABLE_TORCH_LIBRARY_IMPL(reasonkern_cuda, CUDA, m) {
  using Ops = reasonkern::VerifyOperators<reasonkern::CudaBackend>;
  m.impl("sample", TORCH_BOX(&Ops::sample));
  m.impl("verify_tree", TORCH_BOX(&Ops::verify_tree));
  m.impl("compact_kv_", TORCH_BOX(&Ops::compact_kv_));
}
