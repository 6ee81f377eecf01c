#include "int8_rows.h"

#include <float.h>

float eff_scan_row(const float *x, int64_t n, float threshold, uint8_t *columns, int *found) {
  const float limit = threshold > 0.0f ? threshold : NAN; /* nothing is >= NaN */
  eff_vf best = eff_splat(0.0f);
  eff_vi outliers = {0}, bad = {0};
  int64_t i = 0;
  for (; i + EFF_LANES <= n; i += EFF_LANES) {
    eff_vf v = eff_vabs(eff_vload(x + i));
    eff_vi outlier = v >= eff_splat(limit);
    outliers |= outlier;
    bad |= ~(v <= eff_splat(FLT_MAX)) & ~outlier;
    best = eff_vselect((v > best) & ~outlier, v, best);
  }
  float top = eff_vmax(best);
  int any_outlier = 0, any_bad = 0;
  for (int j = 0; j < EFF_LANES; j++) any_outlier |= outliers[j], any_bad |= bad[j];
  for (; i < n; i++) {
    float v = fabsf(x[i]);
    int outlier = v >= limit;
    any_outlier |= outlier;
    any_bad |= !(v <= FLT_MAX) && !outlier;
    if (!outlier && v > top) top = v;
  }
  if (any_outlier) {
    *found = 1;
    for (i = 0; i < n; i++) /* rows are scanned by several threads, all of which write the same 1 */
      if (fabsf(x[i]) >= limit) __atomic_store_n(columns + i, 1, __ATOMIC_RELAXED);
  }
  return any_bad ? NAN : top;
}

/* Adding 1.5 * 2^23 leaves a float without room for a fraction: rounded half to even, the integer in its low bits. */
#define ROUNDER 12582912.0f
#define ROUNDER_BITS 0x4b400000

void eff_row_codes(const float *x, int64_t n, float absmax, eff_outliers mode, float threshold, const uint8_t *columns,
                   eff_act *out, int64_t padded) {
  int64_t i = 0;
  if (!(absmax > 0.0f)) {
    for (; i < padded; i++) out[i] = eff_act_of(0);
    return;
  }
  const float scale = 127.0f * (1.0f / absmax); /* in this order, as PyTorch divides a number by a tensor: bit-equal codes */
  const eff_vf limit = eff_splat(mode == EFF_ZERO_ENTRIES ? threshold : NAN);
  for (; i + EFF_LANES <= n; i += EFF_LANES) {
    eff_vf v = eff_vload(x + i);
    eff_vf scaled = v * eff_splat(scale);
    EFF_ROUNDED(scaled);
    eff_vi code = (eff_vi)(scaled + eff_splat(ROUNDER)) - ROUNDER_BITS;
    code &= ~(eff_vabs(v) >= limit);
    for (int j = 0; j < EFF_LANES; j++) out[i + j] = eff_act_of(code[j]);
  }
  for (; i < n; i++) out[i] = mode == EFF_ZERO_ENTRIES && fabsf(x[i]) >= threshold ? eff_act_of(0) : eff_act_of((int32_t)nearbyintf(x[i] * scale));
  for (; i < padded; i++) out[i] = eff_act_of(0);
  if (mode == EFF_ZERO_COLUMNS)
    for (i = 0; i < n; i++)
      if (columns[i]) out[i] = eff_act_of(0);
}

typedef struct {
  const void *x;
  eff_dtype dtype;
  int64_t rows, n, stride;
  float threshold;
  int8_t *codes;
  float *absmax;
  uint8_t *columns;
  int *found;
  int rows_per_item;
} rows_job;

static void scan_item(void *ctx, int64_t item) {
  rows_job *j = ctx;
  float *row = eff_scratch((size_t)j->n * 4);
  for (int64_t r = item * j->rows_per_item; r < MIN(j->rows, (item + 1) * j->rows_per_item); r++) {
    eff_load_row(j->dtype, eff_at(j->x, j->dtype, r * j->stride), row, j->n);
    j->absmax[r] = eff_scan_row(row, j->n, j->threshold, j->columns, j->found);
  }
  free(row);
}

static void code_item(void *ctx, int64_t item) {
  rows_job *j = ctx;
  float *row = eff_scratch((size_t)j->n * 4);
  eff_act *codes = eff_scratch((size_t)j->n * sizeof(eff_act));
  eff_outliers mode = *j->found ? EFF_ZERO_COLUMNS : EFF_KEEP_ALL;
  for (int64_t r = item * j->rows_per_item; r < MIN(j->rows, (item + 1) * j->rows_per_item); r++) {
    eff_load_row(j->dtype, eff_at(j->x, j->dtype, r * j->stride), row, j->n);
    eff_row_codes(row, j->n, j->absmax[r], mode, j->threshold, j->columns, codes, j->n);
    int8_t *out = j->codes + r * j->n;
    for (int64_t i = 0; i < j->n; i++) out[i] = (int8_t)((int32_t)codes[i] - EFF_OFFSET);
  }
  free(codes), free(row);
}

/* codes[rows, n] and absmax[rows] of x[rows, n]; columns[n] (zeroed by the caller) receives 1 for each outlier column. */
EXPORT void eff_int8_quantize_rows(const void *x, int dtype, int64_t rows, int64_t n, int64_t stride, float threshold, int8_t *codes,
                                   float *absmax, uint8_t *columns, int threads) {
  int found = 0;
  rows_job job = {x, (eff_dtype)dtype, rows, n, stride, threshold, codes, absmax, columns, &found, 4};
  int64_t items = (rows + 3) / 4;
  eff_parallel_for(items, threads, scan_item, &job);
  eff_parallel_for(items, threads, code_item, &job);
}
