/* Dot product of one row of int8 codes and one row of packed 4-bit codes, one version per instruction set.
 *
 * A byte holds the weights of an even index (low half) and of the odd one after it. The activation codes are stored as two rows
 * instead, the even ones and the odd ones, so that unpacking is a mask and a shift. Weights are taken as code + 8, from 0 to 15:
 * no sign to extend, and what that adds is 8 * sum(a), the same for every row of weights. int32 sums are exact for K < 2^21
 * (8 * 128 * K <= 2^31 - 1): they may wrap before the surplus is taken off, and wrap back with it. */
#pragma once
#include "eff.h"

INLINE uint32_t eff_dot4_tail(const int8_t *even, const int8_t *odd, const uint8_t *b, int64_t n) {
  uint32_t sum = 0;
  for (int64_t i = 0; i < n; i++) sum += (uint32_t)(even[i] * ((b[i] & 15) ^ 8) + odd[i] * ((b[i] >> 4) ^ 8));
  return sum;
}

#if defined(__AVX512VNNI__) && defined(__AVX512BW__) && !defined(EFF_NO_VNNI)
#define EFF_PAIR_LANES 64
typedef __m512i eff_pairs;
INLINE eff_pairs eff_pairs_zero(void) { return _mm512_setzero_si512(); }
INLINE void eff_pairs_dot(eff_pairs *c, const int8_t *even, const int8_t *odd, const uint8_t *weights) {
  const __m512i flip = _mm512_set1_epi8((char)0x88), mask = _mm512_set1_epi8(15), b = _mm512_loadu_si512(weights);
  const __m512i low = _mm512_ternarylogic_epi64(b, flip, mask, 0x28); /* (b ^ flip) & mask */
  const __m512i high = _mm512_ternarylogic_epi64(_mm512_srli_epi16(b, 4), flip, mask, 0x28);
  c[0] = _mm512_dpbusd_epi32(c[0], low, _mm512_loadu_si512(even));
  c[1] = _mm512_dpbusd_epi32(c[1], high, _mm512_loadu_si512(odd));
}
INLINE eff_pairs eff_pairs_add(eff_pairs a, eff_pairs b) { return _mm512_add_epi32(a, b); }
INLINE int32_t eff_pairs_sum(eff_pairs c) { return _mm512_reduce_add_epi32(c); }

#elif defined(__AVX2__) && !defined(EFF_GENERIC)
#define EFF_PAIR_LANES 32
typedef __m256i eff_pairs;
INLINE eff_pairs eff_pairs_zero(void) { return _mm256_setzero_si256(); }
INLINE eff_pairs eff_pairs_load(const void *p) { return _mm256_loadu_si256((const __m256i *)p); }
INLINE eff_pairs eff_pairs_add(eff_pairs a, eff_pairs b) { return _mm256_add_epi32(a, b); }
INLINE void eff_pairs_dot(eff_pairs *c, const int8_t *even, const int8_t *odd, const uint8_t *weights) {
  const __m256i mask = _mm256_set1_epi8(15), b = _mm256_xor_si256(eff_pairs_load(weights), _mm256_set1_epi8((char)0x88));
  const __m256i low = _mm256_and_si256(b, mask), high = _mm256_and_si256(_mm256_srli_epi16(b, 4), mask);
#if defined(__AVXVNNI__) && !defined(EFF_NO_VNNI)
  c[0] = _mm256_dpbusd_avx_epi32(c[0], low, eff_pairs_load(even));
  c[1] = _mm256_dpbusd_avx_epi32(c[1], high, eff_pairs_load(odd));
#else /* the sum of four products is at most 4 * 15 * 128, far from the limit of int16 */
  const __m256i even_products = _mm256_maddubs_epi16(low, eff_pairs_load(even));
  const __m256i products = _mm256_add_epi16(even_products, _mm256_maddubs_epi16(high, eff_pairs_load(odd)));
  c[0] = _mm256_add_epi32(c[0], _mm256_madd_epi16(products, _mm256_set1_epi16(1)));
#endif
}
INLINE int32_t eff_pairs_sum(eff_pairs v) {
  __m128i s = _mm_add_epi32(_mm256_castsi256_si128(v), _mm256_extracti128_si256(v, 1));
  s = _mm_add_epi32(s, _mm_shuffle_epi32(s, 0x4e));
  return _mm_cvtsi128_si32(_mm_add_epi32(s, _mm_shuffle_epi32(s, 0xb1)));
}
#endif

/* sum_k a[k] * w[k] over `bytes` pairs, where `sum` is that of all codes of a. As in eff_dot_row, weights are fetched as one
 * stream, a fixed way ahead. */
INLINE int32_t eff_dot4_row(const int8_t *even, const int8_t *odd, int32_t sum, const uint8_t *b, int64_t bytes) {
  int64_t i = 0;
  uint32_t total = 0u - 8u * (uint32_t)sum;
#if defined(EFF_PAIR_LANES)
  enum { STEP = 2 * EFF_PAIR_LANES, AHEAD = 4096 };
  eff_pairs acc[4];
  for (int j = 0; j < 4; j++) acc[j] = eff_pairs_zero();
  for (; i + STEP <= bytes; i += STEP) {
    for (int ahead = AHEAD; ahead < AHEAD + STEP; ahead += 64) __builtin_prefetch(b + i + ahead);
    eff_pairs_dot(acc, even + i, odd + i, b + i);
    eff_pairs_dot(acc + 2, even + i + EFF_PAIR_LANES, odd + i + EFF_PAIR_LANES, b + i + EFF_PAIR_LANES);
  }
  for (; i + EFF_PAIR_LANES <= bytes; i += EFF_PAIR_LANES) eff_pairs_dot(acc, even + i, odd + i, b + i);
  total += (uint32_t)eff_pairs_sum(eff_pairs_add(eff_pairs_add(acc[0], acc[1]), eff_pairs_add(acc[2], acc[3])));
#endif
  return (int32_t)(total + eff_dot4_tail(even + i, odd + i, b + i, bytes - i));
}
