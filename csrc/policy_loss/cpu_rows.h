// Loops over one row of logits. Included once per instruction set (see cpu_dispatch.h), after
// common/simd.h and common/simd_math.h and under the same rules: no include guard, no templates of
// other headers.

struct FloatLanes {
  typedef float Acc;
  typedef F Vec;
  static constexpr int kBlock = kGroup * kLanes;  // elements handled at a time
  static constexpr float kLowest = kExpZero;
  static constexpr float kScale = kExpScale;  // of every exponential
  static RK_INLINE F over(F x, F, F inv_temperature) { return x * inv_temperature; }
};

struct DoubleLanes {
  typedef double Acc;
  typedef double Vec;
  static constexpr int kBlock = kGroup;
  static constexpr double kLowest = -746.0;
  static constexpr double kScale = 1.0;
  static RK_INLINE double over(double x, double temperature, double) { return x / temperature; }
};

template <class L>
RK_INLINE typename L::Vec minus_infinity() {
  return splat(-static_cast<typename L::Acc>(__builtin_inff()));
}

// Copies n < kBlock elements and fills up with -inf, which adds nothing to a maximum or to a sum
// of exponentials.
template <class L, class E>
RK_INLINE void pad(const E* x, int64_t n, E (&padded)[L::kBlock]) {
  for (int k = 0; k < L::kBlock; ++k) padded[k] = static_cast<E>(-__builtin_inff());
  __builtin_memcpy(padded, x, n * sizeof(E));
}

// Calls body.block on consecutive blocks of x[0, n).
template <class L, class E, class Body>
RK_INLINE void walk(const E* x, int64_t n, Body& body) {
  for (; n >= L::kBlock; n -= L::kBlock, x += L::kBlock) body.block(x);
  if (n == 0) return;
  E padded[L::kBlock];
  pad<L>(x, n, padded);
  body.block(padded);
}

// As walk, for a body that reads x and writes out, which may be the same row.
template <class L, class E, class Body>
RK_INLINE void transform(const E* x, E* out, int64_t n, const Body& body) {
  for (; n >= L::kBlock; n -= L::kBlock, x += L::kBlock, out += L::kBlock) body.block(x, out);
  if (n == 0) return;
  E padded[L::kBlock];
  pad<L>(x, n, padded);
  body.block(padded, padded);
  __builtin_memcpy(out, padded, n * sizeof(E));
}

template <class L>
struct Maximum {
  typename L::Vec top[kGroup];
  RK_INLINE Maximum() { RK_EACH top[k] = minus_infinity<L>(); }
  template <class E>
  RK_INLINE void block(const E* from) {  // a NaN is passed over: the sums will show it
    typename L::Vec x[kGroup];
    load(from, x);
    RK_EACH top[k] = max(x[k], top[k]);
  }
  RK_INLINE typename L::Acc result() const {
    typename L::Acc lanes[L::kBlock];
    store(lanes, top);
    for (int k = 1; k < L::kBlock; ++k) lanes[0] = lanes[k] > lanes[0] ? lanes[k] : lanes[0];
    return lanes[0];
  }
};

// z - max z of raw logits under a mode of RowScale; z is x / T, or cap * tanh(x / cap) / T. The
// maximum is given after the soft-cap and before the temperature.
template <class L, Mode kMode>
struct Shift {
  typename L::Vec top, temperature, inv_temperature, cap;

  RK_INLINE Shift(typename L::Acc top_, const RowScale<typename L::Acc>& scale)
      : top(splat(top_)),
        temperature(splat(scale.temperature)),
        inv_temperature(splat(1 / scale.temperature)),
        cap(splat(scale.softcap)) {}
  // tangent = tanh(x / cap), x = cap * tangent, except that -inf stays.
  RK_INLINE void capped(typename L::Vec (&x)[kGroup], typename L::Vec (&tangent)[kGroup]) const {
    typename L::Vec y[kGroup];
    RK_EACH y[k] = x[k] / cap;
    tanh(y, tangent);
    RK_EACH x[k] = x[k] == minus_infinity<L>() ? x[k] : cap * tangent[k];
  }
  // The lower bound keeps -inf out of products with 0; it is the first operand so that NaN passes.
  RK_INLINE void operator()(typename L::Vec (&x)[kGroup],
                            typename L::Vec (&tangent)[kGroup]) const {
    if (kMode == Mode::kCapped) capped(x, tangent);
    RK_EACH x[k] = x[k] - top;
    if (kMode != Mode::kPlain) RK_EACH x[k] = L::over(x[k], temperature, inv_temperature);
    RK_EACH x[k] = max(splat(L::kLowest), x[k]);
  }
};

template <class L, Mode kMode>
typename L::Acc capped(typename L::Acc value, const RowScale<typename L::Acc>& scale) {
  if (kMode != Mode::kCapped) return value;
  typename L::Vec x[kGroup], tangent[kGroup];
  RK_EACH x[k] = splat(value);
  Shift<L, kMode>(0, scale).capped(x, tangent);
  return first_lane(x[0]);
}

// Asks for the `bytes` that lie `ahead` bytes after p, to the second-level cache. The address may
// be past the end of the row, or nowhere.
template <size_t bytes>
RK_INLINE void prefetch(const void* p, size_t ahead) {
  const uintptr_t first = reinterpret_cast<uintptr_t>(p) + ahead;
  for (size_t b = 0; b < bytes; b += 64) {
    __builtin_prefetch(reinterpret_cast<const void*>(first + b), 0, 2);
  }
}

// Sums over one tile. kFull adds q and w and leaves s and u untouched, bit by bit: the
// log-probability of the two passes is the same number.
template <class L, Mode kMode, bool kFull>
struct TileSums {
  struct Partial {
    typename L::Vec s[2], u[2], q[2], w[2];
  };
  Partial now{}, before{};  // before: finished stretches, added up apart so that few rounding
                            // errors reach any one number
  Shift<L, kMode> shift;

  RK_INLINE explicit TileSums(const Shift<L, kMode>& shift_) : shift(shift_) {}

  template <class E>
  RK_INLINE void block(const E* from) {
    prefetch<L::kBlock * sizeof(E)>(from, kTile * sizeof(E));
    typename L::Vec d[kGroup], e[kGroup], tangent[kGroup];
    load(from, d);
    shift(d, tangent);
    scaled_exp(d, e);
    RK_EACH now.s[k % 2] = now.s[k % 2] + e[k];
    RK_EACH now.u[k % 2] = fma(e[k], d[k], now.u[k % 2]);
    if (kFull) {
      RK_EACH now.q[k % 2] = fma(e[k], e[k], now.q[k % 2]);
      RK_EACH now.w[k % 2] = fma(e[k] * d[k], d[k], now.w[k % 2]);
    }
  }
  RK_INLINE void finish_stretch() {
    for (int k = 0; k < 2; ++k) {
      before.s[k] = before.s[k] + now.s[k];
      before.u[k] = before.u[k] + now.u[k];
      if (kFull) {
        before.q[k] = before.q[k] + now.q[k];
        before.w[k] = before.w[k] + now.w[k];
      }
    }
    now = Partial{};
  }
  static RK_INLINE double total(const typename L::Vec (&v)[2]) {
    constexpr int kWidth = L::kBlock / kGroup;
    typename L::Acc stored[2 * kWidth];
    store_one(stored, v[0]);
    store_one(stored + kWidth, v[1]);
    double lanes[2 * kWidth];
    for (int k = 0; k < 2 * kWidth; ++k) lanes[k] = static_cast<double>(stored[k]);
    for (int half = kWidth; half > 0; half /= 2) {
      for (int k = 0; k < half; ++k) lanes[k] += lanes[k + half];
    }
    return lanes[0];
  }
  RK_INLINE void add_to(RowSums& row) const {
    constexpr double unscale = 1.0 / L::kScale;
    row.s += unscale * total(before.s);
    row.u += unscale * total(before.u);
    if (kFull) {
      row.q += unscale * unscale * total(before.q);
      row.w += unscale * total(before.w);
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

// One pass from memory: a tile is read for its maximum, then again from cache for its sums while
// the next tile is on its way. Tiles and merges depend on the vocabulary alone.
template <class L, class E, Mode kMode, bool kFull>
RowSums row_sums(const E* x, int64_t vocab, const RowScale<typename L::Acc>& scale) {
  RowSums row{-static_cast<double>(__builtin_inff()), 0, 0, 0, 0, 0, 0};
  Shift<L, kMode> shift(0, scale);  // 0 stands in for the maximum while only -inf has been seen
  for (int64_t begin = 0; begin < vocab; begin += kTile) {
    const int64_t n = vocab - begin < kTile ? vocab - begin : kTile;
    Maximum<L> maximum;
    walk<L>(x + begin, n, maximum);
    const typename L::Acc top = maximum.result();
    if (top > row.top) {
      const typename L::Acc capped_top = capped<L, kMode>(top, scale);
      const Shift<L, kMode> raised(capped_top, scale);
      const typename L::Vec down =
          L::over(shift.top - raised.top, raised.temperature, raised.inv_temperature);
      if (row.s > 0) lower(row, static_cast<double>(first_lane(down)));
      row.top = static_cast<double>(top);
      row.capped_top = static_cast<double>(capped_top);
      row.top_tile = begin;
      shift = raised;
    }
    TileSums<L, kMode, kFull> tile(shift);
    constexpr int64_t kStretch = 8 * L::kBlock;
    for (int64_t done = 0; done < n; done += kStretch) {
      walk<L>(x + begin + done, n - done < kStretch ? n - done : kStretch, tile);
      tile.finish_stretch();
    }
    tile.add_to(row);
  }
  return row;
}

template <class L, Mode kMode, bool kQuadratic>
struct Gradient {
  Shift<L, kMode> shift;
  typename L::Vec constant, linear, quadratic;

  RK_INLINE explicit Gradient(const GradCoefs<typename L::Acc>& c)
      : shift(c.top, c.scale),
        constant(splat(c.constant * (1 / L::kScale))),
        linear(splat(c.linear * (1 / L::kScale))),
        quadratic(splat(c.quadratic * (1 / L::kScale / L::kScale))) {}

  template <class E>
  RK_INLINE void block(const E* from, E* to) const {
    typename L::Vec d[kGroup], e[kGroup], g[kGroup], tangent[kGroup];
    load(from, d);
    shift(d, tangent);
    scaled_exp(d, e);
    RK_EACH g[k] = fma(linear, d[k], constant);
    if (kQuadratic) RK_EACH g[k] = fma(quadratic, e[k], g[k]);
    RK_EACH g[k] = e[k] * g[k];
    if (kMode == Mode::kCapped) RK_EACH g[k] = g[k] * (1.0f - tangent[k] * tangent[k]);
    store(to, g);
  }
};

template <class L, class E, Mode kMode, bool kQuadratic>
void row_gradient(const E* x, E* out, int64_t vocab, const GradCoefs<typename L::Acc>& coefs) {
  const Gradient<L, kMode, kQuadratic> gradient(coefs);
  transform<L>(x, out, vocab, gradient);
}

template <class L>
struct Scaling {
  typename L::Vec factor;
  template <class E>
  RK_INLINE void block(const E* from, E* to) const {
    typename L::Vec x[kGroup];
    load(from, x);
    RK_EACH x[k] = x[k] * factor;
    store(to, x);
  }
};

template <class L, class E>
void scale_row(E* x, int64_t vocab, typename L::Acc factor) {
  const Scaling<L> scaling{splat(factor)};
  transform<L>(x, x, vocab, scaling);
}

template <class L, class E, Mode kMode>
void fill_mode(RowKernels<E>& table) {
  constexpr int mode = static_cast<int>(kMode);
  table.sums[mode][0] = row_sums<L, E, kMode, false>;
  table.sums[mode][1] = row_sums<L, E, kMode, true>;
  table.gradient[mode][0] = row_gradient<L, E, kMode, false>;
  table.gradient[mode][1] = row_gradient<L, E, kMode, true>;
}

template <class L, class E>
RowKernels<E> row_kernels() {
  RowKernels<E> table;
  fill_mode<L, E, Mode::kPlain>(table);
  fill_mode<L, E, Mode::kScaled>(table);
  fill_mode<L, E, Mode::kCapped>(table);
  table.capped = capped<L, Mode::kCapped>;
  table.scale = scale_row<L, E>;
  return table;
}

#undef RK_EACH
