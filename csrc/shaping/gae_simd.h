// The reverse recurrence of generalised advantage estimation over a row, compiled for several
// instruction sets by gae.h under the rules of common/simd.h: no include guard, no includes, no
// template of another header. The sums are in one order, whatever the instruction set.

// Neighbouring tokens in N vectors, halved: GCC 12 would keep an array in memory.
template <class V, int N>
struct Tokens {
  Tokens<V, N / 2> low, high;
};

template <class V>
struct Tokens<V, 1> {
  V v;
};

template <class T>
struct VectorOf {
  typedef T V __attribute__((vector_size(sizeof(F))));
};

template <class T>
using Window = Tokens<typename VectorOf<T>::V, kWindow * sizeof(T) / sizeof(F)>;

template <class V, int N, class T>
RK_INLINE void load(const T* x, Tokens<V, N>& w) {
  if constexpr (N == 1) {
    __builtin_memcpy(&w.v, x, sizeof w.v);
  } else {
    load(x, w.low);
    load(x + sizeof w.low / sizeof *x, w.high);
  }
}

template <class V, int N, class T>
RK_INLINE void store(T* x, const Tokens<V, N>& w) {
  if constexpr (N == 1) {
    __builtin_memcpy(x, &w.v, sizeof w.v);
  } else {
    store(x, w.low);
    store(x + sizeof w.low / sizeof *x, w.high);
  }
}

template <class Op, class V, int N, class... More>
RK_INLINE Tokens<V, N> each(const Op& op, const Tokens<V, N>& x, const More&... more) {
  if constexpr (N == 1) {
    return {op(x.v, more.v...)};
  } else {
    return {each(op, x.low, more.low...), each(op, x.high, more.high...)};
  }
}

#define RK_OPERATOR(op)                                                              \
  template <class V, int N>                                                          \
  RK_INLINE Tokens<V, N> operator op(const Tokens<V, N>& x, const Tokens<V, N>& y) { \
    return each([](const V& a, const V& b) { return a op b; }, x, y);                \
  }
RK_OPERATOR(+)
RK_OPERATOR(-)
RK_OPERATOR(*)
#undef RK_OPERATOR

// x, or y where `on` is 0.
template <class V, int N>
RK_INLINE Tokens<V, N> select(const Tokens<V, N>& on, const Tokens<V, N>& x,
                              const Tokens<V, N>& y) {
  const auto choose = [](const V& m, const V& a, const V& b) {
    return V((U(m != V{}) & U(a)) | (~U(m != V{}) & U(b)));
  };
  return each(choose, on, x, y);
}

// What is kBytes behind x, where y follows x.
template <int kBytes, class V, int N>
RK_INLINE Tokens<V, N> shift(const Tokens<V, N>& x, const Tokens<V, N>& y) {
  constexpr int kHalf = N * sizeof(V) / 2;
  if constexpr (kBytes == 0) {
    return x;
  } else if constexpr (N > 1 && kBytes >= kHalf) {
    return {shift<kBytes - kHalf>(x.high, y.low), shift<kBytes - kHalf>(y.low, y.high)};
  } else if constexpr (N > 1) {
    return {shift<kBytes>(x.low, x.high), shift<kBytes>(x.high, y.low)};
  } else {
#if RK_SIMD == 4
    return {V(_mm512_maskz_alignr_epi32(kAll, __m512i(y.v), __m512i(x.v), kBytes / 4))};
#elif RK_SIMD == 3
    const __m256i middle = _mm256_permute2x128_si256(__m256i(x.v), __m256i(y.v), 0x21);
    return {V(_mm256_alignr_epi8(middle, __m256i(x.v), kBytes))};
#elif defined(__SSE2__)
    const __m128 middle = _mm_shuffle_ps(__m128(x.v), __m128(y.v), kBytes == 8 ? 0x4e : 0x0f);
    return {V(kBytes == 8 ? middle : _mm_shuffle_ps(__m128(x.v), middle, 0x89))};
#else
    typedef uint64_t Pair __attribute__((vector_size(16)));
    const Pair from = Pair(x.v), middle = {from[1], Pair(y.v)[0]};
    return {V(kBytes == 8 ? middle : from >> 32 | middle << 32)};
#endif
  }
}

// x[t] = own[t] + power[t] x[t + 1], a chain of one multiply and one add per token. Here it is cut
// into kWindow = 16 chains that vectors hold: own[t] becomes what 2, 4, 8, then 16 tokens add, and
// power[t] what they make of x behind them, the same everywhere unless tokens are masked.
template <class T, bool kMasked>
class Chain {
 public:
  explicit Chain(const Window<T>& power) {
    powers_[0] = power;
    powers_[1] = powers_[0] * powers_[0];
    powers_[2] = powers_[1] * powers_[1];
    powers_[3] = powers_[2] * powers_[2];
    powers_[4] = powers_[3] * powers_[3];
  }

  // From x of the window behind to that of this one.
  RK_INLINE void next(Window<T> own, Window<T> power) {
    reach<0>(own, power);
    reach<1>(own, power);
    reach<2>(own, power);
    reach<3>(own, power);
    x = own + (kMasked ? power : powers_[4]) * x;
  }

  Window<T> x = {};

 private:
  template <int kStep>
  RK_INLINE void reach(Window<T>& own, Window<T>& power) {
    constexpr int kBytes = sizeof(T) << kStep;
    const Window<T> own_here = own, here = kMasked ? power : powers_[kStep];
    own = own + here * shift<kBytes>(own, owns_[kStep]);
    if (kMasked) power = here * shift<kBytes>(here, powers_[kStep]);
    owns_[kStep] = own_here, powers_[kStep] = here;
  }

  Window<T> owns_[4] = {}, powers_[5];
};

// With x[t] = gamma V[t] + decay A[t], what a token hands on, A[t] = r[t] - V[t] + x[t + 1]. A
// masked token, where kept[t] is 0, hands on what it gets.
template <bool kMasked, class T>
void scan_row(const T* reward, const T* value, const T* kept, int64_t length, T next, T gamma,
              T decay, T decay_value, T* advantage, T* returns) {
  const auto all = [](T x) { return each([x](const auto& v) { return v + x; }, Window<T>{}); };
  const Window<T> zero = {}, one = all(1), discount = all(gamma);
  const Window<T> power = all(decay), power_value = all(decay_value);
  Chain<T, kMasked> policy(power), critic(power_value);
  const auto step = [&](int64_t t, const T* r, const T* v, T* a,
                        T* b) __attribute__((always_inline)) {
    Window<T> rewards, values, on = one;
    load(r, rewards), load(v, values);
    if (kMasked) load(kept + t, on);
    const Window<T> error = rewards - values, later = discount * values;
    const auto advance = [&](Chain<T, kMasked>& chain,
                             const Window<T>& power) __attribute__((always_inline)) {
      const Window<T> behind = chain.x, own = later + power * error;
      chain.next(kMasked ? select(on, own, zero) : own, kMasked ? select(on, power, one) : power);
      return error + shift<sizeof(T)>(chain.x, behind);
    };
    Window<T> x = advance(policy, power);
    Window<T> y = (decay == decay_value ? x : advance(critic, power_value)) + values;
    if (kMasked) x = select(on, x, zero), y = select(on, y, zero);
    store(a, x), store(b, y);
  };
  const int64_t rest = (length - 1) % kWindow + 1, bytes = rest * sizeof(T);
  int64_t t = length - rest;
  T edge[4][kWindow] = {};
  __builtin_memcpy(edge[0], reward + t, bytes);
  __builtin_memcpy(edge[1], value + t, bytes);
  edge[0][rest - 1] += gamma * next;
  step(t, edge[0], edge[1], edge[2], edge[3]);
  __builtin_memcpy(advantage + t, edge[2], bytes);
  __builtin_memcpy(returns + t, edge[3], bytes);
  while ((t -= kWindow) >= 0) step(t, reward + t, value + t, advantage + t, returns + t);
}

// `next` stands for V behind the last token, of at least one. `scratch`, for a masked row, has room
// for it and kWindow tokens more.
template <class T>
void gae_row(const T* reward, const T* value, const uint8_t* __restrict__ mask, int64_t length,
             T next, T gamma, T decay, T decay_value, T* advantage, T* returns,
             T* __restrict__ scratch) {
  const auto scan = mask == nullptr ? scan_row<false, T> : scan_row<true, T>;
  for (int64_t t = 0; mask != nullptr && t < length; ++t) scratch[t] = mask[t];
  scan(reward, value, scratch, length, next, gamma, decay, decay_value, advantage, returns);
}
