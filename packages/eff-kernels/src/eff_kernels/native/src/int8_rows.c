#include "int8_rows.h"
#include "rows.h"

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

void eff_row_codes(const float *x, int64_t n, float absmax, eff_act *out, int64_t padded) {
  typedef eff_act codes_of_eight __attribute__((vector_size(EFF_LANES * sizeof(eff_act))));
  int64_t i = 0;
  if (!(absmax > 0.0f)) {
    for (; i < padded; i++) out[i] = eff_act_of(0);
    return;
  }
  const float scale = 127.0f * (1.0f / absmax); /* in this order, as PyTorch divides a number by a tensor: bit-equal codes */
  for (; i + EFF_LANES <= n; i += EFF_LANES) {
    eff_vf scaled = eff_vload(x + i) * eff_splat(scale);
    EFF_ROUNDED(scaled);
    const codes_of_eight narrow = __builtin_convertvector(eff_rounded(scaled) + EFF_OFFSET, codes_of_eight);
    memcpy(out + i, &narrow, sizeof narrow);
  }
  for (; i < n; i++) out[i] = eff_act_of((int32_t)nearbyintf(fmaxf(-256.0f, fminf(x[i] * scale, 256.0f))));
  for (; i < padded; i++) out[i] = eff_act_of(0);
}

typedef struct {
  const void *x; /* [rows, n] */
  int64_t dtype, rows, n, stride;
  double threshold;
  int8_t *codes;    /* [rows, n] */
  float *absmax;    /* [rows] */
  uint8_t *columns; /* [n], zeroed by the caller, receives 1 for each outlier column */
  int64_t threads;
} args;

typedef struct {
  const args *a;
  int found, failed;
} rows_job;

#define ROWS_PER_ITEM 4

static void rows_item(void *ctx, int64_t item) {
  rows_job *j = ctx;
  const args *a = j->a;
  const eff_dtype dtype = (eff_dtype)a->dtype;
  float *wide = dtype == EFF_F32 ? NULL : eff_scratch((size_t)a->n * 4);
  if (dtype != EFF_F32 && !wide) {
    j->failed = 1;
    return;
  }
  for (int64_t r = item * ROWS_PER_ITEM; r < MIN(a->rows, (item + 1) * ROWS_PER_ITEM); r++) {
    const void *source = eff_at(a->x, dtype, r * a->stride);
    if (wide) eff_load_row(dtype, source, wide, a->n);
    const float *row = wide ? wide : source;
    a->absmax[r] = eff_scan_row(row, a->n, (float)a->threshold, a->columns, &j->found);
    for (int64_t i = 0; i < a->n; i += CHUNK) {
      eff_act codes[CHUNK];
      const int64_t n = MIN(CHUNK, a->n - i);
      int8_t *out = a->codes + r * a->n + i;
      eff_row_codes(row + i, n, a->absmax[r], codes, n);
      for (int64_t c = 0; c < n; c++) out[c] = (int8_t)((int32_t)codes[c] - EFF_OFFSET);
    }
  }
  free(wide);
}

/* Most calls have no outliers; the others have a few columns of codes to clear. */
static void clear_item(void *ctx, int64_t item) {
  const args *a = ((rows_job *)ctx)->a;
  for (int64_t r = item * ROWS_PER_ITEM; r < MIN(a->rows, (item + 1) * ROWS_PER_ITEM); r++)
    for (int64_t i = 0; i < a->n; i++)
      if (a->columns[i]) a->codes[r * a->n + i] = 0;
}

/* Returns 0, or 1 when memory ran out. */
KERNEL(int, eff_int8_quantize_rows, args) {
  rows_job j = {a, 0, 0};
  const int64_t items = (a->rows + ROWS_PER_ITEM - 1) / ROWS_PER_ITEM;
  eff_parallel_for(items, (int)a->threads, rows_item, &j);
  if (j.found) eff_parallel_for(items, (int)a->threads, clear_item, &j);
  return j.failed;
}
