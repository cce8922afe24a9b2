// Noise words of 4 * kLanes tokens at a time, and a bound of their noise. Included once per
// instruction set by cpu_row_simd.h, behind noise_simd.h and under the same rules.

// Rows of the 4 x 4 matrices that lie in each 128 bits of a, b, c, d.
RK_INLINE void transpose(const U (&in)[4], U (&out)[4]) {
#if RK_SIMD == 4
  const __m512i a = __m512i(in[0]), b = __m512i(in[1]), c = __m512i(in[2]), d = __m512i(in[3]);
  const __m512i ab = _mm512_maskz_unpacklo_epi32(kAll, a, b);
  const __m512i cd = _mm512_maskz_unpacklo_epi32(kAll, c, d);
  const __m512i ab2 = _mm512_maskz_unpackhi_epi32(kAll, a, b);
  const __m512i cd2 = _mm512_maskz_unpackhi_epi32(kAll, c, d);
  out[0] = U(_mm512_maskz_unpacklo_epi64(0xff, ab, cd));
  out[1] = U(_mm512_maskz_unpackhi_epi64(0xff, ab, cd));
  out[2] = U(_mm512_maskz_unpacklo_epi64(0xff, ab2, cd2));
  out[3] = U(_mm512_maskz_unpackhi_epi64(0xff, ab2, cd2));
#elif RK_SIMD == 3
  const __m256i a = __m256i(in[0]), b = __m256i(in[1]), c = __m256i(in[2]), d = __m256i(in[3]);
  const __m256i ab = _mm256_unpacklo_epi32(a, b), ab2 = _mm256_unpackhi_epi32(a, b);
  const __m256i cd = _mm256_unpacklo_epi32(c, d), cd2 = _mm256_unpackhi_epi32(c, d);
  out[0] = U(_mm256_unpacklo_epi64(ab, cd));
  out[1] = U(_mm256_unpackhi_epi64(ab, cd));
  out[2] = U(_mm256_unpacklo_epi64(ab2, cd2));
  out[3] = U(_mm256_unpackhi_epi64(ab2, cd2));
#else
  for (int row = 0; row < 4; ++row) {
    for (int k = 0; k < 4; ++k) out[row][k] = in[k][row];
  }
#endif
}

// Groups of 4 * kLanes tokens that are under way together: one chain of multiplications leaves the
// multipliers idle, two need more registers than AVX2 has.
#if RK_SIMD == 4
constexpr int kBlocks = 2;
#else
constexpr int kBlocks = 1;
#endif

// Philox of kLanes counters per group from `block` on, in 64-bit lanes whose upper halves are never
// read, so two vectors a group. Which lane takes which counter is chosen so that the rows of the
// transposed words are the words of neighbouring tokens.
RK_INLINE void philox_words(const NoiseKey& key, uint32_t block, U (&words)[kBlocks][4]) {
  W c[2 * kBlocks][4];
  for (int half = 0; half < 2 * kBlocks; ++half) {
    for (int m = 0; m < kLanes / 2; ++m) {
      const int lane = 2 * m + half % 2;
      c[half][0][m] = (kLanes / 4) * (lane % 4) + lane / 4;
    }
    c[half][0] = c[half][0] + (block + half / 2 * kLanes);
    c[half][1] = W{} + uint32_t(key.position);
    c[half][2] = W{} + uint32_t(key.position >> 32);
    c[half][3] = W{} + key.stream;
  }
  const W m0 = W{} + kPhiloxM0, m1 = W{} + kPhiloxM1;
  for (int round = 0; round < kPhiloxRounds; ++round) {
    const W k0 = W{} + key.round[round][0], k1 = W{} + key.round[round][1];
    for (auto& x : c) {
      const W p0 = multiply_low(x[0], m0), p1 = multiply_low(x[2], m1);
      x[0] = (p1 >> 32) ^ x[1] ^ k0;
      x[1] = p1;
      x[2] = (p0 >> 32) ^ x[3] ^ k1;
      x[3] = p0;
    }
  }
  for (int g = 0; g < kBlocks; ++g) {
    U packed[4];
    for (int w = 0; w < 4; ++w) {
      packed[w] = U((c[2 * g][w] & 0xffffffffu) | (c[2 * g + 1][w] << 32));
    }
    transpose(packed, words[g]);
  }
}

// An upper bound of the noise of words: -ln u, whose logarithm is bounded by the float's own bits.
RK_INLINE F noise_bound(U word) {
  const F bits = to_float(I(word_of(from_word(word))));
  return fma(bits, splat(-8.26295832e-8f), splat(110.2105f));
}
