/* y = x W^T * scale + bias for weights stored in FP8, read as one byte each and multiplied in float32.
 *
 * As in linear.c each output is the same sum in the same order whatever stands beside it: LANES along k, one chain of
 * multiply-adds each, joined after every K_BLOCK entries. A lone row decodes its weights in registers; several rows decode a few
 * columns of a K_BLOCK once for all of them. With `dynamic` the rows of x are rounded to FP8 first. */
#include "fp8_decode.h"

#define K_BLOCK 1024
#define ROWS 66 /* of x in one item of work; with K_BLOCK entries of each they fill half a megabyte or less */
#define COLUMNS 24
#if LANES == 16
#define MR 6 /* rows and columns of a block whose sums stay in registers */
#else
#define MR 3
#endif
#define NR 4

typedef struct {
  const void *x;
  int64_t x_dtype, m, n, k, x_stride;
  const uint8_t *w;
  int64_t format, w_stride;
  const float *scale; /* [n] */
  const float *bias;  /* [n]; NULL: none */
  void *y;
  int64_t y_dtype, dynamic, threads;
} args;

typedef struct {
  const args *a;
  float *x;         /* [m, padded], float32, in the places of the decoded weights */
  float *row_scale; /* [m], with the unit of the decoded weights */
  int64_t padded;   /* k up to a multiple of STEP */
  const fp8_table *table;
} job;

/* One row of x: widened, rounded if asked for, laid out, zeros behind it. */
static void prepare_row(void *ctx, int64_t m) {
  job *j = ctx;
  const args *a = j->a;
  const eff_fp8 format = (eff_fp8)a->format;
  float *out = j->x + m * j->padded, scale = 1.0f;
  eff_load_row((eff_dtype)a->x_dtype, eff_at(a->x, (eff_dtype)a->x_dtype, m * a->x_stride), out, a->k);
  memset(out + a->k, 0, (size_t)(j->padded - a->k) * 4);
  if (a->dynamic) {
    scale = eff_fp8_scale(format, out, a->k, 0);
    for (int64_t i = 0; scale == scale && i < j->padded; i += EFF_LANES)
      eff_vstore(out + i, eff_fp8_round(format, eff_vload(out + i), scale, NULL));
  }
  j->row_scale[m] = scale * fp8_unit(format);
  for (int64_t k = 0; place(1) != 1 && k < j->padded; k += STEP) {
    float step[STEP];
    for (int i = 0; i < STEP; i++) step[place(i)] = out[k + i];
    memcpy(out + k, step, sizeof step);
  }
}

/* Sums of up to MR rows of x and NR rows of decoded weights, [NR][K_BLOCK], added to c[m * COLUMNS + n]. */
INLINE void block(const int rows, const float *x, int64_t ldx, const float *w, int64_t len, float *c) {
  vf acc[MR][NR];
  for (int m = 0; m < rows; m++)
    for (int n = 0; n < NR; n++) acc[m][n] = vzero();
  for (int64_t k = 0; k < len; k += LANES) {
    vf wide[NR];
#pragma GCC unroll 4
    for (int n = 0; n < NR; n++) wide[n] = vload(w + n * K_BLOCK + k);
#pragma GCC unroll 6
    for (int m = 0; m < rows; m++) {
      const vf v = vload(x + m * ldx + k);
#pragma GCC unroll 4
      for (int n = 0; n < NR; n++) acc[m][n] = vfma(v, wide[n], acc[m][n]);
    }
  }
  for (int m = 0; m < rows; m++) add_sums_of_four(acc[m], c + m * COLUMNS);
}

#define BLOCK(ROWS_OF_X)                                                                                                        \
  static __attribute__((noinline)) void block_##ROWS_OF_X(const float *x, int64_t ldx, const float *w, int64_t len, float *c) { \
    block(ROWS_OF_X, x, ldx, w, len, c);                                                                                        \
  }
BLOCK(1) BLOCK(2) BLOCK(3)
#if MR == 6
BLOCK(4) BLOCK(5) BLOCK(6)
#endif
typedef void (*block_fn)(const float *, int64_t, const float *, int64_t, float *);

/* The last codes of a row, fewer than a step, followed by zeros. */
INLINE const uint8_t *whole_step(const uint8_t *codes, int64_t have, uint8_t *buffer) {
  if (have >= STEP) return codes;
  memset(buffer, 0, STEP);
  memcpy(buffer, codes, (size_t)have);
  return buffer;
}

/* One row of x against NR rows of weights, which are decoded in registers. */
INLINE void lone_row(const eff_fp8 format, const fp8_table *table, const float *x, const uint8_t *w, int64_t w_stride,
                     int64_t k, float *c) {
  const fp8_table t = *table;
  const int64_t ahead = NR * w_stride; /* to the next rows; memory is quickest when it is fetched in the order in which it lies */
  for (int64_t k0 = 0; k0 < k; k0 += K_BLOCK) {
    vf acc[NR];
    for (int n = 0; n < NR; n++) acc[n] = vzero();
    for (int64_t i = k0; i < MIN(k, k0 + K_BLOCK); i += STEP) {
      vf xv[4];
      for (int v = 0; v < 4; v++) xv[v] = vload(x + i + v * LANES);
      if (ahead <= 16384)
        for (int b = 0; b < NR * STEP; b += 64) __builtin_prefetch(w + ahead + NR * i + b);
#pragma GCC unroll 4
      for (int n = 0; n < NR; n++) {
        const uint8_t *codes = w + n * w_stride + i;
        uint8_t rest[STEP];
        vf wide[4];
        if (ahead > 16384) __builtin_prefetch(codes + 1024);
        fp8_decode(format, &t, whole_step(codes, k - i, rest), wide);
        for (int v = 0; v < 4; v++) acc[n] = vfma(xv[v], wide[v], acc[n]);
      }
    }
    add_sums_of_four(acc, c);
  }
}

INLINE void decode_block(const eff_fp8 format, const fp8_table *table, const uint8_t *w, int64_t len, float *out) {
  for (int64_t i = 0; i < len; i += STEP) {
    uint8_t rest[STEP];
    vf wide[4];
    fp8_decode(format, table, whole_step(w + i, len - i, rest), wide);
    for (int v = 0; v < 4; v++) vstore(out + i + v * LANES, wide[v]);
  }
}

/* Several rows of x: the part of x of a K_BLOCK stays in the second-level cache for all columns of the item. Columns beyond the
 * last repeat it and are not stored. */
INLINE void several_rows(const eff_fp8 format, const job *j, int64_t m0, int rows, int64_t n0, int columns, float *c) {
  const args *a = j->a;
  const block_fn of_rows[] = {block_1, block_2, block_3,
#if MR == 6
                              block_4, block_5, block_6
#endif
  };
  float wide[NR * K_BLOCK] __attribute__((aligned(64)));
  for (int64_t k0 = 0; k0 < a->k; k0 += K_BLOCK) {
    const int64_t len = MIN(K_BLOCK, a->k - k0), padded = (len + STEP - 1) / STEP * STEP;
    const float *x = j->x + m0 * j->padded + k0;
    for (int n = 0; n < columns; n += NR) {
      for (int i = 0; i < NR; i++)
        decode_block(format, j->table, a->w + MIN(n0 + n + i, a->n - 1) * a->w_stride + k0, len, wide + i * K_BLOCK);
      for (int m = 0; m < rows; m += MR)
        of_rows[MIN(MR, rows - m) - 1](x + m * j->padded, j->padded, wide, padded, c + m * COLUMNS + n);
    }
  }
}

INLINE void item_sums(const eff_fp8 format, const job *j, int64_t m0, int rows, int64_t n0, int columns, float *c) {
  const args *a = j->a;
  const int whole = rows == 1 ? columns / NR * NR : 0;
  for (int n = 0; n < whole; n += NR)
    lone_row(format, j->table, j->x + m0 * j->padded, a->w + (n0 + n) * a->w_stride, a->w_stride, a->k, c + n);
  if (whole < columns) several_rows(format, j, m0, rows, n0 + whole, columns - whole, c + whole);
}

static void product_item(void *ctx, int64_t item) {
  const job *j = ctx;
  const args *a = j->a;
  const int64_t tiles = (a->n + COLUMNS - 1) / COLUMNS;
  const int64_t m0 = item / tiles * ROWS, n0 = item % tiles * COLUMNS;
  const int rows = (int)MIN(ROWS, a->m - m0), columns = (int)MIN(COLUMNS, a->n - n0);
  float sums[ROWS * COLUMNS];
  memset(sums, 0, sizeof(float) * COLUMNS * (size_t)rows);
  if (a->format == E4M3)
    item_sums(E4M3, j, m0, rows, n0, columns, sums);
  else
    item_sums(E5M2, j, m0, rows, n0, columns, sums);
  for (int m = 0; m < rows; m++) {
    float *row = sums + m * COLUMNS;
    for (int n = 0; n < columns; n++) row[n] = row[n] * j->row_scale[m0 + m] * a->scale[n0 + n];
    for (int n = 0; a->bias && n < columns; n++) row[n] += a->bias[n0 + n];
    eff_store_row((eff_dtype)a->y_dtype, row, eff_at_mut(a->y, (eff_dtype)a->y_dtype, (m0 + m) * a->n + n0), columns);
  }
}

/* y[m, n] (contiguous, of y_dtype). Returns 0, or 1 when memory ran out. */
KERNEL(int, eff_fp8_linear, args) {
  const int64_t padded = (a->k + STEP - 1) / STEP * STEP;
  const fp8_table table = fp8_make_table((eff_fp8)a->format);
  float *x = eff_scratch((size_t)(a->m * (padded + 1)) * 4);
  if (!x) return 1;
  job j = {a, x, x + a->m * padded, padded, &table};
  eff_parallel_for(a->m, a->m * a->k < 65536 ? 1 : (int)a->threads, prepare_row, &j);
  eff_parallel_for((a->m + ROWS - 1) / ROWS * ((a->n + COLUMNS - 1) / COLUMNS), (int)a->threads, product_item, &j);
  free(x);
  return 0;
}
