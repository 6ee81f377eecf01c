/* The products of attention on a tile: AT_LANES queries against many keys.
 *
 * Queries sit in the lanes of a vector, keys are broadcast: a key costs one multiply-add a feature for all of them. */
#pragma once
#include "eff.h"

#define AT_LANES 16
#if defined(__AVX512F__) && !defined(EFF_GENERIC) && !defined(EFF_NO_AVX512)
#define AT_W 16
#define AT_BLOCK 16 /* keys, or features, whose sums are in registers together */
#elif defined(__AVX2__) && !defined(EFF_GENERIC)
#define AT_W 8
#define AT_BLOCK 4
#else
#define AT_W 4
#define AT_BLOCK 2
#endif
#define AT_V (AT_LANES / AT_W) /* vectors for the lanes */
typedef float at_v __attribute__((vector_size(4 * AT_W)));
typedef int32_t at_i __attribute__((vector_size(4 * AT_W)));
typedef float at_u __attribute__((vector_size(4 * AT_W), aligned(4), may_alias)); /* at any address */

INLINE at_v at_load(const float *p) { return *(const at_u *)p; }
INLINE void at_store(float *p, at_v v) { *(at_u *)p = v; }
INLINE at_v at_splat(float f) { return f - (at_v){0}; }
INLINE at_v at_select(at_i mask, at_v a, at_v b) { return (at_v)(((at_i)a & mask) | ((at_i)b & ~mask)); }
INLINE at_v at_max(at_v a, at_v b) { return at_select((at_i)((a > b) | (a != a)), a, b); }

/* A row of n features as floats, followed by zeros up to np. */
INLINE void at_load_row(const eff_dtype dtype, const void *src, int64_t i, float *restrict out, int64_t n, int64_t np) {
  if (dtype == EFF_F32) {
    const float *f = (const float *)src + i;
    int64_t c = 0;
    for (; c + AT_W <= n; c += AT_W) at_store(out + c, at_load(f + c));
    for (; c < n; c++) out[c] = f[c];
  } else {
    eff_load_row(dtype, eff_at(src, dtype, i), out, n);
  }
  for (int64_t c = n; c < np; c++) out[c] = 0.0f;
}

/* dst[j, i] = src[i, j]; rows and columns are multiples of 4. */
INLINE void at_transpose(const float *src, int64_t src_stride, float *dst, int64_t dst_stride, int64_t rows, int64_t columns) {
  for (int64_t i = 0; i < rows; i += 4)
    for (int64_t j = 0; j < columns; j += 4) {
      const float *s = src + i * src_stride + j;
      float *o = dst + j * dst_stride + i;
#if defined(__x86_64__)
      __m128 a = _mm_loadu_ps(s), b = _mm_loadu_ps(s + src_stride), c = _mm_loadu_ps(s + 2 * src_stride);
      __m128 d = _mm_loadu_ps(s + 3 * src_stride);
      _MM_TRANSPOSE4_PS(a, b, c, d);
      _mm_storeu_ps(o, a), _mm_storeu_ps(o + dst_stride, b), _mm_storeu_ps(o + 2 * dst_stride, c);
      _mm_storeu_ps(o + 3 * dst_stride, d);
#else
      for (int x = 0; x < 4; x++)
        for (int y = 0; y < 4; y++) o[y * dst_stride + x] = s[x * src_stride + y];
#endif
    }
}

/* e^x for x <= 0, to about 2 ulp: 2^n * e^r with |r| <= ln(2) / 2; 0 below -87, NaN for NaN. */
INLINE at_v at_exp(at_v raw) {
  at_v x = at_select((at_i)(raw < at_splat(-87.0f)), at_splat(-87.0f), raw);
  at_v t = x * 1.44269504f + 12582912.0f;
  at_i n = (at_i)t - 0x4b400000;
  at_v r = t - 12582912.0f;
  r = (x - r * 0.693359375f) + r * 2.12194440e-4f;
  at_v e = at_splat(1.9875691500e-4f);
  e = e * r + 1.3981999507e-3f;
  e = e * r + 8.3334519073e-3f;
  e = e * r + 4.1665795894e-2f;
  e = e * r + 1.6666665459e-1f;
  e = e * r + 5.0000001201e-1f;
  e = e * r * r + r + 1.0f;
  e = e * (at_v)((n + 127) << 23);
  return at_select((at_i)(raw < at_splat(-87.0f)), at_splat(0.0f), e);
}

#if AT_W == 16
/* Position i: the sum of p over i and i + s where bit s of i is clear, of q over i - s and i where it is set. */
INLINE at_v at_fold(at_v p, at_v q, const int s) {
  at_i pick;
  uint16_t high = 0;
  for (int i = 0; i < 16; i++) pick[i] = i & s ? 16 + i - s : i + s, high |= i & s ? (uint16_t)(1 << i) : 0;
  return (at_v)_mm512_mask_blend_ps(high, (__m512)p, (__m512)q) + (at_v)_mm512_permutex2var_ps((__m512)p, (__m512i)pick, (__m512)q);
}
#endif

/* out[i] = the sum of v[i], for sixteen vectors; v is used up. */
INLINE void at_sums(at_v *v, float *out) {
#if AT_W == 16
#pragma GCC unroll 8
  for (int i = 0; i < 8; i++) v[i] = at_fold(v[i], v[i + 8], 8);
#pragma GCC unroll 4
  for (int i = 0; i < 4; i++) v[i] = at_fold(v[i], v[i + 4], 4);
  v[0] = at_fold(v[0], v[2], 2), v[1] = at_fold(v[1], v[3], 2);
  at_store(out, at_fold(v[0], v[1], 1));
#else
  for (int i = 0; i < 16; i++) {
    float sum = 0.0f;
    for (int l = 0; l < AT_W; l++) sum += v[i][l];
    out[i] = sum;
  }
#endif
}

/* v in the lanes of the mask that belong to vector u, `other` in the rest. */
INLINE at_v at_keep(uint16_t mask, int u, at_v v, at_v other) {
#if AT_W == 16
  (void)u;
  return (at_v)_mm512_mask_blend_ps(mask, (__m512)other, (__m512)v);
#else
  at_i bit;
  for (int i = 0; i < AT_W; i++) bit[i] = 1 << i;
  return at_select(((mask >> (u * AT_W)) & bit) != 0, v, other);
#endif
}

/* s[i, lane] = sum_c rows[i, c] xt[c, lane] for N keys; xt is [d, lanes]. */
#define AT_SCORES(N)                                                                                                              \
  INLINE void at_scores_##N(const float *rows, int64_t stride, const float *xt, int64_t d, float *s) {                            \
    at_v acc[N][AT_V];                                                                                                            \
    _Pragma("GCC unroll 16") for (int i = 0; i < N; i++) _Pragma("GCC unroll 4") for (int u = 0; u < AT_V; u++) acc[i][u] = (at_v){0}; \
    for (int64_t c = 0; c < d; c++) {                                                                                             \
      at_v x[AT_V];                                                                                                               \
      _Pragma("GCC unroll 4") for (int u = 0; u < AT_V; u++) x[u] = at_load(xt + c * AT_LANES + u * AT_W);                        \
      _Pragma("GCC unroll 16") for (int i = 0; i < N; i++) {                                                                      \
        const at_v y = at_splat(rows[i * stride + c]);                                                                            \
        _Pragma("GCC unroll 4") for (int u = 0; u < AT_V; u++) acc[i][u] += x[u] * y;                                             \
      }                                                                                                                           \
    }                                                                                                                             \
    _Pragma("GCC unroll 16") for (int i = 0; i < N; i++) _Pragma("GCC unroll 4") for (int u = 0; u < AT_V; u++)                   \
        at_store(s + i * AT_LANES + u * AT_W, acc[i][u]);                                                                         \
  }
AT_SCORES(4)
#if AT_BLOCK == 16
AT_SCORES(8)
AT_SCORES(16)
#endif

/* For n keys, a multiple of 4. */
INLINE void at_scores(const float *rows, int64_t stride, const float *xt, int64_t d, int n, float *s) {
  int i = 0;
#if AT_BLOCK == 16
  for (; i + 16 <= n; i += 16) at_scores_16(rows + i * stride, stride, xt, d, s + i * AT_LANES);
  for (; i + 8 <= n; i += 8) at_scores_8(rows + i * stride, stride, xt, d, s + i * AT_LANES);
#endif
  for (; i < n; i += 4) at_scores_4(rows + i * stride, stride, xt, d, s + i * AT_LANES);
}

/* acc[c, lane] += sum_i w[i, lane] rows[i, c] for n keys and all features, a multiple of 16. */
INLINE void at_values(const float *w, const float *rows, int64_t stride, int64_t d, int n, float *acc) {
  for (int64_t c = 0; c < d; c += AT_BLOCK) {
    at_v sum[AT_BLOCK][AT_V];
#pragma GCC unroll 16
    for (int j = 0; j < AT_BLOCK; j++)
#pragma GCC unroll 4
      for (int u = 0; u < AT_V; u++) sum[j][u] = at_load(acc + (c + j) * AT_LANES + u * AT_W);
    for (int i = 0; i < n; i++) {
      at_v x[AT_V];
#pragma GCC unroll 4
      for (int u = 0; u < AT_V; u++) x[u] = at_load(w + i * AT_LANES + u * AT_W);
#pragma GCC unroll 16
      for (int j = 0; j < AT_BLOCK; j++) {
        const at_v y = at_splat(rows[i * stride + c + j]);
#pragma GCC unroll 4
        for (int u = 0; u < AT_V; u++) sum[j][u] += x[u] * y;
      }
    }
#pragma GCC unroll 16
    for (int j = 0; j < AT_BLOCK; j++)
#pragma GCC unroll 4
      for (int u = 0; u < AT_V; u++) at_store(acc + (c + j) * AT_LANES + u * AT_W, sum[j][u]);
  }
}

/* acc_i[c] += sum_lane w[i, lane] rows[lane, c] for four keys, whose sums lie at to[0..3]; d is a multiple of 16. */
INLINE void at_spread(const float *w, const float *rows, int64_t d, float *const to[4]) {
  const int vectors = 2;
  for (int64_t c = 0; c < d;) {
    const int two = c + vectors * AT_W <= d;
    at_v sum[4][2];
#pragma GCC unroll 4
    for (int i = 0; i < 4; i++) sum[i][0] = at_load(to[i] + c), sum[i][1] = two ? at_load(to[i] + c + AT_W) : (at_v){0};
    if (two) {
#pragma GCC unroll 16
      for (int lane = 0; lane < AT_LANES; lane++) {
        const at_v x0 = at_load(rows + lane * d + c), x1 = at_load(rows + lane * d + c + AT_W);
#pragma GCC unroll 4
        for (int i = 0; i < 4; i++) {
          const at_v y = at_splat(w[i * AT_LANES + lane]);
          sum[i][0] += x0 * y, sum[i][1] += x1 * y;
        }
      }
    } else {
      for (int lane = 0; lane < AT_LANES; lane++) {
        const at_v x0 = at_load(rows + lane * d + c);
#pragma GCC unroll 4
        for (int i = 0; i < 4; i++) sum[i][0] += x0 * at_splat(w[i * AT_LANES + lane]);
      }
    }
#pragma GCC unroll 4
    for (int i = 0; i < 4; i++) {
      at_store(to[i] + c, sum[i][0]);
      if (two) at_store(to[i] + c + AT_W, sum[i][1]);
    }
    c += two ? 2 * AT_W : AT_W;
  }
}
