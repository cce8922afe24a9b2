// The kernels of the sampler under control: the rows of verify_kernels.cuh after control, and the
// statistics of their laws, summed while a token is drawn.
#pragma once

#include "team_control.cuh"
#include "verify_kernels.cuh"

namespace reasonkern {

// Sums of exp(d) and exp(d) d over a thread's tokens; d = -inf adds nothing.
struct MomentSum {
  double s, u;

  __device__ void add(const float (&d)[4]) {
    float sum = 0, product = 0;
#pragma unroll
    for (int k = 0; k < 4; ++k) {
      const float e = noise::exp_of(d[k]);
      sum += e;
      product += e > 0 ? e * d[k] : 0.0f;
    }
    s += double(sum);
    u += double(product);
  }

  __device__ double entropy() const { return log(s) - u / s; }
};

struct LawSums {
  MomentSum raw, law, kept;
};

struct AddLawSums {
  __device__ LawSums operator()(LawSums a, const LawSums& b) const {
    a.raw.s += b.raw.s, a.raw.u += b.raw.u;
    a.law.s += b.law.s, a.law.u += b.law.u;
    a.kept.s += b.kept.s, a.kept.u += b.kept.u;
    return a;
  }
};

// Sees a row's tokens while one is drawn; -inf where there is no law. Without anybody who asks it
// does nothing.
class Epilogue {
 public:
  static constexpr bool kSeesAll = true;

  __device__ Epilogue(Team& team, const RowTop& top, const ShareTops& tops,
                      const StatisticsParams& to)
      : to_(to),
        is_asked_(to.entropy != nullptr),
        shared_(*team.shared()),
        top_(top),
        bound_(is_asked_ ? bound_of(tops.allowed) : 0.0f) {}

  __device__ float floor() const { return -kInf; }

  template <class Row, class Group>
  __device__ void raw(const Row&, const Group& group, float) {
    if (!is_asked_) return;
    group.each([&](int, const float (&x)[4], int) { add(sums_.raw, x, top_.raw); });
  }

  template <class Row, class Group>
  __device__ void allowed(const Row& row, const Group& group) {
    if (!is_asked_) return;
    group.each([&](int v, float (&x)[4], int) {
      row.apply_mask(v, x);
      allowed(v, x);
    });
  }

  __device__ void kept(float temperature, float top, Cut cut) {
    temperature_ = temperature, kept_top_ = top, cut_ = cut;
  }

  __device__ void swept() { is_swept_ = true; }

  // Writes the statistics; every thread gets the entropy, every block the confidence.
  template <class Row>
  __device__ float finish(Team& team, const Row& row, const Outcome& chosen, int64_t out,
                          float* confidence) {
    if (!is_asked_) {
      if (threadIdx.x == 0) *confidence = -kInf;
      return -kInf;
    }
    if (!is_swept_) {
      row.each_group([&](const auto& group) {
        raw(row, group, 0);
        allowed(row, group);
      });
    }
    sums_ = team.reduce(sums_, AddLawSums());
    const bool law = !chosen.bad;
    const double log_sum = log(sums_.law.s);
    send_candidates<true>(team, row, kConfidenceTokens, true);
    find_confidence(team, log_sum, confidence);
    const float entropy = !law ? -kInf : temperature_ == 0 ? 0.0f : float(sums_.kept.entropy());
    if (threadIdx.x == 0 && !law) *confidence = -kInf;
    if (team.leads()) {
      to_.logprob[out] =
          law ? float(double(row.at(chosen.token)) - double(top_.value) - log_sum) : -kInf;
      to_.entropy[out] = entropy;
      to_.entropy_raw[out] = is_sound(top_) ? float(sums_.raw.entropy()) : -kInf;
      to_.confidence[out] = *confidence;
      to_.max_prob[out] = law ? float(1 / sums_.law.s) : -kInf;
    }
    return entropy;
  }

 private:
  __device__ void allowed(int v, const float (&x)[4]) {
    add(sums_.law, x, top_.value);
    add_candidates(shared_, bound_, v, x);
    if (temperature_ == 0) return;
    float d[4];
#pragma unroll
    for (int k = 0; k < 4; ++k) {
      const float value = noise::divide(x[k], temperature_);
      d[k] = cut_.keeps(value, v + k) ? noise::add(value, -kept_top_) : -kInf;
    }
    sums_.kept.add(d);
  }

  __device__ float bound_of(float thread_top) {
    __syncthreads();  // the candidates before are ranked, `group_top` is read
    start_candidates(shared_, thread_top);
    if (threadIdx.x == 0) shared_.count = 0;
    __syncthreads();
    return candidate_bound(shared_.my_groups, block_groups(), kConfidenceTokens);
  }

  __device__ static void add(MomentSum& sum, const float (&x)[4], float top) {
    float d[4];
#pragma unroll
    for (int k = 0; k < 4; ++k) d[k] = noise::add(x[k], -top);
    sum.add(d);
  }

  // By every block, in the same order: a walk's copies of the windows must not differ.
  __device__ void find_confidence(Team& team, double log_sum, float* confidence) {
    TeamShared& s = shared_;
    const TopPair(*tops)[kMaxTopK / 2] = team.receive_tops();
    for (int i = int(threadIdx.x); i < kConfidenceTokens; i += int(blockDim.x)) {
      s.group_top[i] = -kInf;
    }
    __syncthreads();
    merge_tops(tops, kConfidenceTokens, int(team.size()),
               [&](int place, float value, int) { s.group_top[place] = value; });
    __syncthreads();
    if (threadIdx.x != 0) return;
    int finite = 0;
    double sum = 0;
    for (; finite < kConfidenceTokens && s.group_top[finite] > -kInf; ++finite) {
      sum += double(s.group_top[finite]) - double(top_.value) - log_sum;
    }
    *confidence = float((0 - sum) / double(finite));
  }

  const StatisticsParams& to_;
  const bool is_asked_;
  TeamShared& shared_;
  const RowTop top_;
  const float bound_;
  LawSums sums_{};
  float temperature_ = 0, kept_top_ = 0;
  Cut cut_{-kInf, kLastId};
  bool is_swept_ = false;
};

__device__ inline RowTop find_controlled_top(Team& team, ControlledRow& row, const TeamSlot& slot,
                                             float temperature) {
  RowTop top;
  bool bans = true;
#pragma unroll 1
  for (int round = 0; round < 2; ++round, bans = false) {
    row.prepare(slot, temperature, bans);
    top = find_top(team, row);
    if (!row.ban_takes_all(top.value)) break;
  }
  row.raise(top.value);
  return top;
}

static __global__ void __launch_bounds__(kTeamThreads, blocks_inside<AnyElement>())
    sample_controlled_kernel(SampleParams p) {
  ControlShared& shared = *dynamic_shared<ControlShared>();
  Team team(&shared, stage_offset<ControlShared>(), p.rows);
  const int64_t teams = quotient(gridDim.x, cluster_size());
  for (int64_t b = quotient(blockIdx.x, cluster_size()); b < p.rows.batch; b += teams) {
    const Request& request = team.begin(p.requests, b);
    const TeamSlot slot(p.control, b);
    slot.load(shared, false);
    ControlledRow row(team, p.rows, b, 0, p.control.state.sets, shared);
    const RowTop top = find_controlled_top(team, row, slot, request.temperature);
    Epilogue epilogue(team, top, row.tops, p.statistics);
    const Best share = sample_share(team, row, request, top, request.position, epilogue);
    const Best best = team.reduce(share, TakeBest());
    const Outcome outcome = outcome_of(top, best, request.temperature);
    const float entropy = epilogue.finish(team, row, outcome, b, &shared.confidence);
    if (team.leads()) {
      p.token[b] = outcome.token;
      p.statistics.trigger[b] = slot.triggers(shared, entropy);
    }
    __syncthreads();  // the row is read
  }
  team.leave();
}

// A walk's rows after control. Every block of the team commits what is emitted to its own copy.
class ControlledVisit {
 public:
  __device__ ControlledVisit(const VerifyParams& p, const Request& request, int64_t b)
      : p_(p), request_(request), shared_(*dynamic_shared<ControlShared>()), slot_(p.control, b) {
    slot_.load(shared_, true);
    if (cluster_rank() == 0) clear(b);
  }

  template <class Work>
  __device__ Visited choose(Team& team, const Place& at, const Work& meanwhile) {
    ControlledRow row(team, p_.rows, at.b, at.node, p_.control.state.sets, shared_);
    const RowTop top = find_controlled_top(team, row, slot_, request_.temperature);
    meanwhile();
    Epilogue epilogue(team, top, row.tops, p_.statistics);
    const Choice choice = choose_share(p_, team, row, request_, top, at, epilogue);
    const Best best = team.reduce(choice.best, TakeBest());
    const Outcome outcome = outcome_of(top, best, request_.temperature, choice.accepted);
    const int64_t out = at.b * (p_.depth + 1) + at.depth;
    entropy_ = epilogue.finish(team, row, outcome, out, &shared_.confidence);
    if (team.leads() && p_.statistics.entropy != nullptr) {
      if (outcome.token < 0) p_.statistics.entropy_raw[out] = -kInf;  // a row that emits nothing
      p_.statistics.trigger[out] = slot_.triggers(shared_, entropy_);
    }
    return {outcome, describe(team, row, top)};
  }

  __device__ void emitted(int64_t token) {
    if (threadIdx.x != 0 || slot_.record == nullptr) return;
    slot_.commit(shared_, token, entropy_, shared_.confidence);
  }

 private:
  // The raw statistics, in a sweep of their own: `epilogue` used the candidates.
  __device__ Found describe(Team& team, const ControlledRow& row, const RowTop& top) {
    __syncthreads();  // the statistics before are read
    start_candidates(shared_, row.tops.raw);
    __syncthreads();
    RawStatistics raw(team, top.raw, p_.topk, row.vocab, shared_.my_groups, block_groups());
    raw.finish(row);
    return join(team, top, {-kInf, -1}, raw.sum(), [&] { raw.send(team, row); });
  }

  __device__ void clear(int64_t b) {
    const StatisticsParams& s = p_.statistics;
    if (s.entropy == nullptr) return;
    const int64_t first = b * (p_.depth + 1);
    for (int64_t i = first + threadIdx.x; i <= first + p_.depth; i += blockDim.x) {
      s.logprob[i] = s.entropy[i] = s.entropy_raw[i] = s.confidence[i] = s.max_prob[i] = -kInf;
      s.trigger[i] = false;
    }
  }

  const VerifyParams& p_;
  const Request& request_;
  ControlShared& shared_;
  const TeamSlot slot_;
  float entropy_ = -kInf;
};

static __global__ void __launch_bounds__(kTeamThreads, blocks_inside<AnyElement>())
    verify_controlled_kernel(VerifyParams p) {
  Team team(dynamic_shared<ControlShared>(), stage_offset<ControlShared>(), p.rows);
  const int64_t teams = quotient(gridDim.x, cluster_size());
  for (int64_t b = quotient(blockIdx.x, cluster_size()); b < p.rows.batch; b += teams) {
    verify_request<ControlledVisit>(p, team, b);
  }
  team.leave();
}

}  // namespace reasonkern
