// CPU operators of verification: requests to threads, registration.
#include "cpu_verify.h"

#include <atomic>
#include <cstring>

#include "cpu_tree.h"
#include "verify_operators.h"

namespace reasonkern {
namespace cpu {
namespace {

// Threads take requests as they get free: walks differ in length.
template <class Body>
void for_each_request(int64_t batch, const Body& body) {
  const int64_t workers = std::min<int64_t>(batch, torch::stable::get_num_threads());
  std::atomic<int64_t> next{0};
  torch::stable::parallel_for(0, workers, 1, [&](int64_t, int64_t) {
    static thread_local Row row;
    for (int64_t b; (b = next.fetch_add(1)) < batch;) body(row, b);
  });
}

template <class E>
struct Element {
  typedef E type;
};

template <class Body>
void dispatch_element(ElementType type, const Body& body) {
  switch (type) {
    case ElementType::kFloat32:
      return body(Element<float>());
    case ElementType::kBFloat16:
      return body(Element<BFloat16>());
    case ElementType::kFloat16:
      return body(Element<Half>());
    case ElementType::kFloat64:
      return body(Element<double>());
  }
}

struct CpuBackend {
  static void sample(const SampleParams& p, int32_t) {
    dispatch_element(p.rows.type, [&](auto element) {
      typedef typename decltype(element)::type E;
      for_each_request(p.rows.batch, [&](Row& row, int64_t b) { sample_request<E>(p, row, b); });
    });
  }

  static void verify(const VerifyParams& p, int32_t) {
    check_tree(p);
    dispatch_element(p.rows.type, [&](auto element) {
      typedef typename decltype(element)::type E;
      for_each_request(p.rows.batch, [&](Row& row, int64_t b) { verify_request<E>(p, row, b); });
    });
  }

  static void compact(const CompactParams& p, int32_t) {
    char* cache = static_cast<char*>(p.cache);
    for_each_request(p.batch, [&](Row&, int64_t b) {
      for (int64_t j = 0; j < std::min(p.accepted[b], p.steps); ++j) {
        const int64_t from = slot_offset(p, b, p.start[b] + p.path[b * p.steps + j]);
        const int64_t to = slot_offset(p, b, p.lengths[b] + j);
        if (from == to) continue;
        for (int64_t h = 0; h < p.heads; ++h) {
          std::memcpy(cache + (to + h * p.stride_head) * p.element_bytes,
                      cache + (from + h * p.stride_head) * p.element_bytes,
                      p.head_dim * p.element_bytes);
        }
      }
    });
  }

 private:
  static void check_tree(const VerifyParams& p) {
    STD_TORCH_CHECK(are_children(p.child_ptr, p.child_index, p.rows.nodes),
                    "child_ptr, child_index: expected the children of a tree of ", p.rows.nodes,
                    " nodes");
  }
};

}  // namespace
}  // namespace cpu
}  // namespace reasonkern

STABLE_TORCH_LIBRARY_IMPL(reasonkern, CPU, m) {
  using Ops = reasonkern::VerifyOperators<reasonkern::cpu::CpuBackend>;
  m.impl("sample", TORCH_BOX(&Ops::sample));
  m.impl("verify_tree", TORCH_BOX(&Ops::verify_tree));
  m.impl("sample_controlled", TORCH_BOX(&Ops::sample_controlled));
  m.impl("verify_controlled", TORCH_BOX(&Ops::verify_controlled));
  m.impl("compact_kv_", TORCH_BOX(&Ops::compact_kv_));
}
