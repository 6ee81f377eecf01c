/* Neighborhood attention, backward: one pass over the tiles of the forward.
 *
 * Weights are computed again from the lse. With delta = rowsum(dO O) - dLSE: dS = P (dO V^T - delta), dQ = scale dS K; and a key
 * gathers dV += P^T dO and dK += dS^T (scale Q) from all tiles that see it. The key sums of a head stay in one buffer, which one
 * thread fills in order; where there are fewer heads than SLABS, the map is cut along one axis into slabs with a buffer each,
 * added up in order afterwards. The cut depends on the shape alone, so that the bits do not depend on the threads. */
#include "neighborhood.h"

#define SLABS 16
#define ROWS 256 /* rows of the sums that an item of the last pass stores */

typedef struct {
  int64_t tile_from, tile_to;
  int64_t row_from, row_to; /* tokens whose keys it may see; additional keys follow in its buffer */
  int64_t at;               /* first row in the buffer of a head */
} slab;

typedef struct {
  na_plan plan;
  slab slabs[SLABS];
  int64_t count, rows; /* slabs, and rows of their buffers together */
  int64_t width;       /* dp + dvp */
  int64_t tokens;
  float *sums;
  int failed;
} job;

static void cut_slabs(job *j) {
  const na_plan *p = &j->plan;
  const na_args *a = p->a;
  int axis = 0;
  while (axis < 2 && p->count[axis] == 1) axis++;
  int64_t inner = 1, tiles = p->count[3], flat = 1;
  for (int i = axis + 1; i < 3; i++) inner *= a->length[i], tiles *= p->count[i];
  for (int i = 0; i < axis; i++) flat &= a->length[i] == 1;
  j->count = MAX(1, MIN(MIN(SLABS / (a->batch * a->kv_heads), p->count[axis]), SLABS));
  j->rows = 0;
  for (int64_t s = 0; s < j->count; s++) {
    const int64_t from = s * p->count[axis] / j->count, to = (s + 1) * p->count[axis] / j->count;
    int64_t lo = a->length[axis], hi = -1;
    for (int64_t i = from; i < to; i++) {
      const na_span *n = &p->spans[axis][i];
      lo = MIN(lo, n->lo * a->dilation[axis] + n->group), hi = MAX(hi, n->hi * a->dilation[axis] + n->group);
    }
    slab *x = &j->slabs[s];
    *x = (slab){from * tiles, to * tiles, flat ? lo * inner : 0, flat ? (hi + 1) * inner : j->tokens, j->rows};
    j->rows += x->row_to - x->row_from + a->extra;
  }
}

static void tile_backward(na_tile *t, const slab *x, int64_t tokens, float *sums, float *unused) {
  const na_plan *p = t->p;
  const na_args *a = p->a;
  const int64_t width = p->dp + p->dvp, dp = p->dp, dvp = p->dvp;
  float delta[AT_LANES], lse[AT_LANES];
  na_lanes_load(t, a->q, 1, a->d, dp, (float)a->scale, t->qr);
  at_transpose(t->qr, dp, t->qt, AT_LANES, AT_LANES, dp);
  na_lanes_load(t, a->grad, 0, a->dv, dvp, 1.0f, t->gr);
  na_lanes_load(t, a->out, 0, a->dv, dvp, 1.0f, t->acc);
  at_transpose(t->gr, dvp, t->gt, AT_LANES, AT_LANES, dvp);
  for (int lane = 0; lane < AT_LANES; lane++) {
    const int64_t at = (t->b * tokens + t->token[lane]) * a->heads + t->head[lane];
    lse[lane] = t->token[lane] < 0 ? 0.0f : a->lse[at];
    at_v dot = {0};
    for (int64_t c = 0; c < dvp; c += AT_W) dot += at_load(t->gr + lane * dvp + c) * at_load(t->acc + lane * dvp + c);
    delta[lane] = t->token[lane] < 0 ? 0.0f : -a->grad_lse[at];
    for (int i = 0; i < AT_W; i++) delta[lane] += dot[i];
  }
  memset(t->acc, 0, (size_t)(dp * AT_LANES) * 4);
  for (int n; (n = na_next_keys(t));) {
    at_scores(t->k, dp, t->qt, a->d, n, t->s);
    at_scores(t->v, dvp, t->gt, a->dv, n, t->s2);
    for (int u = 0; u < AT_V; u++) {
      const at_v base = at_load(lse + u * AT_W), less = at_load(delta + u * AT_W);
      float *s = t->s + u * AT_W, *ds = t->s2 + u * AT_W;
      for (int i = 0; i < n; i++) {
        const at_v w = at_keep(t->mask[i], u, at_exp(at_load(s + i * AT_LANES) - base), at_splat(0.0f));
        at_store(s + i * AT_LANES, w);
        at_store(ds + i * AT_LANES, at_keep(t->mask[i], u, w * (at_load(ds + i * AT_LANES) - less), at_splat(0.0f)));
      }
    }
    at_values(t->s2, t->k, dp, dp, n, t->acc);
    for (int i = 0; i < n; i += 4) {
      float *to_k[4], *to_v[4];
      for (int k = 0; k < 4; k++) {
        const int64_t row = t->row[i + k];
        const int64_t at = row < tokens ? row - x->row_from : row - tokens + x->row_to - x->row_from;
        to_k[k] = row < 0 ? unused + k * width : sums + at * width;
        to_v[k] = to_k[k] + dp;
      }
      at_spread(t->s2 + i * AT_LANES, t->qr, dp, to_k);
      at_spread(t->s + i * AT_LANES, t->gr, dvp, to_v);
    }
  }
  at_transpose(t->acc, AT_LANES, t->qr, dp, dp, AT_LANES);
  for (int lane = 0; lane < AT_LANES; lane++) {
    if (t->token[lane] < 0) continue;
    float *row = t->qr + lane * dp;
    for (int64_t c = 0; c < dp; c++) row[c] *= (float)a->scale;
    const int64_t at = (t->b * tokens + t->token[lane]) * a->heads + t->head[lane];
    eff_store_row((eff_dtype)a->dtype, row, eff_at_mut(a->dq, (eff_dtype)a->dtype, at * a->d), a->d);
  }
}

/* Sums the slabs' rows from .. to of one head, in order, into the gradients; the rows after the tokens are additional keys. */
static void store_rows(const job *j, int64_t head, const float *sums, int64_t from, int64_t to) {
  const na_args *a = j->plan.a;
  const eff_dtype dtype = (eff_dtype)a->dtype;
  float total[j->width];
  for (int64_t row = from; row < to; row++) {
    const int is_extra = row >= j->tokens;
    const float *first = NULL;
    for (int64_t s = 0; s < j->count; s++) {
      const slab *x = &j->slabs[s];
      if (!is_extra && (row < x->row_from || row >= x->row_to)) continue;
      const float *one = sums + (x->at + (is_extra ? row - j->tokens + x->row_to : row) - x->row_from) * j->width;
      if (!first) {
        first = one;
      } else {
        for (int64_t c = 0; c < j->width; c++) total[c] = first[c] + one[c];
        first = total;
      }
    }
    const int64_t b = head / a->kv_heads, kv = head % a->kv_heads;
    const int64_t at = is_extra ? (b * a->extra + row - j->tokens) * a->kv_heads + kv : (b * j->tokens + row) * a->kv_heads + kv;
    void *dk = is_extra ? a->d_extra_k : a->dk, *dv = is_extra ? a->d_extra_v : a->dv_out;
    eff_store_row(dtype, first, eff_at_mut(dk, dtype, at * a->d), a->d);
    eff_store_row(dtype, first + j->plan.dp, eff_at_mut(dv, dtype, at * a->dv), a->dv);
  }
}

static void backward_item(void *ctx, int64_t item) {
  job *j = ctx;
  const na_args *a = j->plan.a;
  const int64_t head = item / j->count;
  const slab *x = &j->slabs[item % j->count];
  const int64_t rows = x->row_to - x->row_from + a->extra;
  const int alone = j->count == 1; /* no other slab to add: the buffer lives as long as the item */
  float *own = eff_scratch((size_t)(((alone ? rows : 0) + 4) * j->width) * 4);
  float *sums = alone ? own + 4 * j->width : j->sums + (head * j->rows + x->at) * j->width;
  na_tile t;
  if (!own || na_tile_new(&t, &j->plan)) {
    j->failed = 1;
    free(own);
    return;
  }
  memset(own, 0, (size_t)(4 * j->width) * 4);
  memset(sums, 0, (size_t)(rows * j->width) * 4);
  for (int64_t i = x->tile_from; i < x->tile_to; i++) {
    na_tile_set(&t, head / a->kv_heads, head % a->kv_heads, i);
    tile_backward(&t, x, j->tokens, sums, own);
  }
  if (alone) store_rows(j, head, sums, 0, j->tokens + a->extra);
  free(t.memory);
  free(own);
}

static void store_item(void *ctx, int64_t item) {
  const job *j = ctx;
  const int64_t all = j->tokens + j->plan.a->extra, blocks = (all + ROWS - 1) / ROWS;
  const int64_t head = item / blocks, from = item % blocks * ROWS;
  store_rows(j, head, j->sums + head * j->rows * j->width, from, MIN(all, from + ROWS));
}

/* All gradients, contiguous. Returns 0, or 1 when memory ran out. */
KERNEL(int, eff_neighborhood_backward, na_args) {
  job j = {.failed = 0, .tokens = a->length[0] * a->length[1] * a->length[2]};
  const int64_t heads = a->batch * a->kv_heads;
  if (heads == 0) return 0;
  if (na_plan_make(&j.plan, a)) {
    na_plan_free(&j.plan);
    return 1;
  }
  j.width = j.plan.dp + j.plan.dvp;
  cut_slabs(&j);
  if (j.count > 1 && !(j.sums = eff_scratch((size_t)(heads * j.rows * j.width) * 4))) j.failed = 1;
  if (!j.failed) eff_parallel_for(heads * j.count, (int)a->threads, backward_item, &j);
  if (!j.failed && j.count > 1)
    eff_parallel_for(heads * ((j.tokens + a->extra + ROWS - 1) / ROWS), (int)a->threads, store_item, &j);
  free(j.sums);
  na_plan_free(&j.plan);
  return j.failed;
}
