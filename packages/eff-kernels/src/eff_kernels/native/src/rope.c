/* Rotary position embedding of [B, H, T, D] with any strides between rows: each pair of features turns by its angle. */
#include "rows.h"

typedef struct {
  int64_t batch, heads, tokens, d, pairs;
  const char *x;
  int64_t x_batch, x_head, x_token; /* strides in elements */
  const float *cos, *sin;
  int64_t cos_batch, cos_token, sin_batch, sin_token;
  char *out; /* contiguous */
  int64_t interleaved; /* pairs (2i, 2i+1), else (i, i + pairs) */
  int64_t inverse; /* turn the other way */
  int64_t dtype, threads;
} args;

INLINE void turn_row(const eff_dtype dtype, const args *a, const void *x, const float *cos, const float *sin, void *out) {
  float firsts[2 * CHUNK], seconds[CHUNK], ys[2 * CHUNK], zs[CHUNK];
  const float sign = a->inverse ? -1.0f : 1.0f;
  const int64_t pairs = a->pairs;
  for (int64_t i = 0; i < pairs; i += CHUNK) {
    const int64_t n = MIN(CHUNK, pairs - i);
    const float *c = cos + i, *s = sin + i;
    if (a->interleaved) {
      const float *p = eff_chunk(dtype, x, 2 * i, 2 * n, firsts);
      float *restrict y = eff_chunk_out(dtype, out, 2 * i, ys);
      for (int64_t k = 0; k < n; k++) {
        y[2 * k] = p[2 * k] * c[k] - p[2 * k + 1] * (sign * s[k]);
        y[2 * k + 1] = p[2 * k + 1] * c[k] + p[2 * k] * (sign * s[k]);
      }
      eff_chunk_done(dtype, out, 2 * i, 2 * n, ys);
    } else {
      const float *p = eff_chunk(dtype, x, i, n, firsts), *q = eff_chunk(dtype, x, pairs + i, n, seconds);
      float *restrict y = eff_chunk_out(dtype, out, i, ys), *restrict z = eff_chunk_out(dtype, out, pairs + i, zs);
      for (int64_t k = 0; k < n; k++) {
        y[k] = p[k] * c[k] - q[k] * (sign * s[k]);
        z[k] = q[k] * c[k] + p[k] * (sign * s[k]);
      }
      eff_chunk_done(dtype, out, i, n, ys);
      eff_chunk_done(dtype, out, pairs + i, n, zs);
    }
  }
  const int64_t kept = a->d - 2 * pairs;
  memcpy(eff_at_mut(out, dtype, 2 * pairs), eff_at(x, dtype, 2 * pairs), (size_t)kept * eff_size(dtype));
}

INLINE void turn_rows(const eff_dtype dtype, const args *a, int64_t from, int64_t to) {
  const int64_t size = (int64_t)eff_size(dtype);
  int64_t t = from % a->tokens, h = from / a->tokens % a->heads, b = from / a->tokens / a->heads;
  for (int64_t r = from; r < to; r++) {
    const char *x = a->x + (b * a->x_batch + h * a->x_head + t * a->x_token) * size;
    turn_row(dtype, a, x, a->cos + b * a->cos_batch + t * a->cos_token, a->sin + b * a->sin_batch + t * a->sin_token,
             a->out + r * a->d * size);
    if (++t == a->tokens) {
      t = 0;
      if (++h == a->heads) h = 0, b++;
    }
  }
}

static void item(void *ctx, int64_t index) {
  const args *a = ctx;
  const int64_t step = eff_rows_per_item(a->d), from = index * step;
  const int64_t to = MIN(a->batch * a->heads * a->tokens, from + step);
#define CALL(dtype) turn_rows(dtype, a, from, to); break
  EFF_FOR_DTYPE(a->dtype, CALL)
#undef CALL
}

KERNEL(void, eff_rope, args) {
  const int64_t step = eff_rows_per_item(a->d), rows = a->batch * a->heads * a->tokens;
  eff_parallel_for((rows + step - 1) / step, (int)a->threads, item, (void *)a);
}
