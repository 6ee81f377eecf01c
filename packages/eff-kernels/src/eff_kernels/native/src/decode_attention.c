/* Attention of one query per sequence over a key-value cache, contiguous or paged (flash decoding).
 *
 * An item of work is one key-value head of one sequence, and one split of its keys: all query heads of the group pass over a
 * block of keys while it is in cache, so the cache is read from memory once and heads are never copied. Each item leaves an
 * unnormalised sum with its maximum m and weight l; the splits of a head are then merged. */
#include "decode_block.h"

#define SPLIT 256 /* keys per split */

typedef struct {
  const float *q; /* [batch, heads, dp], scaled, in the order of db_order */
  const void *k, *v;
  eff_dtype dtype;
  int64_t batch, heads, kv_heads, d, dp; /* dp: features of a row of queries and sums */
  int64_t page;               /* keys per page, or per run of a contiguous cache; all of it when there is no table */
  int64_t seq_stride, entry_stride, head_stride, key_stride; /* entry e of sequence b lies at b * seq_stride + e * entry_stride */
  const int32_t *table;       /* [batch, max_pages] or [batch, kv_heads, max_pages]; NULL: entry 0 */
  int64_t table_seq, table_head;
  const int32_t *lengths;
  int64_t splits;
  float *partial; /* [batch, kv_heads, splits, group, dp + 2]: sum, maximum, weight */
  float *records; /* [batch, kv_heads, pieces, group, 2]: weight and its maximum for each piece of the keys; NULL: not wanted */
  int64_t piece, pieces;
  float *mass; /* [batch, kv_heads, mass_blocks] */
  int64_t mass_block, mass_blocks;
  void *out;
  eff_dtype out_dtype;
  float *merged; /* for each sequence, [dp] of a sum and [d] of a result */
} job;

/* One block of keys for NH query heads: scores, running maximum and weight, values; its own weight is added to `record`. */
INLINE void block_of(eff_dtype dtype, const int NH, const job *j, const float *q, const char *key, const char *value, const char *next, int keys,
                     float *sum, float *m, float *l, float *record) {
  float scores[4 * DB_KEYS];
  const int64_t bytes = j->key_stride * (int64_t)eff_size(dtype), dp = j->dp;
  const int rounded = (keys + AT_W - 1) / AT_W * AT_W;
  db_scores(dtype, NH, q, key, value, bytes, j->d, keys, scores);
  for (int h = 0; h < NH; h++) {
    float *s = scores + h * DB_KEYS;
    for (int i = keys; i < rounded; i++) s[i] = -INFINITY;
    const float best = db_top(s, rounded, m[h]), alpha = m[h] == best ? 1.0f : expf(m[h] - best);
    at_v total = {0};
    for (int i = 0; i < rounded; i += AT_W) {
      const at_v e = at_exp(at_load(s + i) - best);
      at_store(s + i, e);
      total += e;
    }
    float own = 0.0f;
    for (int i = 0; i < AT_W; i++) own += total[i];
    m[h] = best;
    l[h] = l[h] * alpha + own;
    if (record) {
      float *r = record + 2 * h;
      r[0] = (r[0] == 0.0f ? 0.0f : r[0] * expf(r[1] - best)) + own, r[1] = best;
    }
    if (alpha != 1.0f)
      for (int64_t c = 0; c < dp; c++) sum[h * dp + c] *= alpha;
  }
  db_values(dtype, NH, scores, value, bytes, j->d, keys, next, sum);
}

#define BLOCK(DTYPE, NH)                                                                                                           \
  static __attribute__((noinline)) void block_##DTYPE##_##NH(const job *j, const float *q, const char *key, const char *value,     \
                                                             const char *next, int keys, float *sum, float *m, float *l,           \
                                                             float *record) {                                                      \
    block_of(DTYPE, NH, j, q, key, value, next, keys, sum, m, l, record);                                                          \
  }
#define BLOCKS(DTYPE) BLOCK(DTYPE, 1) BLOCK(DTYPE, 2) BLOCK(DTYPE, 3) BLOCK(DTYPE, 4)
BLOCKS(EFF_F32) BLOCKS(EFF_BF16) BLOCKS(EFF_F16)
typedef void (*block_fn)(const job *, const float *, const char *, const char *, const char *, int, float *, float *, float *, float *);
static const block_fn blocks[3][4] = {{block_EFF_F32_1, block_EFF_F32_2, block_EFF_F32_3, block_EFF_F32_4},
                                      {block_EFF_BF16_1, block_EFF_BF16_2, block_EFF_BF16_3, block_EFF_BF16_4},
                                      {block_EFF_F16_1, block_EFF_F16_2, block_EFF_F16_3, block_EFF_F16_4}};

/* Where key `key` of sequence b and key-value head kv lies, in elements. */
static int64_t place(const job *j, int64_t b, int64_t kv, int64_t key) {
  const int64_t entry = j->table ? j->table[b * j->table_seq + kv * j->table_head + key / j->page] : 0;
  return b * j->seq_stride + entry * j->entry_stride + kv * j->head_stride + key % j->page * j->key_stride;
}

static void attend(void *ctx, int64_t item) {
  job *j = ctx;
  /* Queries that read the same pages, such as those of a prompt, follow one another while these are in cache. */
  const int64_t group = j->heads / j->kv_heads, b = item % j->batch, kv = item / j->batch % j->kv_heads;
  const int64_t split = item / j->batch / j->kv_heads, row = j->dp + 2;
  float *partial = j->partial + ((b * j->kv_heads + kv) * j->splits + split) * group * row;
  float *sum = partial, *m = partial + group * j->dp, *l = m + group;
  for (int64_t i = 0; i < group * j->dp; i++) sum[i] = 0.0f;
  for (int64_t h = 0; h < group; h++) m[h] = -INFINITY, l[h] = 0.0f;
  const int64_t end = MIN(j->lengths[b], (split + 1) * SPLIT);
  for (int64_t key = split * SPLIT; key < end;) {
    const int keys = (int)MIN(MIN(j->piece - key % j->piece, end - key), j->page - key % j->page);
    const int64_t at = place(j, b, kv, key);
    const void *k = eff_at(j->k, j->dtype, at), *v = eff_at(j->v, j->dtype, at);
    /* The rows after this block, likely on their way when its values are summed. */
    const void *next = key + keys < j->lengths[b] ? eff_at(j->k, j->dtype, place(j, b, kv, key + keys)) : k;
    float *record = j->records ? j->records + ((b * j->kv_heads + kv) * j->pieces + key / j->piece) * group * 2 : NULL;
    for (int64_t h = 0; h < group; h += 4) {
      const int nh = (int)MIN(4, group - h);
      blocks[j->dtype][nh - 1](j, j->q + (b * j->heads + kv * group + h) * j->dp, k, v, next, keys, sum + h * j->dp, m + h, l + h,
                               record ? record + 2 * h : NULL);
    }
    key += keys;
  }
}

/* Merge the splits of each head of a sequence: sum_s e^(m_s - m) sum_s / sum_s e^(m_s - m) l_s. */
static void merge(void *ctx, int64_t b) {
  const job *j = ctx;
  const int64_t group = j->heads / j->kv_heads, row = j->dp + 2, dp = j->dp;
  float *sum = j->merged + b * (dp + j->d), *out = sum + dp;
  for (int64_t head = b * j->heads; head < (b + 1) * j->heads; head++) {
    const int64_t h = head % group, first = head / group * j->splits;
    float m = -INFINITY, l = 0.0f;
    memset(sum, 0, (size_t)dp * 4);
    for (int64_t s = 0; s < j->splits; s++) {
      const float t = j->partial[(first + s) * group * row + group * dp + h];
      m = t > m ? t : m;
    }
    for (int64_t s = 0; s < j->splits; s++) {
      const float *partial = j->partial + (first + s) * group * row, w = partial[group * dp + group + h];
      if (w == 0.0f) continue; /* a split without keys; NaN is not 0 */
      const float e = expf(partial[group * dp + h] - m);
      l += w * e;
      for (int64_t c = 0; c < dp; c++) sum[c] += e * partial[h * dp + c];
    }
    const float inverse = l == 0.0f ? 0.0f : 1.0f / l;
    for (int64_t c = 0; c < j->d; c++) out[c] = sum[db_order(j->dtype, c)] * inverse;
    if (j->records)
      for (int64_t p = 0, kv = head / group; p < j->pieces; p++) {
        const float *r = j->records + ((kv * j->pieces + p) * group + h) * 2;
        if (r[0] != 0.0f) j->mass[kv * j->mass_blocks + p * j->piece / j->mass_block] += r[0] * inverse * expf(r[1] - m);
      }
    eff_store_row(j->out_dtype, out, eff_at_mut(j->out, j->out_dtype, head * j->d), j->d);
  }
}

typedef struct {
  const void *q; /* [batch, heads, d], sequences q_stride apart */
  int64_t q_dtype, q_stride;
  const void *k, *v;
  int64_t dtype, batch, heads, kv_heads, d;
  int64_t pages, page, page_stride, head_stride, key_stride; /* of the cache [pages, kv_heads, page, d] */
  const int32_t *table;
  int64_t max_pages, per_head; /* whether each key-value head has a table of its own */
  int64_t run;                 /* 0, or keys of a run: entries are first rows of runs inside of the sequence's own page */
  const int32_t *lengths;
  double scale;
  void *out;
  float *mass; /* NULL, or [batch, kv_heads, mass_blocks], zero */
  int64_t mass_block, mass_blocks;
  int64_t threads;
} args;

/* Whether every key that would be read lies in the cache. */
static int inside(const args *a) {
  const int64_t keys = a->run ? a->run : a->page, room = a->table ? keys * a->max_pages : a->page;
  for (int64_t b = 0; b < a->batch; b++) {
    if (a->lengths[b] < 0 || a->lengths[b] > room) return 0;
    for (int64_t h = 0; a->table && h < (a->per_head ? a->kv_heads : 1); h++) {
      const int32_t *entries = a->table + (a->per_head ? b * a->kv_heads + h : b) * a->max_pages;
      for (int64_t i = 0; i * keys < a->lengths[b]; i++) {
        const int64_t limit = a->run ? a->page - MIN(keys, a->lengths[b] - i * keys) : a->pages - 1;
        if (entries[i] < 0 || entries[i] > limit) return 0;
      }
    }
  }
  return 1;
}

/* out[batch, heads, d] (contiguous); d a multiple of 8. Keys and values share dtype and strides; the
 * last dimension is contiguous. Returns 0, 1 when memory ran out, 2 when a length or an entry lies outside the cache. */
KERNEL(int, eff_decode_attention, args) {
  const int64_t batch = a->batch, heads = a->heads, kv_heads = a->kv_heads, d = a->d;
  const int32_t *lengths = a->lengths;
  int threads = (int)a->threads;
  if (batch == 0) return 0;
  if (!inside(a)) return 2;
  int64_t longest = 0, total = 0, piece = DB_KEYS;
  for (int64_t b = 0; b < batch; b++) longest = MAX(longest, lengths[b]), total += lengths[b];
  if (total * kv_heads * d < 16384) threads = 1;
  while (a->mass && a->mass_block % piece) piece /= 2;
  /* Cut at the same keys whatever the batch and the threads are: the sums of a sequence are its own. */
  const int64_t splits = MAX(1, (longest + SPLIT - 1) / SPLIT), pieces = a->mass ? (longest + piece - 1) / piece : 0;
  const int inner = a->run || !a->table; /* entries lie inside of the sequence's own page */
  job j = {.k = a->k, .v = a->v, .dtype = (eff_dtype)a->dtype, .batch = batch, .heads = heads, .kv_heads = kv_heads, .d = d,
           .dp = db_features(d),
           .page = a->run ? a->run : a->page, .seq_stride = inner ? a->page_stride : 0,
           .entry_stride = inner ? a->key_stride : a->page_stride, .head_stride = a->head_stride, .key_stride = a->key_stride,
           .table = a->table, .table_seq = a->max_pages * (a->per_head ? kv_heads : 1), .table_head = a->per_head ? a->max_pages : 0,
           .lengths = lengths, .splits = splits, .piece = piece, .pieces = pieces, .mass = a->mass, .mass_block = a->mass_block,
           .mass_blocks = a->mass_blocks, .out = a->out, .out_dtype = (eff_dtype)a->q_dtype};
  const int64_t dp = j.dp, partials = batch * heads * splits * (dp + 2), records = batch * heads * pieces * 2;
  float *scratch = eff_scratch((size_t)(batch * heads * dp + partials + records + batch * (dp + d)) * 4), *row = scratch;
  if (!scratch) return 1;
  memset(scratch, 0, (size_t)(batch * heads * dp) * 4);
  j.q = scratch, j.partial = scratch + batch * heads * dp, j.merged = j.partial + partials + records;
  for (int64_t h = 0; h < batch * heads; h++, row += dp) {
    eff_load_row((eff_dtype)a->q_dtype, eff_at(a->q, (eff_dtype)a->q_dtype, h / heads * a->q_stride + h % heads * d), j.merged, d);
    for (int64_t c = 0; c < d; c++) row[db_order(j.dtype, c)] = j.merged[c] * (float)a->scale;
  }
  if (records) j.records = memset(j.partial + partials, 0, (size_t)records * 4);
  eff_parallel_for(batch * kv_heads * splits, threads, attend, &j);
  eff_parallel_for(batch, batch * heads * splits * dp < 65536 ? 1 : threads, merge, &j);
  free(scratch);
  return 0;
}
