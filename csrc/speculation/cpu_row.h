// A row of logits on the CPU: single logits changed, its statistics, what the filters keep of it,
// and draws from it.
#pragma once

#include <algorithm>
#include <vector>

#include "cpu_passes.h"

namespace reasonkern {
namespace cpu {

struct Candidate {
  float value;
  int32_t id;
  int64_t mass;
};

inline bool before(const Candidate& a, const Candidate& b) {
  return comes_before(a.value, a.id, b.value, b.id);
}

struct RequestFilters {
  float temperature;
  int64_t top_k;
  float top_p, min_p;
};

// Sums over a law's tokens, d = x - top: s = sum exp(d), u = sum exp(d) d.
struct Moments {
  double top, s, u;

  double entropy() const { return std::log(s) - u / s; }
  double log_probability(float x) const { return double(x) - top - std::log(s); }
};

// Buffers are kept from row to row; one instance per thread. Tiles are where the caller, or a
// buffer of ours, has them: a changed logit moves one tile, not the row.
class Row {
 public:
  // `with_sum`: statistics will be asked for.
  template <class E>
  void load(const E* logits, int64_t vocab, bool with_sum) {
    copy_.resize(padded(vocab));
    widen(logits, vocab, copy_.data());
    std::fill(copy_.begin() + vocab, copy_.end(), -kInf);
    set(copy_.data(), vocab, false, with_sum);
  }

  void load(const float* logits, int64_t vocab, bool with_sum) {
    set(logits, vocab, true, with_sum);
  }

  // Forbids the tokens whose bit is not set.
  void mask(const int32_t* words) {
    std::vector<float>& out = masked_;
    out.resize(padded(vocab_));
    for (int64_t v = 0; v < vocab_; ++v) {
      out[v] = uint32_t(words[v / 32]) >> (v % 32) & 1 ? logit(v) : -kInf;
    }
    std::fill(out.begin() + vocab_, out.end(), -kInf);
    set(out.data(), vocab_, false, false);
  }

  // Raw statistics, before `mask`.
  void statistics(int k, int64_t* ids, float* logits, float* lse) {
    std::fill(ids, ids + k, int64_t{-1});
    std::fill(logits, logits + k, -kInf);
    *lse = -kInf;
    if (!sound_ || top_ == -kInf) return;
    find_largest(k);
    for (size_t i = 0; i < largest_.size(); ++i) {
      ids[i] = largest_[i].id;
      logits[i] = largest_[i].value;
    }
    *lse = float(sum_.logarithm());
  }

  // Of the whole row at temperature 1. Tiles far below the top weigh nothing and are not read.
  bool moments(Moments& m) {
    m = {double(top_), 0, 0};
    if (!sound_ || top_ == -kInf) return false;
    sums_.resize(tiles_.size(), 0);
    products_.resize(tiles_.size());
    for (size_t t = 0; t < tiles_.size(); ++t) {
      const double d = double(maxima_[t]) - m.top;
      if (!(d > -kNegligible)) continue;
      if (sums_[t] == 0) passes().tile_moments(tiles_[t], maxima_[t], &sums_[t], &products_[t]);
      const double scale = std::exp(d);
      m.s += scale * sums_[t];
      m.u += scale * (products_[t] + d * sums_[t]);
    }
    return true;
  }

  // -(1/k) sum log p over the k largest logits, fewer where fewer are finite.
  double confidence(const Moments& m, int k) {
    gather(largest_tile(k));
    auto last = candidates_.end();
    if (int64_t(candidates_.size()) > k) {
      last = candidates_.begin() + k;
      std::nth_element(candidates_.begin(), last, candidates_.end(), before);
    }
    double sum = 0;
    int64_t count = 0;
    for (auto c = candidates_.begin(); c != last; ++c) {
      if (c->value > -kInf) sum += m.log_probability(c->value), ++count;
    }
    return (0 - sum) / double(count);
  }

  // After `filter`: entropy of the law that `choose` draws from.
  double kept_entropy() const {
    if (temperature_ == 0) return 0;
    const Choice c = draw(NoiseKey(0, 0, 0), nullptr, 0);
    Moments m{double(top_value_), 0, 0};
    each_part([&](const Part& p) {
      passes().kept_moments(p.x, p.n, maxima_of(p), p.first, c, &m.s, &m.u);
    });
    return m.entropy();
  }

  // ---- single logits, before `filter`: `write` as many as there are, then `refresh`

  float logit(int64_t v) const { return tiles_[v / kTile][v % kTile]; }
  bool is_sound() const { return sound_ && top_ > -kInf; }
  int64_t vocab() const { return vocab_; }

  void write(int64_t v, float logit) {
    const int64_t t = v / kTile;
    largest_.clear();
    edited_.resize(std::max<size_t>(edited_.size(), padded(vocab_)));
    float* own = edited_.data() + t * kTile;
    if (tiles_[t] != own) {
      std::copy(tiles_[t], tiles_[t] + kTile, own);
      tiles_[t] = own;
    }
    if (stale_.empty() || stale_.back() != t) stale_.push_back(t);
    own[v % kTile] = logit;
  }

  void refresh() {
    if (stale_.empty()) return;
    for (const int64_t t : stale_) {
      const float top = passes().tile_maxima(tiles_[t], kTile, &maxima_[t], nullptr);
      sound_ &= top == top;
      if (!sums_.empty()) sums_[t] = 0;
    }
    stale_.clear();
    if (!sound_) measure(nullptr);  // what made it bad may be gone
    top_ = *std::max_element(maxima_.begin(), maxima_.end());
  }

  // Temperature and filters; false: the row is bad, use `fallback`.
  bool filter(const RequestFilters& f) {
    temperature_ = f.temperature;
    top_value_ = f.temperature == 0 ? top_ : noise::divide(top_, f.temperature);
    if (!sound_ || !std::isfinite(top_value_)) return false;
    cut_ = {-kInf, kLastId};
    if (f.temperature == 0) return true;
    if (filters_by_rank(f.top_k, vocab_)) cut_ = rank_cut(f.top_k);
    if (!(f.top_p >= 1)) cut_ = mass_cut(f.top_p);
    cut_ = tighter(cut_, min_p_cut(f.min_p, top_value_));
    return true;
  }

  int64_t argmax() const {
    if (!largest_.empty()) return largest_.front().id;
    const int64_t tile = std::find(maxima_.begin(), maxima_.end(), top_) - maxima_.begin();
    int64_t v = tile * kTile;
    while (logit(v) != top_) ++v;
    return v;
  }

  int64_t fallback() const {
    Best best{-kInf, -1};
    for (int64_t v = 0; v < vocab_; ++v) {
      if (std::isfinite(logit(v))) best.offer(logit(v), int(v));
    }
    return best.id;
  }

  // The largest value plus noise of the given stream. `skip` are tokens that `best` accounts for.
  int64_t choose(const NoiseKey& key, const int64_t* skip, int skip_count, Best best) const {
    if (temperature_ == 0) return argmax();
    const Choice c = draw(key, skip, skip_count);
    const auto offer = [&](float logit, int64_t token) {
      c.offer(logit, noise_word(key.seed, key.position, key.stream, uint32_t(token)), int(token),
              best);
    };
    offer(top_, argmax());
    // Where the last of the largest cannot win, nothing below it can.
    if (!largest_.empty() && largest_.back().value < c.least_logit(best.score)) {
      for (const Candidate& t : largest_) {
        if (!(t.value < c.least_logit(best.score))) offer(t.value, t.id);
      }
      return best.id;
    }
    each_part([&](const Part& p) { passes().choose(p.x, p.n, maxima_of(p), p.first, c, best); });
    return best.id;
  }

  // Mass of all kept tokens.
  int64_t total_mass() const {
    const Choice c = draw(NoiseKey(0, 0, 0), nullptr, 0);
    int64_t total = 0;
    each_part([&](const Part& p) { total += passes().sum_of_masses(p.x, p.n, p.first, c); });
    return total;
  }

  // Mass of a token, 0 where it is not kept.
  int64_t mass(int64_t token) const {
    if (token < 0 || token >= vocab_) return 0;
    const float value = noise::divide(logit(token), temperature_);
    return cut_.keeps(value, int(token)) ? mass_of(value, top_value_) : 0;
  }

  float top_value() const { return top_value_; }

 private:
  // Tiles that are neighbours in memory.
  struct Part {
    const float* x;
    int64_t n, first;
  };

  static void widen(const BFloat16* x, int64_t n, float* out) { passes().widen_bf16(x, n, out); }
  static void widen(const Half* x, int64_t n, float* out) { passes().widen_fp16(x, n, out); }
  static void widen(const double* x, int64_t n, float* out) { std::copy(x, x + n, out); }

  Choice draw(const NoiseKey& key, const int64_t* skip, int skip_count) const {
    return {temperature_, top_value_, cut_, key, skip, skip_count};
  }

  static int64_t padded(int64_t n) { return (n + kTile - 1) / kTile * kTile; }

  template <class Body>
  void each_part(const Body& body) const {
    for (size_t first = 0, t = 0; first < tiles_.size(); first = t) {
      for (t = first + 1; t < tiles_.size() && tiles_[t] == tiles_[t - 1] + kTile;) ++t;
      body(Part{tiles_[first], int64_t(t - first) * kTile, int64_t(first) * kTile});
    }
  }

  const float* maxima_of(const Part& p) const { return maxima_.data() + p.first / kTile; }

  void set(const float* x, int64_t vocab, bool borrowed, bool with_sum) {
    vocab_ = vocab;
    const int64_t whole = borrowed ? vocab / kTile * kTile : padded(vocab);
    tiles_.resize(padded(vocab) / kTile);
    for (int64_t t = 0; t < whole / kTile; ++t) tiles_[t] = x + t * kTile;
    if (whole < vocab) {
      rest_.assign(kTile, -kInf);
      std::copy(x + whole, x + vocab, rest_.begin());
      tiles_.back() = rest_.data();
    }
    maxima_.assign((tiles_.size() + 15) / 16 * 16, -kInf);  // any instruction set's vectors
    sums_.clear();
    largest_.clear();
    sum_ = ExpSum();
    measure(with_sum ? &sum_ : nullptr);
  }

  void measure(ExpSum* sum) {
    sound_ = true;
    top_ = -kInf;
    each_part([&](const Part& p) {
      const float top = passes().tile_maxima(p.x, p.n, maxima_.data() + p.first / kTile, sum);
      sound_ &= top == top;
      top_ = std::max(top_, top);
    });
  }

  // A bound that just k maxima of tiles reach, more where they are equal: k tokens at least are
  // not below it.
  float largest_tile(int64_t k) const {
    if (k > int64_t(tiles_.size())) return -kInf;
    return passes().reached_by(maxima_.data(), int64_t(maxima_.size()), k, top_);
  }

  // The k largest logits in order, fewer where fewer are finite.
  void find_largest(int64_t k) {
    gather(largest_tile(k));
    if (int64_t(candidates_.size()) > kMaxTopK) {  // at least k
      const auto last = candidates_.begin() + k;
      std::nth_element(candidates_.begin(), last - 1, candidates_.end(), before);
      candidates_.erase(last, candidates_.end());
    }
    // Ranks, as no branch depends on them.
    ranks_.assign(candidates_.size(), 0);
    for (size_t i = 1; i < candidates_.size(); ++i) {
      for (size_t j = 0; j < i; ++j) {
        const bool ahead = before(candidates_[j], candidates_[i]);
        ranks_[i] += ahead;
        ranks_[j] += !ahead;
      }
    }
    largest_.resize(candidates_.size());
    for (size_t i = 0; i < candidates_.size(); ++i) largest_[ranks_[i]] = candidates_[i];
    while (int64_t(largest_.size()) > k || largest_.back().value == -kInf) largest_.pop_back();
  }

  // Candidates with logits from `least` up, their values the logits.
  void gather(float least) {
    ids_.resize(padded(vocab_));
    candidates_.clear();
    each_part([&](const Part& p) {
      const int64_t count = passes().collect(p.x, p.n, maxima_of(p), least, ids_.data());
      for (int64_t i = 0; i < count; ++i) {
        const int64_t v = p.first + ids_[i];
        if (v < vocab_) candidates_.push_back({p.x[ids_[i]], int32_t(v), 0});
      }
    });
  }

  // A logit below which z/T is below that of `logit`.
  float strictly_below(float logit) const {
    return logit - 4e-7f * std::fabs(logit) - 1e-30f * std::max(1.0f, temperature_);
  }

  Cut rank_cut(int64_t k) {
    gather(strictly_below(largest_tile(k)));
    for (Candidate& c : candidates_) c.value = noise::divide(c.value, temperature_);
    const auto last = candidates_.begin() + (k - 1);
    std::nth_element(candidates_.begin(), last, candidates_.end(), before);
    return {last->value, last->id};
  }

  // The last token whose predecessors have less mass than P of what cut_ keeps: quickselect by
  // mass. Tokens more than 27.8 below the top have none.
  Cut mass_cut(float top_p) {
    gather(strictly_below((top_value_ - 27.8f) * temperature_));
    int64_t total = 0;
    size_t kept = 0;
    for (Candidate c : candidates_) {
      c.value = noise::divide(c.value, temperature_);
      if (!cut_.keeps(c.value, c.id)) continue;
      c.mass = mass_of(c.value, top_value_);
      total += c.mass;
      candidates_[kept++] = c;
    }
    const double limit = double(top_p) * double(total);
    auto low = candidates_.begin(), high = low + kept;
    for (int64_t passed = 0; high - low > 1;) {
      const auto middle = low + (high - low) / 2;
      std::nth_element(low, middle, high, before);
      int64_t mass = passed;
      for (auto c = low; c != middle; ++c) mass += c->mass;
      if (double(mass) < limit) {
        passed = mass;
        low = middle;
      } else {
        high = middle;
      }
    }
    return {low->value, low->id};
  }

  int64_t vocab_ = 0;
  std::vector<const float*> tiles_;
  float top_ = 0, temperature_ = 0, top_value_ = 0;
  bool sound_ = false;
  ExpSum sum_;
  Cut cut_ = {-kInf, kLastId};
  std::vector<float> copy_, masked_, rest_, edited_, maxima_;
  std::vector<double> sums_, products_;  // of a tile's Moments; a sum of 0 is not known yet
  std::vector<int64_t> stale_;           // tiles with changed logits
  std::vector<int32_t> ids_, ranks_;
  std::vector<Candidate> candidates_;
  std::vector<Candidate> largest_;  // of the row as it is, in order; empty where not known
};

}  // namespace cpu
}  // namespace reasonkern
