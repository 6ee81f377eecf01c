/* y = x W^T with x quantised on the fly and W stored as int8 rows (LLM.int8()), in one call: scan and quantise the rows of x,
 * integer products, dequantisation, the outlier columns in float32, bias, one rounding to the output dtype. */
#include "int8_linear.h"
#include "int8_tiles.h"

#define RUNS 4      /* for each thread: few, since a run starts with weights that nothing has fetched */
#define OUTLIERS 64 /* outlier columns at a time */

typedef struct {
  const eff_int8_linear_args *a;
  eff_dtype x_dtype;
  float threshold;
  tile_rows t;
  uint8_t *columns; /* [k] */
  int found;
  int64_t outliers;
  int32_t *outlier_index; /* [outliers] */
  float *outlier_x;       /* [m, outliers] */
  int64_t items, run;
  int32_t *quads; /* the codes for matrix tiles; NULL: not over these */
  int failed;
} job;

static void scan_rows(void *ctx, int64_t r) {
  job *j = ctx;
  const tile_rows *t = &j->t;
  const void *source = eff_at(j->a->x, j->x_dtype, r * j->a->x_stride);
  float *row = j->x_dtype == EFF_F32 ? (float *)source : eff_scratch((size_t)t->k * 4);
  if (!row) {
    j->failed = 1;
    return;
  }
  if (j->x_dtype != EFF_F32) eff_load_row(j->x_dtype, source, row, t->k);
  eff_act *codes = t->codes + r * t->padded;
  for (int64_t g = 0; g < t->groups; g++) {
    const int64_t k = g * t->group, len = MIN(t->group, t->k - k);
    const float absmax = eff_scan_row(row + k, len, j->threshold, j->columns + k, &j->found);
    t->scale[r * t->groups + g] = absmax / 127.0f;
    /* Most calls have no outliers: make the codes while the row is at hand, and again below if it turns out otherwise. */
    eff_row_codes(row + k, len, absmax, codes + k, g + 1 < t->groups ? len : t->padded - k);
  }
  if (j->x_dtype != EFF_F32) free(row);
}

/* Outliers get codes of 0 and go to outlier_x. */
static void split_row(const job *j, int64_t r) {
  const void *source = eff_at(j->a->x, j->x_dtype, r * j->a->x_stride);
  float *values = j->outlier_x + r * j->outliers;
  for (int64_t o = 0; o < j->outliers; o++) {
    const int32_t i = j->outlier_index[o];
    float v;
    eff_load_row(j->x_dtype, eff_at(source, j->x_dtype, i), &v, 1);
    const int taken = !j->a->per_token || fabsf(v) >= j->threshold;
    values[o] = taken ? v : 0.0f;
    if (taken) j->t.codes[r * j->t.padded + i] = eff_act_of(0);
  }
}

static void finish_rows(void *ctx, int64_t r) {
  const job *j = ctx;
  if (j->outliers) split_row(j, r);
  tile_codes(j->t.codes + r * j->t.padded, &j->t, r);
}

static void quads_of_rows(void *ctx, int64_t tile) {
  const job *j = ctx;
  put_quads(&j->t, tile * 16, j->quads + tile * eff_round_up(j->t.k, 64) * 4);
}

/* Column i of `columns` weight rows as floats. */
INLINE void gather(const int8_t *w, int64_t k, int64_t i, int columns, float *out) {
  int n = 0;
#if EFF_STEP == 64
  if (k >= 4) { /* four bytes of each row, of which one counts */
    const int64_t at = MIN(i, k - 4);
    const __m512i lane = _mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
    const __m512i step = _mm512_mullo_epi32(lane, _mm512_set1_epi32((int)k));
    const __m128i up = _mm_cvtsi32_si128(8 * (int)(3 - (i - at)));
    for (; n < columns; n += 16) {
      const __mmask16 mask = (__mmask16)(0xffffu >> (16 - MIN(16, columns - n)));
      const __m512i v = _mm512_mask_i32gather_epi32(_mm512_setzero_si512(), mask, step, w + n * k + at, 1);
      _mm512_storeu_ps(out + n, _mm512_cvtepi32_ps(_mm512_srai_epi32(_mm512_sll_epi32(v, up), 24)));
    }
  }
#endif
  for (; n < columns; n++) out[n] = (float)w[n * k + i];
}

/* sums += what the outlier columns add. Called while the weights are in a near cache. */
INLINE void add_outliers(const job *j, int64_t r0, int rows, const int8_t *w, int columns, float *sums) {
  float weights[OUTLIERS * COLUMNS];
  for (int64_t o0 = 0; o0 < j->outliers; o0 += OUTLIERS) {
    const int count = (int)MIN(OUTLIERS, j->outliers - o0);
    for (int o = 0; o < count; o++) gather(w, j->t.k, j->outlier_index[o0 + o], columns, weights + o * COLUMNS);
    for (int m = 0; m < rows; m++) {
      const float *x = j->outlier_x + (r0 + m) * j->outliers + o0;
      for (int n = 0; n < columns; n += EFF_LANES) {
        eff_vf sum = eff_vload(sums + m * COLUMNS + n);
        for (int o = 0; o < count; o++) sum += eff_splat(x[o]) * eff_vload(weights + o * COLUMNS + n);
        eff_vstore(sums + m * COLUMNS + n, sum);
      }
    }
  }
}

static void product_item(void *ctx, int64_t item) {
  const job *j = ctx;
  const eff_int8_linear_args *a = j->a;
  const int64_t tiles = (a->n + COLUMNS - 1) / COLUMNS, m0 = item / tiles * ROWS, n0 = item % tiles * COLUMNS;
  const int rows = (int)MIN(ROWS, a->m - m0), columns = (int)MIN(COLUMNS, a->n - n0), step = a->m == 1 ? LONE : COLUMNS;
  float sums[ROWS * COLUMNS] __attribute__((aligned(64)));
  for (int n = 0; n < columns; n += step) {
    const int8_t *w = a->w + (n0 + n) * a->k;
    const int some = MIN(step, columns - n);
    if (j->quads)
      product_on_tiles(&j->t, j->quads, m0, rows, w, some, sums + n);
    else
      tile_product(&j->t, m0, rows, w, some, sums + n);
    if (j->outliers) add_outliers(j, m0, rows, w, some, sums + n);
  }
  float scale[COLUMNS] = {0}, bias[COLUMNS] = {0}, out[COLUMNS];
  for (int n = 0; n < columns; n++) scale[n] = a->w_absmax[n0 + n] / 127.0f;
  if (a->bias) eff_load_row((eff_dtype)a->bias_dtype, eff_at(a->bias, (eff_dtype)a->bias_dtype, n0), bias, columns);
  for (int m = 0; m < rows; m++) {
    for (int n = 0; n < COLUMNS; n++) out[n] = sums[m * COLUMNS + n] * scale[n] + bias[n];
    eff_store_row((eff_dtype)a->y_dtype, out, eff_at_mut(a->y, (eff_dtype)a->y_dtype, (m0 + m) * a->n + n0), columns);
  }
}

/* A run of items that lie one after the other in memory: what is fetched ahead of one is what the same thread reads next. */
static void product_run(void *ctx, int64_t run) {
  const job *j = ctx;
#if EFF_TILES
  if (j->quads) begin_whole_tiles();
#endif
  for (int64_t i = run * j->run; i < MIN((run + 1) * j->run, j->items); i++) product_item(ctx, i);
#if EFF_TILES
  if (j->quads) _tile_release();
#endif
}

KERNEL(int, eff_int8_linear, eff_int8_linear_args) {
  const int64_t m = a->m, n = a->n, k = a->k;
  const int threads = (int)a->threads, row_threads = m * k < 65536 ? 1 : threads;
  job j = {.a = a, .x_dtype = (eff_dtype)a->x_dtype, .threshold = (float)a->threshold};
  tile_rows *t = &j.t;
  t->rows = m, t->k = t->stride = k, t->group = a->group ? MIN(a->group, MAX(k, 1)) : MAX(k, 1);
  t->groups = MAX(1, (k + t->group - 1) / t->group);
  t->padded = ((k + EFF_STEP - 1) / EFF_STEP | 1) * EFF_STEP; /* odd: rows do not all fall into the same sets of the cache */
  const size_t codes = (size_t)(m * t->padded) * sizeof(eff_act), scales = (size_t)(m * t->groups) * 4;
  const size_t flags = j.threshold > 0.0f ? (size_t)k : 0;
  const size_t row = m == 1 ? (size_t)(t->padded + EFF_ROW_STEP) * sizeof(eff_row) : 0;
  const size_t quads = tiles_fit(t) ? quads_bytes(t) : 0;
  char *scratch = eff_scratch(codes + 2 * scales + flags + row + quads + 6 * 64), *free_part = scratch, *outliers = NULL;
  if (!scratch) return 1;
  t->codes = eff_take(&free_part, codes), t->scale = eff_take(&free_part, scales), t->surplus = eff_take(&free_part, scales);
  t->row = eff_take(&free_part, row), j.columns = eff_take(&free_part, flags);
  if (quads) j.quads = eff_take(&free_part, quads);
  memset(j.columns, 0, flags);
  eff_parallel_for(m, row_threads, scan_rows, &j);
  if (j.failed) return free(scratch), 1;
  if (j.found) {
    for (int64_t i = 0; i < k; i++) j.outliers += j.columns[i];
    outliers = eff_scratch((size_t)(j.outliers * (m + 1)) * 4);
    if (!outliers) return free(scratch), 1;
    j.outlier_index = (int32_t *)outliers, j.outlier_x = (float *)outliers + j.outliers;
    int64_t o = 0;
    for (int64_t i = 0; i < k; i++)
      if (j.columns[i]) j.outlier_index[o++] = (int32_t)i;
  }
  eff_parallel_for(m, row_threads, finish_rows, &j);
  if (j.quads) eff_parallel_for((m + 15) / 16, row_threads, quads_of_rows, &j);
  j.items = (m + ROWS - 1) / ROWS * ((n + COLUMNS - 1) / COLUMNS), j.run = MAX(1, j.items / (threads * RUNS));
  eff_parallel_for((j.items + j.run - 1) / j.run, threads, product_run, &j);
  free(outliers), free(scratch);
  return 0;
}
