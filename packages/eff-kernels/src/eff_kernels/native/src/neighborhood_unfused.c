/* The three products of unfused neighborhood attention, in float32: scores of windows, sums over windows, and sums over the
 * queries that see a key. Windows are a table of keys for each query; missing keys are -1. */
#include "attention_tile.h"

#define QUERIES 32 /* of an item of work */

typedef struct {
  int64_t batch, heads, tokens, slots, d;
  const int32_t *index; /* [tokens, slots] */
  const float *x, *y;   /* rows of d features, the last stride 1 */
  int64_t x_stride[3], y_stride[3]; /* batch, head, token */
  const float *weights; /* [batch, heads, tokens, slots] */
  float *out;           /* contiguous */
  int64_t threads;
} nu_args;

INLINE const float *head_of(const float *x, const int64_t *stride, const nu_args *a, int64_t head) {
  return x + head / a->heads * stride[0] + head % a->heads * stride[1];
}

/* out[head, i, t] = x[i] . y[index[i, t]], sixteen slots at a time; minus infinity where there is no key. */
static void qk_item(void *ctx, int64_t item) {
  const nu_args *a = ctx;
  const int64_t blocks = (a->tokens + QUERIES - 1) / QUERIES, head = item / blocks, first = item % blocks * QUERIES;
  const float *x = head_of(a->x, a->x_stride, a, head), *y = head_of(a->y, a->y_stride, a, head);
  for (int64_t i = first; i < MIN(a->tokens, first + QUERIES); i++) {
    const float *q = x + i * a->x_stride[2];
    const int32_t *index = a->index + i * a->slots;
    float *out = a->out + (head * a->tokens + i) * a->slots;
    for (int64_t t = 0; t < a->slots; t += 16) {
      const int n = (int)MIN(16, a->slots - t);
      const float *rows[16];
      at_v acc[16];
      for (int s = 0; s < 16; s++) {
        const int32_t key = index[t + MIN(s, n - 1)];
        rows[s] = key < 0 ? q : y + key * a->y_stride[2];
        acc[s] = (at_v){0};
      }
      int64_t c = 0;
      for (; c + AT_W <= a->d; c += AT_W) {
        const at_v v = at_load(q + c);
#pragma GCC unroll 16
        for (int s = 0; s < 16; s++) acc[s] += v * at_load(rows[s] + c);
      }
      float sums[16];
      at_sums(acc, sums);
      for (; c < a->d; c++)
        for (int s = 0; s < 16; s++) sums[s] += q[c] * rows[s][c];
      for (int s = 0; s < n; s++) out[t + s] = index[t + s] < 0 ? -INFINITY : sums[s];
    }
  }
}

/* out += weight * row, N vectors of it from c on kept in registers over all slots. */
INLINE void gather(const nu_args *a, const int N, const int32_t *index, const float *w, const float *y, float *out) {
  at_v acc[4];
  for (int u = 0; u < N; u++) acc[u] = (at_v){0};
  for (int64_t t = 0; t < a->slots; t++) {
    if (index[t] < 0) continue;
    const float *row = y + index[t] * a->y_stride[2];
    const at_v weight = at_splat(w[t]);
#pragma GCC unroll 4
    for (int u = 0; u < N; u++) acc[u] += weight * at_load(row + u * AT_W);
  }
  for (int u = 0; u < N; u++) at_store(out + u * AT_W, acc[u]);
}

/* out[head, i] = sum_t weights[head, i, t] y[index[i, t]]. */
static void av_item(void *ctx, int64_t item) {
  const nu_args *a = ctx;
  const int64_t blocks = (a->tokens + QUERIES - 1) / QUERIES, head = item / blocks, first = item % blocks * QUERIES;
  const float *y = head_of(a->y, a->y_stride, a, head);
  for (int64_t i = first; i < MIN(a->tokens, first + QUERIES); i++) {
    const int32_t *index = a->index + i * a->slots;
    const float *w = a->weights + (head * a->tokens + i) * a->slots;
    float *out = a->out + (head * a->tokens + i) * a->d;
    int64_t c = 0;
    for (; c + 4 * AT_W <= a->d; c += 4 * AT_W) gather(a, 4, index, w, y + c, out + c);
    for (; c + 2 * AT_W <= a->d; c += 2 * AT_W) gather(a, 2, index, w, y + c, out + c);
    for (; c + AT_W <= a->d; c += AT_W) gather(a, 1, index, w, y + c, out + c);
    for (; c < a->d; c++) {
      float sum = 0.0f;
      for (int64_t t = 0; t < a->slots; t++)
        if (index[t] >= 0) sum += w[t] * y[index[t] * a->y_stride[2] + c];
      out[c] = sum;
    }
  }
}

/* out[head, j] = sum over i, t with index[i, t] = j of weights[head, i, t] x[i], in the order of i. */
static void inverse_item(void *ctx, int64_t head) {
  const nu_args *a = ctx;
  const float *x = head_of(a->x, a->x_stride, a, head);
  float *out = a->out + head * a->tokens * a->d;
  memset(out, 0, (size_t)(a->tokens * a->d) * 4);
  for (int64_t i = 0; i < a->tokens; i++) {
    const int32_t *index = a->index + i * a->slots;
    const float *w = a->weights + (head * a->tokens + i) * a->slots, *row = x + i * a->x_stride[2];
    int64_t c = 0;
    for (; c + AT_W <= a->d; c += AT_W) {
      const at_v v = at_load(row + c);
      for (int64_t t = 0; t < a->slots; t++) {
        if (index[t] < 0) continue;
        float *o = out + index[t] * a->d + c;
        at_store(o, at_load(o) + at_splat(w[t]) * v);
      }
    }
    for (; c < a->d; c++)
      for (int64_t t = 0; t < a->slots; t++)
        if (index[t] >= 0) out[index[t] * a->d + c] += w[t] * row[c];
  }
}

KERNEL(void, eff_neighborhood_qk, nu_args) {
  eff_parallel_for(a->batch * a->heads * ((a->tokens + QUERIES - 1) / QUERIES), (int)a->threads, qk_item, (void *)a);
}

KERNEL(void, eff_neighborhood_av, nu_args) {
  eff_parallel_for(a->batch * a->heads * ((a->tokens + QUERIES - 1) / QUERIES), (int)a->threads, av_item, (void *)a);
}

KERNEL(void, eff_neighborhood_inverse, nu_args) {
  eff_parallel_for(a->batch * a->heads, (int)a->threads, inverse_item, (void *)a);
}
