// CUDA operators of verification: one launch per call; compact_kv_ makes one for keys, one for
// values.
#include <cstdlib>
#include <cstring>
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

// For comparisons on a device, until they have been made: "4x512" draws four rows abreast in blocks
// of 512 threads, "auto" as many as `abreast_shape` says; else rows are drawn in turn.
template <class E>
AbreastShape wanted_shape(const VerifyParams& p, const Device& device) {
  const char* wish = std::getenv("REASONKERN_VERIFY_ABREAST");
  if (wish == nullptr || p.q_ids != nullptr || !can_be_alone<E>(p.rows) || device.arch < 90)
    return {};
  if (abreast_bytes<E>(p.rows, kWideThreads) > device.shared_per_block / 2) return {};
  if (std::strcmp(wish, "auto") == 0) return abreast_shape(p.rows.batch, device);
  char* rest = nullptr;
  const unsigned rows = unsigned(std::strtoul(wish, &rest, 10));
  const unsigned threads = *rest == 'x' ? unsigned(std::strtoul(rest + 1, nullptr, 10)) : 0;
  STD_TORCH_CHECK(
      rows >= 1 && rows <= kTeamBlocks && (threads == kTeamThreads || threads == kWideThreads),
      "REASONKERN_VERIFY_ABREAST: expected auto, or 1 to 8 rows x 256 or 512 threads");
  return {rows, threads};
}

template <class E>
void launch_abreast(const AbreastShape& shape, VerifyParams p, const LaunchScope& scope) {
  p.rows.slice = int(slice_tokens(p.rows.vocab, 1)), p.rows.stages = 0;
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
      const bool measured = blocks_inside<E>() > 1;  // the types that kernels know
      launch_teams<TeamShared, E>(sample_kernel<E>, p, device, measured ? Reads::row : Reads::walk);
    });
  }

  static void verify(const VerifyParams& p, int32_t device) {
    dispatch_row(p.rows.type, [&](auto element) {
      using E = typename decltype(element)::type;
      if constexpr (blocks_inside<E>() > 1) {
        const LaunchScope scope(device);
        const AbreastShape shape = wanted_shape<E>(p, describe(verify_kernel<E>, device));
        if (shape.rows > 0) return launch_abreast<E>(shape, p, scope);
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
