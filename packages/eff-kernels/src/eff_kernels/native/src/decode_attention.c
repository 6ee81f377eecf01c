/* Attention of one query per sequence over a key-value cache, contiguous or paged (flash decoding).
 *
 * An item of work is one key-value head of one sequence, and one split of its keys: all query heads of the group pass over a
 * block of keys while it is in cache, so the cache is read from memory once and heads are never copied. Each item leaves an
 * unnormalised sum with its maximum and weight; the splits of a head are then merged. */
#include "eff.h"

#define KEYS 64   /* keys per block */
#define SPLIT 256 /* keys per split */

typedef struct {
  const float *q; /* [batch, heads, d], scaled */
  const void *k, *v;
  eff_dtype dtype;
  int64_t batch, heads, kv_heads, d;
  int64_t page;               /* keys per page, or per run of a contiguous cache; all of it when there is no table */
  int64_t seq_stride, entry_stride, head_stride, key_stride; /* entry e of sequence b lies at b * seq_stride + e * entry_stride */
  const int32_t *table;       /* [batch, max_pages] or [batch, kv_heads, max_pages]; NULL: entry 0 */
  int64_t table_seq, table_head;
  const int32_t *lengths;
  int64_t splits;
  float *partial; /* [batch, kv_heads, splits, group, d + 2]: sum, maximum, weight */
  float *records; /* [batch, kv_heads, pieces, group, 2]: weight and its maximum for each piece of the keys; NULL: not wanted */
  int64_t piece, pieces;
  float *mass; /* [batch, kv_heads, mass_blocks] */
  int64_t mass_block, mass_blocks;
  void *out;
  eff_dtype out_dtype;
} job;

/* e^x for x <= 0, to about 2 ulp: 2^n * e^r with |r| <= ln(2) / 2. */
INLINE eff_vf exp_nonpositive(eff_vf x) {
  x = eff_vselect(x < eff_splat(-87.0f), eff_splat(-87.0f), x);
  eff_vf t = x * eff_splat(1.44269504f) + eff_splat(12582912.0f);
  eff_vi n = (eff_vi)t - 0x4b400000;
  eff_vf r = t - eff_splat(12582912.0f);
  r = (x - r * eff_splat(0.693359375f)) + r * eff_splat(2.12194440e-4f);
  eff_vf p = eff_splat(1.9875691500e-4f);
  p = p * r + eff_splat(1.3981999507e-3f);
  p = p * r + eff_splat(8.3334519073e-3f);
  p = p * r + eff_splat(4.1665795894e-2f);
  p = p * r + eff_splat(1.6666665459e-1f);
  p = p * r + eff_splat(5.0000001201e-1f);
  p = p * r * r + r + eff_splat(1.0f);
  return p * (eff_vf)((n + 127) << 23);
}

INLINE eff_vf load8(eff_dtype dtype, const void *p) {
  if (dtype == EFF_F32) return eff_vload(p);
  float f[EFF_LANES];
  if (dtype == EFF_BF16) {
#if defined(__AVX2__)
    __m256i wide = _mm256_slli_epi32(_mm256_cvtepu16_epi32(_mm_loadu_si128(p)), 16);
    return (eff_vf)wide;
#else
    eff_load_row(EFF_BF16, p, f, EFF_LANES);
#endif
  } else {
    eff_load_row(EFF_F16, p, f, EFF_LANES);
  }
  return eff_vload(f);
}

/* scores[h, i] = q[h] . key i for NH query heads (d a multiple of 8). */
INLINE void score_keys(eff_dtype dtype, const int NH, const float *q, const char *key, int64_t key_bytes, int64_t d, int keys,
                       float *scores) {
  for (int i = 0; i < keys; i++) {
    const char *row = key + i * key_bytes;
    eff_vf acc[4];
    for (int h = 0; h < NH; h++) acc[h] = eff_splat(0.0f);
    for (int64_t c = 0; c < d; c += EFF_LANES) {
      eff_vf kv = load8(dtype, row + c * (int64_t)eff_size(dtype));
#pragma GCC unroll 4
      for (int h = 0; h < NH; h++) acc[h] += eff_vload(q + h * d + c) * kv;
    }
    for (int h = 0; h < NH; h++) scores[h * KEYS + i] = eff_vsum(acc[h]);
  }
}

/* sum[h] += weights[h, i] * value i, eight features of NH heads at a time in registers. */
INLINE void add_values(eff_dtype dtype, const int NH, const float *weights, const char *value, int64_t value_bytes, int64_t d, int keys,
                       float *sum) {
  for (int64_t c = 0; c < d; c += 2 * EFF_LANES) {
    const int two = c + EFF_LANES < d;
    eff_vf a[4], b[4];
    for (int h = 0; h < NH; h++) a[h] = eff_vload(sum + h * d + c), b[h] = two ? eff_vload(sum + h * d + c + EFF_LANES) : a[h];
    const char *column = value + c * (int64_t)eff_size(dtype);
    for (int i = 0; i < keys; i++) {
      eff_vf va = load8(dtype, column + i * value_bytes);
      eff_vf vb = two ? load8(dtype, column + i * value_bytes + EFF_LANES * (int64_t)eff_size(dtype)) : va;
#pragma GCC unroll 4
      for (int h = 0; h < NH; h++) {
        const eff_vf w = eff_splat(weights[h * KEYS + i]);
        a[h] += w * va, b[h] += w * vb;
      }
    }
    for (int h = 0; h < NH; h++) {
      eff_vstore(sum + h * d + c, a[h]);
      if (two) eff_vstore(sum + h * d + c + EFF_LANES, b[h]);
    }
  }
}

/* One block of keys for NH query heads: scores, running maximum and weight, values; its own weight is added to `record`. */
INLINE void block_of(eff_dtype dtype, const int NH, const job *j, const float *q, const char *key, const char *value, int keys, float *sum,
                     float *top, float *weight, float *record) {
  float scores[4 * KEYS];
  const int64_t bytes = j->key_stride * (int64_t)eff_size(dtype);
  score_keys(dtype, NH, q, key, bytes, j->d, keys, scores);
  for (int h = 0; h < NH; h++) {
    float *s = scores + h * KEYS, best = top[h];
    for (int i = 0; i < keys; i++) best = s[i] > best ? s[i] : best;
    for (int i = keys; i % EFF_LANES; i++) s[i] = -INFINITY;
    const float shrink = top[h] == best ? 1.0f : expf(top[h] - best);
    eff_vf total = eff_splat(0.0f);
    for (int i = 0; i < keys; i += EFF_LANES) {
      eff_vf raw = eff_vload(s + i) - eff_splat(best);
      eff_vf e = exp_nonpositive(raw);
      e = eff_vselect(raw >= eff_splat(-87.0f), e, eff_vselect(raw == raw, eff_splat(0.0f), raw)); /* NaN stays NaN */
      eff_vstore(s + i, e);
      total += e;
    }
    top[h] = best;
    const float own = eff_vsum(total);
    weight[h] = weight[h] * shrink + own;
    if (record) {
      float *r = record + 2 * h;
      r[0] = (r[0] == 0.0f ? 0.0f : r[0] * expf(r[1] - best)) + own, r[1] = best;
    }
    if (shrink != 1.0f)
      for (int64_t c = 0; c < j->d; c++) sum[h * j->d + c] *= shrink;
  }
  add_values(dtype, NH, scores, value, bytes, j->d, keys, sum);
}

#define BLOCK(DTYPE, NH)                                                                                                         \
  static __attribute__((noinline)) void block_##DTYPE##_##NH(const job *j, const float *q, const char *key, const char *value,   \
                                                             int keys, float *sum, float *top, float *weight, float *record) {   \
    block_of(DTYPE, NH, j, q, key, value, keys, sum, top, weight, record);                                                       \
  }
#define BLOCKS(DTYPE) BLOCK(DTYPE, 1) BLOCK(DTYPE, 2) BLOCK(DTYPE, 3) BLOCK(DTYPE, 4)
BLOCKS(EFF_F32) BLOCKS(EFF_BF16) BLOCKS(EFF_F16)
typedef void (*block_fn)(const job *, const float *, const char *, const char *, int, float *, float *, float *, float *);
static const block_fn blocks[3][4] = {{block_EFF_F32_1, block_EFF_F32_2, block_EFF_F32_3, block_EFF_F32_4},
                                      {block_EFF_BF16_1, block_EFF_BF16_2, block_EFF_BF16_3, block_EFF_BF16_4},
                                      {block_EFF_F16_1, block_EFF_F16_2, block_EFF_F16_3, block_EFF_F16_4}};

static void attend(void *ctx, int64_t item) {
  job *j = ctx;
  const int64_t group = j->heads / j->kv_heads, split = item % j->splits, kv = item / j->splits % j->kv_heads;
  const int64_t b = item / j->splits / j->kv_heads, row = j->d + 2;
  float *partial = j->partial + item * group * row;
  float *sum = partial, *top = partial + group * j->d, *weight = top + group;
  for (int64_t i = 0; i < group * j->d; i++) sum[i] = 0.0f;
  for (int64_t h = 0; h < group; h++) top[h] = -INFINITY, weight[h] = 0.0f;
  const int64_t end = MIN(j->lengths[b], (split + 1) * SPLIT);
  for (int64_t key = split * SPLIT; key < end;) {
    const int64_t in_page = key % j->page;
    const int keys = (int)MIN(MIN(j->piece - key % j->piece, end - key), j->page - in_page);
    const int64_t entry = j->table ? j->table[b * j->table_seq + kv * j->table_head + key / j->page] : 0;
    const int64_t at = b * j->seq_stride + entry * j->entry_stride + kv * j->head_stride + in_page * j->key_stride;
    float *record = j->records ? j->records + ((b * j->kv_heads + kv) * j->pieces + key / j->piece) * group * 2 : NULL;
    for (int64_t h = 0; h < group; h += 4) {
      const int nh = (int)MIN(4, group - h);
      blocks[j->dtype][nh - 1](j, j->q + (b * j->heads + kv * group + h) * j->d, eff_at(j->k, j->dtype, at), eff_at(j->v, j->dtype, at),
                               keys, sum + h * j->d, top + h, weight + h, record ? record + 2 * h : NULL);
    }
    key += keys;
  }
}

/* Merge the splits of each head: sum_s e^(top_s - top) sum_s / sum_s e^(top_s - top) weight_s. */
static void merge(const job *j) {
  const int64_t group = j->heads / j->kv_heads, row = j->d + 2;
  float *out = eff_scratch((size_t)j->d * 4);
  for (int64_t head = 0; head < j->batch * j->heads; head++) {
    const int64_t h = head % group, first = head / group * j->splits;
    float top = -INFINITY, weight = 0.0f;
    memset(out, 0, (size_t)j->d * 4);
    for (int64_t s = 0; s < j->splits; s++) {
      const float t = j->partial[(first + s) * group * row + group * j->d + h];
      top = t > top ? t : top;
    }
    for (int64_t s = 0; s < j->splits; s++) {
      const float *partial = j->partial + (first + s) * group * row, w = partial[group * j->d + group + h];
      if (w == 0.0f) continue; /* a split without keys; NaN is not 0 */
      const float e = expf(partial[group * j->d + h] - top);
      weight += w * e;
      for (int64_t c = 0; c < j->d; c++) out[c] += e * partial[h * j->d + c];
    }
    const float inverse = weight == 0.0f ? 0.0f : 1.0f / weight;
    for (int64_t c = 0; c < j->d; c++) out[c] *= inverse;
    if (j->records)
      for (int64_t p = 0, kv = head / group; p < j->pieces; p++) {
        const float *r = j->records + ((kv * j->pieces + p) * group + h) * 2;
        if (r[0] != 0.0f) j->mass[kv * j->mass_blocks + p * j->piece / j->mass_block] += r[0] * inverse * expf(r[1] - top);
      }
    eff_store_row(j->out_dtype, out, eff_at_mut(j->out, j->out_dtype, head * j->d), j->d);
  }
  free(out);
}

typedef struct {
  const void *q;
  int64_t q_dtype;
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

/* out[batch, heads, d] (contiguous) for q of the same shape; d a multiple of 8. Keys and values share dtype and strides; the
 * last dimension is contiguous. Returns 0, 1 when memory ran out, 2 when a length or an entry lies outside the cache. */
EXPORT int eff_decode_attention(const args *a) {
  const int64_t batch = a->batch, heads = a->heads, kv_heads = a->kv_heads, d = a->d;
  const int32_t *lengths = a->lengths;
  int threads = (int)a->threads;
  if (batch == 0) return 0;
  if (!inside(a)) return 2;
  int64_t longest = 0, total = 0, piece = KEYS;
  for (int64_t b = 0; b < batch; b++) longest = MAX(longest, lengths[b]), total += lengths[b];
  if (total * kv_heads * d < 16384) threads = 1;
  while (a->mass && a->mass_block % piece) piece /= 2;
  /* Cut at the same keys whatever the batch and the threads are: the sums of a sequence are its own. */
  const int64_t splits = MAX(1, (longest + SPLIT - 1) / SPLIT), pieces = a->mass ? (longest + piece - 1) / piece : 0;
  const int inner = a->run || !a->table; /* entries lie inside of the sequence's own page */
  job j = {.k = a->k, .v = a->v, .dtype = (eff_dtype)a->dtype, .batch = batch, .heads = heads, .kv_heads = kv_heads, .d = d,
           .page = a->run ? a->run : a->page, .seq_stride = inner ? a->page_stride : 0,
           .entry_stride = inner ? a->key_stride : a->page_stride, .head_stride = a->head_stride, .key_stride = a->key_stride,
           .table = a->table, .table_seq = a->max_pages * (a->per_head ? kv_heads : 1), .table_head = a->per_head ? a->max_pages : 0,
           .lengths = lengths, .splits = splits, .piece = piece, .pieces = pieces, .mass = a->mass, .mass_block = a->mass_block,
           .mass_blocks = a->mass_blocks, .out = a->out, .out_dtype = (eff_dtype)a->q_dtype};
  const int64_t partials = batch * heads * splits * (d + 2), records = batch * heads * pieces * 2;
  float *scratch = eff_scratch((size_t)(batch * heads * d + partials + records) * 4);
  if (!scratch) return 1;
  float *scaled = scratch;
  eff_load_row((eff_dtype)a->q_dtype, a->q, scaled, batch * heads * d);
  for (int64_t i = 0; i < batch * heads * d; i++) scaled[i] *= (float)a->scale;
  j.q = scaled, j.partial = scratch + batch * heads * d;
  if (records) j.records = memset(j.partial + partials, 0, (size_t)records * 4);
  eff_parallel_for(batch * kv_heads * splits, threads, attend, &j);
  merge(&j);
  free(scratch);
  return 0;
}
