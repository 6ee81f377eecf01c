/* A block of keys of decode_attention: scores of up to four query heads, and the weighted sum of values.
 *
 * With AVX-512 a block of 32 features is two vectors. A bfloat16 row is not unpacked in order: the even features are the row
 * shifted left by 16, the odd ones the row with its low halves cleared, two cheap instructions. Queries are laid out the same
 * way, and so are the sums until they are stored (`db_order`). Everything is computed in float32. */
#pragma once
#include "attention_tile.h"

#define DB_KEYS 64 /* keys per block */
#if AT_W == 16 && defined(__AVX512BW__)
#define DB_WIDE 1
#else
#define DB_WIDE 0
#endif

/* Features of a row of queries or sums: d rounded up, the rest is zero. */
INLINE int64_t db_features(int64_t d) { return DB_WIDE ? (d + 31) / 32 * 32 : d; }

/* Where feature c lies in a row of queries or sums. */
INLINE int64_t db_order(eff_dtype dtype, int64_t c) {
  if (DB_WIDE && dtype == EFF_BF16) return c / 32 * 32 + c % 2 * 16 + c % 32 / 2;
  return c;
}

#if DB_WIDE
/* Thirty-two features, the first n of them from memory, as two vectors. */
INLINE void db_load(const eff_dtype dtype, const void *row, int64_t c, const int64_t n, at_v *a, at_v *b) {
  if (dtype == EFF_F32) {
    const float *f = (const float *)row + c;
    if (n >= 32) {
      *a = at_load(f), *b = at_load(f + 16);
    } else {
      const uint32_t mask = ((uint32_t)1 << n) - 1;
      *a = (at_v)_mm512_maskz_loadu_ps((__mmask16)mask, f), *b = (at_v)_mm512_maskz_loadu_ps((__mmask16)(mask >> 16), f + 16);
    }
    return;
  }
  const uint16_t *h = (const uint16_t *)row + c;
  const __m512i both = n >= 32 ? _mm512_loadu_si512(h) : _mm512_maskz_loadu_epi16(((uint32_t)1 << n) - 1, h);
  if (dtype == EFF_BF16) {
    *a = (at_v)_mm512_slli_epi32(both, 16);
    *b = (at_v)_mm512_and_si512(both, _mm512_set1_epi32((int32_t)0xffff0000));
  } else {
    *a = (at_v)_mm512_cvtph_ps(_mm512_castsi512_si256(both)), *b = (at_v)_mm512_cvtph_ps(_mm512_extracti64x4_epi64(both, 1));
  }
}

/* Ask for n rows from memory. */
INLINE void db_ask(const char *row, int64_t row_bytes, int64_t bytes, int n) {
  for (int i = 0; i < n; i++)
    for (int64_t at = 0; at < bytes; at += 64) __builtin_prefetch(row + i * row_bytes + at);
}

/* acc[h, x] += features c to c + 31 of q[h] . key x, n of them in memory. */
INLINE void db_dot(const eff_dtype dtype, const int NH, const int together, const float *q, const char *const *rows, int64_t dp, int64_t c,
                   const int64_t n, at_v *acc) {
  at_v qa[4], qb[4];
#pragma GCC unroll 4
  for (int h = 0; h < NH; h++) qa[h] = at_load(q + h * dp + c), qb[h] = at_load(q + h * dp + c + 16);
#pragma GCC unroll 16
  for (int x = 0; x < together; x++) {
    at_v a, b;
    db_load(dtype, rows[x], c, n, &a, &b);
#pragma GCC unroll 4
    for (int h = 0; h < NH; h++) {
      acc[h * together + x] += qa[h] * a;
      acc[h * together + x] += qb[h] * b;
    }
  }
}

/* scores[h, i] = q[h] . key i for NH query heads; sixteen of them at a time. The rows of `ahead` are asked for on the way. */
INLINE void db_scores(const eff_dtype dtype, const int NH, const float *q, const char *key, const char *ahead, int64_t key_bytes, int64_t d,
                      int keys, float *scores) {
  const int together = NH == 1 ? 16 : NH == 2 ? 8 : 4;
  const int64_t dp = db_features(d);
  for (int i = 0; i < keys; i += together) {
    at_v acc[16];
    const char *rows[16];
#pragma GCC unroll 16
    for (int x = 0; x < 16; x++) acc[x] = (at_v){0};
#pragma GCC unroll 16
    for (int x = 0; x < together; x++) rows[x] = key + MIN(i + x, keys - 1) * key_bytes;
    db_ask(ahead + i * key_bytes, key_bytes, d * (int64_t)eff_size(dtype), MIN(together, keys - i));
    int64_t c = 0;
    for (; c + 32 <= d; c += 32) db_dot(dtype, NH, together, q, rows, dp, c, 32, acc);
    if (c < d) db_dot(dtype, NH, together, q, rows, dp, c, d - c, acc);
    float sums[16];
    at_sums(acc, sums);
#pragma GCC unroll 4
    for (int h = 0; h < NH; h++) memcpy(scores + h * DB_KEYS + i, sums + h * together, (size_t)together * 4);
  }
}

/* sum[h] += weights[h, i] * value i for N blocks of 32 features from c on, n features of them in memory; asks for those of `ahead`. */
INLINE void db_values_of(const eff_dtype dtype, const int NH, const int N, const float *weights, const char *value, int64_t value_bytes,
                         int64_t dp, int64_t c, const int64_t n, int keys, const char *ahead, float *sum) {
  at_v acc[4][4];
#pragma GCC unroll 4
  for (int h = 0; h < NH; h++)
#pragma GCC unroll 4
    for (int x = 0; x < 2 * N; x++) acc[h][x] = at_load(sum + h * dp + c + 16 * x);
  for (int i = 0; i < keys; i++) {
    at_v v[4];
    db_ask(ahead + i * value_bytes + c * (int64_t)eff_size(dtype), 0, 32 * N * (int64_t)eff_size(dtype), 1);
#pragma GCC unroll 2
    for (int x = 0; x < N; x++) db_load(dtype, value + i * value_bytes, c + 32 * x, n - 32 * x, &v[2 * x], &v[2 * x + 1]);
#pragma GCC unroll 4
    for (int h = 0; h < NH; h++) {
      const at_v w = at_splat(weights[h * DB_KEYS + i]);
#pragma GCC unroll 4
      for (int x = 0; x < 2 * N; x++) acc[h][x] += w * v[x];
    }
  }
#pragma GCC unroll 4
  for (int h = 0; h < NH; h++)
#pragma GCC unroll 4
    for (int x = 0; x < 2 * N; x++) at_store(sum + h * dp + c + 16 * x, acc[h][x]);
}

INLINE void db_values(const eff_dtype dtype, const int NH, const float *weights, const char *value, int64_t value_bytes, int64_t d, int keys,
                      const char *ahead, float *sum) {
  const int64_t dp = db_features(d);
  int64_t c = 0;
  for (; c + 64 <= d; c += 64) db_values_of(dtype, NH, 2, weights, value, value_bytes, dp, c, 64, keys, ahead, sum);
  for (; c + 32 <= d; c += 32) db_values_of(dtype, NH, 1, weights, value, value_bytes, dp, c, 32, keys, ahead, sum);
  if (c < d) db_values_of(dtype, NH, 1, weights, value, value_bytes, dp, c, d - c, keys, ahead, sum);
}
#else
INLINE eff_vf db_load(eff_dtype dtype, const void *p) {
  if (dtype == EFF_F32) return eff_vload(p);
  float f[EFF_LANES];
#if defined(__AVX2__) && !defined(EFF_GENERIC)
  if (dtype == EFF_BF16) return (eff_vf)_mm256_slli_epi32(_mm256_cvtepu16_epi32(_mm_loadu_si128(p)), 16);
#endif
  eff_load_row(dtype, p, f, EFF_LANES);
  return eff_vload(f);
}

/* scores[h, i] = q[h] . key i for NH query heads (d a multiple of 8). */
INLINE void db_scores(const eff_dtype dtype, const int NH, const float *q, const char *key, const char *ahead, int64_t key_bytes, int64_t d,
                      int keys, float *scores) {
  (void)ahead;
  for (int i = 0; i < keys; i++) {
    const char *row = key + i * key_bytes;
    eff_vf acc[4];
    for (int h = 0; h < NH; h++) acc[h] = eff_splat(0.0f);
    for (int64_t c = 0; c < d; c += EFF_LANES) {
      eff_vf kv = db_load(dtype, row + c * (int64_t)eff_size(dtype));
#pragma GCC unroll 4
      for (int h = 0; h < NH; h++) acc[h] += eff_vload(q + h * d + c) * kv;
    }
    for (int h = 0; h < NH; h++) scores[h * DB_KEYS + i] = eff_vsum(acc[h]);
  }
}

/* sum[h] += weights[h, i] * value i, sixteen features of NH heads at a time in registers. */
INLINE void db_values(const eff_dtype dtype, const int NH, const float *weights, const char *value, int64_t value_bytes, int64_t d, int keys,
                      const char *ahead, float *sum) {
  (void)ahead;
  for (int64_t c = 0; c < d; c += 2 * EFF_LANES) {
    const int two = c + EFF_LANES < d;
    eff_vf a[4], b[4];
    for (int h = 0; h < NH; h++) a[h] = eff_vload(sum + h * d + c), b[h] = two ? eff_vload(sum + h * d + c + EFF_LANES) : a[h];
    const char *column = value + c * (int64_t)eff_size(dtype);
    for (int i = 0; i < keys; i++) {
      eff_vf va = db_load(dtype, column + i * value_bytes);
      eff_vf vb = two ? db_load(dtype, column + i * value_bytes + EFF_LANES * (int64_t)eff_size(dtype)) : va;
#pragma GCC unroll 4
      for (int h = 0; h < NH; h++) {
        const eff_vf w = eff_splat(weights[h * DB_KEYS + i]);
        a[h] += w * va, b[h] += w * vb;
      }
    }
    for (int h = 0; h < NH; h++) {
      eff_vstore(sum + h * d + c, a[h]);
      if (two) eff_vstore(sum + h * d + c + EFF_LANES, b[h]);
    }
  }
}
#endif

/* The largest of n scores and `best`, n a multiple of AT_W; a NaN is passed over (it shows in the weights). */
INLINE float db_top(const float *s, int n, float best) {
  at_v top = at_splat(best);
  for (int i = 0; i < n; i += AT_W) {
    const at_v x = at_load(s + i);
    top = at_select((at_i)(x > top), x, top);
  }
  for (int l = 0; l < AT_W; l++) best = top[l] > best ? top[l] : best;
  return best;
}
