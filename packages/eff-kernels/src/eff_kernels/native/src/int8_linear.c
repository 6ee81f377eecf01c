/* y = x W^T with x quantised on the fly and W stored as int8 rows (LLM.int8()), in one call: scan and quantise the rows of x,
 * integer products, dequantisation, the outlier columns in float32, bias, one rounding to the output dtype. */
#include "int8_linear.h"
#include "int8_rows.h"

/* An item of work is ROWS x COLUMNS outputs: its activation codes stay in the second-level cache, its weights in the first. */
#define ROWS 64
#define COLUMNS 24
#define K_BLOCK 2048
#define RUNS 4 /* for each thread: few, since a run starts with weights that nothing has fetched */

typedef struct {
  const void *x;
  eff_dtype x_dtype;
  int64_t m, n, k, x_stride;
  const int8_t *w;
  const float *w_absmax;
  const void *bias; /* NULL: none */
  eff_dtype bias_dtype;
  float threshold;
  int per_token;
  void *y;
  eff_dtype y_dtype;
  /* scratch */
  int64_t padded; /* k, rounded up to EFF_STEP */
  eff_act *codes; /* [m, padded] */
  float *x_absmax; /* [m] */
  eff_row *row; /* [padded to EFF_ROW_STEP], for m = 1: the codes as a lone row takes them */
  uint8_t *columns; /* [k] */
  int found;
  int64_t outliers;
  int32_t *outlier_index; /* [outliers] */
  float *outlier_x; /* [m, outliers] */
  float *outlier_w; /* [items, outliers, COLUMNS] */
  int64_t items, run;
} job;

static void scan_rows(void *ctx, int64_t r) {
  job *j = ctx;
  const void *source = eff_at(j->x, j->x_dtype, r * j->x_stride);
  float *row = j->x_dtype == EFF_F32 ? (float *)source : eff_scratch((size_t)j->k * 4);
  if (j->x_dtype != EFF_F32) eff_load_row(j->x_dtype, source, row, j->k);
  j->x_absmax[r] = eff_scan_row(row, j->k, j->threshold, j->columns, &j->found);
  /* Most calls have no outliers: make the codes while the row is at hand, and again below if it turns out otherwise. */
  eff_row_codes(row, j->k, j->x_absmax[r], j->codes + r * j->padded, j->padded);
  if (j->x_dtype != EFF_F32) free(row);
}

/* With outliers: their codes become 0 and their values go to outlier_x. */
static void split_rows(void *ctx, int64_t r) {
  job *j = ctx;
  const void *source = eff_at(j->x, j->x_dtype, r * j->x_stride);
  eff_act *codes = j->codes + r * j->padded;
  float *values = j->outlier_x + r * j->outliers;
  for (int64_t o = 0; o < j->outliers; o++) {
    int32_t i = j->outlier_index[o];
    float v;
    eff_load_row(j->x_dtype, eff_at(source, j->x_dtype, i), &v, 1);
    int taken = !j->per_token || fabsf(v) >= j->threshold;
    values[o] = taken ? v : 0.0f;
    if (taken) codes[i] = eff_act_of(0);
  }
}

/* One function per block shape: each gets its own registers. */
#define DOT(MR, NR, FIRST)                                                                                                   \
  static __attribute__((noinline)) void dot_##MR##x##NR##_##FIRST(const eff_act *a, int64_t lda, const int8_t *b, int64_t ldb, \
                                                                  int64_t k, int32_t *surplus, int32_t *c) {                 \
    eff_dot_block(MR, NR, FIRST, a, lda, b, ldb, k, surplus, c, COLUMNS);                                                    \
  }
DOT(1, 3, 0) DOT(2, 3, 0) DOT(3, 3, 0) DOT(1, 3, 1) DOT(2, 3, 1) DOT(3, 3, 1)
DOT(1, 1, 0) DOT(1, 1, 1)

/* Codes of the outlier columns of NR weight rows as floats: out[o, n]. Called while the rows are in the first-level cache. */
INLINE void gather_weights(const job *j, const int8_t *b, int nr, float *out) {
  for (int64_t o = 0; o < j->outliers; o++)
    for (int n = 0; n < nr; n++) out[o * COLUMNS + n] = (float)b[n * j->k + j->outlier_index[o]];
}

/* A lone row of x: one weight row after the other, and at once what its outlier columns add. */
static void one_row(const job *j, int64_t n0, int columns, int32_t *sums, float *outlier_sums) {
  for (int n = 0; n < columns; n++) {
    const int8_t *b = j->w + (n0 + n) * j->k;
    sums[n] = eff_dot_row(j->row, b, j->k);
    for (int64_t o = 0; o < j->outliers; o++) outlier_sums[n] += j->outlier_x[o] * (float)b[j->outlier_index[o]];
  }
}

static void product_item(void *ctx, int64_t item) {
  job *j = ctx;
  const int64_t tiles = (j->n + COLUMNS - 1) / COLUMNS;
  const int64_t m0 = item / tiles * ROWS, n0 = item % tiles * COLUMNS;
  const int rows = (int)MIN(ROWS, j->m - m0), columns = (int)MIN(COLUMNS, j->n - n0);
  const eff_act *codes = j->codes + m0 * j->padded;
  const float *x_out = j->outlier_x + m0 * j->outliers;
  int32_t sums[ROWS * COLUMNS], surplus[COLUMNS];
  float outlier_sums[COLUMNS] = {0};
  memset(sums, 0, sizeof(int32_t) * COLUMNS * (size_t)rows);
  float *w_out = j->outliers ? j->outlier_w + item * j->outliers * COLUMNS : NULL;

  const int done = j->m == 1 ? columns : 0;
  if (done) one_row(j, n0, columns, sums, outlier_sums);
  for (int64_t k0 = 0; k0 < j->k && done < columns; k0 += K_BLOCK) {
    const int64_t k = MIN(K_BLOCK, j->k - k0);
    const eff_act *a = codes + k0;
    int n = done;
    for (; n + 3 <= columns; n += 3) { /* three weight rows stay in the first-level cache while all rows of x pass */
      const int8_t *b = j->w + (n0 + n) * j->k + k0;
      int m = 0;
#define ARGUMENTS a + m * j->padded, j->padded, b, j->k, k, surplus + n, sums + m * COLUMNS + n
      if (rows >= 3) dot_3x3_1(ARGUMENTS), m = 3;
      for (; m + 3 <= rows; m += 3) dot_3x3_0(ARGUMENTS);
      if (rows - m == 2) m ? dot_2x3_0(ARGUMENTS) : dot_2x3_1(ARGUMENTS);
      if (rows - m == 1) m ? dot_1x3_0(ARGUMENTS) : dot_1x3_1(ARGUMENTS);
#undef ARGUMENTS
    }
    for (; n < columns; n++)
      for (int m = 0; m < rows; m++)
        (m ? dot_1x1_0 : dot_1x1_1)(a + m * j->padded, j->padded, j->w + (n0 + n) * j->k + k0, j->k, k, surplus + n,
                                    sums + m * COLUMNS + n);
  }
  if (j->outliers && done < columns) gather_weights(j, j->w + (n0 + done) * j->k, columns - done, w_out + done);

  float scale[COLUMNS], bias[COLUMNS] = {0}, out[COLUMNS];
  for (int n = 0; n < columns; n++) scale[n] = j->w_absmax[n0 + n];
  if (j->bias) eff_load_row(j->bias_dtype, eff_at(j->bias, j->bias_dtype, n0), bias, columns);
  for (int m = 0; m < rows; m++) {
    const float s = j->x_absmax[m0 + m] / 127.0f;
    for (int64_t o = 0; o < j->outliers && done < columns; o++)
      for (int n = done; n < columns; n++) outlier_sums[n] += x_out[m * j->outliers + o] * w_out[o * COLUMNS + n];
    for (int n = 0; n < columns; n++) {
      out[n] = ((float)sums[m * COLUMNS + n] * s + outlier_sums[n]) * (scale[n] / 127.0f) + bias[n];
      outlier_sums[n] = 0.0f;
    }
    eff_store_row(j->y_dtype, out, eff_at_mut(j->y, j->y_dtype, (m0 + m) * j->n + n0), columns);
  }
}

/* A run of items that lie one after the other in memory: what is fetched ahead of one is what the same thread reads next. */
static void product_run(void *ctx, int64_t run) {
  const job *j = ctx;
  for (int64_t i = run * j->run; i < MIN((run + 1) * j->run, j->items); i++) product_item(ctx, i);
}

int eff_int8_linear(const eff_int8_linear_args *a) {
  const int64_t m = a->m, n = a->n, k = a->k;
  const int threads = (int)a->threads;
  job j = {.x = a->x, .x_dtype = (eff_dtype)a->x_dtype, .m = m, .n = n, .k = k, .x_stride = a->x_stride, .w = a->w,
           .w_absmax = a->w_absmax, .bias = a->bias, .bias_dtype = (eff_dtype)a->bias_dtype, .threshold = (float)a->threshold,
           .per_token = a->per_token != 0, .y = a->y, .y_dtype = (eff_dtype)a->y_dtype};
  j.padded = (k + EFF_STEP - 1) / EFF_STEP * EFF_STEP;
  const size_t codes = (size_t)(m * j.padded) * sizeof(eff_act), absmax = (size_t)m * 4, flags = j.threshold > 0.0f ? (size_t)k : 0;
  const size_t row = m == 1 ? (size_t)(k + EFF_ROW_STEP) * sizeof(eff_row) : 0;
  char *scratch = eff_scratch(codes + absmax + flags + row);
  if (!scratch) return 1;
  j.codes = (eff_act *)scratch, j.x_absmax = (float *)(scratch + codes), j.columns = (uint8_t *)(scratch + codes + absmax);
  j.row = (eff_row *)(scratch + codes + absmax + flags);
  memset(j.columns, 0, flags);
  const int row_threads = m * k < 65536 ? 1 : threads;
  eff_parallel_for(m, row_threads, scan_rows, &j);
  char *outliers = NULL;
  const int64_t items = (m + ROWS - 1) / ROWS * ((n + COLUMNS - 1) / COLUMNS);
  if (j.found) {
    for (int64_t i = 0; i < k; i++) j.outliers += j.columns[i];
    outliers = eff_scratch((size_t)(j.outliers * (m + 1 + items * COLUMNS)) * 4);
    if (!outliers) return free(scratch), 1;
    j.outlier_index = (int32_t *)outliers, j.outlier_x = (float *)outliers + j.outliers;
    j.outlier_w = j.outlier_x + m * j.outliers;
    int64_t o = 0;
    for (int64_t i = 0; i < k; i++)
      if (j.columns[i]) j.outlier_index[o++] = (int32_t)i;
    eff_parallel_for(m, row_threads, split_rows, &j);
  }
  for (int64_t i = 0; m == 1 && i < k; i++) j.row[i] = (eff_row)j.codes[i];
  j.items = items, j.run = MAX(1, items / (threads * RUNS));
  eff_parallel_for((items + j.run - 1) / j.run, threads, product_run, &j);
  free(outliers), free(scratch);
  return 0;
}
