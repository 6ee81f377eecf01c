/* SwiGLU: silu(gate) * up, and its backward. */
#include "rows.h"

/* e^t to about 1 ulp: t = k ln 2 + r with |r| <= ln 2 / 2, the Taylor polynomial of e^r, and 2^k as two factors, so that
 * large t gives infinity and very negative t gives 0 without a branch: the compiler makes vectors of it. NaN stays NaN. */
INLINE float exp_float(float t) {
  const float shift = 12582912.0f; /* 1.5 * 2^23: adding it rounds to a whole number */
  t = t > 104.0f ? 104.0f : t;
  t = t < -104.0f ? -104.0f : t;
  const float shifted = t * 1.44269504f + shift, k = shifted - shift;
  const float r = (t - k * 0.693359375f) - k * -2.12194440e-4f; /* ln 2 in two parts, the first exact in few bits */
  float p = 1.0f / 5040;
  p = p * r + 1.0f / 720;
  p = p * r + 1.0f / 120;
  p = p * r + 1.0f / 24;
  p = p * r + 1.0f / 6;
  p = p * r + 0.5f;
  p = p * r + 1.0f;
  p = p * r + 1.0f;
  int32_t n;
  memcpy(&n, &shifted, 4);
  n -= 0x4b400000;
  const uint32_t first = (uint32_t)((n >> 1) + 127) << 23, second = (uint32_t)(n - (n >> 1) + 127) << 23;
  float a, b;
  memcpy(&a, &first, 4), memcpy(&b, &second, 4);
  return p * a * b;
}

typedef struct {
  int64_t rows, d;
  const char *gate;
  int64_t gate_stride;
  const char *up;
  int64_t up_stride;
  const char *grad; /* backward only */
  int64_t grad_stride;
  char *out; /* forward: the result; backward: gradient to gate */
  char *out_up; /* backward: gradient to up */
  int64_t dtype, threads;
} args;

INLINE void forward_rows(const eff_dtype dtype, const args *a, int64_t from, int64_t to) {
  const int64_t size = (int64_t)eff_size(dtype), d = a->d;
  float gates[CHUNK], ups[CHUNK], ys[CHUNK];
  for (int64_t r = from; r < to; r++)
    for (int64_t i = 0; i < d; i += CHUNK) {
      const int64_t n = MIN(CHUNK, d - i);
      const float *g = eff_chunk(dtype, a->gate + r * a->gate_stride * size, i, n, gates);
      const float *u = eff_chunk(dtype, a->up + r * a->up_stride * size, i, n, ups);
      float *restrict y = eff_chunk_out(dtype, a->out + r * d * size, i, ys);
      for (int64_t k = 0; k < n; k++) y[k] = g[k] / (1.0f + exp_float(-g[k])) * u[k];
      eff_chunk_done(dtype, a->out + r * d * size, i, n, ys);
    }
}

/* d silu(x) / dx = s * (1 + x * (1 - s)) with s = sigmoid(x). */
INLINE void backward_rows(const eff_dtype dtype, const args *a, int64_t from, int64_t to) {
  const int64_t size = (int64_t)eff_size(dtype), d = a->d;
  float gates[CHUNK], ups[CHUNK], grads[CHUNK], to_gate[CHUNK], to_up[CHUNK];
  for (int64_t r = from; r < to; r++)
    for (int64_t i = 0; i < d; i += CHUNK) {
      const int64_t n = MIN(CHUNK, d - i);
      const float *g = eff_chunk(dtype, a->gate + r * a->gate_stride * size, i, n, gates);
      const float *u = eff_chunk(dtype, a->up + r * a->up_stride * size, i, n, ups);
      const float *e = eff_chunk(dtype, a->grad + r * a->grad_stride * size, i, n, grads);
      float *restrict y = eff_chunk_out(dtype, a->out + r * d * size, i, to_gate);
      float *restrict z = eff_chunk_out(dtype, a->out_up + r * d * size, i, to_up);
      for (int64_t k = 0; k < n; k++) {
        const float s = 1.0f / (1.0f + exp_float(-g[k]));
        y[k] = e[k] * u[k] * s * (1.0f + g[k] * (1.0f - s));
        z[k] = e[k] * g[k] * s;
      }
      eff_chunk_done(dtype, a->out + r * d * size, i, n, to_gate);
      eff_chunk_done(dtype, a->out_up + r * d * size, i, n, to_up);
    }
}

static void forward_item(void *ctx, int64_t item) {
  const args *a = ctx;
  const int64_t step = eff_rows_per_item(a->d), from = item * step, to = MIN(a->rows, from + step);
#define CALL(dtype) forward_rows(dtype, a, from, to); break
  EFF_FOR_DTYPE(a->dtype, CALL)
#undef CALL
}

static void backward_item(void *ctx, int64_t item) {
  const args *a = ctx;
  const int64_t step = eff_rows_per_item(a->d), from = item * step, to = MIN(a->rows, from + step);
#define CALL(dtype) backward_rows(dtype, a, from, to); break
  EFF_FOR_DTYPE(a->dtype, CALL)
#undef CALL
}

KERNEL(void, eff_swiglu, args) {
  const int64_t step = eff_rows_per_item(a->d);
  eff_parallel_for((a->rows + step - 1) / step, (int)a->threads, a->grad ? backward_item : forward_item, (void *)a);
}
