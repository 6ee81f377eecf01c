/* What the forward and the backward of neighborhood attention share: windows, tiles, packing, and the three products.
 *
 * A tile is NA_LANES queries of one batch entry, one key-value head and one dilation group, in a box on the map that is chosen
 * for the least surplus work. Its keys are the box of all keys that any of its queries sees. Queries sit in the lanes of a
 * vector, keys are broadcast: a key costs one multiply-add a feature, and a mask of one bit a lane takes out what is not in
 * the window of the lane's query. So borders, strides, dilation and causal axes need no code of their own. */
#pragma once
#include "eff.h"

#define NA_LANES 16
#if defined(__AVX512F__) && !defined(EFF_GENERIC) && !defined(EFF_NO_AVX512)
#define NA_W 16
#define NA_BLOCK 16 /* keys, or features, whose sums are in registers together */
#elif defined(__AVX2__) && !defined(EFF_GENERIC)
#define NA_W 8
#define NA_BLOCK 4
#else
#define NA_W 4
#define NA_BLOCK 2
#endif
#define NA_V (NA_LANES / NA_W) /* vectors for the lanes */
#define NA_CHUNK 128           /* keys that are packed at once */
typedef float na_v __attribute__((vector_size(4 * NA_W)));
typedef int32_t na_i __attribute__((vector_size(4 * NA_W)));
typedef float na_u __attribute__((vector_size(4 * NA_W), aligned(4), may_alias)); /* at any address */

INLINE na_v na_load(const float *p) { return *(const na_u *)p; }
INLINE void na_store(float *p, na_v v) { *(na_u *)p = v; }
INLINE na_v na_splat(float f) { return f - (na_v){0}; }
INLINE na_v na_select(na_i mask, na_v a, na_v b) { return (na_v)(((na_i)a & mask) | ((na_i)b & ~mask)); }
INLINE na_v na_max(na_v a, na_v b) { return na_select((na_i)((a > b) | (a != a)), a, b); }

typedef struct {
  int64_t batch, heads, kv_heads, d, dv, extra;
  int64_t length[3], window[3], stride[3], dilation[3], causal[3];
  const void *q, *k, *v, *extra_k, *extra_v;
  int64_t q_stride[5], k_stride[5], v_stride[5]; /* batch, three axes, head */
  int64_t extra_k_stride[3], extra_v_stride[3];  /* batch, key, head */
  double scale;
  int64_t dtype, threads;
  void *out;  /* [batch, tokens, heads, dv] */
  float *lse; /* [batch, tokens, heads] */
  const void *grad;
  const float *grad_lse;
  void *dq, *dk, *dv_out, *d_extra_k, *d_extra_v;
} na_args;

typedef struct {
  int64_t group, first, count, lo, hi; /* residue, first query, number of queries, first and last key; in the group */
} na_span;

typedef struct {
  const na_args *a;
  int64_t dp, dvp; /* d and dv rounded up to lanes */
  int64_t group;   /* query heads of a key-value head */
  int64_t size[4]; /* tile: three axes, heads */
  na_span *spans[3];
  int64_t count[4]; /* tiles: three axes, heads */
  int64_t tiles;
} na_plan;

typedef struct {
  const na_plan *p;
  const na_span *span[3];
  int64_t b, kv, first_head;
  int64_t token[NA_LANES]; /* flat index; -1: no query in this lane */
  int64_t head[NA_LANES];
  int64_t q_at[NA_LANES];
  int64_t next[3], done_extra; /* the key to be packed next */
  uint16_t every;              /* lanes that hold a query */
  /* scratch */
  uint16_t *seen[3];          /* for each axis and key of the box: lanes whose window has it */
  float *k, *v;               /* [NA_CHUNK, dp], [NA_CHUNK, dvp] */
  float *s, *s2;              /* [NA_CHUNK, lanes] */
  uint16_t mask[NA_CHUNK];    /* lanes that see the key */
  int64_t row[NA_CHUNK];      /* flat index of the key; additional ones follow the tokens; -1: padding */
  float *qr, *qt, *gr, *gt;   /* queries and gradients, [lanes, dp or dvp] and transposed */
  float *acc;                 /* [max(dp, dvp), lanes] */
  void *memory;
} na_tile;

int na_plan_make(na_plan *p, const na_args *a);
void na_plan_free(na_plan *p);
int na_tile_new(na_tile *t, const na_plan *p);
void na_tile_set(na_tile *t, int64_t b, int64_t kv, int64_t index);
/* Packs the next keys, padded to a multiple of 4; 0 when there are no more. */
int na_next_keys(na_tile *t);
/* Rows of the tile's lanes, from a contiguous [batch, tokens, heads, n] when strides are not given; zeros where there is none. */
void na_lanes_load(const na_tile *t, const void *src, int strided, int64_t n, int64_t np, float scale, float *rows);
void na_transpose(const float *src, int64_t src_stride, float *dst, int64_t dst_stride, int64_t rows, int64_t columns);

/* e^x for x <= 0, to about 2 ulp: 2^n * e^r with |r| <= ln(2) / 2; 0 below -87, NaN for NaN. */
INLINE na_v na_exp(na_v raw) {
  na_v x = na_select((na_i)(raw < na_splat(-87.0f)), na_splat(-87.0f), raw);
  na_v t = x * 1.44269504f + 12582912.0f;
  na_i n = (na_i)t - 0x4b400000;
  na_v r = t - 12582912.0f;
  r = (x - r * 0.693359375f) + r * 2.12194440e-4f;
  na_v e = na_splat(1.9875691500e-4f);
  e = e * r + 1.3981999507e-3f;
  e = e * r + 8.3334519073e-3f;
  e = e * r + 4.1665795894e-2f;
  e = e * r + 1.6666665459e-1f;
  e = e * r + 5.0000001201e-1f;
  e = e * r * r + r + 1.0f;
  e = e * (na_v)((n + 127) << 23);
  return na_select((na_i)(raw < na_splat(-87.0f)), na_splat(0.0f), e);
}

/* v in the lanes of the mask that belong to vector u, `other` in the rest. */
INLINE na_v na_keep(uint16_t mask, int u, na_v v, na_v other) {
#if NA_W == 16
  (void)u;
  return (na_v)_mm512_mask_blend_ps(mask, (__m512)other, (__m512)v);
#else
  na_i bit;
  for (int i = 0; i < NA_W; i++) bit[i] = 1 << i;
  return na_select(((mask >> (u * NA_W)) & bit) != 0, v, other);
#endif
}

/* s[i, lane] = sum_c rows[i, c] xt[c, lane] for N keys; xt is [d, lanes]. */
#define NA_SCORES(N)                                                                                                              \
  INLINE void na_scores_##N(const float *rows, int64_t stride, const float *xt, int64_t d, float *s) {                            \
    na_v acc[N][NA_V];                                                                                                            \
    _Pragma("GCC unroll 16") for (int i = 0; i < N; i++) _Pragma("GCC unroll 4") for (int u = 0; u < NA_V; u++) acc[i][u] = (na_v){0}; \
    for (int64_t c = 0; c < d; c++) {                                                                                             \
      na_v x[NA_V];                                                                                                               \
      _Pragma("GCC unroll 4") for (int u = 0; u < NA_V; u++) x[u] = na_load(xt + c * NA_LANES + u * NA_W);                        \
      _Pragma("GCC unroll 16") for (int i = 0; i < N; i++) {                                                                      \
        const na_v y = na_splat(rows[i * stride + c]);                                                                            \
        _Pragma("GCC unroll 4") for (int u = 0; u < NA_V; u++) acc[i][u] += x[u] * y;                                             \
      }                                                                                                                           \
    }                                                                                                                             \
    _Pragma("GCC unroll 16") for (int i = 0; i < N; i++) _Pragma("GCC unroll 4") for (int u = 0; u < NA_V; u++)                   \
        na_store(s + i * NA_LANES + u * NA_W, acc[i][u]);                                                                         \
  }
NA_SCORES(4)
#if NA_BLOCK == 16
NA_SCORES(8)
NA_SCORES(16)
#endif

/* For n keys, a multiple of 4. */
INLINE void na_scores(const float *rows, int64_t stride, const float *xt, int64_t d, int n, float *s) {
  int i = 0;
#if NA_BLOCK == 16
  for (; i + 16 <= n; i += 16) na_scores_16(rows + i * stride, stride, xt, d, s + i * NA_LANES);
  for (; i + 8 <= n; i += 8) na_scores_8(rows + i * stride, stride, xt, d, s + i * NA_LANES);
#endif
  for (; i < n; i += 4) na_scores_4(rows + i * stride, stride, xt, d, s + i * NA_LANES);
}

/* acc[c, lane] += sum_i w[i, lane] rows[i, c] for n keys and all features, a multiple of 16. */
INLINE void na_values(const float *w, const float *rows, int64_t stride, int64_t d, int n, float *acc) {
  for (int64_t c = 0; c < d; c += NA_BLOCK) {
    na_v sum[NA_BLOCK][NA_V];
#pragma GCC unroll 16
    for (int j = 0; j < NA_BLOCK; j++)
#pragma GCC unroll 4
      for (int u = 0; u < NA_V; u++) sum[j][u] = na_load(acc + (c + j) * NA_LANES + u * NA_W);
    for (int i = 0; i < n; i++) {
      na_v x[NA_V];
#pragma GCC unroll 4
      for (int u = 0; u < NA_V; u++) x[u] = na_load(w + i * NA_LANES + u * NA_W);
#pragma GCC unroll 16
      for (int j = 0; j < NA_BLOCK; j++) {
        const na_v y = na_splat(rows[i * stride + c + j]);
#pragma GCC unroll 4
        for (int u = 0; u < NA_V; u++) sum[j][u] += x[u] * y;
      }
    }
#pragma GCC unroll 16
    for (int j = 0; j < NA_BLOCK; j++)
#pragma GCC unroll 4
      for (int u = 0; u < NA_V; u++) na_store(acc + (c + j) * NA_LANES + u * NA_W, sum[j][u]);
  }
}

/* acc_i[c] += sum_lane w[i, lane] rows[lane, c] for four keys, whose sums lie at to[0..3]; d is a multiple of 16. */
INLINE void na_spread(const float *w, const float *rows, int64_t d, float *const to[4]) {
  const int vectors = 2;
  for (int64_t c = 0; c < d;) {
    const int two = c + vectors * NA_W <= d;
    na_v sum[4][2];
#pragma GCC unroll 4
    for (int i = 0; i < 4; i++) sum[i][0] = na_load(to[i] + c), sum[i][1] = two ? na_load(to[i] + c + NA_W) : (na_v){0};
    if (two) {
#pragma GCC unroll 16
      for (int lane = 0; lane < NA_LANES; lane++) {
        const na_v x0 = na_load(rows + lane * d + c), x1 = na_load(rows + lane * d + c + NA_W);
#pragma GCC unroll 4
        for (int i = 0; i < 4; i++) {
          const na_v y = na_splat(w[i * NA_LANES + lane]);
          sum[i][0] += x0 * y, sum[i][1] += x1 * y;
        }
      }
    } else {
      for (int lane = 0; lane < NA_LANES; lane++) {
        const na_v x0 = na_load(rows + lane * d + c);
#pragma GCC unroll 4
        for (int i = 0; i < 4; i++) sum[i][0] += x0 * na_splat(w[i * NA_LANES + lane]);
      }
    }
#pragma GCC unroll 4
    for (int i = 0; i < 4; i++) {
      na_store(to[i] + c, sum[i][0]);
      if (two) na_store(to[i] + c + NA_W, sum[i][1]);
    }
    c += two ? 2 * NA_W : NA_W;
  }
}
