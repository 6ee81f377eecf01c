/* y = x W^T with x quantised on the fly and W stored as int8 rows (LLM.int8()), in one call: scan and quantise the rows of x,
 * integer products, dequantisation, the outlier columns in float32, bias, one rounding to the output dtype. */
#include "int8_rows.h"

/* An item of work is ROWS x COLUMNS outputs: its activation codes stay in the second-level cache, its weights in the first. */
#define ROWS 64
#define COLUMNS 24
#define K_BLOCK 2048

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
  uint8_t *columns; /* [k] */
  int found;
  int64_t outliers;
  int32_t *outlier_index; /* [outliers] */
  float *outlier_x; /* [m, outliers] */
} job;

static void scan_rows(void *ctx, int64_t r) {
  job *j = ctx;
  const void *source = eff_at(j->x, j->x_dtype, r * j->x_stride);
  float *row = j->x_dtype == EFF_F32 ? (float *)source : eff_scratch((size_t)j->k * 4);
  if (j->x_dtype != EFF_F32) eff_load_row(j->x_dtype, source, row, j->k);
  j->x_absmax[r] = eff_scan_row(row, j->k, j->threshold, j->columns, &j->found);
  /* Most calls have no outliers: make the codes while the row is at hand, and again below if it turns out otherwise. */
  eff_row_codes(row, j->k, j->x_absmax[r], j->per_token && j->found ? EFF_ZERO_ENTRIES : EFF_KEEP_ALL, j->threshold, j->columns,
                j->codes + r * j->padded, j->padded);
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

INLINE void dot_columns(const int MR, const int first, const eff_act *a, int64_t lda, const int8_t *b, int64_t ldb, int64_t k, int columns,
                        int32_t *surplus, int32_t *c) {
  int n = 0;
#define STEP_N(NR) \
  for (; n + NR <= columns; n += NR) eff_dot_block(MR, NR, first, a, lda, b + n * ldb, ldb, k, surplus + n, c + n, COLUMNS)
  if (MR == 1) {
    STEP_N(4);
  } else {
    STEP_N(3);
  }
  STEP_N(2);
  STEP_N(1);
#undef STEP_N
}

static void product_item(void *ctx, int64_t item) {
  job *j = ctx;
  const int64_t tiles = (j->n + COLUMNS - 1) / COLUMNS;
  const int64_t m0 = item / tiles * ROWS, n0 = item % tiles * COLUMNS;
  const int rows = (int)MIN(ROWS, j->m - m0), columns = (int)MIN(COLUMNS, j->n - n0);
  int32_t sums[ROWS * COLUMNS], surplus[COLUMNS];
  memset(sums, 0, sizeof(int32_t) * COLUMNS * (size_t)rows);
  for (int64_t k0 = 0; k0 < j->k; k0 += K_BLOCK) {
    const int64_t k = rows == 1 ? j->k : MIN(K_BLOCK, j->k - k0);
    const int8_t *b = j->w + n0 * j->k + k0;
    const eff_act *a = j->codes + m0 * j->padded + k0;
    for (int n = 0; n < columns; n += 3) { /* three weight rows stay in the first-level cache while all rows of x pass */
      const int nr = rows == 1 ? columns : MIN(3, columns - n);
      int m = 0;
      const int8_t *bn = b + n * j->k;
#define STEP_M(MR, FIRST) \
  dot_columns(MR, FIRST, a + m * j->padded, j->padded, bn, j->k, k, nr, surplus + n, sums + m * COLUMNS + n), m += MR
      if (rows >= 3) STEP_M(3, 1);
      for (; m + 3 <= rows;) STEP_M(3, 0);
      if (m == 0 && rows == 2) STEP_M(2, 1);
      else if (rows - m == 2) STEP_M(2, 0);
      if (m == 0 && rows == 1) STEP_M(1, 1);
      else if (rows - m == 1) STEP_M(1, 0);
#undef STEP_M
      if (rows == 1) break;
    }
    if (rows == 1) break;
  }

  float scale[COLUMNS], bias[COLUMNS] = {0}, out[COLUMNS];
  for (int n = 0; n < columns; n++) scale[n] = j->w_absmax[n0 + n] / 16129.0f; /* 127^2 */
  if (j->bias) eff_load_row(j->bias_dtype, eff_at(j->bias, j->bias_dtype, n0), bias, columns);
  float *w_out = NULL; /* [outliers, COLUMNS]: dequantised weights of the outlier columns */
  if (j->outliers) {
    w_out = eff_scratch((size_t)j->outliers * COLUMNS * 4);
    for (int64_t o = 0; o < j->outliers; o++)
      for (int n = 0; n < COLUMNS; n++)
        w_out[o * COLUMNS + n] =
            n < columns ? (float)j->w[(n0 + n) * j->k + j->outlier_index[o]] * (j->w_absmax[n0 + n] / 127.0f) : 0.0f;
  }
  for (int m = 0; m < rows; m++) {
    const float s = j->x_absmax[m0 + m];
    for (int n = 0; n < columns; n++) out[n] = (float)sums[m * COLUMNS + n] * (s * scale[n]) + bias[n];
    const float *x_out = j->outlier_x + (m0 + m) * j->outliers;
    for (int64_t o = 0; o < j->outliers; o++)
      for (int n = 0; n < COLUMNS; n++) out[n] += x_out[o] * w_out[o * COLUMNS + n];
    eff_store_row(j->y_dtype, out, eff_at_mut(j->y, j->y_dtype, (m0 + m) * j->n + n0), columns);
  }
  free(w_out);
}

/* y[m, n] (contiguous) = x[m, k] (rows x_stride apart) times w[n, k]^T. Returns 0, or 1 when memory ran out. */
EXPORT int eff_int8_linear(const void *x, int x_dtype, int64_t m, int64_t n, int64_t k, int64_t x_stride, const int8_t *w,
                           const float *w_absmax, const void *bias, int bias_dtype, float threshold, int per_token, void *y,
                           int y_dtype, int threads) {
  job j = {.x = x, .x_dtype = (eff_dtype)x_dtype, .m = m, .n = n, .k = k, .x_stride = x_stride, .w = w, .w_absmax = w_absmax,
           .bias = bias, .bias_dtype = (eff_dtype)bias_dtype, .threshold = threshold, .per_token = per_token, .y = y,
           .y_dtype = (eff_dtype)y_dtype};
  j.padded = (k + EFF_STEP - 1) / EFF_STEP * EFF_STEP;
  const size_t codes = (size_t)(m * j.padded) * sizeof(eff_act), absmax = (size_t)m * 4, flags = threshold > 0.0f ? (size_t)k : 0;
  char *scratch = eff_scratch(codes + absmax + flags);
  if (!scratch) return 1;
  j.codes = (eff_act *)scratch, j.x_absmax = (float *)(scratch + codes), j.columns = (uint8_t *)(scratch + codes + absmax);
  memset(j.columns, 0, flags);
  const int row_threads = m * k < 65536 ? 1 : threads;
  eff_parallel_for(m, row_threads, scan_rows, &j);
  char *outliers = NULL;
  if (j.found) {
    for (int64_t i = 0; i < k; i++) j.outliers += j.columns[i];
    outliers = eff_scratch((size_t)(j.outliers * (m + 1)) * 4);
    if (!outliers) return free(scratch), 1;
    j.outlier_index = (int32_t *)outliers, j.outlier_x = (float *)outliers + j.outliers;
    int64_t o = 0;
    for (int64_t i = 0; i < k; i++)
      if (j.columns[i]) j.outlier_index[o++] = (int32_t)i;
    eff_parallel_for(m, row_threads, split_rows, &j);
  }
  eff_parallel_for((m + ROWS - 1) / ROWS * ((n + COLUMNS - 1) / COLUMNS), threads, product_item, &j);
  free(outliers), free(scratch);
  return 0;
}
