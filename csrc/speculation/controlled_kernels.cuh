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
  __device__ Epilogue(Team& team, const RowTop& top, const ThreadTops& tops,
                      const StatisticsParams& to)
      : to_(to),
        is_asked_(to.entropy != nullptr),
        shared_(*team.shared()),
        top_(top),
        bound_(is_asked_ ? block_bound(shared_, tops.value, kConfidenceTokens) : 0.0f) {}

  __device__ void raw(int, const float (&x)[4]) {
    if (is_asked_) add(sums_.raw, x, top_.raw);
  }

  __device__ void allowed(int v, const float (&x)[4]) {
    if (!is_asked_) return;
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
      row.template each<2>(team, [&](int v, float (&x)[4]) {
        raw(v, x);
        row.apply_mask(v, x);
        allowed(v, x);
      });
    }
    block_top<true>(team, row, kConfidenceTokens);
    sums_ = team.reduce(sums_, LawSums{}, AddLawSums());
    const bool law = !chosen.bad;
    const double log_sum = log(sums_.law.s);
    find_confidence(team, log_sum, confidence);
    const float entropy = !law ? -kInf : temperature_ == 0 ? 0.0f : float(sums_.kept.entropy());
    if (threadIdx.x == 0 && !law) *confidence = -kInf;
    if (team.leads()) {
      const bool sound = (top_.bad & 2) == 0 && top_.raw > -kInf;
      to_.logprob[out] =
          law ? float(double(row.at(chosen.token)) - double(top_.value) - log_sum) : -kInf;
      to_.entropy[out] = entropy;
      to_.entropy_raw[out] = sound ? float(sums_.raw.entropy()) : -kInf;
      to_.confidence[out] = *confidence;
      to_.max_prob[out] = law ? float(1 / sums_.law.s) : -kInf;
    }
    cluster_sync();  // the tops were read and may change
    return entropy;
  }

 private:
  __device__ static void add(MomentSum& sum, const float (&x)[4], float top) {
    float d[4];
#pragma unroll
    for (int k = 0; k < 4; ++k) d[k] = noise::add(x[k], -top);
    sum.add(d);
  }

  // By every block, in the same order: a walk's copies of the windows must not differ.
  __device__ void find_confidence(Team& team, double log_sum, float* confidence) {
    TeamShared& s = shared_;
    const int count = gather_tops(team, kConfidenceTokens);
    for (int i = int(threadIdx.x); i < count; i += int(blockDim.x)) {
      const int place = s.id[i] < 0 ? count : place_of(s.value, s.id, count, i);
      if (place < kConfidenceTokens) s.thread_top[place] = s.value[i];
    }
    __syncthreads();
    if (threadIdx.x != 0) return;
    int finite = 0;
    for (int i = 0; i < count; ++i) finite += s.id[i] >= 0;
    finite = finite < kConfidenceTokens ? finite : kConfidenceTokens;
    double sum = 0;
    for (int i = 0; i < finite; ++i) sum += double(s.thread_top[i]) - double(top_.value) - log_sum;
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
                                             float temperature, ThreadTops& tops) {
  RowTop top;
  bool bans = true;
#pragma unroll 1
  for (int round = 0; round < 2; ++round, bans = false) {
    row.prepare(slot, temperature, bans);
    top = find_top(team, row, tops);
    if (!row.ban_takes_all(top.id)) break;
  }
  row.raise(top.value);
  return top;
}

static __global__ void __launch_bounds__(kTeamThreads, 1) sample_controlled_kernel(SampleParams p) {
  ControlShared& shared = *dynamic_shared<ControlShared>();
  Team team(&shared);
  const int64_t teams = gridDim.x / cluster_size();
  for (int64_t b = blockIdx.x / cluster_size(); b < p.rows.batch; b += teams) {
    const TeamSlot slot(p.control, b);
    slot.load(shared, false);
    const float temperature = p.requests.temperature[b];
    ControlledRow row(p.rows, b, 0, p.control.state.sets, shared);
    ThreadTops tops;
    const RowTop top = find_controlled_top(team, row, slot, temperature, tops);
    Epilogue epilogue(team, top, tops, p.statistics);
    const Outcome outcome = sample_token(team, row, p.requests, b, top, epilogue);
    const float entropy = epilogue.finish(team, row, outcome, b, &shared.confidence);
    if (team.leads()) {
      p.token[b] = outcome.token;
      p.statistics.trigger[b] = slot.triggers(shared, entropy);
    }
  }
  cluster_sync();  // no block exits while another may read its shared memory
}

// A walk's rows after control. Every block of the team commits what is emitted to its own copy.
class ControlledVisit {
 public:
  __device__ ControlledVisit(const VerifyParams& p, int64_t b)
      : shared_(*dynamic_shared<ControlShared>()), slot_(p.control, b) {
    slot_.load(shared_, true);
  }

  __device__ Outcome choose(const VerifyParams& p, Team& team, const Place& at, RowTop& top,
                            ThreadTops& tops) {
    ControlledRow row(p.rows, at.b, at.node, p.control.state.sets, shared_);
    top = find_controlled_top(team, row, slot_, p.requests.temperature[at.b], tops);
    Epilogue epilogue(team, top, tops, p.statistics);
    const Outcome outcome = choose_token(p, team, row, top, at, epilogue);
    const int64_t out = at.b * (p.depth + 1) + at.depth;
    entropy_ = epilogue.finish(team, row, outcome, out, &shared_.confidence);
    if (team.leads() && p.statistics.trigger != nullptr) {
      p.statistics.trigger[out] = slot_.triggers(shared_, entropy_);
    }
    return outcome;
  }

  __device__ void emitted(const Outcome& chosen) {
    __syncthreads();
    if (threadIdx.x != 0 || slot_.slot < 0) return;
    slot_.commit(shared_, chosen.token, entropy_, shared_.confidence);
  }

  // Statistics of the rows from `first` on.
  __device__ static void clear(const VerifyParams& p, int64_t b, int first) {
    const StatisticsParams& s = p.statistics;
    if (s.entropy == nullptr) return;
    const int64_t row = b * (p.depth + 1);
    for (int64_t i = row + first + threadIdx.x; i <= row + p.depth; i += blockDim.x) {
      s.logprob[i] = s.entropy[i] = s.entropy_raw[i] = s.confidence[i] = s.max_prob[i] = -kInf;
      s.trigger[i] = false;
    }
  }

 private:
  ControlShared& shared_;
  const TeamSlot slot_;
  float entropy_ = -kInf;
};

static __global__ void __launch_bounds__(kTeamThreads, 1) verify_controlled_kernel(VerifyParams p) {
  Team team(dynamic_shared<ControlShared>());
  const int64_t teams = gridDim.x / cluster_size();
  for (int64_t b = blockIdx.x / cluster_size(); b < p.rows.batch; b += teams) {
    verify_request<AnyElement, ControlledVisit>(p, team, b);
  }
  cluster_sync();  // no block exits while another may read its shared memory
}

}  // namespace reasonkern
