// Loops over one row of logits. Included once per instruction set (see cpu_dispatch.h), after
// common/simd.h and under the same rules: no include guard, no templates of other headers.

struct FloatLanes {
  typedef float Acc;
  typedef F Vec;
  static constexpr int kWidth = kLanes;
  static constexpr float kLowest = -104.0f;  // exp is 0 from here on
};

struct DoubleLanes {
  typedef double Acc;
  typedef double Vec;
  static constexpr int kWidth = 1;
  static constexpr double kLowest = -746.0;
};

// Vectors per step: enough independent chains to cover the latency of exp.
constexpr int kUnroll = 4;

template <class L>
constexpr int block_size() {
  return kUnroll * L::kWidth;
}

// Calls body.block on consecutive blocks of x[0, n). The last one is filled up with -inf, which
// adds nothing to a maximum or a sum of exponentials.
template <class L, class E, class Body>
RK_INLINE void walk(const E* x, int64_t n, Body& body) {
  constexpr int kBlock = block_size<L>();
  int64_t i = 0;
  for (; i + kBlock <= n; i += kBlock) body.block(x + i);
  if (i == n) return;
  E padded[kBlock];
  for (int k = 0; k < kBlock; ++k) padded[k] = static_cast<E>(-__builtin_inff());
  __builtin_memcpy(padded, x + i, (n - i) * sizeof(E));
  body.block(padded);
}

// As walk, for a body that reads x and writes out, which may be the same row.
template <class L, class E, class Body>
RK_INLINE void transform(const E* x, E* out, int64_t n, const Body& body) {
  constexpr int kBlock = block_size<L>();
  int64_t i = 0;
  for (; i + kBlock <= n; i += kBlock) body.block(x + i, out + i);
  if (i == n) return;
  E padded[kBlock];
  for (int k = 0; k < kBlock; ++k) padded[k] = static_cast<E>(-__builtin_inff());
  __builtin_memcpy(padded, x + i, (n - i) * sizeof(E));
  body.block(padded, padded);
  __builtin_memcpy(out + i, padded, (n - i) * sizeof(E));
}

// The logits before the division by the temperature: x, or cap * tanh(x / cap).
template <class L, bool kCapped>
struct Capped {
  typename L::Vec cap;
  RK_INLINE explicit Capped(typename L::Acc softcap) : cap(splat(softcap)) {}
  RK_INLINE typename L::Vec tangent(typename L::Vec x) const { return tanh(x / cap); }
  RK_INLINE typename L::Vec operator()(typename L::Vec x) const {
    if (!kCapped) return x;
    const typename L::Vec y = cap * tangent(x);
    return x == splat(-static_cast<typename L::Acc>(__builtin_inff())) ? x : y;
  }
  RK_INLINE typename L::Acc one(typename L::Acc x) const {
    const typename L::Vec y = (*this)(splat(x));
    typename L::Acc first;
    __builtin_memcpy(&first, &y, sizeof first);
    return first;
  }
};

template <class L>
struct Maximum {
  typename L::Vec top[kUnroll];
  RK_INLINE Maximum() {
    for (auto& t : top) t = splat(-static_cast<typename L::Acc>(__builtin_inff()));
  }
  template <class E>
  RK_INLINE void block(const E* x) {  // a NaN is passed over: the sums will show it
    for (int k = 0; k < kUnroll; ++k) top[k] = max(load(x + k * L::kWidth), top[k]);
  }
  RK_INLINE typename L::Acc result() const {
    typename L::Acc lanes[L::kWidth];
    store(lanes, max(max(top[0], top[1]), max(top[2], top[3])));
    for (int k = 1; k < L::kWidth; ++k) lanes[0] = lanes[k] > lanes[0] ? lanes[k] : lanes[0];
    return lanes[0];
  }
};

template <class L>
RK_INLINE double total(const typename L::Vec (&v)[kUnroll]) {
  typename L::Acc stored[L::kWidth];
  store(stored, (v[0] + v[1]) + (v[2] + v[3]));
  double lanes[L::kWidth];
  for (int k = 0; k < L::kWidth; ++k) lanes[k] = static_cast<double>(stored[k]);
  for (int half = L::kWidth / 2; half > 0; half /= 2) {
    for (int k = 0; k < half; ++k) lanes[k] += lanes[k + half];
  }
  return lanes[0];
}

// Sums over one tile, relative to `top`. kFull adds q and w and leaves s and u untouched, bit by
// bit: the log-probability of the two passes is the same number.
template <class L, bool kCapped, bool kFull>
struct TileSums {
  typename L::Vec s[kUnroll], u[kUnroll], q[kUnroll], w[kUnroll];
  typename L::Vec top, inv_temperature;
  Capped<L, kCapped> capped;

  RK_INLINE TileSums(typename L::Acc top_, const RowScale<typename L::Acc>& scale)
      : top(splat(top_)), inv_temperature(splat(scale.inv_temperature)), capped(scale.softcap) {
    for (int k = 0; k < kUnroll; ++k) {
      s[k] = u[k] = q[k] = w[k] = splat(static_cast<typename L::Acc>(0));
    }
  }

  template <class E>
  RK_INLINE void block(const E* x) {
    for (int k = 0; k < kUnroll; ++k) {
      // The lower bound keeps -inf out of e * d; it is the first operand so that a NaN passes.
      const typename L::Vec d =
          max(splat(L::kLowest), (capped(load(x + k * L::kWidth)) - top) * inv_temperature);
      const typename L::Vec e = exp(d);
      s[k] = s[k] + e;
      u[k] = fma(e, d, u[k]);
      if (kFull) {
        q[k] = fma(e, e, q[k]);
        w[k] = fma(e * d, d, w[k]);
      }
    }
  }
};

// Moves the reference of the sums up by `down` = old - new (negative).
RK_INLINE void lower(RowSums& r, double down) {
  const double a = __builtin_exp(down);
  r.w = a * (r.w + 2 * down * r.u + down * down * r.s);
  r.u = a * (r.u + down * r.s);
  r.s = a * r.s;
  r.q = a * a * r.q;
}

// One pass from memory: a tile is read for its maximum, then again from L1 for its sums. Tiles and
// merges depend on the vocabulary alone.
template <class L, class E, bool kCapped, bool kFull>
RowSums row_sums(const E* x, int64_t vocab, const RowScale<typename L::Acc>& scale) {
  typedef typename L::Acc Acc;
  const Capped<L, kCapped> capped(scale.softcap);
  RowSums row{-static_cast<double>(__builtin_inff()), 0, 0, 0, 0, 0};
  Acc reference = 0;  // stands in for the maximum while only -inf has been seen
  for (int64_t begin = 0; begin < vocab; begin += kTile) {
    const int64_t n = vocab - begin < kTile ? vocab - begin : kTile;
    Maximum<L> maximum;
    walk<L>(x + begin, n, maximum);
    const Acc top = maximum.result();
    if (top > row.top) {
      const Acc before = reference;
      reference = capped.one(top);
      if (row.s > 0) lower(row, static_cast<double>((before - reference) * scale.inv_temperature));
      row.top = static_cast<double>(top);
      row.top_tile = begin;
    }
    TileSums<L, kCapped, kFull> tile(reference, scale);
    walk<L>(x + begin, n, tile);
    row.s += total<L>(tile.s);
    row.u += total<L>(tile.u);
    if (kFull) {
      row.q += total<L>(tile.q);
      row.w += total<L>(tile.w);
    }
  }
  return row;
}

template <class L, class E>
double row_maximum(const E* x, int64_t vocab) {
  Maximum<L> maximum;
  walk<L>(x, vocab, maximum);
  return static_cast<double>(maximum.result());
}

template <class L, bool kCapped, bool kQuadratic>
struct Gradient {
  typename L::Vec top, inv_temperature, constant, linear, quadratic;
  Capped<L, kCapped> capped;

  RK_INLINE explicit Gradient(const GradCoefs<typename L::Acc>& c)
      : top(splat(Capped<L, kCapped>(c.scale.softcap).one(c.top))),
        inv_temperature(splat(c.scale.inv_temperature)),
        constant(splat(c.constant)),
        linear(splat(c.linear)),
        quadratic(splat(c.quadratic)),
        capped(c.scale.softcap) {}

  template <class E>
  RK_INLINE void block(const E* x, E* out) const {
    for (int k = 0; k < kUnroll; ++k) {
      const typename L::Vec raw = load(x + k * L::kWidth);
      const typename L::Vec d = max(splat(L::kLowest), (capped(raw) - top) * inv_temperature);
      const typename L::Vec e = exp(d);
      typename L::Vec factor = fma(linear, d, constant);
      if (kQuadratic) factor = fma(quadratic, e, factor);
      typename L::Vec g = e * factor;
      if (kCapped) {
        const typename L::Vec t = capped.tangent(raw);
        g = g * (static_cast<typename L::Acc>(1) - t * t);
      }
      store(out + k * L::kWidth, g);
    }
  }
};

template <class L, class E, bool kCapped, bool kQuadratic>
void row_gradient(const E* x, E* out, int64_t vocab, const GradCoefs<typename L::Acc>& coefs) {
  const Gradient<L, kCapped, kQuadratic> gradient(coefs);
  transform<L>(x, out, vocab, gradient);
}

template <class L>
struct Scaling {
  typename L::Vec factor;
  template <class E>
  RK_INLINE void block(const E* x, E* out) const {
    for (int k = 0; k < kUnroll; ++k) {
      store(out + k * L::kWidth, load(x + k * L::kWidth) * factor);
    }
  }
};

template <class L, class E>
void scale_row(E* x, int64_t vocab, typename L::Acc factor) {
  const Scaling<L> scaling{splat(factor)};
  transform<L>(x, x, vocab, scaling);
}

template <class L, class E>
RowKernels<E> row_kernels() {
  return {{{row_sums<L, E, false, false>, row_sums<L, E, false, true>},
           {row_sums<L, E, true, false>, row_sums<L, E, true, true>}},
          {{row_gradient<L, E, false, false>, row_gradient<L, E, false, true>},
           {row_gradient<L, E, true, false>, row_gradient<L, E, true, true>}},
          row_maximum<L, E>,
          scale_row<L, E>};
}
