/* Linear attention over the blocks of keys that a map puts into its scope, forward (the linear branch of arXiv 2509.24006).
 *
 * The state S_j = phi(K_j)^T V_j, z_j = sum phi(K_j) of every block of keys comes first. A block of queries then adds up the states
 * in its scope and multiplies once: O = phi(Q) H / phi(Q) z. States outside of the scope are never touched. */
#include "attention_tile.h"

enum { SOFTMAX, ELU, RELU };              /* feature_map */
enum { MARGINAL, NONCRITICAL, EVERY };    /* scope: entries of the map that are 0; 0 or less; any */
#define STATES ((int64_t)1 << 19)         /* floats of the states in memory together: few, for caches, and fresh pages are slow */

typedef struct {
  int64_t batch, heads, kv_heads, lq, lk, d, dv, block_q, block_k;
  const void *q, *k, *v;
  const int8_t *map;                             /* [batch, heads, blocks of queries, blocks of keys] */
  int64_t q_stride[3], k_stride[3], v_stride[3]; /* batch, head, token */
  int64_t feature_map, scope, dtype, threads;
  void *out; /* [batch, heads, lq, dv] */
} args;

typedef struct {
  const args *a;
  eff_dtype dtype;
  int64_t dp, dvp;    /* d and dv rounded up to lanes */
  int64_t size;       /* of a state: dvp / AT_LANES panels [dp, AT_LANES] of S, then z [dp] */
  int64_t tm, tn;     /* blocks of queries, of keys */
  int64_t first;      /* key-value head of the first state in memory */
  float *states;      /* [heads in memory, tn, size] */
  char *finite;       /* [heads in memory, tn], whether a state is */
  int64_t together;   /* blocks of queries whose states are summed in one go, at most AT_LANES */
  int failed;
} job;

/* phi of the AT_LANES tokens in the lanes of x [dp, lanes]; zeros in features d to dp. */
static void features(const job *j, float *x) {
  const int64_t d = j->a->d;
  for (int u = 0; u < AT_V; u++) {
    float *column = x + u * AT_W;
    at_v sum = {0};
    if (j->a->feature_map == SOFTMAX) {
      at_v top = at_splat(-INFINITY);
      for (int64_t c = 0; c < d; c++) top = at_max(at_load(column + c * AT_LANES), top);
      for (int64_t c = 0; c < d; c++) {
        const at_v e = at_exp(at_load(column + c * AT_LANES) - top);
        at_store(column + c * AT_LANES, e);
        sum += e;
      }
      const at_v inverse = 1.0f / sum;
      for (int64_t c = 0; c < d; c++) at_store(column + c * AT_LANES, at_load(column + c * AT_LANES) * inverse);
    } else if (j->a->feature_map == ELU) {
      for (int64_t c = 0; c < d; c++) {
        const at_v v = at_load(column + c * AT_LANES);
        at_store(column + c * AT_LANES, at_select((at_i)(v > (at_v){0}), v + 1.0f, at_exp(v)));
      }
    } else {
      for (int64_t c = 0; c < d; c++) {
        const at_v v = at_load(column + c * AT_LANES);
        at_store(column + c * AT_LANES, at_select((at_i)(v <= (at_v){0}), (at_v){0}, v));
      }
    }
  }
}

/* phi of n rows of up to AT_LANES tokens into xt [dp, lanes]. */
static void load_features(const job *j, const void *src, int64_t at, int64_t stride, int64_t n, float *rows, float *xt) {
  memset(rows, 0, (size_t)(AT_LANES * j->dp) * 4);
  for (int64_t lane = 0; lane < n; lane++)
    at_load_row(j->dtype, src, at + lane * stride, rows + lane * j->dp, j->a->d, j->dp);
  at_transpose(rows, j->dp, xt, AT_LANES, AT_LANES, j->dp);
  features(j, xt);
}

/* The state of one block of keys. */
static void state_item(void *ctx, int64_t item) {
  job *j = ctx;
  const args *a = j->a;
  const int64_t head = j->first + item / j->tn, b = head / a->kv_heads, kv = head % a->kv_heads;
  const int64_t first = item % j->tn * a->block_k, keys = MIN(a->block_k, a->lk - first);
  float *state = j->states + item * j->size, *z = state + j->dp * j->dvp;
  float *f = eff_scratch((size_t)(AT_LANES * (3 * j->dp + 2 * j->dvp)) * 4);
  if (!f) {
    j->failed = 1;
    return;
  }
  float *rows = f, *xt = rows + AT_LANES * j->dp, *phi = xt + AT_LANES * j->dp, *v = phi + AT_LANES * j->dp, *panels = v + AT_LANES * j->dvp;
  memset(state, 0, (size_t)j->size * 4);
  for (int64_t t = 0; t < keys; t += AT_LANES) {
    const int n = (int)MIN(AT_LANES, keys - t);
    const int64_t i = first + t;
    load_features(j, a->k, b * a->k_stride[0] + kv * a->k_stride[1] + i * a->k_stride[2], a->k_stride[2], n, rows, xt);
    at_transpose(xt, AT_LANES, phi, j->dp, j->dp, AT_LANES);
    for (int lane = 0; lane < n; lane++) {
      at_load_row(j->dtype, a->v, b * a->v_stride[0] + kv * a->v_stride[1] + (i + lane) * a->v_stride[2], v, a->dv, j->dvp);
      for (int64_t c = 0; c < j->dvp; c += AT_W)
        at_store(panels + (c / AT_LANES * AT_LANES + lane) * AT_LANES + c % AT_LANES, at_load(v + c));
      for (int64_t c = 0; c < a->d; c += 1) z[c] += phi[lane * j->dp + c];
    }
    for (int64_t p = 0; p < j->dvp / AT_LANES; p++)
      at_values(panels + p * AT_LANES * AT_LANES, phi, j->dp, j->dp, n, state + p * j->dp * AT_LANES);
  }
  at_v zeros = {0}; /* NaN from anything that is not finite */
  for (int64_t c = 0; c < j->size; c += AT_W) zeros += 0.0f * at_load(state + c);
  float zero = 0.0f;
  for (int i = 0; i < AT_W; i++) zero += zeros[i];
  j->finite[item] = zero == 0.0f;
  free(f);
}

INLINE int in_scope(const job *j, int8_t class) {
  return j->a->scope == EVERY || class == 0 || (class < 0 && j->a->scope == NONCRITICAL);
}

/* The sum of the states of one key-value head that a row of the map has in its scope, and of no other. */
static void sum_states(const job *j, const float *states, const int8_t *map, float *sum) {
  memset(sum, 0, (size_t)j->size * 4);
  for (int64_t i = 0; i < j->tn; i++, states += j->size) {
    if (map && !in_scope(j, map[i])) continue;
    for (int64_t c = 0; c < j->size; c += AT_W) at_store(sum + c, at_load(sum + c) + at_load(states + c));
  }
}

/* The same for up to AT_LANES rows of the map, one in a lane: a product with zeros and ones, for states that are finite.
 * w [tn, lanes] is scratch. */
static void sum_states_of_rows(const job *j, const float *states, const int8_t *map, int64_t rows, float *w, float *sums) {
  enum { COLUMNS = 64 };
  float acc[COLUMNS * AT_LANES] __attribute__((aligned(64)));
  for (int64_t i = 0; i < j->tn; i++)
    for (int64_t lane = 0; lane < AT_LANES; lane++)
      w[i * AT_LANES + lane] = lane < rows && in_scope(j, map[lane * j->tn + i]) ? 1.0f : 0.0f;
  for (int64_t c = 0; c < j->size; c += COLUMNS) {
    const int64_t columns = MIN(COLUMNS, j->size - c);
    memset(acc, 0, sizeof acc);
    at_values(w, states + c, j->size, columns, (int)j->tn, acc);
    at_transpose(acc, AT_LANES, sums + c, j->size, columns, AT_LANES);
  }
}

/* With every block in scope, all queries have the sum of all states, which then lies in the place of the first. */
static void total_item(void *ctx, int64_t item) {
  job *j = ctx;
  float *states = j->states + item * j->tn * j->size, *sum = eff_scratch((size_t)j->size * 4);
  if (!sum) {
    j->failed = 1;
    return;
  }
  sum_states(j, states, NULL, sum);
  memcpy(states, sum, (size_t)j->size * 4);
  free(sum);
}

/* One block of queries, from the sum of the states in its scope. */
static void attend(const job *j, int64_t head, int64_t block, const float *sum, float *scratch) {
  const args *a = j->a;
  const int64_t b = head / a->heads, h = head % a->heads, end = MIN((block + 1) * a->block_q, a->lq);
  float *rows = scratch, *xt = rows + AT_LANES * j->dp, *acc = xt + AT_LANES * j->dp, *out = acc + AT_LANES * j->dvp;
  const float *z = sum + j->dp * j->dvp;
  for (int64_t i = block * a->block_q; i < end; i += AT_LANES) {
    const int64_t n = MIN(AT_LANES, end - i);
    load_features(j, a->q, b * a->q_stride[0] + h * a->q_stride[1] + i * a->q_stride[2], a->q_stride[2], n, rows, xt);
    memset(acc, 0, (size_t)(AT_LANES * j->dvp) * 4);
    for (int64_t p = 0; p < j->dvp / AT_LANES; p++)
      at_values(xt, sum + p * j->dp * AT_LANES, AT_LANES, AT_LANES, (int)a->d, acc + p * AT_LANES * AT_LANES);
    for (int u = 0; u < AT_V; u++) {
      at_v weight = {0};
      for (int64_t c = 0; c < a->d; c++) weight += at_load(xt + c * AT_LANES + u * AT_W) * z[c];
      const at_v inverse = 1.0f / at_select((at_i)(weight == (at_v){0}), at_splat(1.0f), weight);
      for (int64_t c = 0; c < j->dvp; c++) {
        float *at = acc + c * AT_LANES + u * AT_W;
        at_store(at, at_load(at) * inverse);
      }
    }
    at_transpose(acc, AT_LANES, out, j->dvp, j->dvp, AT_LANES);
    for (int64_t lane = 0; lane < n; lane++)
      eff_store_row(j->dtype, out + lane * j->dvp, eff_at_mut(a->out, j->dtype, (head * a->lq + i + lane) * a->dv), a->dv);
  }
}

/* Some blocks of queries of one head. */
static void query_item(void *ctx, int64_t item) {
  job *j = ctx;
  const args *a = j->a;
  const int64_t group = a->heads / a->kv_heads, items = (j->tm + j->together - 1) / j->together;
  const int64_t first = item % items * j->together, blocks = MIN(j->together, j->tm - first);
  const int64_t kv = item / items / group, head = j->first * group + item / items;
  const float *states = j->states + kv * j->tn * j->size;
  const int8_t *map = a->map + (head * j->tm + first) * j->tn;
  const int64_t sums = a->scope == EVERY ? 0 : AT_LANES * (j->size + j->tn);
  float *f = eff_scratch((size_t)(sums + AT_LANES * (2 * j->dp + 2 * j->dvp)) * 4);
  if (!f) {
    j->failed = 1;
    return;
  }
  int finite = 1;
  for (int64_t i = 0; i < j->tn; i++) finite &= j->finite[kv * j->tn + i];
  if (sums && finite) sum_states_of_rows(j, states, map, blocks, f + AT_LANES * j->size, f);
  for (int64_t m = 0; m < blocks; m++) {
    float *sum = f + m * j->size;
    if (sums && !finite) sum_states(j, states, map + m * j->tn, sum);
    attend(j, head, first + m, sums ? sum : states, f + sums);
  }
  free(f);
}

/* Returns 0, or 1 when memory ran out. */
KERNEL(int, eff_linear_attention, args) {
  job j = {.a = a, .dtype = (eff_dtype)a->dtype, .dp = eff_round_up(a->d, AT_LANES), .dvp = eff_round_up(a->dv, AT_LANES)};
  j.size = j.dp * j.dvp + j.dp;
  j.tm = (a->lq + a->block_q - 1) / a->block_q, j.tn = (a->lk + a->block_k - 1) / a->block_k;
  const int64_t all = a->batch * a->kv_heads, group = a->heads / a->kv_heads;
  const int64_t step = MIN(all, MAX(a->threads, STATES / (j.tn * j.size)));
  j.together = MAX(1, MIN(AT_LANES, step * group * j.tm / (4 * a->threads))); /* four items for each thread, if there are */
  j.states = eff_scratch((size_t)(step * j.tn * j.size) * 4), j.finite = eff_scratch((size_t)(step * j.tn));
  if (!j.states || !j.finite) {
    free(j.states), free(j.finite);
    return 1;
  }
  for (; j.first < all && !j.failed; j.first += step) {
    const int64_t heads = MIN(step, all - j.first);
    eff_parallel_for(heads * j.tn, (int)a->threads, state_item, &j);
    if (a->scope == EVERY) eff_parallel_for(heads, (int)a->threads, total_item, &j);
    eff_parallel_for(heads * group * ((j.tm + j.together - 1) / j.together), (int)a->threads, query_item, &j);
  }
  free(j.states), free(j.finite);
  return j.failed;
}
