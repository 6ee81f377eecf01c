/* out[t] = y[t] + sum_j gate[t, j] * B[e] (A[e] x[t]), e = ids[t, j]: low-rank updates of many adapters in one batch.
 *
 * A block of rows is one item of work. Its pairs of row and expert are put in the order of the experts, and up to four
 * rows of one expert share the loads of its factors. Each sum has one order of its own: eight lanes along K, joined
 * after every K_BLOCK entries, then eight lanes along the rank; experts are added from the lowest to the highest. So a
 * row of the result never depends on its neighbours. */
#include "lanes.h"

#define ROWS 32     /* most rows of an item */
#define K_BLOCK 1024
#define MR 4        /* most rows of one expert at a time */
#define NR 4        /* rows of a factor at a time */

typedef struct {
  const void *x;
  int64_t x_dtype, t, k, x_stride;
  const void *a, *b; /* [num_experts, r, k], [num_experts, n, r] */
  int64_t dtype, num_experts, r, n;
  const void *ids; /* [t, places], int32 or int64 */
  int64_t ids64, places;
  const float *weights; /* [t, places]; NULL: ones */
  const float *scale;   /* [num_experts]; NULL: ones */
  const void *y;        /* [t, y_stride]; NULL: zeros */
  int64_t y_stride, y_dtype;
  void *out; /* [t, n], of y_dtype */
  int64_t threads;
} args;

typedef struct {
  const args *a;
  int64_t rows; /* of an item */
  int failed;   /* 1: no memory, 2: an id that names no expert */
} job;

typedef struct {
  int64_t expert;
  int64_t row; /* within the item */
  float gate;
} pair;

INLINE eff_vf load8(const eff_dtype dtype, const void *p) {
  if (dtype == EFF_F32) return eff_vload(p);
#if defined(__AVX2__)
  if (dtype == EFF_BF16) return (eff_vf)_mm256_slli_epi32(_mm256_cvtepu16_epi32(_mm_loadu_si128((const __m128i *)p)), 16);
#endif
#if defined(__F16C__)
  if (dtype == EFF_F16) return (eff_vf)_mm256_cvtph_ps(_mm_loadu_si128((const __m128i *)p));
#endif
  float v[EFF_LANES];
  eff_load_row(dtype, p, v, EFF_LANES);
  return eff_vload(v);
}

/* The last len < 8 entries, followed by zeros. */
INLINE eff_vf load_tail(const eff_dtype dtype, const void *p, int64_t len) {
  float v[EFF_LANES] = {0};
  eff_load_row(dtype, p, v, len);
  return eff_vload(v);
}

/* c[m][n] = sum_k v[m][k] * f[n, k] for `ms` vectors of floats, and `ns` rows of a factor that lie `len` apart. */
INLINE void products(const int ms, const int ns, const eff_dtype dtype, const float *const *v, const void *f, int64_t len,
                     float c[MR][NR]) {
  for (int m = 0; m < ms; m++)
    for (int n = 0; n < NR; n++) c[m][n] = 0.0f;
  for (int64_t from = 0; from < len; from += K_BLOCK) {
    const int64_t to = MIN(len, from + K_BLOCK);
    eff_vf acc[MR][NR];
    for (int m = 0; m < MR; m++)
      for (int n = 0; n < NR; n++) acc[m][n] = eff_splat(0.0f);
    int64_t k = from;
    for (; k + EFF_LANES <= to; k += EFF_LANES) {
      eff_vf x[MR];
#pragma GCC unroll 4
      for (int m = 0; m < ms; m++) x[m] = eff_vload(v[m] + k);
#pragma GCC unroll 4
      for (int n = 0; n < ns; n++) {
        const eff_vf wide = load8(dtype, eff_at(f, dtype, n * len + k));
#pragma GCC unroll 4
        for (int m = 0; m < ms; m++) acc[m][n] = multiply_add(x[m], wide, acc[m][n]);
      }
    }
    if (k < to)
      for (int n = 0; n < ns; n++) {
        const eff_vf wide = load_tail(dtype, eff_at(f, dtype, n * len + k), to - k);
        for (int m = 0; m < ms; m++) acc[m][n] = multiply_add(load_tail(EFF_F32, v[m] + k, to - k), wide, acc[m][n]);
      }
    for (int m = 0; m < ms; m++) add_lanes_of_four(acc[m], c[m]);
  }
}

/* One expert for `ms` rows: low = gate * A x, then sums += B low. */
INLINE void expert_rows(const int ms, const eff_dtype dtype, const args *a, const pair *p, const float *x, float *low, float *sums) {
  const int64_t k = a->k, r = a->r, n = a->n, expert = p->expert;
  const void *first = eff_at(a->a, dtype, expert * r * k), *second = eff_at(a->b, dtype, expert * n * r);
  const float *rows[MR], *lows[MR];
  float c[MR][NR];
  for (int m = 0; m < ms; m++) rows[m] = x + p[m].row * k, lows[m] = low + m * r;
  int64_t i = 0;
  for (; i + NR <= r; i += NR) {
    products(ms, NR, dtype, rows, eff_at(first, dtype, i * k), k, c);
    for (int m = 0; m < ms; m++)
      for (int j = 0; j < NR; j++) low[m * r + i + j] = p[m].gate * c[m][j];
  }
  for (; i < r; i++) {
    products(ms, 1, dtype, rows, eff_at(first, dtype, i * k), k, c);
    for (int m = 0; m < ms; m++) low[m * r + i] = p[m].gate * c[m][0];
  }
  for (i = 0; i + NR <= n; i += NR) {
    products(ms, NR, dtype, lows, eff_at(second, dtype, i * r), r, c);
    for (int m = 0; m < ms; m++) {
      float *s = sums + p[m].row * n + i;
      for (int j = 0; j < NR; j++) s[j] += c[m][j];
    }
  }
  for (; i < n; i++) {
    products(ms, 1, dtype, lows, eff_at(second, dtype, i * r), r, c);
    for (int m = 0; m < ms; m++) sums[p[m].row * n + i] += c[m][0];
  }
}

/* Pairs of the rows from..to, in the order of their experts; -1 when an id names no expert. */
static int64_t collect(const args *a, int64_t from, int64_t to, pair *pairs) {
  int64_t count = 0;
  for (int64_t t = from; t < to; t++)
    for (int64_t j = 0; j < a->places; j++) {
      const int64_t at = t * a->places + j;
      const int64_t expert = a->ids64 ? ((const int64_t *)a->ids)[at] : ((const int32_t *)a->ids)[at];
      if (expert < -1 || expert >= a->num_experts) return -1;
      if (expert < 0) continue;
      const float gate = (a->weights ? a->weights[at] : 1.0f) * (a->scale ? a->scale[expert] : 1.0f);
      int64_t place = count++;
      for (; place > 0 && pairs[place - 1].expert > expert; place--) pairs[place] = pairs[place - 1];
      pairs[place] = (pair){expert, t - from, gate};
    }
  return count;
}

static void add(const args *a, int64_t count, const pair *pairs, const float *x, float *low, float *sums) {
#define RUN(dtype)                                                                                         \
  for (int64_t i = 0; i < count;) {                                                                        \
    int64_t same = 1;                                                                                      \
    while (i + same < count && same < MR && pairs[i + same].expert == pairs[i].expert) same++;             \
    switch (same) {                                                                                        \
      case 4: expert_rows(4, dtype, a, pairs + i, x, low, sums); break;                                    \
      case 3: expert_rows(3, dtype, a, pairs + i, x, low, sums); break;                                    \
      case 2: expert_rows(2, dtype, a, pairs + i, x, low, sums); break;                                    \
      default: expert_rows(1, dtype, a, pairs + i, x, low, sums);                                          \
    }                                                                                                      \
    i += same;                                                                                             \
  }
  switch (a->dtype) {
    case EFF_F32: RUN(EFF_F32) break;
    case EFF_BF16: RUN(EFF_BF16) break;
    default: RUN(EFF_F16)
  }
#undef RUN
}

/* out = y + sums in the rows that have an expert; the others keep the bits of y. */
static void finish(const args *a, int64_t t, int touched, float *sums, float *wide) {
  const eff_dtype dtype = (eff_dtype)a->y_dtype;
  void *out = eff_at_mut(a->out, dtype, t * a->n);
  const void *y = a->y ? eff_at(a->y, dtype, t * a->y_stride) : NULL;
  if (!touched && y) {
    memcpy(out, y, (size_t)a->n * eff_size(dtype));
    return;
  }
  if (y) {
    eff_load_row(dtype, y, wide, a->n);
    for (int64_t i = 0; i < a->n; i++) sums[i] = wide[i] + sums[i];
  }
  eff_store_row(dtype, sums, out, a->n);
}

static void item(void *ctx, int64_t index) {
  job *j = ctx;
  const args *a = j->a;
  const int64_t from = index * j->rows, to = MIN(a->t, from + j->rows), rows = to - from;
  const int widen = a->x_dtype != EFF_F32 || a->x_stride != a->k;
  const size_t floats = (size_t)((widen ? rows * a->k : 0) + MR * a->r + rows * a->n + a->n);
  char *memory = eff_scratch(floats * 4 + (size_t)(rows * a->places) * sizeof(pair) + 6 * 64);
  if (!memory) {
    __atomic_store_n(&j->failed, 1, __ATOMIC_RELAXED);
    return;
  }
  char *left = memory;
  pair *pairs = eff_take(&left, (size_t)(rows * a->places) * sizeof(pair));
  float *low = eff_take(&left, (size_t)(MR * a->r) * 4), *sums = eff_take(&left, (size_t)(rows * a->n) * 4);
  float *wide = eff_take(&left, (size_t)a->n * 4);
  const float *x = widen ? eff_take(&left, (size_t)(rows * a->k) * 4) : (const float *)a->x + from * a->k;
  const int64_t count = collect(a, from, to, pairs);
  if (count < 0) {
    __atomic_store_n(&j->failed, 2, __ATOMIC_RELAXED);
  } else {
    memset(sums, 0, (size_t)(rows * a->n) * 4);
    uint8_t touched[ROWS] = {0};
    for (int64_t i = 0; i < count; i++) touched[pairs[i].row] = 1;
    if (widen)
      for (int64_t i = 0; i < rows; i++)
        if (touched[i])
          eff_load_row((eff_dtype)a->x_dtype, eff_at(a->x, (eff_dtype)a->x_dtype, (from + i) * a->x_stride), (float *)x + i * a->k, a->k);
    add(a, count, pairs, x, low, sums);
    for (int64_t i = 0; i < rows; i++) finish(a, from + i, touched[i], sums + i * a->n, wide);
  }
  free(memory);
}

KERNEL(int, eff_grouped_lora, args) {
  const int64_t share = (a->t + a->threads - 1) / MAX(a->threads, 1);
  job j = {a, MAX(1, MIN(ROWS, share)), 0};
  eff_parallel_for((a->t + j.rows - 1) / j.rows, (int)a->threads, item, &j);
  return j.failed;
}
