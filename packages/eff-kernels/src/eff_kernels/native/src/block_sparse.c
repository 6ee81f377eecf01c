/* Attention over chosen blocks of keys, forward and backward (the sparse branch of arXiv 2509.24006).
 *
 * A block of queries walks over the blocks of keys that its row of the map holds, tile by tile, with an online softmax; blocks
 * that are not chosen are never touched. Keys and values are read where they lie if they are floats and fill vectors; other ones
 * are brought into padded rows of floats once. */
#include "attention_tile.h"

typedef struct {
  int64_t batch, heads, kv_heads, lq, lk, d, dv, block_q, block_k;
  const void *q, *k, *v;
  const int8_t *map;                             /* [batch, heads, blocks of queries, blocks of keys], chosen where positive */
  int64_t q_stride[3], k_stride[3], v_stride[3]; /* batch, head, token */
  double scale;
  int64_t dtype, threads;
  void *out;  /* [batch, heads, lq, dv] */
  float *lse; /* [batch, heads, lq] */
  const void *grad;
  const float *grad_lse;
  void *dq, *dk, *dv_out; /* contiguous */
} args;

typedef struct {
  const args *a;
  eff_dtype dtype;
  int64_t dp, dvp;     /* d and dv rounded up to lanes */
  int64_t rows;        /* of a block of keys, rounded up to 4 */
  int64_t tm, tn;      /* blocks of queries, of keys */
  int64_t tiles, side; /* tiles of a block of queries; rows of the wider of dp and dvp */
  int64_t direct;      /* blocks of keys of each head, from the first, that are read where they lie */
  float *k, *v;        /* the others: [batch, kv_heads, tn - direct, rows, dp or dvp], zeros in the padding */
  int failed;
} job;

static int job_new(job *j, const args *a) {
  *j = (job){.a = a, .dtype = (eff_dtype)a->dtype, .dp = eff_round_up(a->d, 16), .dvp = eff_round_up(a->dv, 16)};
  j->rows = eff_round_up(a->block_k, 4);
  j->tm = (a->lq + a->block_q - 1) / a->block_q, j->tn = (a->lk + a->block_k - 1) / a->block_k;
  j->tiles = (a->block_q + AT_LANES - 1) / AT_LANES, j->side = MAX(j->dp, j->dvp);
  const int whole = j->dtype == EFF_F32 && a->d == j->dp && a->dv == j->dvp && a->block_k == j->rows;
  j->direct = whole ? a->lk / a->block_k : 0;
  const int64_t keys = a->batch * a->kv_heads * (j->tn - j->direct) * j->rows;
  j->k = eff_scratch((size_t)(keys * (j->dp + j->dvp)) * 4);
  j->v = j->k + keys * j->dp;
  return !j->k;
}

static void pack_item(void *ctx, int64_t item) {
  const job *j = ctx;
  const args *a = j->a;
  const int64_t packed = j->tn - j->direct, head = item / packed, b = head / a->kv_heads, kv = head % a->kv_heads;
  const int64_t first = (j->direct + item % packed) * a->block_k;
  float *k = j->k + item * j->rows * j->dp, *v = j->v + item * j->rows * j->dvp;
  for (int64_t r = 0; r < j->rows; r++, k += j->dp, v += j->dvp) {
    const int64_t i = first + r;
    if (r >= a->block_k || i >= a->lk) {
      memset(k, 0, (size_t)j->dp * 4), memset(v, 0, (size_t)j->dvp * 4);
      continue;
    }
    at_load_row(j->dtype, a->k, b * a->k_stride[0] + kv * a->k_stride[1] + i * a->k_stride[2], k, a->d, j->dp);
    at_load_row(j->dtype, a->v, b * a->v_stride[0] + kv * a->v_stride[1] + i * a->v_stride[2], v, a->dv, j->dvp);
  }
}

typedef struct {
  const float *k, *v;
  int64_t k_stride, v_stride, count;
} key_block;

INLINE key_block keys_of(const job *j, int64_t head, int64_t n) {
  const args *a = j->a;
  const int64_t first = n * a->block_k, count = MIN(a->block_k, a->lk - first);
  if (n < j->direct) {
    const int64_t b = head / a->kv_heads, kv = head % a->kv_heads;
    return (key_block){(const float *)a->k + b * a->k_stride[0] + kv * a->k_stride[1] + first * a->k_stride[2],
                       (const float *)a->v + b * a->v_stride[0] + kv * a->v_stride[1] + first * a->v_stride[2],
                       a->k_stride[2], a->v_stride[2], count};
  }
  const int64_t at = (head * (j->tn - j->direct) + n - j->direct) * j->rows;
  return (key_block){j->k + at * j->dp, j->v + at * j->dvp, j->dp, j->dvp, count};
}

/* n rows of up to AT_LANES tokens, from a stride, scaled; zeros after them. */
static void load_rows(const job *j, const void *src, int64_t at, int64_t stride, int64_t n, int64_t d, int64_t dp, float scale,
                      float *rows) {
  for (int64_t lane = 0; lane < AT_LANES; lane++, rows += dp) {
    if (lane >= n) {
      memset(rows, 0, (size_t)dp * 4);
      continue;
    }
    at_load_row(j->dtype, src, at + lane * stride, rows, d, dp);
    for (int64_t c = 0; c < dp; c++) rows[c] *= scale;
  }
}

typedef struct {
  at_v m[AT_V], l[AT_V]; /* the largest score so far, and the sum of the exponentials */
} running;

/* One block of keys into the running softmax of a tile. */
static void attend(const job *j, key_block x, const float *qt, float *s, float *acc, running *r) {
  const int n = (int)eff_round_up(x.count, 4);
  at_scores(x.k, x.k_stride, qt, j->a->d, n, s);
  for (int64_t i = x.count; i < n; i++)
    for (int u = 0; u < AT_V; u++) at_store(s + i * AT_LANES + u * AT_W, at_splat(-INFINITY));
  for (int u = 0; u < AT_V; u++) {
    float *column = s + u * AT_W;
    at_v some[4]; /* chains that do not wait for one another */
#pragma GCC unroll 4
    for (int c = 0; c < 4; c++) some[c] = r->m[u];
    for (int i = 0; i < n; i += 4)
#pragma GCC unroll 4
      for (int c = 0; c < 4; c++) some[c] = at_max(at_load(column + (i + c) * AT_LANES), some[c]);
    const at_v best = at_max(at_max(some[0], some[1]), at_max(some[2], some[3]));
    const at_v base = at_select((at_i)(best == at_splat(-INFINITY)), at_splat(0.0f), best);
    const at_v alpha = at_exp(r->m[u] - base);
    r->l[u] *= alpha;
    for (int64_t c = 0; c < j->dvp; c++)
      at_store(acc + c * AT_LANES + u * AT_W, at_load(acc + c * AT_LANES + u * AT_W) * alpha);
    at_v total[4] = {{0}};
    for (int i = 0; i < n; i += 4)
#pragma GCC unroll 4
      for (int c = 0; c < 4; c++) {
        const at_v e = at_exp(at_load(column + (i + c) * AT_LANES) - base);
        at_store(column + (i + c) * AT_LANES, e);
        total[c] += e;
      }
    r->m[u] = best, r->l[u] += (total[0] + total[1]) + (total[2] + total[3]);
  }
  at_values(s, x.v, x.v_stride, j->dvp, n, acc);
}

static void store_tile(const job *j, const running *r, float *acc, float *rows, int64_t at, int64_t n) {
  const args *a = j->a;
  float m[AT_LANES], l[AT_LANES];
  for (int u = 0; u < AT_V; u++) {
    at_store(m + u * AT_W, r->m[u]), at_store(l + u * AT_W, r->l[u]);
    /* A query without keys has the output 0 and the lse -inf. */
    const at_v inverse = at_select((at_i)(r->l[u] == at_splat(0.0f)), at_splat(0.0f), 1.0f / r->l[u]);
    for (int64_t c = 0; c < j->dvp; c++)
      at_store(acc + c * AT_LANES + u * AT_W, at_load(acc + c * AT_LANES + u * AT_W) * inverse);
  }
  at_transpose(acc, AT_LANES, rows, j->dvp, j->dvp, AT_LANES);
  for (int64_t lane = 0; lane < n; lane++) {
    eff_store_row(j->dtype, rows + lane * j->dvp, eff_at_mut(a->out, j->dtype, (at + lane) * a->dv), a->dv);
    a->lse[at + lane] = m[lane] + logf(l[lane]);
  }
}

static void forward_item(void *ctx, int64_t item) {
  job *j = ctx;
  const args *a = j->a;
  const int64_t head = item / j->tm, b = head / a->heads, h = head % a->heads, m = item % j->tm;
  const int64_t kv = b * a->kv_heads + h / (a->heads / a->kv_heads), first = m * a->block_q;
  const int64_t queries = MIN(a->block_q, a->lq - first), tiles = eff_round_up(queries, AT_LANES) / AT_LANES;
  float *f = eff_scratch((size_t)(tiles * AT_LANES * (j->dp + j->dvp) + AT_LANES * (j->rows + j->side)) * 4);
  running *state = eff_scratch((size_t)tiles * sizeof *state);
  if (!f || !state) {
    j->failed = 1;
    free(f), free(state);
    return;
  }
  float *qt = f, *acc = qt + tiles * AT_LANES * j->dp, *s = acc + tiles * AT_LANES * j->dvp, *rows = s + AT_LANES * j->rows;
  for (int64_t t = 0; t < tiles; t++) {
    const int64_t i = first + t * AT_LANES;
    load_rows(j, a->q, b * a->q_stride[0] + h * a->q_stride[1] + i * a->q_stride[2], a->q_stride[2],
              MIN(AT_LANES, queries - t * AT_LANES), a->d, j->dp, (float)a->scale, rows);
    at_transpose(rows, j->dp, qt + t * AT_LANES * j->dp, AT_LANES, AT_LANES, j->dp);
    for (int u = 0; u < AT_V; u++) state[t].m[u] = at_splat(-INFINITY), state[t].l[u] = (at_v){0};
  }
  memset(acc, 0, (size_t)(tiles * AT_LANES * j->dvp) * 4);
  const int8_t *map = a->map + item * j->tn;
  for (int64_t n = 0; n < j->tn; n++) {
    if (map[n] <= 0) continue;
    const key_block x = keys_of(j, kv, n);
    for (int64_t t = 0; t < tiles; t++) attend(j, x, qt + t * AT_LANES * j->dp, s, acc + t * AT_LANES * j->dvp, state + t);
  }
  for (int64_t t = 0; t < tiles; t++)
    store_tile(j, state + t, acc + t * AT_LANES * j->dvp, rows, head * a->lq + first + t * AT_LANES,
               MIN(AT_LANES, queries - t * AT_LANES));
  free(f), free(state);
}

/* Returns 0, or 1 when memory ran out. */
KERNEL(int, eff_block_sparse, args) {
  job j;
  if (job_new(&j, a)) return 1;
  eff_parallel_for(a->batch * a->kv_heads * (j.tn - j.direct), (int)a->threads, pack_item, &j);
  eff_parallel_for(a->batch * a->heads * j.tm, (int)a->threads, forward_item, &j);
  free(j.k);
  return j.failed;
}

typedef struct {
  float *qr, *qt, *gr, *gt, *acc, *s, *ds; /* of one tile */
  float delta[AT_LANES], lse[AT_LANES];
} tile;

/* Weights of one block of keys from the lse, and what they send to the queries and to the keys. dS = P (dO V^T - delta) with
 * delta = rowsum(dO O) - dLSE. */
static void attend_backward(const job *j, key_block x, const tile *t, float *dk, float *dv) {
  const int n = (int)eff_round_up(x.count, 4);
  at_scores(x.k, x.k_stride, t->qt, j->a->d, n, t->s);
  at_scores(x.v, x.v_stride, t->gt, j->a->dv, n, t->ds);
  for (int u = 0; u < AT_V; u++) {
    const at_v base = at_load(t->lse + u * AT_W), less = at_load(t->delta + u * AT_W);
    float *s = t->s + u * AT_W, *ds = t->ds + u * AT_W;
    for (int i = 0; i < n; i++) {
      const at_v w = i < x.count ? at_exp(at_load(s + i * AT_LANES) - base) : (at_v){0};
      at_store(s + i * AT_LANES, w);
      at_store(ds + i * AT_LANES, w * (at_load(ds + i * AT_LANES) - less));
    }
  }
  at_values(t->ds, x.k, x.k_stride, j->dp, n, t->acc);
  for (int i = 0; i < n; i += 4) {
    float *to_k[4], *to_v[4];
    for (int r = 0; r < 4; r++) to_k[r] = dk + (i + r) * j->dp, to_v[r] = dv + (i + r) * j->dvp;
    at_spread(t->ds + i * AT_LANES, t->qr, j->dp, to_k);
    at_spread(t->s + i * AT_LANES, t->gr, j->dvp, to_v);
  }
}

static void tile_backward(const job *j, tile *t, int64_t head, int64_t kv, int64_t first, int64_t n, float *dk, float *dv) {
  const args *a = j->a;
  const int64_t b = head / a->heads, h = head % a->heads, at = head * a->lq + first;
  load_rows(j, a->q, b * a->q_stride[0] + h * a->q_stride[1] + first * a->q_stride[2], a->q_stride[2], n, a->d, j->dp,
            (float)a->scale, t->qr);
  at_transpose(t->qr, j->dp, t->qt, AT_LANES, AT_LANES, j->dp);
  load_rows(j, a->grad, at * a->dv, a->dv, n, a->dv, j->dvp, 1.0f, t->gr);
  at_transpose(t->gr, j->dvp, t->gt, AT_LANES, AT_LANES, j->dvp);
  load_rows(j, a->out, at * a->dv, a->dv, n, a->dv, j->dvp, 1.0f, t->acc);
  for (int64_t lane = 0; lane < AT_LANES; lane++) {
    t->lse[lane] = INFINITY, t->delta[lane] = 0.0f; /* no query: all its weights are 0 */
    if (lane >= n || a->lse[at + lane] == -INFINITY) continue;
    t->lse[lane] = a->lse[at + lane];
    at_v dot = {0};
    for (int64_t c = 0; c < j->dvp; c += AT_W) dot += at_load(t->gr + lane * j->dvp + c) * at_load(t->acc + lane * j->dvp + c);
    t->delta[lane] = -a->grad_lse[at + lane];
    for (int i = 0; i < AT_W; i++) t->delta[lane] += dot[i];
  }
  memset(t->acc, 0, (size_t)(AT_LANES * j->dp) * 4);
  const int8_t *map = a->map + (head * j->tm + first / a->block_q) * j->tn;
  for (int64_t m = 0; m < j->tn; m++) {
    if (map[m] <= 0) continue;
    attend_backward(j, keys_of(j, kv, m), t, dk + m * j->rows * j->dp, dv + m * j->rows * j->dvp);
  }
  at_transpose(t->acc, AT_LANES, t->qt, j->dp, j->dp, AT_LANES);
  for (int64_t lane = 0; lane < n; lane++) {
    float *row = t->qt + lane * j->dp;
    for (int64_t c = 0; c < j->dp; c++) row[c] *= (float)a->scale;
    eff_store_row(j->dtype, row, eff_at_mut(a->dq, j->dtype, (at + lane) * a->d), a->d);
  }
}

/* All query heads of one key-value head, in order: the sums of its keys have one owner, and their bits do not depend on the
 * number of threads. */
static void backward_item(void *ctx, int64_t kv) {
  job *j = ctx;
  const args *a = j->a;
  const int64_t group = a->heads / a->kv_heads, both = j->dp + j->dvp, keys = j->tn * j->rows;
  float *f = eff_scratch((size_t)(keys * both + AT_LANES * (2 * both + j->side + 2 * j->rows)) * 4);
  if (!f) {
    j->failed = 1;
    return;
  }
  float *dk = f, *dv = dk + keys * j->dp;
  tile t = {.qr = dv + keys * j->dvp};
  t.qt = t.qr + AT_LANES * j->dp, t.gr = t.qt + AT_LANES * j->dp, t.gt = t.gr + AT_LANES * j->dvp;
  t.acc = t.gt + AT_LANES * j->dvp, t.s = t.acc + AT_LANES * j->side, t.ds = t.s + AT_LANES * j->rows;
  memset(dk, 0, (size_t)(keys * both) * 4);
  for (int64_t h = 0; h < group; h++) {
    const int64_t head = (kv / a->kv_heads) * a->heads + kv % a->kv_heads * group + h;
    for (int64_t block = 0; block < a->lq; block += a->block_q)
      for (int64_t i = block; i < MIN(block + a->block_q, a->lq); i += AT_LANES)
        tile_backward(j, &t, head, kv, i, MIN(AT_LANES, MIN(block + a->block_q, a->lq) - i), dk, dv);
  }
  for (int64_t i = 0; i < a->lk; i++) {
    const int64_t row = i / a->block_k * j->rows + i % a->block_k, at = kv * a->lk + i;
    eff_store_row(j->dtype, dk + row * j->dp, eff_at_mut(a->dk, j->dtype, at * a->d), a->d);
    eff_store_row(j->dtype, dv + row * j->dvp, eff_at_mut(a->dv_out, j->dtype, at * a->dv), a->dv);
  }
  free(f);
}

/* Gradients to q, k and v. Returns 0, or 1 when memory ran out. */
KERNEL(int, eff_block_sparse_backward, args) {
  job j;
  if (job_new(&j, a)) return 1;
  eff_parallel_for(a->batch * a->kv_heads * (j.tn - j.direct), (int)a->threads, pack_item, &j);
  eff_parallel_for(a->batch * a->kv_heads, (int)a->threads, backward_item, &j);
  free(j.k);
  return j.failed;
}
