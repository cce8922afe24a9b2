// Scores of the candidates of a node, compiled for several instruction sets by cpu_table_scores.h
// under the rules of common/simd.h: no include guard, no includes, no template of another header.

#include "noise_simd.h"

// Both halves of the products of 32-bit lanes.
RK_INLINE void multiply(U a, uint32_t factor, U& high, U& low) {
  const W b = W(splat(factor)), even = multiply_low(W(a), b), odd = multiply_low(W(a) >> 32, b);
  low = U((even & 0xffffffffu) | odd << 32);
  high = U(even >> 32 | (odd & 0xffffffff00000000u));
}

// The word of each token: noise_word of noise.h.
RK_INLINE U words_of(U token, uint64_t seed, uint64_t position, uint32_t stream) {
  U c0 = token >> 2, c1 = splat(uint32_t(position)), c2 = splat(uint32_t(position >> 32));
  U c3 = splat(stream);
  uint32_t k0 = uint32_t(seed), k1 = uint32_t(seed >> 32);
  for (int round = 0; round < kPhiloxRounds; ++round) {
    U high0, low0, high1, low1;
    multiply(c0, kPhiloxM0, high0, low0);
    multiply(c2, kPhiloxM1, high1, low1);
    c0 = high1 ^ c1 ^ splat(k0), c1 = low1;
    c2 = high0 ^ c3 ^ splat(k1), c3 = low0;
    k0 += kPhiloxW0, k1 += kPhiloxW1;
  }
  const U which = token & 3u;
  const U first = select(which == 0u, c0, c1), second = select(which == 2u, c2, c3);
  return select(which < 2u, first, second);
}

// Ids and probabilities of kMaxTopk packed words; those of an empty word are 0.
static void unpack_words(const int32_t* words, int32_t* ids, float* p) {
  for (int i = 0; i < kMaxTopk; i += kLanes) {
    U word;
    __builtin_memcpy(&word, words + i, sizeof word);
    const U code = word >> kIdBits, token = word & splat(kIdMask);
    // The float of `decode` times 2^-24: the code's fields are those of a float but for the bias.
    const F normal = F((code << 13) + splat(112u << 23));
    store_one(p + i, select(I(code >= 1024u), normal, from_word(code) * splat(0x1p-24f)));
    __builtin_memcpy(ids + i, &token, sizeof token);
  }
}

// What the first n candidates are ranked by: log p, or log p over the temperature plus noise. Lanes
// beyond them hold a token and a probability too.
static void score_candidates(const ChildDraw& d, int n, const int32_t* ids, const float* p,
                             float* scores) {
  for (int i = 0; i < n; i += kLanes) {
    F x = -minus_log(load_one(p + i));
    if (d.noisy) {
      U token;
      __builtin_memcpy(&token, ids + i, sizeof token);
      x = x / splat(d.temperature) + gumbel_of(words_of(token, d.seed, d.position, d.stream));
    }
    store_one(scores + i, x);
  }
}
