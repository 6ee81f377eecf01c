/* Column-wise int8 quantisation with outlier detection: a strip of columns at a time, whose maxima stay in registers and cache
 * while the rows pass, once for the maxima and once for the codes. */
#include "rows.h"

#include <float.h>

typedef struct {
  const void *x; /* [rows, n] */
  int64_t dtype, rows, n, stride;
  double threshold;
  int8_t *codes;    /* [rows, n] */
  float *absmax;    /* [n] */
  uint8_t *columns; /* [n], receives 1 for each outlier column, 0 for the others */
  int64_t threads;
} args;

/* best[i] = max |x[i]| below the limit; seen[i] |= 1 for an outlier, 2 for what no code stands for. */
INLINE void scan(const float *restrict x, int64_t n, float limit, float *restrict best, int32_t *restrict seen) {
  for (int64_t i = 0; i < n; i++) {
    const float v = fabsf(x[i]);
    const int outlier = v >= limit;
    seen[i] |= outlier | ((!(v <= FLT_MAX) & !outlier) << 1);
    best[i] = !outlier & (v > best[i]) ? v : best[i];
  }
}

/* As eff_row_codes: adding 1.5 * 2^23 rounds half to even and leaves the integer in the low bits. */
INLINE void code(const float *restrict x, int64_t n, const float *restrict scale, int8_t *restrict out) {
  int32_t wide[CHUNK];
  int64_t i = 0;
  for (; i + EFF_LANES <= n; i += EFF_LANES) {
    eff_vf scaled = eff_vload(x + i) * eff_vload(scale + i);
    EFF_ROUNDED(scaled);
    const eff_vf shifted = scaled + eff_splat(12582912.0f);
    const eff_vi integer = (eff_vi)shifted - 0x4b400000;
    memcpy(wide + i, &integer, sizeof integer);
  }
  for (; i < n; i++) wide[i] = (int32_t)nearbyintf(x[i] * scale[i]);
  for (i = 0; i < n; i++) out[i] = (int8_t)(scale[i] == 0.0f ? 0 : wide[i]);
}

/* Rows are far apart, which the processor's own prefetch does not follow. */
INLINE void fetch(const args *a, int64_t row, int64_t first, int64_t n) {
  const eff_dtype dtype = (eff_dtype)a->dtype;
  const char *p = eff_at(a->x, dtype, row * a->stride + first);
  for (int64_t i = 0; row < a->rows && i < n * (int64_t)eff_size(dtype); i += 64) __builtin_prefetch(p + i);
}

static void strip(void *ctx, int64_t item) {
  const args *a = ctx;
  const eff_dtype dtype = (eff_dtype)a->dtype;
  const int64_t first = item * CHUNK, n = MIN(CHUNK, a->n - first);
  const float limit = a->threshold > 0 ? (float)a->threshold : NAN; /* nothing is >= NaN */
  float buffer[CHUNK], best[CHUNK] = {0}, scale[CHUNK];
  int32_t seen[CHUNK] = {0};
  for (int64_t r = 0; r < a->rows; r++) {
    fetch(a, r + 2, first, n);
    scan(eff_chunk(dtype, eff_at(a->x, dtype, r * a->stride), first, n, buffer), n, limit, best, seen);
  }
  for (int64_t i = 0; i < n; i++) {
    a->absmax[first + i] = seen[i] & 2 ? NAN : best[i];
    a->columns[first + i] = (uint8_t)(seen[i] & 1);
    scale[i] = seen[i] || !(best[i] > 0.0f) ? 0.0f : 127.0f * (1.0f / best[i]);
  }
  for (int64_t r = 0; r < a->rows; r++) {
    fetch(a, r + 2, first, n);
    code(eff_chunk(dtype, eff_at(a->x, dtype, r * a->stride), first, n, buffer), n, scale, a->codes + r * a->n + first);
  }
}

KERNEL(void, eff_int8_quantize_columns, args) {
  eff_parallel_for((a->n + CHUNK - 1) / CHUNK, (int)a->threads, strip, (void *)a);
}
