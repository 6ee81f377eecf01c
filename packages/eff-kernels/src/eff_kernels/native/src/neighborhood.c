/* Neighborhood attention, forward: online softmax over chunks of a tile's keys. */
#include "neighborhood.h"

#define TILES 16 /* of an item of work */

static void tile_forward(na_tile *t) {
  const na_plan *p = t->p;
  const na_args *a = p->a;
  at_v m[AT_V], l[AT_V]; /* the largest score so far, and the sum of the exponentials */
  for (int u = 0; u < AT_V; u++) m[u] = at_splat(-INFINITY), l[u] = (at_v){0};
  memset(t->acc, 0, (size_t)(p->dvp * AT_LANES) * 4);
  na_lanes_load(t, a->q, 1, a->d, p->dp, (float)a->scale, t->qr);
  at_transpose(t->qr, p->dp, t->qt, AT_LANES, AT_LANES, p->dp);
  int first = 1;
  for (int n; (n = na_next_keys(t)); first = 0) {
    at_scores(t->k, p->dp, t->qt, a->d, n, t->s);
    for (int u = 0; u < AT_V; u++) {
      float *s = t->s + u * AT_W;
      at_v best = m[u];
      for (int i = 0; i < n; i++) {
        const at_v x = at_keep(t->mask[i], u, at_load(s + i * AT_LANES), at_splat(-INFINITY));
        at_store(s + i * AT_LANES, x);
        best = at_max(x, best);
      }
      /* A lane that has seen no key yet: anything finite will do. */
      const at_v base = at_select((at_i)(best == at_splat(-INFINITY)), at_splat(0.0f), best);
      if (!first) {
        const at_v alpha = at_exp(m[u] - base);
        l[u] *= alpha;
        for (int64_t c = 0; c < p->dvp; c++)
          at_store(t->acc + c * AT_LANES + u * AT_W, at_load(t->acc + c * AT_LANES + u * AT_W) * alpha);
      }
      at_v total = {0};
      for (int i = 0; i < n; i++) {
        const at_v e = at_exp(at_load(s + i * AT_LANES) - base);
        at_store(s + i * AT_LANES, e);
        total += e;
      }
      m[u] = best, l[u] += total;
    }
    at_values(t->s, t->v, p->dvp, p->dvp, n, t->acc);
  }
  float lse[AT_LANES], weight[AT_LANES];
  for (int u = 0; u < AT_V; u++) {
    at_store(weight + u * AT_W, l[u]), at_store(lse + u * AT_W, m[u]);
    const at_v inverse = 1.0f / l[u];
    for (int64_t c = 0; c < p->dvp; c++)
      at_store(t->acc + c * AT_LANES + u * AT_W, at_load(t->acc + c * AT_LANES + u * AT_W) * inverse);
  }
  at_transpose(t->acc, AT_LANES, t->gr, p->dvp, p->dvp, AT_LANES);
  const int64_t tokens = a->length[0] * a->length[1] * a->length[2];
  for (int lane = 0; lane < AT_LANES; lane++) {
    if (t->token[lane] < 0) continue;
    const int64_t at = (t->b * tokens + t->token[lane]) * a->heads + t->head[lane];
    eff_store_row((eff_dtype)a->dtype, t->gr + lane * p->dvp, eff_at_mut(a->out, (eff_dtype)a->dtype, at * a->dv), a->dv);
    a->lse[at] = lse[lane] + logf(weight[lane]);
  }
}

typedef struct {
  na_plan plan;
  int64_t blocks;
  int failed;
} job;

static void forward_item(void *ctx, int64_t item) {
  job *j = ctx;
  const na_plan *p = &j->plan;
  na_tile t;
  if (na_tile_new(&t, p)) {
    j->failed = 1;
    return;
  }
  const int64_t block = item % j->blocks, head = item / j->blocks;
  for (int64_t i = block * TILES; i < MIN(p->tiles, (block + 1) * TILES); i++) {
    na_tile_set(&t, head / p->a->kv_heads, head % p->a->kv_heads, i);
    tile_forward(&t);
  }
  free(t.memory);
}

/* Returns 0, or 1 when memory ran out. */
KERNEL(int, eff_neighborhood, na_args) {
  job j = {.failed = 0};
  if (na_plan_make(&j.plan, a)) {
    na_plan_free(&j.plan);
    return 1;
  }
  j.blocks = (j.plan.tiles + TILES - 1) / TILES;
  eff_parallel_for(a->batch * a->kv_heads * j.blocks, (int)a->threads, forward_item, &j);
  na_plan_free(&j.plan);
  return j.failed;
}
