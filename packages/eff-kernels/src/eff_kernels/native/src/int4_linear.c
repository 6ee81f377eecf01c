/* y = x W^T in integers, for weights of 4 bits that stay packed, or of 8: quantise the rows of x (by their largest magnitude, or
 * by a static scale for each column), exact integer products, the scale of each weight row, bias, one rounding.
 *
 * Up to FEW rows of x meet the packed weights directly (dot4.h), one after the other while a weight row is in the first-level
 * cache. For more rows a tile of weights is unpacked into the first-level
 * cache and multiplied as int8 (dot.h): of each K_BLOCK columns those of even index first, then the odd ones, which is how their
 * activation codes lie too. */
#include "int4_linear.h"
#include "dot4.h"
#include "int8_rows.h"

#include <float.h>

#define ROWS 64 /* rows and columns of an item of work, as in int8_linear.c */
#define COLUMNS 24
#define K_BLOCK 2048
#define RUNS 4
#define TILE 3 /* weight rows at a time */
#define FEW 3

typedef eff_int4_linear_args args;

typedef struct {
  const args *a;
  int64_t row_bytes;  /* of the weight */
  int64_t padded;     /* activation codes of a row */
  eff_act *codes;     /* [m, padded] */
  float *row_scale;   /* [m], NaN for a row that no codes stand for */
  int8_t *halves;     /* [m, k], for few rows and packed weights, instead of `codes`: those of even index, then the odd ones */
  int32_t *sum;       /* [m], of the codes in halves */
  int64_t items, run;
  int failed;
} job;

INLINE int64_t round_up(int64_t n, int64_t step) { return (n + step - 1) / step * step; }

/* codes = x / step, rounded half to even, from -128 to 127, and zeros up to `padded`. Returns 1, or NaN if a quotient is not
 * finite. */
static float static_codes(const float *x, const float *step, int64_t n, eff_act *out, int64_t padded) {
  typedef eff_act codes_of_eight __attribute__((vector_size(EFF_LANES * sizeof(eff_act))));
  eff_vi bad = {0};
  for (int64_t i = 0; i < n; i += EFF_LANES) {
    float last_x[EFF_LANES] = {0}, last_step[EFF_LANES] = {1, 1, 1, 1, 1, 1, 1, 1};
    const int64_t len = MIN(EFF_LANES, n - i);
    const int whole = len == EFF_LANES;
    if (!whole) memcpy(last_x, x + i, (size_t)len * 4), memcpy(last_step, step + i, (size_t)len * 4);
    eff_vf q = eff_vload(whole ? x + i : last_x) / eff_vload(whole ? step + i : last_step);
    bad |= ~(eff_vabs(q) <= eff_splat(FLT_MAX));
    q = eff_vselect(q > eff_splat(127.0f), eff_splat(127.0f), q);
    q = eff_vselect(q < eff_splat(-128.0f), eff_splat(-128.0f), q);
    const codes_of_eight codes = __builtin_convertvector(eff_rounded(q) + EFF_OFFSET, codes_of_eight);
    memcpy(out + i, &codes, (size_t)len * sizeof(eff_act));
  }
  for (int64_t i = n; i < padded; i++) out[i] = eff_act_of(0);
  int any = 0;
  for (int i = 0; i < EFF_LANES; i++) any |= bad[i];
  return any ? NAN : 1.0f;
}

/* Codes in their order -> of each K_BLOCK columns those of even index and then the odd ones, each padded to EFF_STEP. */
static void arrange(const eff_act *codes, int64_t k, eff_act *out) {
  for (int64_t k0 = 0; k0 < k; k0 += K_BLOCK) {
    const int64_t half = MIN(K_BLOCK, k - k0) / 2, room = round_up(half, EFF_STEP);
    eff_act *even = out + k0, *odd = even + room;
    for (int64_t i = 0; i < half; i++) even[i] = codes[k0 + 2 * i], odd[i] = codes[k0 + 2 * i + 1];
    for (int64_t i = half; i < room; i++) even[i] = odd[i] = eff_act_of(0);
  }
}

/* The same for rows of which there are few, as dot4.h wants them. Returns the sum of the codes. */
static int32_t split(const eff_act *codes, int64_t k, int8_t *even, int8_t *odd) {
  int32_t sum = 0;
  for (int64_t i = 0; i < k / 2; i++) {
    even[i] = (int8_t)((int32_t)codes[2 * i] - EFF_OFFSET), odd[i] = (int8_t)((int32_t)codes[2 * i + 1] - EFF_OFFSET);
    sum += even[i] + odd[i];
  }
  return sum;
}

static void quantise_row(void *ctx, int64_t r) {
  job *j = ctx;
  const args *a = j->a;
  const eff_dtype dtype = (eff_dtype)a->x_dtype;
  const size_t wide = dtype == EFF_F32 ? 0 : (size_t)round_up(a->k, 16) * 4;
  const void *row = eff_at(a->x, dtype, r * a->x_stride);
  char *scratch = eff_scratch(wide + (a->packed ? (size_t)a->k * sizeof(eff_act) : 0));
  if (!scratch) {
    j->failed = 1;
    return;
  }
  if (wide) eff_load_row(dtype, row, (float *)scratch, a->k), row = scratch;
  eff_act *codes = a->packed ? (eff_act *)(scratch + wide) : j->codes + r * j->padded;
  const int64_t padded = a->packed ? a->k : j->padded;
  if (a->x_scale) {
    j->row_scale[r] = static_codes(row, a->x_scale, a->k, codes, padded);
  } else {
    const float absmax = eff_scan_row(row, a->k, 0.0f, NULL, NULL);
    eff_row_codes(row, a->k, absmax, codes, padded);
    j->row_scale[r] = absmax / 127.0f;
  }
  if (j->halves)
    j->sum[r] = split(codes, a->k, j->halves + r * a->k, j->halves + r * a->k + a->k / 2);
  else if (a->packed)
    arrange(codes, a->k, j->codes + r * j->padded);
  free(scratch);
}

/* `pairs` bytes -> as many low halves and, from `room` on, high halves. */
static void unpack(const uint8_t *src, int64_t pairs, int8_t *restrict out, int64_t room) {
  for (int64_t i = 0; i < pairs; i++) out[i] = (int8_t)(((src[i] & 15) ^ 8) - 8);
  for (int64_t i = 0; i < pairs; i++) out[room + i] = (int8_t)(((src[i] >> 4) ^ 8) - 8);
  for (int64_t i = pairs; i < room; i++) out[i] = out[room + i] = 0;
}

/* One function per number of rows of x: each gets its own registers. */
#define DOT(MR, FIRST)                                                                                                      \
  static __attribute__((noinline)) void dot_##MR##_##FIRST(const eff_act *a, int64_t lda, const int8_t *b, int64_t ldb, \
                                                           int64_t k, int32_t *surplus, int32_t *c) {                  \
    eff_dot_block(MR, TILE, FIRST, a, lda, b, ldb, k, surplus, c, COLUMNS);                                                 \
  }
DOT(1, 0) DOT(2, 0) DOT(3, 0) DOT(1, 1) DOT(2, 1) DOT(3, 1)

/* sums[m, n] of rows m0.. and weight rows n0.. */
static void tile_sums(const job *j, int64_t m0, int rows, int64_t n0, int columns, int32_t *sums) {
  const args *a = j->a;
  const int64_t lda = j->padded;
  int32_t surplus[COLUMNS];
  int8_t tile[TILE * K_BLOCK];
  memset(sums, 0, sizeof(int32_t) * COLUMNS * (size_t)rows);
  for (int64_t k0 = 0; k0 < a->k; k0 += K_BLOCK) {
    const eff_act *codes = j->codes + m0 * lda + k0;
    const int64_t k = MIN(K_BLOCK, a->k - k0);
    const int64_t room = round_up(k / 2, EFF_STEP), bytes = a->packed ? k / 2 : k;
    for (int n = 0; n < columns; n += TILE) { /* these weight rows stay in the first-level cache while all rows of x pass */
      const int rest = MIN(TILE, columns - n);
      const uint8_t *w = a->w + (n0 + n) * j->row_bytes + (a->packed ? k0 / 2 : k0);
      const int8_t *b = (const int8_t *)w;
      int64_t ldb = j->row_bytes, len = k;
      if (a->packed || rest < TILE) {
        if (rest < TILE) memset(tile, 0, sizeof tile);
        for (int i = 0; i < rest; i++) {
          if (a->packed)
            unpack(w + i * j->row_bytes, k / 2, tile + i * K_BLOCK, room);
          else
            memcpy(tile + i * K_BLOCK, w + i * j->row_bytes, (size_t)k);
        }
        b = tile, ldb = K_BLOCK, len = a->packed ? 2 * room : k;
      }
      for (int i = 0; i < TILE; i++) /* of the next tile, which arrives while this one is multiplied */
        for (int64_t at = 0; at < bytes; at += 64) __builtin_prefetch(w + (TILE + i) * j->row_bytes + at, 0, 2);
      int m = 0;
#define ARGUMENTS codes + m * lda, lda, b, ldb, len, surplus + n, sums + m * COLUMNS + n
      if (rows >= 3) dot_3_1(ARGUMENTS), m = 3;
      for (; m + 3 <= rows; m += 3) dot_3_0(ARGUMENTS);
      if (rows - m == 2) m ? dot_2_0(ARGUMENTS) : dot_2_1(ARGUMENTS);
      if (rows - m == 1) m ? dot_1_0(ARGUMENTS) : dot_1_1(ARGUMENTS);
#undef ARGUMENTS
    }
  }
}

static void product_item(job *j, int64_t item) {
  const args *a = j->a;
  const int64_t tiles = (a->n + COLUMNS - 1) / COLUMNS;
  const int64_t m0 = item / tiles * ROWS, n0 = item % tiles * COLUMNS;
  const int rows = (int)MIN(ROWS, a->m - m0), columns = (int)MIN(COLUMNS, a->n - n0);
  int32_t sums[ROWS * COLUMNS];
  if (j->halves) {
    for (int n = 0; n < columns; n++)
      for (int m = 0; m < rows; m++) {
        const int8_t *even = j->halves + m * a->k;
        sums[m * COLUMNS + n] = eff_dot4_row(even, even + a->k / 2, j->sum[m], a->w + (n0 + n) * j->row_bytes, a->k / 2);
      }
#if EFF_ROW_STEP == EFF_STEP /* else eff_dot_row takes no code of -128 */
  } else if (a->m == 1) {
    for (int n = 0; n < columns; n++) sums[n] = eff_dot_row(j->codes, (const int8_t *)a->w + (n0 + n) * a->k, a->k);
#endif
  } else {
    tile_sums(j, m0, rows, n0, columns, sums);
  }
  float bias[COLUMNS] = {0}, out[COLUMNS];
  if (a->bias) eff_load_row((eff_dtype)a->bias_dtype, eff_at(a->bias, (eff_dtype)a->bias_dtype, n0), bias, columns);
  for (int m = 0; m < rows; m++) {
    for (int n = 0; n < columns; n++)
      out[n] = (float)sums[m * COLUMNS + n] * j->row_scale[m0 + m] * a->w_scale[n0 + n] + bias[n];
    eff_store_row((eff_dtype)a->y_dtype, out, eff_at_mut(a->y, (eff_dtype)a->y_dtype, (m0 + m) * a->n + n0), columns);
  }
}

/* A run of items that lie one after the other in memory, as in int8_linear.c. */
static void product_run(void *ctx, int64_t run) {
  job *j = ctx;
  for (int64_t i = run * j->run; i < MIN((run + 1) * j->run, j->items); i++) product_item(j, i);
}

int eff_int4_linear(const args *a) {
  const int64_t m = a->m, k = a->k;
  const int few = m <= FEW && a->packed;
  job j = {.a = a, .row_bytes = a->packed ? k / 2 : k};
  j.padded = a->packed ? k / K_BLOCK * K_BLOCK + 2 * round_up(k % K_BLOCK / 2, EFF_STEP) : round_up(k, EFF_STEP);
  const size_t codes = (size_t)round_up(few ? m * k : m * j.padded * (int64_t)sizeof(eff_act), 64);
  char *scratch = eff_scratch(codes + (size_t)m * 8);
  if (!scratch) return 1;
  j.codes = (eff_act *)scratch, j.row_scale = (float *)(scratch + codes), j.sum = (int32_t *)(j.row_scale + m);
  if (few) j.halves = (int8_t *)scratch;
  eff_parallel_for(m, m * k < 65536 ? 1 : (int)a->threads, quantise_row, &j);
  if (!j.failed) {
    j.items = (m + ROWS - 1) / ROWS * ((a->n + COLUMNS - 1) / COLUMNS), j.run = MAX(1, j.items / (a->threads * RUNS));
    eff_parallel_for((j.items + j.run - 1) / j.run, (int)a->threads, product_run, &j);
  }
  free(scratch);
  return j.failed;
}
