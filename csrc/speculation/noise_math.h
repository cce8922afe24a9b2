// The floating-point half of the noise contract: logarithm, exponential and Gumbel noise in IEEE
// single precision operations of a fixed order, so that every backend gets the same bits. One text
// for scalars and vectors: included wherever a scope defines
// - F, U and I: floats, unsigned and signed 32-bit integers (scalars, or vectors of one size);
// - RK_FN: how its functions are declared;
// - mul and add, rounded once each and never contracted;
// - splat(float), from_word(U) -> F (to nearest), to_float(I) -> F;
// - word_of(F) -> U and float_of(U) -> F (bits), signed_of(U) -> I, unsigned_of(I) -> U;
// - select(condition, F, F), also of two U;
// hence no include guard and no includes.

// log(1 + f) for 1 + f in [sqrt(1/2), sqrt(2)): f + f^2 Q(f), relative error 3e-8 before rounding.
RK_FN F log_series(F f) {
  F q = splat(0.08734750747680664f);
  q = add(mul(q, f), splat(-0.14307482540607452f));
  q = add(mul(q, f), splat(0.14917989075183868f));
  q = add(mul(q, f), splat(-0.165705144405365f));
  q = add(mul(q, f), splat(0.19962070882320404f));
  q = add(mul(q, f), splat(-0.25001755356788635f));
  q = add(mul(q, f), splat(0.33333951234817505f));
  q = add(mul(q, f), splat(-0.49999991059303284f));
  return add(mul(mul(f, f), q), f);
}

// The power of two n that leaves x / 2^n in [sqrt(1/2), sqrt(2)), for normal x > 0.
RK_FN I binade(F x) { return signed_of(word_of(x) - 0x3f3504f3u) >> 23; }

RK_FN F mantissa(F x, I n) { return float_of(word_of(x) - (unsigned_of(n) << 23)); }

// -(n ln 2 + log(1 + f)). The upper part of ln 2 has ten bits: n times it is exact.
RK_FN F minus_log(I n, F f) {
  const F steps = to_float(n);
  const F low = add(mul(steps, splat(-2.12194440e-4f)), log_series(f));
  return -add(mul(steps, splat(0.693359375f)), low);
}

RK_FN F minus_log(F x) {
  const I n = binade(x);
  return minus_log(n, add(mantissa(x, n), splat(-1.0f)));
}

// The uniform number of a word: max(k, 1) / 2^32 rounded to nearest, at most 1 - 2^-24.
RK_FN F uniform_of(U word) {
  const F u = mul(from_word(select(word == 0u, word + 1u, word)), splat(0x1p-32f));
  return select(u > splat(0x1.fffffep-1f), splat(0x1.fffffep-1f), u);
}

// -log1p(-u) keeps the relative accuracy of a small u: 1 - u is formed only where f is not -u.
RK_FN F exponential_of(F u) {
  const F w = add(splat(1.0f), -u);
  const I n = binade(w);
  return minus_log(n, select(n == 0, -u, add(mantissa(w, n), splat(-1.0f))));
}

// Standard Gumbel noise; decreasing in the word up to rounding, largest (22.18) at word 0 or 1.
RK_FN F gumbel_of(U word) { return minus_log(exponential_of(uniform_of(word))); }

// exp(x) for x <= 0, 1 at 0; 0 below -87 (the results stay normal numbers) and for NaN.
RK_FN F exp_of(F x) {
  const F magic = splat(12582912.0f);  // adding it rounds to an integer, which its low bits show
  const F sum = add(mul(x, splat(1.44269504f)), magic), n = add(sum, -magic);
  const F r = add(add(x, mul(n, splat(-0.693359375f))), mul(n, splat(2.12194440e-4f)));
  F e = splat(0.0013813142431899905f);
  e = add(mul(e, r), splat(0.008369418792426586f));
  e = add(mul(e, r), splat(0.04166845604777336f));
  e = add(mul(e, r), splat(0.16666515171527863f));
  e = add(mul(e, r), splat(0.4999999403953552f));
  e = add(splat(1.0f), add(mul(mul(r, r), e), r));
  const F power = float_of(word_of(e) + ((word_of(sum) - word_of(magic)) << 23));
  return select(x > splat(-87.0f), power, splat(0.0f));
}
