/* The two halves of attention of one query per sequence, apart, so that its weights may be changed in between: scores of all
 * keys, and values summed by weights. Blocks of keys are those of decode_attention. */
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

/* Returns 0, or 1 when memory ran out. */
KERNEL(int, eff_attention_row_scores, score_args) {
  const int64_t group = a->heads / a->kv_heads, dp = db_features(a->d), bytes = a->k_key * (int64_t)eff_size((eff_dtype)a->dtype);
  float *q = eff_scratch((size_t)(4 * dp + a->d) * 4), *row = q + 4 * dp, block[4 * DB_KEYS];
  if (!q) return 1;
  for (int64_t b = 0; b < a->batch; b++)
    for (int64_t first = 0; first < a->heads; first++) {
      const int64_t kv = first / group, nh = MIN(4, (kv + 1) * group - first);
      memset(q, 0, (size_t)(4 * dp) * 4);
      for (int64_t h = 0; h < nh; h++) {
        eff_load_row((eff_dtype)a->q_dtype, eff_at(a->q, (eff_dtype)a->q_dtype, b * a->q_batch + (first + h) * a->q_head), row, a->d);
        for (int64_t c = 0; c < a->d; c++) q[h * dp + db_order((eff_dtype)a->dtype, c)] = row[c] * (float)a->scale;
      }
      const char *keys = eff_at(a->k, (eff_dtype)a->dtype, b * a->k_batch + kv * a->k_head);
      for (int64_t key = 0; key < a->keys; key += DB_KEYS) {
        const int n = (int)MIN(DB_KEYS, a->keys - key);
        const char *at = keys + key * bytes;
#define SCORES(dtype, NH) db_scores(dtype, NH, q, at, at, bytes, a->d, n, block)
#define SCORES_OF(dtype) OF_HEADS(dtype, SCORES)
        OF_DTYPE(a->dtype, SCORES_OF)
        for (int64_t h = 0; h < nh; h++)
          memcpy(a->scores + (b * a->heads + first + h) * a->keys + key, block + h * DB_KEYS, (size_t)n * 4);
      }
      first += nh - 1;
    }
  free(q);
  return 0;
}

/* Returns 0, or 1 when memory ran out. */
KERNEL(int, eff_attention_row_values, value_args) {
  const int64_t group = a->heads / a->kv_heads, dp = db_features(a->d), bytes = a->v_key * (int64_t)eff_size((eff_dtype)a->dtype);
  float *sum = eff_scratch((size_t)(4 * dp + a->d) * 4), *row = sum + 4 * dp, block[4 * DB_KEYS];
  if (!sum) return 1;
  for (int64_t b = 0; b < a->batch; b++)
    for (int64_t first = 0; first < a->heads; first++) {
      const int64_t kv = first / group, nh = MIN(4, (kv + 1) * group - first);
      memset(sum, 0, (size_t)(4 * dp) * 4);
      const char *values = eff_at(a->v, (eff_dtype)a->dtype, b * a->v_batch + kv * a->v_head);
      for (int64_t key = 0; key < a->keys; key += DB_KEYS) {
        const int n = (int)MIN(DB_KEYS, a->keys - key);
        const char *at = values + key * bytes;
        for (int64_t h = 0; h < nh; h++)
          memcpy(block + h * DB_KEYS, a->weights + (b * a->heads + first + h) * a->keys + key, (size_t)n * 4);
#define VALUES(dtype, NH) db_values(dtype, NH, block, at, bytes, a->d, n, at, sum)
#define VALUES_OF(dtype) OF_HEADS(dtype, VALUES)
        OF_DTYPE(a->dtype, VALUES_OF)
      }
      for (int64_t h = 0; h < nh; h++) {
        for (int64_t c = 0; c < a->d; c++) row[c] = sum[h * dp + db_order((eff_dtype)a->dtype, c)];
        eff_store_row((eff_dtype)a->out_dtype, row, eff_at_mut(a->out, (eff_dtype)a->out_dtype, (b * a->heads + first + h) * a->d), a->d);
      }
      first += nh - 1;
    }
  free(sum);
  return 0;
}
