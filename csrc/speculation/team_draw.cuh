// A draw from a row by a team, and what its blocks tell each other of it.
#pragma once

#include "team_row.cuh"

namespace reasonkern {

// Who sees a row's tokens while one is drawn: groups whose largest logit is not below `floor`, as
// they came and as they are drawn from.
struct Nothing {
  static constexpr bool kSeesAll = false;  // whatever their logits
  __device__ float floor() const { return kInf; }
  template <class Row, class Group>
  __device__ void raw(const Row&, const Group&, float) {}
  template <class Row, class Group>
  __device__ void allowed(const Row&, const Group&) {}
  __device__ void kept(float, float, Cut) {}
  __device__ void swept() {}
};

struct Draw {
  float temperature, top;
  Cut cut;
  uint64_t seed, position;
  uint32_t stream;
  int skip_count;  // tokens of TeamShared::skip, which have log-weights of their own
};

// An upper bound of the noise of a word: -ln u, whose logarithm is bounded by the float's own bits.
__device__ __forceinline__ float noise_bound(uint32_t word) {
  return fmaf(float(int32_t(noise::word_of(noise::from_word(word)))), -8.26295832e-8f, 110.2105f);
}

__device__ __forceinline__ void offer(const Team& team, const Draw& d, float logit, uint32_t word,
                                      int token, Best& best) {
  const float value = noise::divide(logit, d.temperature);
  if (!d.cut.keeps(value, token)) return;
  for (int i = 0; i < d.skip_count; ++i) {
    if (team.shared()->skip[i] == token) return;
  }
  best.offer(noise::add(value, noise::gumbel_of(word)), token);
}

constexpr float kMinNoise = -2.8116f;  // below that of the largest uniform number

// Perturbed values below the bar cannot be the best, whose value is at least `score`: what rounding
// adds to a value, to its bounds and to z times 1/T is less than the distance.
__device__ __forceinline__ float bar_of(float score) {
  return score - 2e-3f - 1e-6f * fabsf(score);
}

// Logits below it stay below the bar. (A tiny temperature rounds.)
__device__ __forceinline__ float floor_of(float bar, float temperature) {
  return temperature < 0x1p-100f ? -kInf : (bar - kMaxNoise) * temperature;
}

// Words above it bring a value no further up than by `step`: -ln u bounds the noise.
__device__ __forceinline__ uint32_t word_limit(float step) {
  if (!(step > 0)) return 0xffffffffu;
  const float words = exp2_approx<true>(32.0f - 1.44269504f * step);
  return uint32_t(fminf(words, 0x1.fffffep31f)) + 1;
}

// Not above the noise of a word: ln(1 - u) - ln u.
__device__ __forceinline__ float least_noise(uint32_t word) {
  return __logf(float(~word)) - __logf(float(word | 1));
}

// How far a draw has come: the best value of the thread, and what the block's is not below.
struct Bar {
  unsigned key;
  float bar, floor;

  __device__ void raise(unsigned other, float temperature) {
    if (other <= key) return;
    key = other, bar = bar_of(value_of(key)), floor = floor_of(bar, temperature);
  }
};

// Raises the block's bar by what the first quads are worth at least: a flat row's later tokens are
// then passed over, who would be the best so far one after the other. By whole warps. A few likely
// quads, as peaked rows have, say little.
template <class Row>
__device__ void look_ahead(Team& team, const Row& row, const Draw& d, float inverse, Bar& bar) {
  const int v = row.slice.first + 4 * int(threadIdx.x);
  float x[4] = {-kInf, -kInf, -kInf, -kInf};
  if (v < row.slice.last) row.read(v, x), row.apply_mask(v, x);
  if (__popc(__ballot_sync(kFullMask, !(top_of(x) < bar.floor))) < 8) return;
  const PhiloxWords words = noise_block(d.seed, d.position, d.stream, uint32_t(v / 4));
  float least = -kInf;
#pragma unroll
  for (int k = 0; k < 4; ++k) least = fmaxf(least, fmaf(x[k], inverse, least_noise(words.w[k])));
  const unsigned key = __reduce_max_sync(kFullMask, key_of(least));
  if (key > bar.key && threadIdx.x % 32 == 0) atomicMax(&team.shared()->best, key);
  bar.raise(key, d.temperature);
}

// Whether few threads have a logit at or above `floor` in their share: they are listed then. Starts
// the row's candidates; a barrier. In a peaked row a few tokens count, and threads to whose shares
// they happen to belong would look at them one after the other while all others wait.
template <class Row>
__device__ bool list_likely(TeamShared& s, const Row& row, float floor) {
  const bool mine = !(row.tops.raw < floor);
  const unsigned hits = __ballot_sync(kFullMask, mine), lane = threadIdx.x % 32;
  const int limit = int(blockDim.x / 4);
  if (hits != 0) {  // of the warp, by one atomic
    int slot = 0;
    if (lane == 0) slot = atomicAdd(&s.likely_count, __popc(hits));
    slot = __shfl_sync(kFullMask, slot, 0) + __popc(hits & ((1u << lane) - 1));
    if (mine && slot < limit) s.likely[slot] = uint16_t(threadIdx.x);
  }
  if (threadIdx.x == 0) s.count = 0;
  __syncthreads();
  return s.likely_count <= limit;
}

// body(chunk) for the chunks of the shares that are listed, a share to a warp.
template <class Row, class Body>
__device__ __forceinline__ void each_listed_chunk(const TeamShared& s, const Row& row,
                                                  const Body& body) {
  const int count = s.likely_count, warps = int(blockDim.x / 32);
#pragma unroll 1
  for (int i = int(threadIdx.x / 32); i < count; i += warps) row.each_chunk(s.likely[i], body);
}

// Offers the tokens of a quad.
template <class Row>
__device__ __forceinline__ void offer_quad(const Team& team, const Row& row, const Draw& d, int v,
                                           const PhiloxWords& words, float inverse, float bar,
                                           Best& best) {
  float x[4];
  row.read(v, x);
  row.apply_mask(v, x);
  unsigned likely = 0;
#pragma unroll
  for (int k = 0; k < 4; ++k) {
    if (!(fmaf(x[k], inverse, noise_bound(words.w[k])) < bar)) likely |= 1u << k;
  }
#pragma unroll 1  // rarely entered: one copy
  for (; likely != 0; likely &= likely - 1) {
    const int k = __ffs(int(likely)) - 1;
    offer(team, d, lane_of(x, k), lane_of(words.w, k), v + k, best);
  }
}

// Offers the tokens of a group whose largest logit is `top`. Two quads at a time: Philox is a
// chain.
template <class Row, class Group>
__device__ __forceinline__ void offer_group(const Team& team, const Row& row, const Draw& d,
                                            const Group& group, float top, float inverse,
                                            const Bar& bar, Best& best) {
  static_assert(Group::kQuads % 2 == 0 || Group::kQuads == 1, "pairs, or a single one");
  constexpr int kPair = Row::kHasRoom && Group::kQuads > 1 ? 2 : 1;
  const uint32_t limit = word_limit(bar.bar - top * inverse);
#pragma unroll 1
  for (int quad = 0; quad < Group::kQuads; quad += kPair) {
    PhiloxWords words[kPair];
    bool likely[kPair];
#pragma unroll
    for (int j = 0; j < kPair; ++j) {
      const int v = group.quad_of(quad + j);
      words[j] = noise_block(d.seed, d.position, d.stream, uint32_t(v / 4));
      const uint32_t* w = words[j].w;
      likely[j] = v < group.last && min(min(w[0], w[1]), min(w[2], w[3])) <= limit;
    }
    if (!likely[0] && !likely[kPair - 1]) continue;
#pragma unroll 1  // rarely entered: one copy
    for (int j = 0; j < kPair; ++j) {
      if (j == 0 ? !likely[0] : !likely[kPair - 1]) continue;
      const PhiloxWords chosen = j == 0 ? words[0] : words[kPair - 1];
      offer_quad(team, row, d, group.quad_of(quad + j), chosen, inverse, bar.bar, best);
    }
  }
}

// The best of the tokens that are left out of a row's law and drawn by weights of their own.
__device__ inline Best draw_skipped(const TeamShared& s, const Draw& d, int vocab) {
  Best best{-kInf, -1};
  for (int i = 0; i < d.skip_count; ++i) {
    const int64_t token = s.skip[i];
    if (token < 0 || token >= vocab) continue;
    const float g = gumbel_noise(d.seed, d.position, uint32_t(token), d.stream);
    best.offer(noise::add(s.log_weight[i], g), int(token));
  }
  return best;
}

// The largest value plus noise of this thread's share, if it may be the block's. Tokens are passed
// over whose bound is below a value that the block has seen: nothing that could win is. `also` sees
// every token, as it came and as it is drawn from.
template <class Row, class Also>
__device__ Best draw(Team& team, Row& row, const Draw& d, Also& also) {
  TeamShared& s = *team.shared();
  Best best = draw_skipped(s, d, row.vocab);
  const float inverse = inverse_temperature(d.temperature);
  Bar bar{0, -kInf, -kInf};
  // With tokens left out the top may be among them.
  bar.raise(key_of(d.skip_count > 0 ? best.score : d.top + kMinNoise), d.temperature);
  const auto see = [&](const auto& group) {
    const float group_top = group.top();
    if (group_top < fminf(bar.floor, also.floor())) return;
    also.raw(row, group, group_top);
    also.allowed(row, group);
    const float top = row.may_change() ? allowed_top(row, group, group_top) : group_top;
    bar.raise(*const_cast<volatile unsigned*>(&s.best), d.temperature);
    if (top < bar.floor) return;
    offer_group(team, row, d, group, top, inverse, bar, best);
    if (key_of(best.score) > bar.key) atomicMax(&s.best, key_of(best.score));
  };
  also.swept();
  if constexpr (!Also::kSeesAll) {
    if (list_likely(s, row, fminf(bar.floor, also.floor())) && Row::kHasRoom) {
      if (team.is_room_wanted()) row.leave_copy(), team.make_room();
      each_listed_chunk(s, row, see);
      return best;
    }
  }
  if (d.skip_count == 0 && !(d.cut.value > -kInf)) look_ahead(team, row, d, inverse, bar);
  row.each_group(see);
  return best;
}

// A row is bad when z/T of its top, or a logit, is not finite.
__device__ __forceinline__ bool is_bad(const RowTop& top, float temperature) {
  const float value = temperature == 0 ? top.value : noise::divide(top.value, temperature);
  return (top.bad & 1) != 0 || !(fabsf(value) < kInf);
}

// A draw from the filtered row with the target's noise.
template <class Row>
__device__ Draw target_draw(Team& team, const Row& row, const Request& r, const RowTop& top,
                            uint64_t position) {
  const float value = noise::divide(top.value, r.temperature);
  return {r.temperature, value, filter_cut(team, row, r, value), r.seed, position, kTarget, 0};
}

struct Found {
  RowTop top;
  Best best;
  int64_t sum;  // of exp(x - top) over the raw logits, in units of 2^-40
};

struct Share {
  Best best;
  int64_t sum;
};

struct JoinShares {};

// Overload, see that of RowTop.
__device__ __forceinline__ Share reduce_lanes(Share x, unsigned n, JoinShares) {
  const unsigned key = key_of(x.best.score + 0.0f), top = __reduce_max_sync(kFullMask, key);
  x.best.id = int(__reduce_min_sync(kFullMask, key == top ? unsigned(x.best.id) : ~0u));
  x.best.score = value_of(top);
  x.sum = reduce_lanes(x.sum, n, Sum());
  return x;
}

// `top` is the row's; `meanwhile` is behind a barrier.
template <class Work>
__device__ Found join(Team& team, const RowTop& top, const Best& best, int64_t sum,
                      const Work& meanwhile) {
  Share share = team.reduce_block(Share{best, sum}, JoinShares());
  share = reduce_lanes(team.exchange(share, meanwhile), team.size(), JoinShares());
  return {top, share.best, share.sum};
}

// accepted: the child that passed the coins, or -1.
__device__ __forceinline__ Outcome outcome_of(const RowTop& top, const Best& best,
                                              float temperature, int accepted = -1) {
  if (is_bad(top, temperature)) return {best.id, true};
  return {accepted >= 0 ? accepted : best.id, false};
}

}  // namespace reasonkern
