/* Row-wise rounding to FP8, to codes or to the numbers that they stand for. Every row is read twice, the second time from the
 * cache. */
#include "fp8.h"
#include "rows.h"

typedef struct {
  const void *x; /* [rows, n] */
  int64_t dtype, rows, n, stride, format, power_of_two;
  uint8_t *codes; /* [rows, n] */
  void *values;   /* [rows, n], of the dtype of x: codes * scale */
  float *scale;   /* [rows]; NULL: values are wanted, and no codes */
  int64_t threads;
} args;

typedef struct {
  const args *a;
  int failed;
} job;

INLINE void eight_codes(const eff_fp8 format, const float *x, float scale, uint8_t *codes) {
  typedef uint8_t bytes __attribute__((vector_size(EFF_LANES)));
  eff_vi wide;
  eff_fp8_round(format, eff_vload(x), scale, &wide);
  const bytes narrow = __builtin_convertvector(wide, bytes);
  memcpy(codes, &narrow, EFF_LANES);
}

INLINE void row_codes(const eff_fp8 format, const float *x, int64_t n, float scale, uint8_t *codes) {
  int64_t i = 0;
  for (; i + EFF_LANES <= n; i += EFF_LANES) eight_codes(format, x + i, scale, codes + i);
  if (i < n) {
    float rest[EFF_LANES] = {0};
    uint8_t rest_codes[EFF_LANES];
    memcpy(rest, x + i, (size_t)(n - i) * 4);
    eight_codes(format, rest, scale, rest_codes);
    memcpy(codes + i, rest_codes, (size_t)(n - i));
  }
}

/* x becomes the numbers for which its codes stand. */
INLINE void row_values(const eff_fp8 format, const float *x, int64_t n, float scale, float *out) {
  int64_t i = 0;
  for (; i + EFF_LANES <= n; i += EFF_LANES)
    eff_vstore(out + i, eff_fp8_round(format, eff_vload(x + i), scale, NULL) * eff_splat(scale));
  if (i < n) {
    float rest[EFF_LANES] = {0};
    memcpy(rest, x + i, (size_t)(n - i) * 4);
    eff_vstore(rest, eff_fp8_round(format, eff_vload(rest), scale, NULL) * eff_splat(scale));
    memcpy(out + i, rest, (size_t)(n - i) * 4);
  }
}

INLINE void store_values(const args *a, int64_t r, const float *x, float scale) {
  const eff_dtype dtype = (eff_dtype)a->dtype;
  void *row = eff_at_mut(a->values, dtype, r * a->n);
  for (int64_t i = 0; i < a->n; i += CHUNK) {
    float buffer[CHUNK];
    const int64_t n = MIN(CHUNK, a->n - i);
    float *out = eff_chunk_out(dtype, row, i, buffer);
    if (scale != scale)
      for (int64_t c = 0; c < n; c++) out[c] = NAN;
    else if (a->format == E4M3)
      row_values(E4M3, x + i, n, scale, out);
    else
      row_values(E5M2, x + i, n, scale, out);
    eff_chunk_done(dtype, row, i, n, buffer);
  }
}

static void rows_item(void *ctx, int64_t item) {
  job *j = ctx;
  const args *a = j->a;
  const eff_dtype dtype = (eff_dtype)a->dtype;
  const eff_fp8 format = (eff_fp8)a->format;
  const int64_t rows = eff_rows_per_item(a->n);
  float *wide = dtype == EFF_F32 ? NULL : eff_scratch((size_t)a->n * 4);
  if (dtype != EFF_F32 && !wide) {
    j->failed = 1;
    return;
  }
  for (int64_t r = item * rows; r < MIN(a->rows, (item + 1) * rows); r++) {
    const void *source = eff_at(a->x, dtype, r * a->stride);
    if (wide) eff_load_row(dtype, source, wide, a->n);
    const float *row = wide ? wide : source;
    const float scale = eff_fp8_scale(format, row, a->n, (int)a->power_of_two);
    if (!a->scale) {
      store_values(a, r, row, scale);
      continue;
    }
    a->scale[r] = scale;
    uint8_t *codes = a->codes + r * a->n;
    if (scale != scale)
      memset(codes, FP8_NAN, (size_t)a->n);
    else if (format == E4M3)
      row_codes(E4M3, row, a->n, scale, codes);
    else
      row_codes(E5M2, row, a->n, scale, codes);
  }
  free(wide);
}

/* Returns 0, or 1 when memory ran out. */
KERNEL(int, eff_fp8_quantize, args) {
  job j = {a, 0};
  const int64_t rows = eff_rows_per_item(a->n);
  eff_parallel_for((a->rows + rows - 1) / rows, (int)a->threads, rows_item, &j);
  return j.failed;
}
