/* y = x W^T + bias for weights stored as floats of 16 or 32 bits, or as int8 with a scale for each row.
 *
 * Each output is the same sum in the same order whatever the number of rows of x: eight lanes along k, one chain of
 * multiply-adds each, joined after every K_BLOCK entries. So the result of a row never depends on its neighbours in the batch,
 * which libraries that choose a blocking by the shape do not give. Weights are read once, in the dtype they are stored in. */
#include "lanes.h"

/* An item of work is ROWS x COLUMNS outputs: its part of x stays in the second-level cache, its weights in the first. */
#define ROWS 64
#define COLUMNS 24
#define K_BLOCK 1024
#define PAD 16 /* floats between widened rows, which would otherwise all fall into the same sets of the cache */

#define INT8 3 /* a dtype of weights, after those of eff_dtype */

typedef struct {
  const void *x;
  int64_t x_dtype, m, n, k, x_stride;
  const void *w;
  int64_t w_dtype, w_stride;
  const float *scale; /* [n], factor of each output; NULL: none */
  const float *bias;  /* [n]; NULL: none */
  void *y;
  int64_t y_dtype, threads;
} args;

typedef struct {
  const args *a;
  const float *x; /* [m, x_stride], float32 */
  int64_t x_stride;
} job;

typedef struct {
  job *j;
  float *out;
} widening;

INLINE int64_t weight_size(const int dtype) { return dtype == INT8 ? 1 : (int64_t)eff_size((eff_dtype)dtype); }
INLINE const void *weight_at(const void *w, const int dtype, int64_t i) { return (const char *)w + i * weight_size(dtype); }

/* n weights as floats. */
INLINE void load_weights(const int dtype, const void *src, float *restrict out, int64_t n) {
  const int8_t *codes = src;
  if (dtype != INT8) {
    eff_load_row((eff_dtype)dtype, src, out, n);
    return;
  }
  for (int64_t i = 0; i < n; i++) out[i] = (float)codes[i];
}

/* Eight weights as floats. */
INLINE eff_vf load8(const int dtype, const void *p) {
  if (dtype == EFF_F32) return eff_vload(p);
#if defined(__AVX2__)
  if (dtype == EFF_BF16)
    return (eff_vf)_mm256_slli_epi32(_mm256_cvtepu16_epi32(_mm_loadu_si128((const __m128i *)p)), 16);
  if (dtype == INT8) return (eff_vf)_mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(_mm_loadl_epi64((const __m128i *)p)));
#endif
#if defined(__F16C__)
  if (dtype == EFF_F16) return (eff_vf)_mm256_cvtph_ps(_mm_loadu_si128((const __m128i *)p));
#endif
  float v[EFF_LANES];
  load_weights(dtype, p, v, EFF_LANES);
  return eff_vload(v);
}

/* The last len < 8 weights or activations, followed by zeros. */
INLINE eff_vf load_tail(const int dtype, const void *p, int64_t len) {
  float v[EFF_LANES] = {0};
  load_weights(dtype, p, v, len);
  return eff_vload(v);
}

/* c[m * COLUMNS + n] += sum_k x[m, k] * w[n, k] for MR rows of x and NR rows of w, at most K_BLOCK entries each. */
INLINE void block(const int MR, const int NR, const int dtype, const float *x, int64_t ldx, const void *w, int64_t ldw,
                  int64_t len, float *c) {
  const int64_t size = weight_size(dtype), ahead = NR * ldw * size; /* to the next rows */
  eff_vf acc[4][4], xv[4];
  for (int m = 0; m < MR; m++)
    for (int n = 0; n < NR; n++) acc[m][n] = eff_splat(0.0f);
  int64_t k = 0;
  for (; k + EFF_LANES <= len; k += EFF_LANES) {
#pragma GCC unroll 4
    for (int m = 0; m < MR; m++) xv[m] = eff_vload(x + m * ldx + k);
    if (MR == 1 && ahead <= 8192) /* memory is quickest when it is fetched in the order in which it lies */
      for (int i = 0; i < NR * EFF_LANES * size; i += 64) __builtin_prefetch((const char *)w + ahead + NR * k * size + i);
#pragma GCC unroll 4
    for (int n = 0; n < NR; n++) {
      const char *p = weight_at(w, dtype, n * ldw + k);
      if (MR == 1 && ahead > 8192) __builtin_prefetch(p + (ahead <= 16384 ? ahead : 1024));
      eff_vf wide = load8(dtype, p);
      EFF_ROUNDED(wide); /* one load, not one for each multiply-add */
#pragma GCC unroll 4
      for (int m = 0; m < MR; m++) acc[m][n] = multiply_add(xv[m], wide, acc[m][n]);
    }
  }
  if (k < len) {
    for (int m = 0; m < MR; m++) xv[m] = load_tail(EFF_F32, x + m * ldx + k, len - k);
    for (int n = 0; n < NR; n++) {
      const eff_vf wide = load_tail(dtype, weight_at(w, dtype, n * ldw + k), len - k);
      for (int m = 0; m < MR; m++) acc[m][n] = multiply_add(xv[m], wide, acc[m][n]);
    }
  }
  for (int m = 0; m < MR; m++) {
    if (NR == 4)
      add_lanes_of_four(acc[m], c + m * COLUMNS);
    else
      for (int n = 0; n < NR; n++) c[m * COLUMNS + n] += sum_lanes(acc[m][n]);
  }
}

/* One function per block shape and dtype: each gets its own registers. */
#define BLOCK(MR, NR, DTYPE)                                                                                                    \
  static __attribute__((noinline)) void block_##MR##x##NR##_##DTYPE(const float *x, int64_t ldx, const void *w, int64_t ldw,     \
                                                                    int64_t len, float *c) {                                    \
    block(MR, NR, DTYPE, x, ldx, w, ldw, len, c);                                                                               \
  }
BLOCK(3, 4, EFF_F32) BLOCK(2, 4, EFF_F32) BLOCK(1, 4, EFF_F32)
BLOCK(1, 4, EFF_BF16) BLOCK(1, 4, EFF_F16) BLOCK(1, 4, INT8)
BLOCK(1, 1, EFF_F32) BLOCK(1, 1, EFF_BF16) BLOCK(1, 1, EFF_F16) BLOCK(1, 1, INT8)

typedef void (*block_fn)(const float *, int64_t, const void *, int64_t, int64_t, float *);

static void product_item(void *ctx, int64_t item) {
  const job *j = ctx;
  const args *a = j->a;
  const int64_t tiles = (a->n + COLUMNS - 1) / COLUMNS;
  const int64_t m0 = item / tiles * ROWS, n0 = item % tiles * COLUMNS;
  const int rows = (int)MIN(ROWS, a->m - m0), columns = (int)MIN(COLUMNS, a->n - n0);
  const int dtype = (int)a->w_dtype;
  const block_fn one_four[] = {block_1x4_EFF_F32, block_1x4_EFF_BF16, block_1x4_EFF_F16, block_1x4_INT8};
  const block_fn one_one[] = {block_1x1_EFF_F32, block_1x1_EFF_BF16, block_1x1_EFF_F16, block_1x1_INT8};
  float sums[ROWS * COLUMNS], wide[4 * (K_BLOCK + PAD)];
  memset(sums, 0, sizeof(float) * COLUMNS * (size_t)rows);
  for (int64_t k0 = 0; k0 < a->k; k0 += K_BLOCK) {
    const int64_t len = MIN(K_BLOCK, a->k - k0);
    const float *x = j->x + m0 * j->x_stride + k0;
    int n = 0;
    for (; n + 4 <= columns; n += 4) {
      const void *w = weight_at(a->w, dtype, (n0 + n) * a->w_stride + k0);
      float *c = sums + n;
      if (rows == 1) {
        one_four[dtype](x, 0, w, a->w_stride, len, c);
        continue;
      }
      const float *f = w;
      int64_t ldf = a->w_stride;
      if (dtype != EFF_F32) { /* several rows: widen the weights once */
        for (int i = 0; i < 4; i++) load_weights(dtype, weight_at(w, dtype, i * a->w_stride), wide + i * (K_BLOCK + PAD), len);
        f = wide, ldf = K_BLOCK + PAD;
      }
      int m = 0;
      for (; m + 3 <= rows; m += 3) block_3x4_EFF_F32(x + m * j->x_stride, j->x_stride, f, ldf, len, c + m * COLUMNS);
      if (rows - m == 2) block_2x4_EFF_F32(x + m * j->x_stride, j->x_stride, f, ldf, len, c + m * COLUMNS);
      if (rows - m == 1) block_1x4_EFF_F32(x + m * j->x_stride, j->x_stride, f, ldf, len, c + m * COLUMNS);
    }
    for (; n < columns; n++)
      for (int m = 0; m < rows; m++)
        one_one[dtype](x + m * j->x_stride, 0, weight_at(a->w, dtype, (n0 + n) * a->w_stride + k0), 0, len, sums + m * COLUMNS + n);
  }
  for (int m = 0; m < rows; m++) {
    float *row = sums + m * COLUMNS;
    for (int n = 0; a->scale && n < columns; n++) row[n] *= a->scale[n0 + n];
    for (int n = 0; a->bias && n < columns; n++) row[n] += a->bias[n0 + n];
    eff_store_row((eff_dtype)a->y_dtype, row, eff_at_mut(a->y, (eff_dtype)a->y_dtype, (m0 + m) * a->n + n0), columns);
  }
}

static void widen_row(void *ctx, int64_t m) {
  const widening *s = ctx;
  const args *a = s->j->a;
  eff_load_row((eff_dtype)a->x_dtype, eff_at(a->x, (eff_dtype)a->x_dtype, m * a->x_stride), s->out + m * a->k, a->k);
}

/* y[m, n] (contiguous, of y_dtype) = x[m, k] w[n, k]^T + bias. Returns 0, or 1 when memory ran out. */
KERNEL(int, eff_linear, args) {
  job j = {a, a->x, a->x_stride};
  float *wide = NULL;
  if (a->x_dtype != EFF_F32) {
    wide = eff_scratch((size_t)(a->m * a->k) * 4);
    if (!wide) return 1;
    widening s = {&j, wide};
    eff_parallel_for(a->m, a->m * a->k < 65536 ? 1 : (int)a->threads, widen_row, &s);
    j.x = wide, j.x_stride = a->k;
  }
  eff_parallel_for((a->m + ROWS - 1) / ROWS * ((a->n + COLUMNS - 1) / COLUMNS), (int)a->threads, product_item, &j);
  free(wide);
  return 0;
}
