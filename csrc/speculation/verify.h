// Plain parameter structs of verification: what host code fills after validation and kernels read.
// No framework type.
#pragma once

#include <cstdint>

#include "../modulation/modulation.h"

namespace reasonkern {

enum class ElementType : int { kFloat32, kBFloat16, kFloat16, kFloat64 };

RK_HOST_DEVICE int element_bytes(ElementType type) {
  return type == ElementType::kFloat64 ? 8 : type == ElementType::kFloat32 ? 4 : 2;
}

enum StatusBit : int32_t { kEos = 1, kBadRow = 2, kCapped = 4 };  // Status in verify.py

constexpr int kMaxNodes = 4096;  // of a tree, MAX_NODES in tree.py
constexpr int kMaxEntry = 64;    // tokens of a draft law
constexpr int kMaxTopK = 64;     // raw logits returned per row

// Logits (B, N, V); sampling has N = 1.
struct LogitRows {
  const void* data;
  ElementType type;
  int64_t batch, nodes, vocab;
  int64_t stride_b, stride_n;  // in elements
  const int32_t* mask;         // (B, N, ceil(V / 32)) or null: every token is allowed
  int64_t mask_stride_b, mask_stride_n;
  // On CUDA: tokens of a block's slice of a row, and slices that it has shared memory for.
  int slice, stages;
};

// Each (B).
struct RequestParams {
  const float* temperature;
  const int64_t* top_k;
  const float *top_p, *min_p;
  const int64_t *seed, *position;
};

// Statistics of the rows that emitted a token, -inf in bad ones; all null where nobody asks.
struct StatisticsParams {
  float *logprob, *confidence, *max_prob;  // of the law after mask and control at temperature 1
  float* entropy;                          // of the law that the token is drawn from
  float* entropy_raw;                      // of the row as it came, at temperature 1
  bool* trigger;                           // `entropy` stands out of the request's window
};

constexpr int kConfidenceTokens = 20;  // the most likely ones, which `confidence` averages over

// What controls the rows; all null: nothing does.
struct ControlParams {
  modulation::State state;
  const int64_t* slot;  // (B)
};

struct SampleParams {
  LogitRows rows;
  RequestParams requests;
  int64_t* token;  // (B)
  ControlParams control;
  StatisticsParams statistics;  // (B)
};

struct VerifyParams {
  LogitRows rows;
  RequestParams requests;
  const int64_t* tokens;                   // (B, N)
  const bool* valid;                       // (B, N)
  const int64_t* q_ids;                    // (B, N, entry), null in the equality modes
  const float* q_logprob;                  // (B, N, entry)
  int entry;                               // at most kMaxEntry
  const int32_t *child_ptr, *child_index;  // (N + 1), (N - 1)
  const int64_t* eos;                      // (eos_count) or null
  int eos_count;
  const int64_t* max_length;  // (B) or null
  const int64_t* num_nodes;   // (B) or null
  int depth, topk;
  int64_t *out_tokens, *length, *path;  // (B, D + 1), (B), (B, D + 1)
  int64_t* topk_ids;                    // (B, D + 1, topk)
  float *topk_logits, *lse;             // (B, D + 1, topk), (B, D + 1)
  int32_t* status;                      // (B)
  ControlParams control;
  StatisticsParams statistics;  // (B, D + 1)
};

struct CompactParams {
  void* cache;
  int element_bytes;
  int64_t batch, heads, head_dim, steps;           // steps: columns of path
  int64_t stride_block, stride_slot, stride_head;  // of the cache; a block is a request when dense
  const int64_t *lengths, *path, *accepted, *start;
  const int64_t* block_table;  // (B, max_blocks) or null: dense
  int64_t max_blocks, block_size;
};

// Elements from the cache's start to a slot of request b.
RK_HOST_DEVICE int64_t slot_offset(const CompactParams& p, int64_t b, int64_t slot) {
  if (p.block_table == nullptr) return b * p.stride_block + slot * p.stride_slot;
  const int64_t block = p.block_table[b * p.max_blocks + slot / p.block_size];
  return block * p.stride_block + slot % p.block_size * p.stride_slot;
}

}  // namespace reasonkern
