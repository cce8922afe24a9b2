// The reverse recurrence of generalised advantage estimation over a row without holes, compiled for
// several instruction sets by gae.h under the rules of common/simd.h: no include guard, no
// includes, no template of another header. The sums are in one order, whatever the instruction set.

// x[t] = delta[t] + decay * x[t + 1], a chain of one multiply and one add per token. Here it is cut
// into kWindow = 16 chains that vectors hold: x[t] = sum[t] + decay^16 * x[t + 16], where sum[t] is
// that of the 16 terms delta[t + k] decay^k, taken four by four.
template <class T>
class Chain {
 public:
  explicit Chain(T decay) {
    powers_[0] = 1;
    for (int k = 0; k < kWindow; ++k) powers_[k + 1] = powers_[k] * decay;
  }

  // `delta` holds `count` tokens and behind them the kWindow first ones of the chunk behind. The
  // first kWindow results are kept for the chunk before.
  void run(const T* __restrict__ delta, int64_t count, T* __restrict__ x) {
    const T one = powers_[1], two = powers_[2], three = powers_[3];
    T sums[kChunk + kWindow];
    for (int64_t t = 0; t < count + 12; ++t) {
      sums[t] = (delta[t] + one * delta[t + 1]) + (two * delta[t + 2] + three * delta[t + 3]);
    }
    const int64_t rest = count % kWindow;
    Window later = load<Window>(behind_);
    for (int64_t t = count - kWindow; t >= rest; t -= kWindow) {
      later = sum_of_16<Window>(sums + t) + powers_[16] * later;
      __builtin_memcpy(x + t, &later, sizeof later);
    }
    for (int64_t t = rest; t-- > 0;) {
      const T behind = t + kWindow < count ? x[t + kWindow] : behind_[t + kWindow - count];
      x[t] = sum_of_16<T>(sums + t) + powers_[16] * behind;
    }
    // A chunk shorter than that is the first one of its row: nothing comes after it.
    if (count >= kWindow) __builtin_memcpy(behind_, x, sizeof behind_);
  }

 private:
  typedef T Window __attribute__((vector_size(kWindow * sizeof(T))));

  template <class V>
  static RK_INLINE V load(const T* x) {
    V v;
    __builtin_memcpy(&v, x, sizeof v);
    return v;
  }

  template <class V>
  RK_INLINE V sum_of_16(const T* sums) const {
    return (load<V>(sums) + powers_[4] * load<V>(sums + 4)) +
           (powers_[8] * load<V>(sums + 8) + powers_[12] * load<V>(sums + 12));
  }

  T powers_[kWindow + 1], behind_[kWindow] = {};
};

// `next` stands for V behind the last token.
template <class T>
void gae_row(const T* __restrict__ reward, const T* __restrict__ value, int64_t length, T next,
             T gamma, T decay, T decay_value, T* __restrict__ advantage, T* __restrict__ returns) {
  T delta[kChunk + kWindow] = {};
  Chain<T> policy(decay), critic(decay_value);
  for (int64_t end = length; end > 0;) {
    const int64_t count = end < kChunk ? end : kChunk, first = end - count;
    for (int k = kWindow; k-- > 0;) delta[count + k] = delta[k];
    const T *r = reward + first, *v = value + first;
    T *a = advantage + first, *b = returns + first;
    // The chunk before comes while this one is computed.
    for (int64_t t = 0; t < count && first > 0; t += 64 / sizeof(T)) {
      __builtin_prefetch(r - kChunk + t, 0);
      __builtin_prefetch(v - kChunk + t, 0);
      __builtin_prefetch(a - kChunk + t, 1);
      __builtin_prefetch(b - kChunk + t, 1);
    }
    for (int64_t t = 0; t < count - 1; ++t) delta[t] = r[t] + gamma * v[t + 1] - v[t];
    delta[count - 1] = r[count - 1] + gamma * (end == length ? next : v[count]) - v[count - 1];
    policy.run(delta, count, a);
    if (decay_value == decay) {
      for (int64_t t = 0; t < count; ++t) b[t] = a[t] + v[t];
    } else {
      critic.run(delta, count, b);
      for (int64_t t = 0; t < count; ++t) b[t] += v[t];
    }
    end = first;
  }
}
