// The kernels of verification. A team (a cluster of blocks) takes one request; only the rows that a
// walk visits are read, and nothing that grows with B * N * V is written. A row's way is: its
// slices to shared memory; a sweep for the largest logit, which the blocks exchange; a look at what
// may count, which draws, sums and collects the top-k; another exchange.
#pragma once

#include "team_statistics.cuh"

namespace reasonkern {

// A walk's place: the request, the node whose row is read, its depth.
struct Place {
  int64_t b;
  int node, depth;
};

__device__ __forceinline__ bool is_usable(const VerifyParams& p, int64_t b, int64_t node) {
  const bool inside = p.num_nodes == nullptr || node < p.num_nodes[b];
  return inside & p.valid[b * p.rows.nodes + node];  // loads side by side
}

// ---- a row's token

// -1: no child was accepted.
__device__ inline int64_t test_children(const VerifyParams& p, const Place& at, const Request& r,
                                        Rejection& law) {
  const int32_t first = p.child_ptr[at.node], last = p.child_ptr[at.node + 1];
  for (int32_t c = first; c < last; ++c) {
    const int32_t child = p.child_index[c];
    if (!is_usable(p, at.b, child)) continue;
    const int64_t token = p.tokens[at.b * p.rows.nodes + child];
    if (law.test(token, coin_of(r.seed, r.position, at.depth, c - first))) return token;
  }
  return -1;
}

// Every thread of a block needs the outcome; one works it out. The arguments say where the entry's
// tokens are, and what mass the row keeps.
__device__ inline void toss_coins(const VerifyParams& p, TeamShared& s, Place at, const Request& r,
                                  int64_t total, float top) {
  const int64_t entry = (at.b * p.rows.nodes + at.node) * p.entry;
  Rejection law{p.q_ids + entry, p.entry, s.s, s.r, 0, 0, 0, false, false};
  law.start(p.q_logprob + entry, s.mass, total);
  s.accepted = test_children(p, at, r, law);
  s.patched = law.patched;
  for (int i = 0; law.patched && i < p.entry; ++i) s.log_weight[i] = law.log_weight(i, top);
}

// The accepted child's token, or -1 and a draw from the residual law.
template <class Row>
__device__ int64_t accept_or_reject(const VerifyParams& p, Team& team, const Row& row,
                                    const Request& r, Draw& d, const Place& at) {
  TeamShared& s = *team.shared();
  const int64_t entry = (at.b * p.rows.nodes + at.node) * p.entry;
  for (int i = int(threadIdx.x); i < p.entry; i += int(blockDim.x)) {
    const int64_t v = s.skip[i] = p.q_ids[entry + i];
    const bool inside = v >= 0 && v < row.vocab;
    const float x = inside ? noise::divide(row.at(v), d.temperature) : -kInf;
    s.mass[i] = inside && d.cut.keeps(x, int(v)) ? mass_of(x, d.top) : 0;
  }
  const int64_t total = kept_mass(team, row, d.temperature, d.top, d.cut);  // behind its barrier
  if (threadIdx.x == 0) toss_coins(p, s, at, r, total, d.top);
  __syncthreads();
  d.position = r.position;
  d.stream = stream_word(kResidual, at.depth);
  d.skip_count = s.patched ? p.entry : 0;
  return s.accepted;
}

// This thread's share of a draw.
template <class Row, class Also>
__device__ Best sample_share(Team& team, Row& row, const Request& r, const RowTop& top,
                             uint64_t position, Also& also) {
  if (r.temperature == 0 || is_bad(top, r.temperature)) return find_top_token(row, top);
  const Draw d = target_draw(team, row, r, top, position);
  also.kept(d.temperature, d.top, d.cut);
  return draw(team, row, d, also);
}

// The same at a node; or the child that passed the coins, and no draw.
struct Choice {
  Best best;
  int accepted;
};

template <class Row, class Also>
__device__ Choice choose_share(const VerifyParams& p, Team& team, Row& row, const Request& r,
                               const RowTop& top, const Place& at, Also& also) {
  if (r.temperature == 0 || is_bad(top, r.temperature)) return {find_top_token(row, top), -1};
  Choice choice{{-kInf, -1}, -1};
  Draw d = target_draw(team, row, r, top, r.position + uint64_t(at.depth));
  also.kept(d.temperature, d.top, d.cut);
  if (p.q_ids != nullptr) choice.accepted = int(accept_or_reject(p, team, row, r, d, at));
  if (choice.accepted < 0) choice.best = draw(team, row, d, also);
  return choice;
}

// ---- kernels

template <class E>
__global__ void __launch_bounds__(kTeamThreads, blocks_inside<E>()) sample_kernel(SampleParams p) {
  Team team(dynamic_shared<TeamShared>(), stage_offset<TeamShared>(), p.rows);
  const int64_t teams = quotient(gridDim.x, cluster_size());
  for (int64_t b = quotient(blockIdx.x, cluster_size()); b < p.rows.batch; b += teams) {
    const Request& request = team.begin(p.requests, b);
    TeamRow<E> row(team, p.rows, b, 0);
    const RowTop top = find_row_top(team, row, [] {});
    Nothing nothing;
    const Best best = sample_share(team, row, request, top, request.position, nothing);
    const Found found = join(team, top, best, 0, [] {});
    if (team.leads()) p.token[b] = outcome_of(found.top, found.best, request.temperature).token;
  }
  team.leave();
}

// Places in child_index: the children of a node.
struct Range {
  int32_t first, last;

  __device__ static Range of(const VerifyParams& p, int node) {
    return {p.child_ptr[node], p.child_ptr[node + 1]};
  }

  __device__ bool is_long() const { return last - first > 32; }

  // The child of this lane, from the `skip`-th on, or 0.
  __device__ int32_t child(const VerifyParams& p, int skip = 0) const {
    const int32_t c = first + skip + int32_t(threadIdx.x % 32);
    return c < last ? p.child_index[c] : 0;
  }
};

// The children of a node, one to a lane and in each warp. No load waits for another one: what the
// child itself is read by was loaded with its parent.
struct Children {
  Child mine;

  __device__ Children(const VerifyParams& p, int64_t b, int32_t node) : mine{node, -1, 0, 0} {
    if (node <= 0) return;
    const int64_t drafted = p.tokens[b * p.rows.nodes + node];
    mine.first = p.child_ptr[node], mine.last = p.child_ptr[node + 1];
    if (is_usable(p, b, node) && drafted >= 0 && drafted < p.rows.vocab) mine.token = int(drafted);
  }

  // Those that the last warp left, behind a barrier; the first one has more to do.
  __device__ Children(const TeamShared& s, int turn) : mine(s.children[turn][threadIdx.x % 32]) {}

  __device__ static bool is_last_warp() { return threadIdx.x / 32 == blockDim.x / 32 - 1; }

  __device__ void leave(TeamShared& s, int turn) const {
    if (is_last_warp()) s.children[turn][threadIdx.x % 32] = mine;
  }

  // The likeliest one, 0 if it may not be entered; and its children.
  __device__ int likely() const {
    return __shfl_sync(kFullMask, mine.token >= 0 ? mine.node : 0, 0);
  }
  __device__ Range ahead() const {
    return {__shfl_sync(kFullMask, mine.first, 0), __shfl_sync(kFullMask, mine.last, 0)};
  }

  // The one among these that holds a token, -1 when there is none.
  __device__ int find(int64_t emitted) const {
    const unsigned hits = __ballot_sync(kFullMask, mine.token == int32_t(emitted));
    return hits != 0 ? __shfl_sync(kFullMask, mine.node, __ffs(int(hits)) - 1) : -1;
  }
};

// `few`: the first of a node's children, and all if there are no `more`.
__device__ inline int find_child(const VerifyParams& p, const Place& at, const Children& few,
                                 bool more, int64_t token) {
  int found = few.find(token);
  if (found >= 0 || !more) return found;
  const Range range = Range::of(p, at.node);
  for (int skip = 32; found < 0 && range.first + skip < range.last; skip += 32) {
    found = Children(p, at.b, range.child(p, skip)).find(token);
  }
  return found;
}

// One to a lane, read ahead; those beyond 32 when they are asked for.
struct EndTokens {
  int mine;

  __device__ explicit EndTokens(const VerifyParams& p) : mine(-1) {
    const int64_t id = threadIdx.x % 32 < p.eos_count ? p.eos[threadIdx.x % 32] : -1;
    if (id >= 0 && id < p.rows.vocab) mine = int(id);
  }

  __device__ bool contain(const VerifyParams& p, int64_t token) const {
    bool hit = mine == token;
    for (int i = int(threadIdx.x % 32) + 32; i < p.eos_count; i += 32) hit |= p.eos[i] == token;
    return __any_sync(kFullMask, hit) != 0;
  }
};

// The statistics of rows that emit nothing, by a block: places [first, last) of the outputs.
__device__ inline void clear_statistics(const VerifyParams& p, int64_t first, int64_t last) {
#pragma unroll 1
  for (int64_t i = first + threadIdx.x; i < last; i += blockDim.x) p.lse[i] = -kInf;
#pragma unroll 1
  for (int64_t i = first * p.topk + threadIdx.x; i < last * p.topk; i += blockDim.x) {
    p.topk_ids[i] = -1;
    p.topk_logits[i] = -kInf;
  }
}

// Empties the outputs of request b from a depth on, by one block.
__device__ inline void clear_outputs(const VerifyParams& p, int64_t b, int depth) {
  const int64_t root = b * (p.depth + 1), last = root + p.depth + 1;
#pragma unroll 1
  for (int64_t i = root + depth + threadIdx.x; i < last; i += blockDim.x) {
    p.out_tokens[i] = -1;
    p.path[i] = i == root ? 0 : -1;
  }
  clear_statistics(p, root + depth, last);
}

struct Visited {
  Outcome outcome;
  Found found;
};

// How a walk treats its rows: as they are. ControlledVisit is the other way.
template <class E>
struct PlainVisit {
  const VerifyParams& p;
  const Request& request;

  __device__ PlainVisit(const VerifyParams& p, const Request& request, int64_t)
      : p(p), request(request) {}

  template <class Work>
  __device__ Visited choose(Team& team, const Place& at, const Work& meanwhile) {
    TeamRow<E> row(team, p.rows, at.b, at.node);
    const RowTop top = find_row_top(team, row, meanwhile);
    const bool alone = team.size() == 1;
    TeamShared& s = *team.shared();
    RawStatistics raw(team, top.raw, p.topk, row.vocab, alone ? s.my_groups : s.group_top,
                      alone ? block_groups() : kGroups);
    const Choice choice = choose_share(p, team, row, request, top, at, raw);
    raw.finish(row);
    const Found found = join(team, top, choice.best, raw.sum(), [&] {
      raw.send(team, row);
      team.make_room();
    });
    return {outcome_of(found.top, found.best, request.temperature, choice.accepted), found};
  }

  __device__ void emitted(int64_t) {}
};

template <class Visit>
__device__ void verify_request(const VerifyParams& p, Team& team, int64_t b) {
  const Request& request = team.begin(p.requests, b);
  const bool active = p.valid[b * p.rows.nodes], first_block = cluster_rank() == 0;
  const int64_t allowed = p.max_length != nullptr ? p.max_length[b] : p.depth + 1;
  const int limit = int(allowed < p.depth + 1 ? allowed : p.depth + 1);  // where any is allowed
  int32_t status = 0;
  Place at{b, active && allowed > 0 ? 0 : -1, 0};
  const bool walks = at.node >= 0;
  if (!walks) team.await(Slice(p.rows, b, 0, team.rank()));
  if (first_block) clear_outputs(p, b, 0);
  Visit visit(p, request, b);
  TeamShared& shared = *team.shared();
  const EndTokens ends(p);
  const auto write_last = [&](int depth) {
    const int64_t out = b * (p.depth + 1) + depth;
    write_statistics(team, p.topk, p.topk_ids + out * p.topk, p.topk_logits + out * p.topk,
                     p.lse + out);
  };
  Range range = Range::of(p, 0);
  Children children(p, b, range.child(p));
  children.leave(shared, 0);
  bool more = range.is_long();
  while (at.node >= 0) {
    const int node = at.node, likely = children.likely();
    const int32_t grandchild = likely > 0 ? children.ahead().child(p) : 0;  // read during the sweep
    team.guess(likely);
    const Visited row = visit.choose(team, at, [&] {
      if (likely > 0 && Children::is_last_warp()) {
        Children(p, b, grandchild).leave(shared, (at.depth + 1) % 2);
      }
      if (first_block && at.depth > 0) write_last(at.depth - 1);
    });
    children = Children(shared, at.depth % 2);
    const int64_t token = row.outcome.token, out = b * (p.depth + 1) + at.depth;
    if (row.outcome.bad) status |= kBadRow;
    if (token < 0) at.node = -1;
    if (token >= 0) {
      at.node = at.depth + 1 < limit ? find_child(p, at, children, more, token) : -1;
      ++at.depth;
      if (ends.contain(p, token)) status |= kEos, at.node = -1;
      if (at.node >= 0) {  // the next row is on its way meanwhile
        team.fetch(at.node);
        if (at.node == likely) {
          range = children.ahead(), children = Children(shared, at.depth % 2);
        } else {
          range = Range::of(p, at.node), children = Children(p, b, range.child(p));
          children.leave(shared, at.depth % 2);
        }
        more = range.is_long();
      }
      if (team.leads()) p.out_tokens[out] = token, p.path[out] = node;
      visit.emitted(token);
    }
    if (first_block) leave_statistics(shared, row.found, token >= 0);
  }
  if (first_block && walks) {
    __syncthreads();
    write_last(at.depth - 1);
  }
  if (active && p.max_length != nullptr && at.depth >= p.max_length[b]) status |= kCapped;
  if (team.leads()) p.length[b] = at.depth, p.status[b] = status;
}

template <class E>
__global__ void __launch_bounds__(kTeamThreads, blocks_inside<E>()) verify_kernel(VerifyParams p) {
  Team team(dynamic_shared<TeamShared>(), stage_offset<TeamShared>(), p.rows);
  const int64_t teams = quotient(gridDim.x, cluster_size());
  for (int64_t b = quotient(blockIdx.x, cluster_size()); b < p.rows.batch; b += teams) {
    verify_request<PlainVisit<E>>(p, team, b);
  }
  team.leave();
}

// ---- the cache: a thread takes a word of one head and moves it for every step, in order

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
