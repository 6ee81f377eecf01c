/* y = x W^T in integers, for weights of 4 bits that stay packed, or of 8: quantise the rows of x (by their largest magnitude, or
 * by a static scale for each column), exact integer products, the scale of each weight row, bias, one rounding.
 *
 * Up to FEW rows of x meet the packed weights directly (dot4.h), one after the other while a weight row is in the first-level
 * cache. For more rows, and for int8 weights, the product is that of int8_linear, whose tiles unpack as they read. */
#include "int4_linear.h"
#include "dot4.h"
#include "int8_tile.h"

#include <float.h>

#define RUNS 4 /* as in int8_linear.c */
#define FEW 5

typedef eff_int4_linear_args args;

typedef struct {
  const args *a;
  tile_rows t;    /* scale: NaN for a row that no codes stand for */
  int8_t *halves; /* [m, k], for few rows and packed weights, instead of t.codes: those of even index, then the odd ones */
  int32_t *sum;   /* [m], of the codes in halves */
  int64_t items, run;
  int failed;
} job;

/* codes = x / step, rounded half to even, from -128 to 127, and zeros up to `padded`. Returns 1, or NaN if a quotient is not
 * finite. */
static float static_codes(const float *x, const float *step, int64_t n, eff_act *out, int64_t padded) {
  typedef eff_act codes_of_eight __attribute__((vector_size(EFF_LANES * sizeof(eff_act))));
  eff_vi bad = {0};
  for (int64_t i = 0; i < n; i += EFF_LANES) {
    float last_x[EFF_LANES] = {0}, last_step[EFF_LANES] = {1, 1, 1, 1, 1, 1, 1, 1};
    const int64_t len = MIN(EFF_LANES, n - i);
    const int whole = len == EFF_LANES;
    if (!whole) memcpy(last_x, x + i, (size_t)len * 4), memcpy(last_step, step + i, (size_t)len * 4);
    eff_vf q = eff_vload(whole ? x + i : last_x) / eff_vload(whole ? step + i : last_step);
    bad |= ~(eff_vabs(q) <= eff_splat(FLT_MAX));
    q = eff_vselect(q > eff_splat(127.0f), eff_splat(127.0f), q);
    q = eff_vselect(q < eff_splat(-128.0f), eff_splat(-128.0f), q);
    const codes_of_eight codes = __builtin_convertvector(eff_rounded(q) + EFF_OFFSET, codes_of_eight);
    memcpy(out + i, &codes, (size_t)len * sizeof(eff_act));
  }
  for (int64_t i = n; i < padded; i++) out[i] = eff_act_of(0);
  int any = 0;
  for (int i = 0; i < EFF_LANES; i++) any |= bad[i];
  return any ? NAN : 1.0f;
}

/* Codes in their order -> in that of packed weights (int8_tile.h). */
static void arrange(const eff_act *codes, int64_t k, eff_act *out, int64_t padded) {
  for (int64_t i = 0; i < padded; i++) out[i] = eff_act_of(0);
  for (int64_t k0 = 0; k0 < k; k0 += 2 * PAIRS) {
    const int64_t half = MIN(PAIRS, (k - k0) / 2);
    for (int64_t i = 0; i < half; i++) out[k0 + i] = codes[k0 + 2 * i], out[k0 + PAIRS + i] = codes[k0 + 2 * i + 1];
  }
}

/* The same for rows of which there are few, as dot4.h wants them. Returns the sum of the codes. */
static int32_t split(const eff_act *codes, int64_t k, int8_t *even, int8_t *odd) {
  int32_t sum = 0;
  for (int64_t i = 0; i < k / 2; i++) {
    even[i] = (int8_t)((int32_t)codes[2 * i] - EFF_OFFSET), odd[i] = (int8_t)((int32_t)codes[2 * i + 1] - EFF_OFFSET);
    sum += even[i] + odd[i];
  }
  return sum;
}

static void quantise_row(void *ctx, int64_t r) {
  job *j = ctx;
  const args *a = j->a;
  const eff_dtype dtype = (eff_dtype)a->x_dtype;
  const size_t wide = dtype == EFF_F32 ? 0 : (size_t)eff_round_up(a->k, 16) * 4;
  const void *row = eff_at(a->x, dtype, r * a->x_stride);
  char *scratch = eff_scratch(wide + (a->packed ? (size_t)a->k * sizeof(eff_act) : 0));
  if (!scratch) {
    j->failed = 1;
    return;
  }
  if (wide) eff_load_row(dtype, row, (float *)scratch, a->k), row = scratch;
  eff_act *arranged = j->t.codes + r * j->t.padded, *codes = a->packed ? (eff_act *)(scratch + wide) : arranged;
  const int64_t padded = a->packed ? a->k : j->t.padded;
  if (a->x_scale) {
    j->t.scale[r] = static_codes(row, a->x_scale, a->k, codes, padded);
  } else {
    const float absmax = eff_scan_row(row, a->k, 0.0f, NULL, NULL);
    eff_row_codes(row, a->k, absmax, codes, padded);
    j->t.scale[r] = absmax / 127.0f;
  }
  if (j->halves) {
    j->sum[r] = split(codes, a->k, j->halves + r * a->k, j->halves + r * a->k + a->k / 2);
  } else {
    if (a->packed) arrange(codes, a->k, arranged, j->t.padded);
    tile_codes(arranged, &j->t, r);
  }
  free(scratch);
}

static void product_item(job *j, int64_t item) {
  const args *a = j->a;
  const tile_rows *t = &j->t;
  const int64_t tiles = (a->n + COLUMNS - 1) / COLUMNS, m0 = item / tiles * ROWS, n0 = item % tiles * COLUMNS;
  const int rows = (int)MIN(ROWS, a->m - m0), columns = (int)MIN(COLUMNS, a->n - n0);
  const uint8_t *w = a->w + n0 * t->stride;
  float sums[ROWS * COLUMNS] __attribute__((aligned(64)));
  if (j->halves) {
    for (int n = 0; n < columns; n++)
      for (int m = 0; m < rows; m++) {
        const int8_t *even = j->halves + m * a->k;
        const int32_t exact = eff_dot4_row(even, even + a->k / 2, j->sum[m], w + n * t->stride, t->stride);
        sums[m * COLUMNS + n] = (float)exact * t->scale[m];
      }
  } else {
    tile_product(t, m0, rows, (const int8_t *)w, columns, sums);
  }
  float bias[COLUMNS] = {0}, out[COLUMNS];
  if (a->bias) eff_load_row((eff_dtype)a->bias_dtype, eff_at(a->bias, (eff_dtype)a->bias_dtype, n0), bias, columns);
  for (int m = 0; m < rows; m++) {
    for (int n = 0; n < columns; n++) out[n] = sums[m * COLUMNS + n] * a->w_scale[n0 + n] + bias[n];
    eff_store_row((eff_dtype)a->y_dtype, out, eff_at_mut(a->y, (eff_dtype)a->y_dtype, (m0 + m) * a->n + n0), columns);
  }
}

/* A run of items that lie one after the other in memory, as in int8_linear.c. */
static void product_run(void *ctx, int64_t run) {
  job *j = ctx;
  for (int64_t i = run * j->run; i < MIN((run + 1) * j->run, j->items); i++) product_item(j, i);
}

KERNEL(int, eff_int4_linear, args) {
  const int64_t m = a->m, k = a->k;
  const int few = m <= FEW && a->packed;
  job j = {.a = a};
  tile_rows *t = &j.t;
  t->packed = a->packed != 0, t->stride = a->packed ? k / 2 : k;
  t->k = a->packed ? eff_round_up(k, 2 * PAIRS) : k, t->group = MAX(t->k, 1), t->groups = 1;
  t->rows = EFF_ROW_STEP == EFF_STEP ? m : MAX(m, 2); /* there, what lone rows are multiplied with takes no code of -128 */
  t->padded = (eff_round_up(t->k, EFF_STEP) / EFF_STEP | 1) * EFF_STEP; /* odd, as in int8_linear.c */
  const size_t codes = few ? (size_t)(m * k) : (size_t)(m * t->padded) * sizeof(eff_act), scales = (size_t)m * 4;
  const size_t row = t->rows == 1 ? (size_t)(t->padded + EFF_ROW_STEP) * sizeof(eff_row) : 0;
  char *scratch = eff_scratch(codes + 2 * scales + row + 4 * 64), *free_part = scratch;
  if (!scratch) return 1;
  t->codes = eff_take(&free_part, codes), t->scale = eff_take(&free_part, scales);
  t->surplus = j.sum = eff_take(&free_part, scales), t->row = eff_take(&free_part, row);
  if (few) j.halves = (int8_t *)t->codes;
  eff_parallel_for(m, m * k < 65536 ? 1 : (int)a->threads, quantise_row, &j);
  if (!j.failed) {
    j.items = (m + ROWS - 1) / ROWS * ((a->n + COLUMNS - 1) / COLUMNS), j.run = MAX(1, j.items / (a->threads * RUNS));
    eff_parallel_for((j.items + j.run - 1) / j.run, (int)a->threads, product_run, &j);
  }
  free(scratch);
  return j.failed;
}
