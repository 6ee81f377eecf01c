/* RMSNorm, with or without an addition before it, and its backward. Sums run in LANES floats per chunk and in double over the
 * chunks, which makes the result as good as that of a pairwise sum. */
#include "rows.h"

typedef struct {
  int64_t rows, d;
  const char *x;
  int64_t x_stride;
  const char *residual; /* NULL: none */
  int64_t residual_stride;
  const char *weight;
  double eps;
  char *total; /* x + residual */
  char *out;
  int64_t dtype, weight_dtype, threads;
} forward_args;

INLINE double dot_chunk(const float *a, const float *b, int64_t n) {
  float sum[LANES] = {0}, rest = 0.0f;
  int64_t i = 0;
  for (; i + LANES <= n; i += LANES)
    for (int k = 0; k < LANES; k++) sum[k] += a[i + k] * b[i + k];
  for (; i < n; i++) rest += a[i] * b[i];
  for (int k = 0; k < LANES; k++) rest += sum[k];
  return rest;
}

/* total = x + residual, rounded to the dtype. */
INLINE void add_row(const eff_dtype dtype, const void *x, const void *residual, void *total, int64_t d) {
  float xs[CHUNK], rs[CHUNK], ts[CHUNK];
  for (int64_t i = 0; i < d; i += CHUNK) {
    const int64_t n = MIN(CHUNK, d - i);
    const float *a = eff_chunk(dtype, x, i, n, xs), *b = eff_chunk(dtype, residual, i, n, rs);
    float *t = eff_chunk_out(dtype, total, i, ts);
    for (int64_t k = 0; k < n; k++) t[k] = a[k] + b[k];
    eff_chunk_done(dtype, total, i, n, ts);
  }
}

INLINE float inverse_rms(const eff_dtype dtype, const void *x, int64_t d, double eps) {
  float xs[CHUNK];
  double sum = 0.0;
  for (int64_t i = 0; i < d; i += CHUNK) {
    const int64_t n = MIN(CHUNK, d - i);
    const float *a = eff_chunk(dtype, x, i, n, xs);
    sum += dot_chunk(a, a, n);
  }
  return (float)(1.0 / sqrt(sum / (double)d + eps));
}

INLINE void forward_rows(const eff_dtype dtype, const forward_args *a, int64_t from, int64_t to) {
  const eff_dtype weight_dtype = (eff_dtype)a->weight_dtype;
  const int64_t size = (int64_t)eff_size(dtype), d = a->d;
  float xs[CHUNK], ws[CHUNK], ys[CHUNK];
  for (int64_t r = from; r < to; r++) {
    const void *x = a->x + r * a->x_stride * size;
    if (a->residual) {
      void *total = a->total + r * d * size;
      add_row(dtype, x, a->residual + r * a->residual_stride * size, total, d);
      x = total;
    }
    const float scale = inverse_rms(dtype, x, d, a->eps);
    void *out = a->out + r * d * size;
    for (int64_t i = 0; i < d; i += CHUNK) {
      const int64_t n = MIN(CHUNK, d - i);
      const float *v = eff_chunk(dtype, x, i, n, xs), *w = eff_chunk(weight_dtype, a->weight, i, n, ws);
      float *restrict y = eff_chunk_out(dtype, out, i, ys);
      for (int64_t k = 0; k < n; k++) y[k] = v[k] * scale * w[k];
      eff_chunk_done(dtype, out, i, n, ys);
    }
  }
}

static void forward_item(void *ctx, int64_t item) {
  const forward_args *a = ctx;
  const int64_t step = eff_rows_per_item(a->d), from = item * step, to = MIN(a->rows, from + step);
#define CALL(dtype) forward_rows(dtype, a, from, to); break
  EFF_FOR_DTYPE(a->dtype, CALL)
#undef CALL
}

KERNEL(void, eff_rms_norm, forward_args) {
  const int64_t step = eff_rows_per_item(a->d);
  eff_parallel_for((a->rows + step - 1) / step, (int)a->threads, forward_item, (void *)a);
}

typedef struct {
  int64_t rows, d;
  const char *grad;
  int64_t grad_stride;
  const char *x;
  int64_t x_stride;
  const char *weight;
  const char *grad_residual; /* NULL: none */
  int64_t grad_residual_stride;
  double eps;
  char *grad_x;
  float *grad_weight; /* [parts, d]: part p holds the sum over rows p * rows_per_part .. */
  int64_t rows_per_part;
  int64_t dtype, weight_dtype, threads;
} backward_args;

INLINE void backward_rows(const eff_dtype dtype, const backward_args *a, int64_t from, int64_t to, float *restrict grad_weight) {
  const eff_dtype weight_dtype = (eff_dtype)a->weight_dtype;
  const int64_t size = (int64_t)eff_size(dtype), d = a->d;
  float gs[CHUNK], xs[CHUNK], ws[CHUNK], rs[CHUNK], out[CHUNK];
  memset(grad_weight, 0, (size_t)d * 4);
  for (int64_t r = from; r < to; r++) {
    const void *grad = a->grad + r * a->grad_stride * size, *x = a->x + r * a->x_stride * size;
    const void *more = a->grad_residual ? a->grad_residual + r * a->grad_residual_stride * size : NULL;
    void *grad_x = a->grad_x + r * d * size;
    const float scale = inverse_rms(dtype, x, d, a->eps);
    double dot = 0.0; /* sum of grad * weight * x */
    for (int64_t i = 0; i < d; i += CHUNK) {
      const int64_t n = MIN(CHUNK, d - i);
      const float *g = eff_chunk(dtype, grad, i, n, gs), *v = eff_chunk(dtype, x, i, n, xs);
      const float *w = eff_chunk(weight_dtype, a->weight, i, n, ws);
      for (int64_t k = 0; k < n; k++) {
        out[k] = g[k] * w[k];
        grad_weight[i + k] += g[k] * v[k] * scale;
      }
      dot += dot_chunk(out, v, n);
    }
    const float pull = (float)(dot * scale * scale / (double)d);
    for (int64_t i = 0; i < d; i += CHUNK) {
      const int64_t n = MIN(CHUNK, d - i);
      const float *g = eff_chunk(dtype, grad, i, n, gs), *v = eff_chunk(dtype, x, i, n, xs);
      const float *w = eff_chunk(weight_dtype, a->weight, i, n, ws);
      float *y = eff_chunk_out(dtype, grad_x, i, out);
      for (int64_t k = 0; k < n; k++) y[k] = (g[k] * w[k] - v[k] * pull) * scale;
      if (more) {
        const float *e = eff_chunk(dtype, more, i, n, rs);
        for (int64_t k = 0; k < n; k++) y[k] += e[k];
      }
      eff_chunk_done(dtype, grad_x, i, n, out);
    }
  }
}

static void backward_item(void *ctx, int64_t part) {
  const backward_args *a = ctx;
  const int64_t from = part * a->rows_per_part, to = MIN(a->rows, from + a->rows_per_part);
  float *grad_weight = a->grad_weight + part * a->d;
#define CALL(dtype) backward_rows(dtype, a, from, to, grad_weight); break
  EFF_FOR_DTYPE(a->dtype, CALL)
#undef CALL
}

KERNEL(void, eff_rms_norm_backward, backward_args) {
  eff_parallel_for((a->rows + a->rows_per_part - 1) / a->rows_per_part, (int)a->threads, backward_item, (void *)a);
}
