// The kernels of verification. A team (a cluster of blocks) takes one request; only the rows that a
// walk visits are read, and nothing that grows with B * N * V is written.
#pragma once

#include "team_row.cuh"
#include "team_statistics.cuh"

namespace reasonkern {

// A walk's place: the request, the node whose row is read, its depth.
struct Place {
  int64_t b, node;
  int depth;
};

__device__ __forceinline__ bool is_usable(const VerifyParams& p, int64_t b, int64_t node) {
  return p.valid[b * p.rows.nodes + node] && (p.num_nodes == nullptr || node < p.num_nodes[b]);
}

// ---- a row's token

// A row is bad when z/T of its top, or a logit, is not finite.
__device__ __forceinline__ bool is_bad(const RowTop& top, float temperature) {
  const float value = temperature == 0 ? top.value : noise::divide(top.value, temperature);
  return (top.bad & 1) != 0 || !(fabsf(value) < kInf);
}

// A draw from the filtered row with the target's noise.
template <class Row>
__device__ Draw target_draw(Team& team, const Row& row, const RequestParams& r, int64_t b,
                            const RowTop& top, uint64_t position) {
  const float temperature = r.temperature[b], value = noise::divide(top.value, temperature);
  return {temperature, value, filter_cut(team, row, r, b, value), uint64_t(r.seed[b]), position,
          kTarget,     0};
}

// Every thread of a block needs the outcome; one works it out. -1: no child was accepted.
__device__ inline int64_t test_children(const VerifyParams& p, const Place& at, Rejection& law) {
  const uint64_t seed = uint64_t(p.requests.seed[at.b]);
  const uint64_t position = uint64_t(p.requests.position[at.b]);
  const int32_t first = p.child_ptr[at.node], last = p.child_ptr[at.node + 1];
  for (int32_t c = first; c < last; ++c) {
    const int32_t child = p.child_index[c];
    if (!is_usable(p, at.b, child)) continue;
    const int64_t token = p.tokens[at.b * p.rows.nodes + child];
    if (law.test(token, coin_of(seed, position, at.depth, c - first))) return token;
  }
  return -1;
}

// The accepted child's token, or -1 and a draw from the residual law.
template <class Row>
__device__ int64_t accept_or_reject(const VerifyParams& p, Team& team, const Row& row, Draw& d,
                                    const Place& at) {
  TeamShared& s = *team.shared();
  const int64_t total = kept_mass(team, row, d.temperature, d.top, d.cut);
  const int64_t entry = (at.b * p.rows.nodes + at.node) * p.entry;
  if (threadIdx.x == 0) {
    Rejection law{p.q_ids + entry, p.entry, s.s, s.r, 0, 0, 0, false, false};
    for (int i = 0; i < p.entry; ++i) {
      const int64_t v = s.skip[i] = law.ids[i];
      const bool inside = v >= 0 && v < row.vocab;
      const float x = inside ? noise::divide(row.at(v), d.temperature) : -kInf;
      s.mass[i] = inside && d.cut.keeps(x, int(v)) ? mass_of(x, d.top) : 0;
    }
    law.start(p.q_logprob + entry, s.mass, total);
    s.accepted = test_children(p, at, law);
    s.patched = law.patched;
    for (int i = 0; law.patched && i < p.entry; ++i) s.log_weight[i] = law.log_weight(i, d.top);
  }
  __syncthreads();
  d.position = uint64_t(p.requests.position[at.b]);
  d.stream = stream_word(kResidual, at.depth);
  d.skip_count = s.patched ? p.entry : 0;
  return s.accepted;
}

// ---- kernels

template <class Row, class Also>
__device__ Outcome sample_token(Team& team, const Row& row, const RequestParams& r, int64_t b,
                                const RowTop& top, Also& also) {
  if (is_bad(top, r.temperature[b])) return {top.id, true};
  if (r.temperature[b] == 0) return {top.id, false};
  const Draw d = target_draw(team, row, r, b, top, uint64_t(r.position[b]));
  also.kept(d.temperature, d.top, d.cut);
  return {draw(team, row, d, top.value, top.id, also), false};
}

template <class E>
__global__ void __launch_bounds__(kTeamThreads, 1) sample_kernel(SampleParams p) {
  Team team(dynamic_shared<TeamShared>());
  const int64_t teams = gridDim.x / cluster_size();
  for (int64_t b = blockIdx.x / cluster_size(); b < p.rows.batch; b += teams) {
    const TeamRow<E> row(p.rows, b, 0);
    ThreadTops unused;
    const RowTop top = find_top(team, row, unused);
    Nothing nothing;
    const Outcome outcome = sample_token(team, row, p.requests, b, top, nothing);
    if (team.leads()) p.token[b] = outcome.token;
  }
  cluster_sync();  // no block exits while another may read its shared memory
}

// The child that holds the token, by the lanes of each warp; -1 when there is none.
__device__ inline int64_t find_child(const VerifyParams& p, const Place& at, int64_t token) {
  const int32_t first = p.child_ptr[at.node], last = p.child_ptr[at.node + 1];
  const int lane = int(threadIdx.x % 32);
  for (int32_t c = first; c < last; c += 32) {
    const int32_t child = c + lane < last ? p.child_index[c + lane] : 0;
    const bool hit =
        child > 0 && is_usable(p, at.b, child) && p.tokens[at.b * p.rows.nodes + child] == token;
    const unsigned hits = __ballot_sync(kFullMask, hit);
    if (hits != 0) return __shfl_sync(kFullMask, child, __ffs(int(hits)) - 1);
  }
  return -1;
}

__device__ __forceinline__ bool is_eos(const VerifyParams& p, int64_t token) {
  const int lane = int(threadIdx.x % 32);
  bool hit = false;
  for (int i = lane; i < p.eos_count; i += 32) hit |= p.eos[i] == token;
  return __any_sync(kFullMask, hit) != 0;
}

// Rows of the outputs from `first` to `last`, of request b, by the team's first block.
__device__ inline void clear_outputs(const VerifyParams& p, int64_t b, int first, int last) {
  const int64_t row = b * (p.depth + 1);
  for (int64_t i = row + first + threadIdx.x; i < row + last; i += blockDim.x) {
    p.out_tokens[i] = -1;
    p.path[i] = i == row ? 0 : -1;
    p.lse[i] = -kInf;
  }
  for (int64_t i = (row + first) * p.topk + threadIdx.x; i < (row + last) * p.topk;
       i += blockDim.x) {
    p.topk_ids[i] = -1;
    p.topk_logits[i] = -kInf;
  }
}

template <class Row, class Also>
__device__ Outcome choose_token(const VerifyParams& p, Team& team, const Row& row,
                                const RowTop& top, const Place& at, Also& also) {
  const RequestParams& r = p.requests;
  if (is_bad(top, r.temperature[at.b])) return {top.id, true};
  if (r.temperature[at.b] == 0) return {top.id, false};
  Draw d = target_draw(team, row, r, at.b, top, uint64_t(r.position[at.b]) + uint64_t(at.depth));
  also.kept(d.temperature, d.top, d.cut);
  const int64_t accepted = p.q_ids == nullptr ? -1 : accept_or_reject(p, team, row, d, at);
  if (accepted >= 0) return {accepted, false};
  return {draw(team, row, d, top.value, top.id, also), false};
}

// How a walk treats its rows: as they are. ControlledVisit is the other way.
template <class E>
struct PlainVisit {
  __device__ PlainVisit(const VerifyParams&, int64_t) {}

  __device__ Outcome choose(const VerifyParams& p, Team& team, const Place& at, RowTop& top,
                            ThreadTops& tops) {
    const TeamRow<E> row(p.rows, at.b, at.node);
    top = find_top(team, row, tops);
    Nothing nothing;
    return choose_token(p, team, row, top, at, nothing);
  }

  __device__ void emitted(const Outcome&) {}
  __device__ static void clear(const VerifyParams&, int64_t, int) {}
};

template <class E, class Visit>
__device__ void verify_request(const VerifyParams& p, Team& team, int64_t b) {
  const bool active = p.valid[b * p.rows.nodes], first_block = cluster_rank() == 0;
  const int64_t limit = p.max_length != nullptr ? p.max_length[b] : p.depth + 1;
  int32_t status = 0;
  int length = 0;
  Visit visit(p, b);
  Place at{b, 0, 0};
  while (active && length < limit && at.node >= 0 && at.depth <= p.depth) {
    RowTop top;
    ThreadTops tops;
    const Outcome outcome = visit.choose(p, team, at, top, tops);
    if (outcome.bad) status |= kBadRow;
    if (outcome.token < 0) break;
    const int64_t out = b * (p.depth + 1) + at.depth;
    if (first_block) clear_outputs(p, b, at.depth, at.depth + 1);
    __syncthreads();
    if (team.leads()) p.out_tokens[out] = outcome.token, p.path[out] = at.node;
    visit.emitted(outcome);
    if ((top.bad & 2) == 0 && top.raw > -kInf) {
      const TeamRow<E> row(p.rows, b, at.node);
      write_statistics(team, row, tops.raw, top.raw, p.topk, p.topk_ids + out * p.topk,
                       p.topk_logits + out * p.topk, p.lse + out);
    }
    ++length;
    if (is_eos(p, outcome.token)) {
      status |= kEos;
      break;
    }
    at = {b, find_child(p, at, outcome.token), at.depth + 1};
  }
  if (active && p.max_length != nullptr && length >= limit) status |= kCapped;
  if (first_block) clear_outputs(p, b, length, p.depth + 1);
  if (first_block) Visit::clear(p, b, length);
  if (team.leads()) p.length[b] = length, p.status[b] = status;
}

template <class E>
__global__ void __launch_bounds__(kTeamThreads, 1) verify_kernel(VerifyParams p) {
  Team team(dynamic_shared<TeamShared>());
  const int64_t teams = gridDim.x / cluster_size();
  for (int64_t b = blockIdx.x / cluster_size(); b < p.rows.batch; b += teams) {
    verify_request<E, PlainVisit<E>>(p, team, b);
  }
  cluster_sync();  // no block exits while another may read its shared memory
}

// ---- the cache: a thread takes a word of one head and moves it for every step, in order

__device__ __forceinline__ int64_t slot_offset(const CompactParams& p, int64_t b, int64_t slot) {
  if (p.block_table == nullptr) return b * p.stride_block + slot * p.stride_slot;
  const int64_t block = p.block_table[b * p.max_blocks + slot / p.block_size];
  return block * p.stride_block + slot % p.block_size * p.stride_slot;
}

template <class Word>
__global__ void __launch_bounds__(kTeamThreads, 4) compact_kernel(CompactParams p) {
  const int64_t words = p.head_dim * p.element_bytes / int64_t(sizeof(Word));
  const int64_t total = p.batch * p.heads * words;
  char* cache = static_cast<char*>(p.cache);
  for (int64_t i = int64_t(blockIdx.x) * blockDim.x + threadIdx.x; i < total;
       i += int64_t(gridDim.x) * blockDim.x) {
    const int64_t b = i / (p.heads * words), h = i / words % p.heads, word = i % words;
    for (int64_t j = 0; j < p.accepted[b] && j < p.steps; ++j) {
      const int64_t from = slot_offset(p, b, p.start[b] + p.path[b * p.steps + j]);
      const int64_t to = slot_offset(p, b, p.lengths[b] + j);
      if (from == to) continue;
      const int64_t head = h * p.stride_head;
      reinterpret_cast<Word*>(cache + (to + head) * p.element_bytes)[word] =
          reinterpret_cast<const Word*>(cache + (from + head) * p.element_bytes)[word];
    }
  }
}

}  // namespace reasonkern
