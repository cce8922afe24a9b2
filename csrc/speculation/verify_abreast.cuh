// Verification by equality with rows abreast. The blocks of a cluster are teams of their own: each
// draws one of the next rows on the likeliest path, that of first children, before it is known
// whether the walk comes there. Then they tell each other the tokens, and the walk goes along the
// path as far as these are the drafted ones; from the node where it left, it goes on in the same
// way. A round is as long as a row, and takes the place of as many rows as it finds visited.
#pragma once

#include "alone_row.cuh"
#include "verify_kernels.cuh"

namespace reasonkern {

// A request's tree in shared memory, behind what the team needs: finding a path there takes no
// load from global memory.
class SharedTree {
 public:
  __device__ explicit SharedTree(int64_t nodes)
      : nodes_(int(nodes)),
        first_(dynamic_shared<int32_t>(stage_offset<TeamShared>())),
        child_(first_ + nodes_ + 1),
        token_(child_ + nodes_) {}

  // Readers are behind a barrier.
  __device__ void load(const VerifyParams& p, int64_t b) const {
#pragma unroll 1
    for (int i = int(threadIdx.x); i < nodes_; i += int(blockDim.x)) {
      const int64_t token = p.tokens[b * nodes_ + i];
      const bool inside = token >= 0 && token < p.rows.vocab;
      first_[i + 1] = p.child_ptr[i + 1];
      child_[i] = i + 1 < nodes_ ? p.child_index[i] : 0;
      token_[i] = is_usable(p, b, i) && inside ? int(token) : -1;
    }
    if (threadIdx.x == 0) first_[0] = p.child_ptr[0];
  }

  // The node so many first children below, of those that may be entered; -1 where there is none.
  __device__ int below(int node, unsigned levels) const {
    for (; levels > 0 && node >= 0; --levels) node = first_child(node);
    return node;
  }

  // The child that holds a token, -1 when there is none. By whole warps.
  __device__ int find(int node, int token) const {
    for (int c = first_[node]; c < first_[node + 1]; c += 32) {
      const int mine = c + int(threadIdx.x % 32);
      const int child = mine < first_[node + 1] ? child_[mine] : 0;
      const unsigned hits = __ballot_sync(kFullMask, child > 0 && token_[child] == token);
      if (hits != 0) return __shfl_sync(kFullMask, child, __ffs(int(hits)) - 1);
    }
    return -1;
  }

 private:
  __device__ int first_child(int node) const {
    for (int c = first_[node]; c < first_[node + 1]; ++c) {
      if (token_[child_[c]] >= 0) return child_[c];
    }
    return -1;
  }

  const int nodes_;
  int32_t *const first_, *const child_, *const token_;  // token: -1: may not be entered
};

// Where the largest logits of a row's batches lie in a block's shared memory, behind the tree.
constexpr unsigned batches_offset(int64_t nodes) {
  return stage_offset<TeamShared>() + unsigned(sizeof(int32_t)) * unsigned(3 * nodes + 1);
}

// Shared memory of a block.
template <class E>
std::size_t abreast_bytes(const LogitRows& rows, unsigned threads) {
  return batches_offset(rows.nodes) +
         sizeof(float) * threads * unsigned(batch_count<E>(rows.vocab, threads));
}

// Whether a launch draws rows abreast: by equality, in blocks of which two fit on a multiprocessor.
template <class E>
bool draws_abreast(const VerifyParams& p, const Device& device) {
  return p.q_ids == nullptr && device.arch >= 90 && can_be_alone<E>(p.rows, kTeamThreads) &&
         abreast_bytes<E>(p.rows, kTeamThreads) <= device.shared_per_block / 2 - 1024;
}

// Rows that a walk may take: all that the tree has, or as many as tokens are allowed.
__device__ __forceinline__ int most_rows(const VerifyParams& p, int64_t allowed) {
  return allowed < 0 ? 0 : allowed < p.depth + 1 ? int(allowed) : p.depth + 1;
}

// What a block has found out about its row.
struct alignas(16) Told {
  int32_t node = -1, token = -1;  // node -1: it had none; token -1: the row emits nothing
  int32_t next = -1;              // the child that holds the token
  int32_t status = 0;
};

// What all blocks conclude from what they were told.
struct Round {
  int visited;  // rows on the walk, those of the first blocks
  int tokens;   // that they emit: all, or all but the last
  int next;     // the node where the walk goes on, -1 where it ends
  int32_t status;

  // told: lane r has what block r found.
  __device__ explicit Round(const Told& told) {
    const unsigned lane = threadIdx.x % 32;
    const int after = __shfl_down_sync(kFullMask, told.node, 1);
    const unsigned between = (1u << (cluster_size() - 1)) - 1;
    const bool leads_on = told.next >= 0 && told.next == after;
    visited = __ffs(int(~(__ballot_sync(kFullMask, leads_on) & between)));
    tokens = visited - (__shfl_sync(kFullMask, told.token, visited - 1) < 0 ? 1 : 0);
    next = __shfl_sync(kFullMask, told.next, visited - 1);
    status = int32_t(__reduce_or_sync(kFullMask, int(lane) < visited ? unsigned(told.status) : 0u));
  }
};

// One request's walk, as a block of its cluster sees it.
template <class E>
class AbreastWalk {
 public:
  __device__ AbreastWalk(const VerifyParams& p, Team& team, const SharedTree& tree, int64_t b)
      : p_(p),
        team_(team),
        tree_(tree),
        b_(b),
        request_(team.begin(p.requests, b)),
        ends_(p),
        active_(p.valid[b * p.rows.nodes]),
        cap_(p.max_length != nullptr ? p.max_length[b] : INT64_MAX),
        limit_(most_rows(p, cap_)) {
    tree.load(p, b);
    __syncthreads();  // all loads so far come side by side
  }

  __device__ void run() {
    int node = active_ && limit_ > 0 ? 0 : -1, depth = 0;
    int32_t status = 0;
    while (node >= 0) {
      const Round round = draw(node, depth);
      node = round.next, depth += round.tokens, status |= round.status;
    }
    if (active_ && depth >= cap_) status |= kCapped;
    if (cluster_rank() != 0) return;
    clear_outputs(p_, b_, depth);
    if (threadIdx.x == 0) p_.length[b_] = depth, p_.status[b_] = status;
  }

 private:
  // Draws rows from `node` on, the first of which is at `depth`, and writes those that are visited.
  __device__ Round draw(int node, int depth) {
    const int rank = int(cluster_rank());
    const Place at{b_, depth + rank < limit_ ? tree_.below(node, rank) : -1, depth + rank};
    if (at.node < 0) {
      __syncthreads();  // between two times that blocks tell each other
      return Round(team_.tell(Told{}, [] {}));
    }
    AloneRow<E> row(Slice(p_.rows, b_, at.node, 0), p_.rows, b_, at.node,
                    dynamic_shared<float>(batches_offset(p_.rows.nodes)));
    const RowTop top = find_row_top(team_, row, [] {});
    TeamShared& s = *team_.shared();
    RawStatistics raw(team_, top.raw, p_.topk, row.vocab, s.my_groups, block_groups());
    const uint64_t position = request_.position + uint64_t(at.depth);
    const Best best = sample_share(team_, row, request_, top, position, raw);
    raw.finish(row);
    const Found found = join(team_, top, best, raw.sum(), [] {});
    const Told mine = describe(at, outcome_of(found.top, found.best, request_.temperature));
    const Round round(team_.tell(mine, [&] { rank_candidates<false>(team_, row, p_.topk); }));
    __syncthreads();  // all are ranked
    if (rank < round.visited && mine.token >= 0) write(at, mine.token, found);
    return round;
  }

  __device__ Told describe(const Place& at, const Outcome& outcome) const {
    Told told{at.node, int32_t(outcome.token), -1, outcome.bad ? kBadRow : 0};
    if (told.token < 0) return told;
    const bool ends = ends_.contain(p_, told.token);
    if (ends) told.status |= kEos;
    if (!ends && at.depth + 1 < limit_) told.next = tree_.find(at.node, told.token);
    return told;
  }

  __device__ void write(const Place& at, int32_t token, const Found& found) {
    const TeamShared& s = *team_.shared();
    const int64_t out = b_ * (p_.depth + 1) + at.depth;
    const bool sound = is_sound(found.top);
    if (threadIdx.x == 0) {
      p_.out_tokens[out] = token, p_.path[out] = at.node;
      p_.lse[out] = sound ? lse_of(found.top.raw, found.sum) : -kInf;
    }
    const int known = sound ? min(s.count, p_.topk) : 0;
    for (int i = int(threadIdx.x); i < p_.topk; i += int(blockDim.x)) {
      p_.topk_ids[out * p_.topk + i] = i < known ? s.top[i / 2].id[i % 2] : -1;
      p_.topk_logits[out * p_.topk + i] = i < known ? s.top[i / 2].value[i % 2] : -kInf;
    }
  }

  const VerifyParams& p_;
  Team& team_;
  const SharedTree& tree_;
  const int64_t b_;
  const Request& request_;
  const EndTokens ends_;
  const bool active_;
  const int64_t cap_;  // of tokens
  const int limit_;    // no row lies so deep
};

template <class E, int kThreads>
__global__ void __launch_bounds__(kThreads, kBlocksInside* kTeamThreads / kThreads)
    verify_abreast_kernel(VerifyParams p) {
  Team team(dynamic_shared<TeamShared>(), stage_offset<TeamShared>(), p.rows, Members::block);
  const SharedTree tree(p.rows.nodes);
  for (int64_t b = cluster_index(); b < p.rows.batch; b += cluster_count()) {
    AbreastWalk<E>(p, team, tree, b).run();
  }
  team.leave();
}

}  // namespace reasonkern
