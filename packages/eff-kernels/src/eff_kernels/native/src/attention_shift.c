/* The output of causal attention, changed as if the weights of some keys had been: o' = f o + sum of (w' - f w) v over these keys.
 *
 * The log-sum-exp of each query is known, so that a weight takes a score and an exponential. Sixteen queries are taken at a
 * time, one in each lane; of the keys only those that are changed, and all others only where f o would have lost its digits. */
#include "attention_tile.h"

typedef struct {
  const void *q; /* [batch, heads, queries, d], the last dimension contiguous, as in all that follow */
  int64_t q_batch, q_head, q_row;
  const void *k; /* [batch, kv_heads, keys, d] */
  int64_t k_batch, k_head, k_row;
  const void *v; /* [batch, kv_heads, keys, dv] */
  int64_t v_batch, v_head, v_row;
  void *out; /* [batch, heads, queries, dv], changed in place */
  int64_t o_batch, o_head, o_row;
  const float *lse; /* [batch, heads, queries] */
  int64_t l_batch, l_head, l_row;
  int64_t dtype, batch, heads, kv_heads, queries, keys, d, dv;
  const int64_t *which; /* [chosen] query heads */
  int64_t chosen;
  const int64_t *at; /* [batch, chosen, most], or [batch, most] for all heads: the keys that are changed, ascending */
  const int64_t *count; /* how many of them are in each list */
  int64_t most, apart; /* whether heads have lists of their own */
  double scale;
  int64_t threads;
  double beta; /* scaled: factor of the keys; the others of a row get what they lose */
  const uint8_t *kind; /* moved, NULL otherwise: [batch, most], 1 for a receiver, 2 for a giver of the picture, 3 for another one */
  const uint8_t *asked; /* [batch, queries] */
  const int64_t *images; /* [batch]: keys of pictures */
  double share, rho, least; /* of givers that moves; which heads are changed */
  int64_t by_sinks; /* how rho is meant */
  double *moved; /* [batch, chosen, 2]: queries that were changed, and the weight that moved */
} args;

typedef struct {
  const args *a;
  char *scratch;
  int64_t room;
} job;

typedef struct {
  float *s, *x, *xt, *acc, *block;
  int64_t d, dv; /* features, with zeros behind them up to a multiple of 16 */
  at_v lse[AT_V];
} tile;

INLINE at_v lanes_from(int u) {
  at_v v;
  for (int l = 0; l < AT_W; l++) v[l] = (float)(u * AT_W + l);
  return v;
}

/* Weights of n keys, whose scores lie in s; `place` tells which lanes are behind a key: those of its number and more. */
INLINE void weigh(const args *a, const tile *t, const int64_t *at, int64_t from, int64_t n, int64_t padded, int64_t first) {
  for (int64_t c = 0; c < padded; c++) {
    const float seen = c < n ? (float)((at ? at[c] : from + c) - first) : 1e9f;
#pragma GCC unroll 4
    for (int u = 0; u < AT_V; u++) {
      float *p = t->s + c * AT_LANES + u * AT_W;
      const at_v w = at_exp(at_load(p) * (float)a->scale - t->lse[u]);
      at_store(p, at_select((at_i)(lanes_from(u) >= at_splat(seen)), w, (at_v){0}));
    }
  }
}

/* The output of queries that have next to nothing but scaled keys, from all keys: their share of the rest is computed, not 1 - mass.
 * Those whose others have no weight, and cannot take any, are not to be changed. */
static void whole_rows(const args *a, const tile *t, const int64_t *at, int64_t n, int64_t first, int64_t end, int64_t key, int64_t value,
                       const at_v *mass, const at_v *poor, at_v *change, float *others) {
  const eff_dtype dtype = (eff_dtype)a->dtype;
  float *rows = t->block, *sinks = others + t->dv * AT_LANES;
  at_v rest[AT_V];
  for (int u = 0; u < AT_V; u++) rest[u] = (at_v){0};
  memset(others, 0, (size_t)(2 * t->dv * AT_LANES) * 4);
  int64_t next = 0;
  for (int64_t i = 0; i < end; i += 64) {
    const int64_t m = MIN(64, end - i), padded = eff_round_up(m, 4);
    for (int64_t y = 0; y < padded; y++)
      if (y < m)
        at_load_row(dtype, a->k, key + (i + y) * a->k_row, rows + y * t->d, a->d, t->d);
      else
        memset(rows + y * t->d, 0, (size_t)t->d * 4);
    at_scores(rows, t->d, t->xt, t->d, (int)padded, t->s);
    weigh(a, t, NULL, i, m, padded, first);
    for (int64_t y = 0; y < m; y++) {
      at_load_row(dtype, a->v, value + (i + y) * a->v_row, rows, a->dv, t->dv);
      const int is_sink = next < n && at[next] == i + y;
      next += is_sink;
      for (int u = 0; u < AT_V && !is_sink; u++) rest[u] += at_load(t->s + y * AT_LANES + u * AT_W);
      at_values(t->s + y * AT_LANES, rows, t->dv, t->dv, 1, is_sink ? sinks : others);
    }
  }
  for (int u = 0; u < AT_V; u++) {
    const at_i enough = (at_i)(rest[u] > at_splat(1.17549435e-38f));
    const at_v gain = 1.0f + (1.0f - (float)a->beta) * mass[u] / at_select(enough, rest[u], at_splat(1.0f));
    change[u] = at_select(enough | (at_i)(poor[u] == (at_v){0}), change[u], (at_v){0});
    for (int64_t c = 0; c < t->dv; c++) {
      const int64_t p = c * AT_LANES + u * AT_W;
      at_store(others + p, at_load(others + p) * gain + at_load(sinks + p) * (float)a->beta);
    }
  }
}

/* One head of one sequence. */
static void shift(void *ctx, int64_t item) {
  const job *j = ctx;
  const args *a = j->a;
  const eff_dtype dtype = (eff_dtype)a->dtype;
  const int64_t b = item / a->chosen, head = a->which[item % a->chosen], kv = head / (a->heads / a->kv_heads);
  const int64_t d = eff_round_up(a->d, 16), dv = eff_round_up(a->dv, 16);
  const int64_t list = a->apart ? item : b, n = a->count[list], gap = a->keys - a->queries;
  if (!n) return;
  const int64_t *at = a->at + list * a->most;
  const uint8_t *kind = a->kind ? a->kind + b * a->most : NULL, *asked = a->kind ? a->asked + b * a->queries : NULL;
  const int64_t query = b * a->q_batch + head * a->q_head, key = b * a->k_batch + kv * a->k_head, value = b * a->v_batch + kv * a->v_head;
  const int64_t to = b * a->o_batch + head * a->o_head, padded = eff_round_up(MAX(n, 64), 4), wide = MAX(d, dv);
  const float *lse = a->lse + b * a->l_batch + head * a->l_head;
  char *scratch = j->scratch + item * j->room;
  tile t = {.d = d, .dv = dv};
  t.s = eff_take(&scratch, (size_t)(padded * AT_LANES) * 4), t.x = eff_take(&scratch, (size_t)(wide * AT_LANES) * 4);
  t.xt = eff_take(&scratch, (size_t)(d * AT_LANES) * 4), t.acc = eff_take(&scratch, (size_t)(dv * AT_LANES) * 4);
  t.block = eff_take(&scratch, (size_t)(64 * wide) * 4);
  float *others = eff_take(&scratch, (size_t)(2 * dv * AT_LANES) * 4);
  float *keys = eff_take(&scratch, (size_t)(padded * d) * 4), *values = eff_take(&scratch, (size_t)(padded * dv) * 4);
  memset(keys, 0, (size_t)(padded * d) * 4);
  for (int64_t c = 0; c < n; c++) {
    at_load_row(dtype, a->k, key + at[c] * a->k_row, keys + c * d, a->d, d);
    at_load_row(dtype, a->v, value + at[c] * a->v_row, values + c * dv, a->dv, dv);
  }
  memset(values + n * dv, 0, (size_t)((padded - n) * dv) * 4);
  const at_v near = at_splat(dtype == EFF_F32 ? 0.1f : 0.25f), tiny = at_splat(1.17549435e-38f), zero = {0};
  double queries = 0.0, weight = 0.0;
  int64_t m = 0; /* keys of the list that the last query of a tile sees */
  for (int64_t start = MAX(0, at[0] - gap); start < a->queries; start += AT_LANES) {
    const int64_t lanes = MIN(AT_LANES, a->queries - start), first = gap + start; /* the last key that lane 0 sees */
    int any = !asked;
    for (int64_t l = 0; asked && l < lanes; l++) any |= asked[start + l];
    while (m < n && at[m] < first + lanes) m++;
    if (!any) continue;
    memset(t.x, 0, (size_t)(d * AT_LANES) * 4);
    for (int64_t l = 0; l < lanes; l++) at_load_row(dtype, a->q, query + (start + l) * a->q_row, t.x + l * d, a->d, d);
    at_transpose(t.x, d, t.xt, AT_LANES, AT_LANES, d);
    for (int u = 0; u < AT_V; u++)
      for (int l = 0; l < AT_W; l++) {
        const int64_t lane = u * AT_W + l;
        t.lse[u][l] = lane < lanes ? lse[(start + lane) * a->l_row] : INFINITY;
      }
    const int64_t mp = eff_round_up(m, 4);
    at_scores(keys, d, t.xt, d, (int)mp, t.s);
    weigh(a, &t, at, 0, m, mp, first);
    at_v factor[AT_V], change[AT_V]; /* of the host's output; whether a lane is changed, as 1 or 0 */
    at_v poor[AT_V], total[AT_V];
    int any_poor = 0, any_change = 0;
    memset(t.acc, 0, (size_t)(dv * AT_LANES) * 4);
#pragma GCC unroll 4
    for (int u = 0; u < AT_V; u++) {
      float *s = t.s + u * AT_W;
      factor[u] = at_splat(1.0f), poor[u] = total[u] = zero;
      if (!kind) {
        at_v mass = zero;
        for (int64_t c = 0; c < mp; c++) mass += at_load(s + c * AT_LANES);
        const at_v rest = 1.0f - mass;
        change[u] = at_select((at_i)(mass > zero), at_splat(1.0f), zero);
        poor[u] = at_select((at_i)(rest < near), change[u], zero);
        factor[u] = 1.0f + (1.0f - (float)a->beta) * mass / at_max(rest, at_splat(1e-6f));
        for (int64_t c = 0; c < mp; c++) at_store(s + c * AT_LANES, at_load(s + c * AT_LANES) * ((float)a->beta - factor[u]));
        total[u] = mass;
      } else {
        at_v good = zero, bad = zero, given = zero;
        for (int64_t c = 0; c < m; c++) {
          const at_v w = at_load(s + c * AT_LANES);
          if (kind[c] == 1) good += w;
          if (kind[c] == 2) bad += w;
          if (kind[c] >= 2) given += w;
        }
        const at_v mass = good + bad;
        const at_i looks = a->by_sinks ? (at_i)(bad <= (float)a->rho * (mass + 1e-6f * (float)a->images[b])) : (at_i)(good >= (float)a->rho * mass);
        at_v is_asked;
        for (int l = 0; l < AT_W; l++) is_asked[l] = u * AT_W + l < lanes && asked[start + u * AT_W + l] ? 1.0f : 0.0f;
        const at_i select = looks & (at_i)(mass >= at_splat((float)a->least)) & (at_i)(good > zero) & (at_i)(is_asked > zero);
        for (int l = 0; l < AT_W; l++)
          if (select[l]) queries += 1.0, weight += (double)(given[l] * (float)a->share);
        const at_i enough = select & (at_i)(good > tiny);
        change[u] = at_select(enough, at_splat(1.0f), zero);
        const at_v gain = at_select(enough, (float)a->share * given / at_select(enough, good, at_splat(1.0f)), zero);
        const at_v loss = at_select(enough, at_splat(-(float)a->share), zero);
        for (int64_t c = 0; c < m; c++) at_store(s + c * AT_LANES, at_load(s + c * AT_LANES) * (kind[c] == 1 ? gain : loss));
      }
      for (int l = 0; l < AT_W; l++) any_poor |= poor[u][l] > 0.0f, any_change |= change[u][l] > 0.0f;
    }
    if (!any_change) continue;
    at_values(t.s, values, dv, dv, (int)m, t.acc);
    if (any_poor) {
      whole_rows(a, &t, at, m, first, MIN(a->keys, first + lanes), key, value, total, poor, change, others);
      for (int u = 0; u < AT_V; u++)
        for (int64_t c = 0; c < dv; c++) {
          float *p = t.acc + c * AT_LANES + u * AT_W;
          at_store(p, at_select((at_i)(poor[u] > zero), at_load(others + c * AT_LANES + u * AT_W), at_load(p)));
        }
    }
    at_transpose(t.acc, AT_LANES, t.block, dv, dv, AT_LANES);
    for (int64_t l = 0; l < lanes; l++) {
      const int u = (int)(l / AT_W), at_lane = (int)(l % AT_W);
      if (change[u][at_lane] == 0.0f) continue;
      const float f = poor[u][at_lane] > 0.0f ? 0.0f : factor[u][at_lane], *more = t.block + l * dv;
      void *row = eff_at_mut(a->out, dtype, to + (start + l) * a->o_row);
      eff_load_row(dtype, row, t.x, a->dv);
      if (f == 0.0f)
        memcpy(t.x, more, (size_t)a->dv * 4);
      else
        for (int64_t c = 0; c < a->dv; c++) t.x[c] = t.x[c] * f + more[c];
      eff_store_row(dtype, t.x, row, a->dv);
    }
  }
  if (kind) a->moved[item * 2] = queries, a->moved[item * 2 + 1] = weight;
}

/* Query i sees keys 0 .. keys - queries + i. Returns 0, or 1 when memory ran out. */
KERNEL(int, eff_attention_shift, args) {
  const int64_t d = eff_round_up(a->d, 16), dv = eff_round_up(a->dv, 16);
  const int64_t items = a->batch * a->chosen, wide = MAX(d, dv), padded = eff_round_up(MAX(a->most, 64), 4);
  if (!items || !a->queries) return 0;
  job j = {.a = a};
  j.room = (padded * (AT_LANES + d + dv) + wide * (AT_LANES + 64) + (d + 3 * dv) * AT_LANES) * 4 + 8 * 64;
  j.room = eff_round_up(j.room, 64);
  j.scratch = eff_scratch((size_t)(items * j.room));
  if (!j.scratch) return 1;
  eff_parallel_for(items, (int)a->threads, shift, &j);
  free(j.scratch);
  return 0;
}
