/* Dot products of int8 codes: the innermost loop of every int8 kernel, one version per instruction set.
 *
 * Weights are read where they lie, row-major int8. Activation codes are stored in the form that the multiply instruction
 * wants (`eff_act`), padded to a multiple of EFF_STEP with the code of zero:
 *   AVX-512 VNNI, AVX-VNNI  unsigned bytes, code + 128; the surplus 128 * sum(weights) is subtracted
 *   others                  int16 (AVX2: one multiply-add of pairs gives exact int32 sums)
 * All sums are exact in int32 for K <= 133144 (127^2 * K < 2^31), the offset form included: surplus and sum wrap together. */
#pragma once
#include "eff.h"

#if defined(__AVX512VNNI__) && defined(__AVX512BW__) && !defined(EFF_NO_VNNI) && !defined(EFF_EMULATE_VNNI)
#define EFF_STEP 64
#define EFF_OFFSET 128
typedef uint8_t eff_act;
typedef __m512i eff_acc;
typedef __m512i eff_wide;
INLINE eff_acc eff_acc_zero(void) { return _mm512_setzero_si512(); }
INLINE eff_wide eff_widen_weights(const int8_t *b) { return _mm512_loadu_si512(b); }
INLINE eff_acc eff_dot(eff_acc c, const eff_act *a, eff_wide b) { return _mm512_dpbusd_epi32(c, _mm512_loadu_si512(a), b); }
INLINE eff_acc eff_dot_offset(eff_acc c, eff_wide b) { return _mm512_dpbusd_epi32(c, _mm512_set1_epi8((char)EFF_OFFSET), b); }
INLINE int32_t eff_sum(eff_acc c) { return _mm512_reduce_add_epi32(c); }

#elif (defined(__AVXVNNI__) || defined(EFF_EMULATE_VNNI)) && !defined(EFF_NO_VNNI)
#define EFF_STEP 32
#define EFF_OFFSET 128
typedef uint8_t eff_act;
typedef __m256i eff_acc;
typedef __m256i eff_wide;
INLINE eff_acc eff_acc_zero(void) { return _mm256_setzero_si256(); }
INLINE eff_wide eff_widen_weights(const int8_t *b) { return _mm256_loadu_si256((const __m256i *)b); }
#if defined(__AVXVNNI__) && !defined(EFF_EMULATE_VNNI)
INLINE eff_acc eff_dpbusd(eff_acc c, __m256i a, __m256i b) { return _mm256_dpbusd_avx_epi32(c, a, b); }
#else /* the same function without the instruction, so that machines without it can test this path */
INLINE eff_acc eff_dpbusd(eff_acc c, __m256i a, __m256i b) {
  uint8_t ua[32];
  int8_t sb[32];
  int32_t out[8];
  memcpy(ua, &a, 32), memcpy(sb, &b, 32), memcpy(out, &c, 32);
  for (int i = 0; i < 32; i++) out[i / 4] += (int32_t)ua[i] * sb[i];
  return _mm256_loadu_si256((const __m256i *)out);
}
#endif
INLINE eff_acc eff_dot(eff_acc c, const eff_act *a, eff_wide b) { return eff_dpbusd(c, _mm256_loadu_si256((const __m256i *)a), b); }
INLINE eff_acc eff_dot_offset(eff_acc c, eff_wide b) { return eff_dpbusd(c, _mm256_set1_epi8((char)EFF_OFFSET), b); }
INLINE int32_t eff_sum(eff_acc v) {
  __m128i s = _mm_add_epi32(_mm256_castsi256_si128(v), _mm256_extracti128_si256(v, 1));
  s = _mm_add_epi32(s, _mm_shuffle_epi32(s, 0x4e));
  return _mm_cvtsi128_si32(_mm_add_epi32(s, _mm_shuffle_epi32(s, 0xb1)));
}

#elif defined(__AVX2__) && !defined(EFF_GENERIC)
#define EFF_STEP 16
#define EFF_OFFSET 0
typedef int16_t eff_act;
typedef __m256i eff_acc;
typedef __m256i eff_wide;
INLINE eff_acc eff_acc_zero(void) { return _mm256_setzero_si256(); }
INLINE eff_wide eff_widen_weights(const int8_t *b) { return _mm256_cvtepi8_epi16(_mm_loadu_si128((const __m128i *)b)); }
INLINE eff_acc eff_dot(eff_acc c, const eff_act *a, eff_wide b) {
  c = _mm256_add_epi32(c, _mm256_madd_epi16(_mm256_loadu_si256((const __m256i *)a), b));
  __asm__ volatile("" : "+x"(c)); /* GCC would gather all products before the sums, for which there are not enough registers */
  return c;
}
INLINE int32_t eff_sum(eff_acc v) {
  __m128i s = _mm_add_epi32(_mm256_castsi256_si128(v), _mm256_extracti128_si256(v, 1));
  s = _mm_add_epi32(s, _mm_shuffle_epi32(s, 0x4e));
  return _mm_cvtsi128_si32(_mm_add_epi32(s, _mm_shuffle_epi32(s, 0xb1)));
}

/* A lone row takes its codes as bytes and 32 weights at a time, without the widening. |w| <= 128 and |a| <= 127, so that a pair
 * of products fits int16: exact. */
#define EFF_ROW_STEP 32
typedef int8_t eff_row;
INLINE eff_acc eff_row_dot(eff_acc c, const eff_row *a, const int8_t *b) {
  const __m256i w = _mm256_loadu_si256((const __m256i *)b), code = _mm256_loadu_si256((const __m256i *)a);
  const __m256i pairs = _mm256_maddubs_epi16(_mm256_abs_epi8(w), _mm256_sign_epi8(code, w));
  return _mm256_add_epi32(c, _mm256_madd_epi16(pairs, _mm256_set1_epi16(1)));
}

#else /* any processor: the compiler makes what it can of vectors of its own */
#define EFF_STEP 16
#define EFF_OFFSET 0
typedef int16_t eff_act;
typedef int32_t eff_acc __attribute__((vector_size(32)));
typedef int8_t eff_wide __attribute__((vector_size(16)));
INLINE eff_acc eff_acc_zero(void) { return (eff_acc){0}; }
INLINE eff_wide eff_widen_weights(const int8_t *b) {
  eff_wide v;
  memcpy(&v, b, 16);
  return v;
}
INLINE eff_acc eff_dot(eff_acc c, const eff_act *a, eff_wide b) {
  for (int i = 0; i < 8; i++) c[i] += (int32_t)a[2 * i] * b[2 * i] + (int32_t)a[2 * i + 1] * b[2 * i + 1];
  return c;
}
INLINE int32_t eff_sum(eff_acc v) {
  int32_t s = 0;
  for (int i = 0; i < 8; i++) s += v[i];
  return s;
}
#endif

#if EFF_OFFSET == 0
INLINE eff_acc eff_dot_offset(eff_acc c, eff_wide b) {
  (void)b;
  return c;
}
#endif

INLINE eff_act eff_act_of(int32_t code) { return (eff_act)(code + EFF_OFFSET); }

#ifndef EFF_ROW_STEP
#define EFF_ROW_STEP EFF_STEP
typedef eff_act eff_row;
INLINE eff_acc eff_row_dot(eff_acc c, const eff_row *a, const int8_t *b) { return eff_dot(c, a, eff_widen_weights(b)); }
#endif

/* sum_k a[k] * b[k] of one row of activations and one of weights. The speed is that of reading the weights, and memory is read
 * quickest as one stream from beginning to end: one row of weights after the other, a fixed way ahead. `a` has room for a
 * multiple of EFF_ROW_STEP. */
INLINE int32_t eff_dot_row(const eff_row *a, const int8_t *b, int64_t k_len) {
  eff_acc acc[4], off[4];
  for (int i = 0; i < 4; i++) acc[i] = off[i] = eff_acc_zero();
#define EFF_STEP_OF(i, weights)                                                            \
  acc[i] = eff_row_dot(acc[i], a + k + (i) * EFF_ROW_STEP, weights);                       \
  if (EFF_OFFSET) off[i] = eff_dot_offset(off[i], eff_widen_weights(weights));
  int64_t k = 0;
  for (; k + 4 * EFF_ROW_STEP <= k_len; k += 4 * EFF_ROW_STEP) {
    for (int ahead = 2048; ahead < 2048 + 4 * EFF_ROW_STEP; ahead += 64) __builtin_prefetch(b + k + ahead);
#pragma GCC unroll 4
    for (int i = 0; i < 4; i++) { EFF_STEP_OF(i, b + k + i * EFF_ROW_STEP) }
  }
  for (; k + EFF_ROW_STEP <= k_len; k += EFF_ROW_STEP) { EFF_STEP_OF(0, b + k) }
  if (k < k_len) {
    int8_t tail[EFF_ROW_STEP] = {0};
    memcpy(tail, b + k, (size_t)(k_len - k));
    EFF_STEP_OF(0, tail)
  }
#undef EFF_STEP_OF
  int32_t sum = 0; /* wraps with its surplus */
  for (int i = 0; i < 4; i++) sum = (int32_t)((uint32_t)sum + (uint32_t)eff_sum(acc[i]) - (EFF_OFFSET ? (uint32_t)eff_sum(off[i]) : 0u));
  return sum;
}

#define EFF_BLOCK 8 /* most rows of either side in one block */

/* c[m * ldc + n] += sum_k a[m, k] * b[n, k] for MR rows of activations and NR rows of weights; `surplus[n]` is what the offset
 * of the activation codes adds to each of these sums: computed here when `first`, taken as given otherwise. */
INLINE void eff_dot_block(const int MR, const int NR, const int first, const eff_act *a, int64_t lda, const int8_t *b, int64_t ldb,
                          int64_t k_len, int32_t *surplus, int32_t *c, int64_t ldc) {
  eff_acc acc[EFF_BLOCK][EFF_BLOCK], off[EFF_BLOCK]; /* constant bounds, so that they live in registers */
  for (int n = 0; n < NR; n++) {
    off[n] = eff_acc_zero();
    for (int m = 0; m < MR; m++) acc[m][n] = eff_acc_zero();
  }
  int64_t k = 0;
  for (; k + EFF_STEP <= k_len; k += EFF_STEP) {
    eff_wide wide[EFF_BLOCK];
#pragma GCC unroll 8
    for (int n = 0; n < NR; n++) {
      wide[n] = eff_widen_weights(b + n * ldb + k);
      if (EFF_OFFSET && first) off[n] = eff_dot_offset(off[n], wide[n]);
    }
#pragma GCC unroll 8
    for (int m = 0; m < MR; m++)
#pragma GCC unroll 8
      for (int n = 0; n < NR; n++) acc[m][n] = eff_dot(acc[m][n], a + m * lda + k, wide[n]);
  }
  if (k < k_len) /* the last weights of the row, padded with zeros; the activation codes are padded already */
    for (int n = 0; n < NR; n++) {
      int8_t tail[EFF_STEP] = {0};
      memcpy(tail, b + n * ldb + k, (size_t)(k_len - k));
      eff_wide wide = eff_widen_weights(tail);
      if (EFF_OFFSET && first) off[n] = eff_dot_offset(off[n], wide);
      for (int m = 0; m < MR; m++) acc[m][n] = eff_dot(acc[m][n], a + m * lda + k, wide);
    }
  for (int n = 0; n < NR; n++) {
    if (EFF_OFFSET && first) surplus[n] = eff_sum(off[n]);
    for (int m = 0; m < MR; m++) c[m * ldc + n] += (int32_t)((uint32_t)eff_sum(acc[m][n]) - (EFF_OFFSET ? (uint32_t)surplus[n] : 0u));
  }
}
