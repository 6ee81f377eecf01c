/* Running softmax mean of values whose scores belong to the keys, and its backward. With the weight of a token among all up to
 * it as gate, out[t] = out[t - 1] + gate[t] (v[t] - out[t - 1]): one exp and one pass over the features a token. */
#include "rows.h"

typedef struct {
  int64_t batch, heads, kv_heads, tokens, d;
  int64_t v_batch, v_head, v_token; /* strides of v; its features lie side by side */
  const char *score, *v;            /* score, out, grad: contiguous [batch, heads, tokens(, d)] */
  char *out;
  float *tops, *totals;
  float *running; /* forward: the state [batch, heads, d + 2]; backward: scratch [batch, heads, d] */
  const char *grad;
  float *dscore, *dv; /* of each query head */
  int64_t score_dtype, dtype, threads;
} scan_args;

INLINE const char *values_of(const scan_args *a, int64_t item) {
  const int64_t b = item / a->heads, h = item % a->heads / (a->heads / a->kv_heads);
  return eff_at(a->v, (eff_dtype)a->dtype, b * a->v_batch + h * a->v_head);
}

INLINE float score_at(const scan_args *a, int64_t i) {
  float s;
  eff_load_row((eff_dtype)a->score_dtype, eff_at(a->score, (eff_dtype)a->score_dtype, i), &s, 1);
  return s;
}

INLINE void scan_head(const eff_dtype dtype, const scan_args *a, int64_t item) {
  const int64_t d = a->d, first = item * a->tokens;
  const char *v = values_of(a, item);
  float *restrict mean = a->running + item * (d + 2);
  float total = mean[d], top = mean[d + 1], buffer[CHUNK];
  for (int64_t t = 0; t < a->tokens; t++) {
    const float s = score_at(a, first + t);
    float gate = 0.0f;
    if (s > top) {
      total = total * expf(top - s) + 1.0f;
      top = s;
      gate = 1.0f / total;
    } else if (s != -INFINITY) { /* a NaN too, which it then hands on */
      const float weight = expf(s - top);
      total += weight;
      gate = weight / total;
    }
    const void *row = eff_at(v, dtype, t * a->v_token);
    void *out = eff_at_mut(a->out, dtype, (first + t) * d);
    for (int64_t i = 0; i < d; i += CHUNK) {
      const int64_t n = MIN(CHUNK, d - i);
      const float *x = eff_chunk(dtype, row, i, n, buffer);
      for (int64_t k = 0; k < n; k++) mean[i + k] += gate * (x[k] - mean[i + k]);
      eff_store_row(dtype, mean + i, eff_at_mut(out, dtype, i), n);
    }
    a->tops[first + t] = top;
    a->totals[first + t] = total;
  }
  mean[d] = total;
  mean[d + 1] = top;
}

/* `pull` is the gradient to the running mean after token t. */
INLINE void scan_head_backward(const eff_dtype dtype, const scan_args *a, int64_t item) {
  const int64_t d = a->d, first = item * a->tokens;
  const char *v = values_of(a, item);
  const float *tops = a->tops + first, *totals = a->totals + first;
  float *restrict pull = a->running + item * d;
  float gs[CHUNK], os[CHUNK], vs[CHUNK];
  double mass = 0.0; /* sum of the weights times grad . out */
  memset(pull, 0, (size_t)d * 4);
  for (int64_t t = a->tokens - 1; t >= 0; t--) {
    const float gate = totals[t] > 0.0f ? expf(score_at(a, first + t) - tops[t]) / totals[t] : totals[t];
    float keep = 0.0f;
    if (t + 1 < a->tokens && totals[t] != 0.0f) keep = expf(tops[t] - tops[t + 1]) * totals[t] / totals[t + 1];
    const void *grad = eff_at(a->grad, dtype, (first + t) * d), *out = eff_at(a->out, dtype, (first + t) * d);
    const void *row = eff_at(v, dtype, t * a->v_token);
    float *restrict dv = a->dv + (first + t) * d;
    float along[LANES] = {0}, on[LANES] = {0}; /* grad . out and pull . v */
    for (int64_t i = 0; i < d; i += CHUNK) {
      const int64_t n = MIN(CHUNK, d - i);
      const float *g = eff_chunk(dtype, grad, i, n, gs), *o = eff_chunk(dtype, out, i, n, os);
      const float *x = eff_chunk(dtype, row, i, n, vs);
      float *restrict p = pull + i;
      for (int64_t k = 0; k < n; k++) p[k] = p[k] * keep + g[k];
      for (int64_t k = 0; k < n; k++) dv[i + k] = gate * p[k];
      int64_t k = 0;
      for (; k + LANES <= n; k += LANES)
        for (int l = 0; l < LANES; l++) {
          along[l] += g[k + l] * o[k + l];
          on[l] += p[k + l] * x[k + l];
        }
      for (; k < n; k++) {
        along[0] += g[k] * o[k];
        on[0] += p[k] * x[k];
      }
    }
    for (int l = 1; l < LANES; l++) {
      along[0] += along[l];
      on[0] += on[l];
    }
    mass = mass * keep + along[0];
    a->dscore[first + t] = gate * (float)(on[0] - mass);
  }
}

static void forward_item(void *ctx, int64_t item) {
  const scan_args *a = ctx;
#define CALL(dtype) scan_head(dtype, a, item); break
  EFF_FOR_DTYPE(a->dtype, CALL)
#undef CALL
}

static void backward_item(void *ctx, int64_t item) {
  const scan_args *a = ctx;
#define CALL(dtype) scan_head_backward(dtype, a, item); break
  EFF_FOR_DTYPE(a->dtype, CALL)
#undef CALL
}

KERNEL(void, eff_self_gated_scan, scan_args) {
  eff_parallel_for(a->batch * a->heads, (int)a->threads, forward_item, (void *)a);
}

KERNEL(void, eff_self_gated_scan_backward, scan_args) {
  eff_parallel_for(a->batch * a->heads, (int)a->threads, backward_item, (void *)a);
}
