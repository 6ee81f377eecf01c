/* The two halves of attention of one query per sequence, apart, so that its weights may be changed in between: scores of all
 * keys, and values summed by weights; and both in one with the weights of sinks scaled. Blocks of keys are those of
 * decode_attention. */
#include "decode_block.h"

typedef struct {
  const void *q; /* [batch, heads, d], q_batch and q_head elements apart */
  int64_t q_dtype, q_batch, q_head;
  const void *k; /* [batch, kv_heads, keys, d], the last dimension contiguous */
  int64_t dtype, k_batch, k_head, k_key;
  int64_t batch, heads, kv_heads, keys, d; /* d a multiple of 8 */
  double scale;
  float *scores; /* [batch, heads, keys] */
} score_args;

typedef struct {
  const float *weights; /* [batch, heads, keys] */
  const void *v;
  int64_t dtype, v_batch, v_head, v_key;
  int64_t batch, heads, kv_heads, keys, d;
  void *out; /* [batch, heads, d] */
  int64_t out_dtype;
} value_args;

typedef struct {
  const void *q; /* [batch, heads, d] */
  int64_t q_dtype, q_batch, q_head;
  const void *k;
  int64_t dtype, k_batch, k_head, k_key;
  const void *v; /* [batch, kv_heads, keys, dv] of the same dtype; dv a multiple of 8 */
  int64_t v_batch, v_head, v_key;
  int64_t batch, heads, kv_heads, keys, d, dv;
  double scale;
  const float *old; /* [batch, heads, known]: what keys got before */
  int64_t known;
  const int64_t *rows;   /* [batch, keys]: queries that could see them */
  const uint8_t *may_be; /* [batch, keys]: which may be sinks */
  const float *bound;    /* [batch]: mean weight above which a key is one */
  int64_t spare_first;   /* whether the first key above it is none */
  double beta;           /* what is left of the weights of sinks */
  float *sums;           /* [batch, heads, keys]: what they have got now */
  uint8_t *sinks;        /* [batch, heads, keys] */
  int64_t *count;        /* [heads]: sinks of all sequences */
  float *mass;           /* [heads]: weight that they had */
  void *out;             /* [batch, heads, dv]; untouched where there is no sink at all */
  int64_t out_dtype;
} calibrate_args;

#define OF_DTYPE(dtype, call)                              \
  switch (dtype) {                                         \
    case EFF_F32: call(EFF_F32); break;                    \
    case EFF_BF16: call(EFF_BF16); break;                  \
    default: call(EFF_F16); break;                         \
  }
#define OF_HEADS(dtype, call)                              \
  switch (nh) {                                            \
    case 1: call(dtype, 1); break;                         \
    case 2: call(dtype, 2); break;                         \
    case 3: call(dtype, 3); break;                         \
    default: call(dtype, 4); break;                        \
  }

/* scores[h, keys] of nh query heads from `first` on, which share the keys at `keys`; q and row are scratch. */
INLINE void scores_of(eff_dtype q_dtype, const void *q, int64_t q_head, eff_dtype dtype, const char *keys, int64_t bytes, int64_t count, int64_t d,
                      int64_t nh, float scale, float *query, float *row, float *scores) {
  const int64_t dp = db_features(d);
  float block[4 * DB_KEYS];
  memset(query, 0, (size_t)(4 * dp) * 4);
  for (int64_t h = 0; h < nh; h++) {
    eff_load_row(q_dtype, eff_at(q, q_dtype, h * q_head), row, d);
    for (int64_t c = 0; c < d; c++) query[h * dp + db_order(dtype, c)] = row[c] * scale;
  }
  for (int64_t key = 0; key < count; key += DB_KEYS) {
    const int n = (int)MIN(DB_KEYS, count - key);
    const char *at = keys + key * bytes;
#define SCORES(dtype, NH) db_scores(dtype, NH, query, at, at, bytes, d, n, block)
#define SCORES_OF(dtype) OF_HEADS(dtype, SCORES)
    OF_DTYPE(dtype, SCORES_OF)
    for (int64_t h = 0; h < nh; h++) memcpy(scores + h * count + key, block + h * DB_KEYS, (size_t)n * 4);
  }
}

/* out[h, d] = values summed by weights[h, keys] for nh heads that share the values. */
INLINE void values_of(const float *weights, eff_dtype dtype, const char *values, int64_t bytes, int64_t count, int64_t d, int64_t nh, float *sum,
                      float *row, eff_dtype out_dtype, void *out) {
  const int64_t dp = db_features(d);
  float block[4 * DB_KEYS];
  memset(sum, 0, (size_t)(4 * dp) * 4);
  for (int64_t key = 0; key < count; key += DB_KEYS) {
    const int n = (int)MIN(DB_KEYS, count - key);
    const char *at = values + key * bytes;
    for (int64_t h = 0; h < nh; h++) memcpy(block + h * DB_KEYS, weights + h * count + key, (size_t)n * 4);
#define VALUES(dtype, NH) db_values(dtype, NH, block, at, bytes, d, n, at, sum)
#define VALUES_OF(dtype) OF_HEADS(dtype, VALUES)
    OF_DTYPE(dtype, VALUES_OF)
  }
  for (int64_t h = 0; h < nh; h++) {
    for (int64_t c = 0; c < d; c++) row[c] = sum[h * dp + db_order(dtype, c)];
    eff_store_row(out_dtype, row, eff_at_mut(out, out_dtype, h * d), d);
  }
}

/* Returns 0, or 1 when memory ran out. */
KERNEL(int, eff_attention_row_scores, score_args) {
  const eff_dtype dtype = (eff_dtype)a->dtype, q_dtype = (eff_dtype)a->q_dtype;
  const int64_t group = a->heads / a->kv_heads, dp = db_features(a->d), bytes = a->k_key * (int64_t)eff_size(dtype);
  float *q = eff_scratch((size_t)(4 * dp + a->d) * 4);
  if (!q) return 1;
  for (int64_t b = 0; b < a->batch; b++)
    for (int64_t first = 0, nh; first < a->heads; first += nh) {
      const int64_t kv = first / group;
      nh = MIN(4, (kv + 1) * group - first);
      scores_of(q_dtype, eff_at(a->q, q_dtype, b * a->q_batch + first * a->q_head), a->q_head, dtype,
                eff_at(a->k, dtype, b * a->k_batch + kv * a->k_head), bytes, a->keys, a->d, nh, (float)a->scale, q, q + 4 * dp,
                a->scores + (b * a->heads + first) * a->keys);
    }
  free(q);
  return 0;
}

/* Returns 0, or 1 when memory ran out. */
KERNEL(int, eff_attention_row_values, value_args) {
  const eff_dtype dtype = (eff_dtype)a->dtype, out_dtype = (eff_dtype)a->out_dtype;
  const int64_t group = a->heads / a->kv_heads, dp = db_features(a->d), bytes = a->v_key * (int64_t)eff_size(dtype);
  float *sum = eff_scratch((size_t)(4 * dp + a->d) * 4);
  if (!sum) return 1;
  for (int64_t b = 0; b < a->batch; b++)
    for (int64_t first = 0, nh; first < a->heads; first += nh) {
      const int64_t kv = first / group, at = b * a->heads + first;
      nh = MIN(4, (kv + 1) * group - first);
      values_of(a->weights + at * a->keys, dtype, eff_at(a->v, dtype, b * a->v_batch + kv * a->v_head), bytes, a->keys, a->d, nh, sum,
                sum + 4 * dp, out_dtype, eff_at_mut(a->out, out_dtype, at * a->d));
    }
  free(sum);
  return 0;
}

/* Weights from scores in place, of n keys in room for a multiple of AT_W. */
static void soften(float *s, int64_t n) {
  const int64_t wide = eff_round_up(n, AT_W);
  for (int64_t i = n; i < wide; i++) s[i] = -INFINITY;
  const at_v top = at_splat(db_top(s, (int)wide, -INFINITY));
  at_v sum = {0};
  for (int64_t i = 0; i < wide; i += AT_W) {
    const at_v e = at_exp(at_load(s + i) - top);
    at_store(s + i, e);
    sum += e;
  }
  float total = 0.0f;
  for (int l = 0; l < AT_W; l++) total += sum[l];
  const at_v share = at_splat(1.0f / total);
  for (int64_t i = 0; i < wide; i += AT_W) at_store(s + i, at_load(s + i) * share);
}

/* Sums, sinks and changed weights w[keys] of one head of one sequence; the number of sinks. */
static int64_t calibrate(const calibrate_args *a, int64_t b, int64_t head, float *restrict w) {
  const int64_t at = b * a->heads + head, n = a->keys;
  const float *old = a->old + at * a->known;
  float *restrict sums = a->sums + at * n;
  uint8_t *restrict sinks = a->sinks + at * n;
  const int64_t *rows = a->rows + b * n;
  const uint8_t *may_be = a->may_be + b * n;
  const float bound = a->bound[b];
  memcpy(sums, w, (size_t)n * 4);
  for (int64_t i = 0; i < a->known; i++) sums[i] += old[i];
  int64_t found = 0;
  for (int64_t i = 0; i < n; i++) {
    sinks[i] = (sums[i] / (float)rows[i] > bound) & may_be[i];
    found += sinks[i];
  }
  if (found && a->spare_first) {
    *(uint8_t *)memchr(sinks, 1, (size_t)n) = 0;
    found--;
  }
  if (!found) return 0;
  float mass = 0.0f, rest = 0.0f;
  for (int64_t i = 0; i < n; i++) mass += sinks[i] ? w[i] : 0.0f, rest += sinks[i] ? 0.0f : w[i];
  a->mass[head] += mass;
  a->count[head] += found;
  if (rest > 1.17549435e-38f) { /* others that have no weight cannot take any */
    const float gain = 1.0f + (1.0f - (float)a->beta) * mass / rest;
    for (int64_t i = 0; i < n; i++) w[i] *= sinks[i] ? (float)a->beta : gain;
  }
  return found;
}

/* One step of attention whose sinks are found anew and scaled. Returns 0, or 1 when memory ran out. */
KERNEL(int, eff_attention_row_calibrated, calibrate_args) {
  const eff_dtype dtype = (eff_dtype)a->dtype, q_dtype = (eff_dtype)a->q_dtype, out_dtype = (eff_dtype)a->out_dtype;
  const int64_t group = a->heads / a->kv_heads, dp = db_features(MAX(a->d, a->dv)), size = (int64_t)eff_size(dtype);
  const int64_t room = a->batch * a->heads * a->keys;
  float *scratch = eff_scratch((size_t)(4 * dp + MAX(a->d, a->dv) + room + 2 * AT_LANES + a->keys) * 4);
  if (!scratch) return 1;
  float *row = scratch + 4 * dp, *weights = row + MAX(a->d, a->dv), *one = weights + room;
  int64_t found = 0;
  for (int64_t b = 0; b < a->batch; b++)
    for (int64_t first = 0, nh; first < a->heads; first += nh) {
      const int64_t kv = first / group;
      nh = MIN(4, (kv + 1) * group - first);
      float *w = weights + (b * a->heads + first) * a->keys;
      scores_of(q_dtype, eff_at(a->q, q_dtype, b * a->q_batch + first * a->q_head), a->q_head, dtype,
                eff_at(a->k, dtype, b * a->k_batch + kv * a->k_head), a->k_key * size, a->keys, a->d, nh, (float)a->scale, scratch, row, w);
      for (int64_t h = 0; h < nh; h++) {
        memcpy(one, w + h * a->keys, (size_t)a->keys * 4);
        soften(one, a->keys);
        found += calibrate(a, b, first + h, one);
        memcpy(w + h * a->keys, one, (size_t)a->keys * 4);
      }
    }
  for (int64_t b = 0; found && b < a->batch; b++)
    for (int64_t first = 0, nh; first < a->heads; first += nh) {
      const int64_t kv = first / group, at = b * a->heads + first;
      nh = MIN(4, (kv + 1) * group - first);
      values_of(weights + at * a->keys, dtype, eff_at(a->v, dtype, b * a->v_batch + kv * a->v_head), a->v_key * size, a->keys, a->dv, nh, scratch,
                row, out_dtype, eff_at_mut(a->out, out_dtype, at * a->dv));
    }
  free(scratch);
  return 0;
}
