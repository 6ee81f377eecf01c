/* y = x W^T + bias for a weight in packed 4-bit floats: nvfp4 or mxfp4.
 *
 * Each output is the same sum in the same order whatever the number of rows of x, so that the result of a row never depends
 * on its neighbours in the batch. A few rows are multiplied by weights that are decoded in registers, straight from memory;
 * for more rows a panel of weights is decoded once into scratch memory. */
#include "fp4_linear.h"
#include "fp4.h"

#define FUSED_ROWS 4 /* up to so many rows of x, weights are decoded in registers */
#define FUSED_RUN 32 /* at most so many rows of the weight, a multiple of FP4_FUSED, are an item of work then */
#define ROWS 64      /* else an item is ROWS x COLUMNS outputs */
#define COLUMNS 16
#define PANEL 4 /* rows of the weight that are decoded at a time */
#define BLOCK_STEPS (1024 / FP4_STEP) /* the lanes of a sum are joined after so many steps */
#define AHEAD 1024     /* bytes of the weight that are fetched ahead */

typedef eff_fp4_linear_args args;

typedef struct {
  const args *a;
  float *x;                  /* [m, steps, FP4_STEP], see eff_fp4_place */
  int64_t steps, x_row, run; /* run: rows of the weight in an item, for few rows of x */
  float factor;
} job;

/* FP4_STEP decoded weights of a row. */
typedef struct {
  eff_fp4_vec w[8];
  eff_fp4_vec scale[8 / FP4_SHARE];
} step;

static void prepare_row(void *ctx, int64_t m) {
  const job *j = ctx;
  const args *a = j->a;
  const eff_dtype dtype = (eff_dtype)a->x_dtype;
  for (int64_t s = 0; s < j->steps; s++) {
    const void *x = eff_at(a->x, dtype, m * a->x_stride + s * FP4_STEP);
    float *out = j->x + m * j->x_row + s * FP4_STEP, in[FP4_STEP] = {0};
    eff_load_row(dtype, x, in, MIN(FP4_STEP, a->k - s * FP4_STEP));
    for (int v = 0; v < 8; v++)
      for (int l = 0; l < FP4_WIDTH; l++) out[v * FP4_WIDTH + l] = in[eff_fp4_place(v, l)];
  }
}

/* Where row n of the weight begins. */
typedef struct {
  const uint8_t *packed, *scale;
} row;

INLINE row row_at(const int format, const args *a, int64_t n) {
  return (row){a->packed + n * (a->k / 2), a->scale + n * (a->k / eff_fp4_block(format))};
}

INLINE void decode_step(const int format, row r, int64_t k, int64_t s, step *d) {
  const int64_t block = eff_fp4_block(format), left = k - s * FP4_STEP;
  const uint8_t *p = r.packed + s * (FP4_STEP / 2), *scale = r.scale + s * (FP4_STEP / block);
  if (__builtin_expect(left >= FP4_STEP, 1)) {
    eff_fp4_decode(p, d->w);
    eff_fp4_scales(format, scale, FP4_STEP / block, d->scale);
  } else {
    eff_fp4_decode_tail(p, left / 2, d->w);
    eff_fp4_scales(format, scale, left / block, d->scale);
  }
  for (int v = 0; !FP4_SUM_FIRST && v < 8; v++) d->w[v] *= d->scale[v / FP4_SHARE];
}

/* Whether a scale of row n is NaN, which the decoder does not see: all outputs of the row are then NaN. */
static int has_nan(const args *a, int64_t n) {
  const int format = (int)a->format;
  const int64_t blocks = a->k / eff_fp4_block(format);
  const uint8_t *s = row_at(format, a, n).scale, mask = format == EFF_NVFP4 ? 0x7f : 0xff;
  uint8_t found = 0;
  for (int64_t i = 0; i < blocks; i++) found |= (s[i] & mask) == mask;
  return found;
}

/* sums[m * FUSED_RUN + n] = sum_k x[m, k] * w[n0 + n, k] for MR rows of x and n < FP4_FUSED, the weight decoded in registers. */
INLINE void fused(const int format, const int MR, const job *j, int64_t n0, float *sums) {
  const int64_t k = j->a->k, steps = j->steps;
  row r[FP4_FUSED]; /* past the end the last row takes part again; nobody looks at its sums */
  for (int n = 0; n < FP4_FUSED; n++) r[n] = row_at(format, j->a, MIN(n0 + n, j->a->n - 1));
  for (int n = 0; n < FP4_FUSED; n++)
    for (int m = 0; m < MR; m++) sums[m * FUSED_RUN + n] = 0.0f;
  for (int64_t s0 = 0; s0 < steps; s0 += BLOCK_STEPS) {
    const int64_t end = MIN(steps, s0 + BLOCK_STEPS);
    eff_fp4_vec acc[FP4_FUSED][FUSED_ROWS];
    for (int n = 0; n < FP4_FUSED; n++)
      for (int m = 0; m < MR; m++) acc[n][m] = eff_fp4_zero();
    for (int64_t s = s0; s < end; s++)
#pragma GCC unroll 4
      for (int n = 0; n < FP4_FUSED; n++) {
        step d;
        __builtin_prefetch(r[n].packed + s * (FP4_STEP / 2) + AHEAD);
        decode_step(format, r[n], k, s, &d);
#pragma GCC unroll 4
        for (int m = 0; m < MR; m++) {
          const float *x = j->x + m * j->x_row + s * FP4_STEP;
          eff_fp4_vec sum = FP4_SUM_FIRST ? eff_fp4_zero() : acc[n][m];
#pragma GCC unroll 8
          for (int v = 0; v < 8; v++) sum = eff_fp4_fma(eff_fp4_load(x + v * FP4_WIDTH), d.w[v], sum);
          acc[n][m] = FP4_SUM_FIRST ? eff_fp4_fma(sum, d.scale[0], acc[n][m]) : sum;
        }
      }
    for (int n = 0; n < FP4_FUSED; n++)
      for (int m = 0; m < MR; m++) sums[m * FUSED_RUN + n] += sum_lanes(eff_fp4_fold(acc[n][m]));
  }
}

/* sums[m * COLUMNS + n] += sum_k x[m, k] * w[n, k] over at most BLOCK_STEPS steps, for MR rows of x and PANEL decoded rows of the
 * weight. */
INLINE void block(const int MR, const float *x, int64_t x_row, const step *w, int64_t steps, float *sums) {
  eff_fp4_vec acc[PANEL][FP4_ROWS];
  for (int n = 0; n < PANEL; n++)
    for (int m = 0; m < MR; m++) acc[n][m] = eff_fp4_zero();
  for (int64_t s = 0; s < steps; s++, x += FP4_STEP) {
#if FP4_SUM_FIRST
#pragma GCC unroll 4
    for (int n = 0; n < PANEL; n++) {
      const step *d = w + n * BLOCK_STEPS + s;
      eff_fp4_vec sum[FP4_ROWS];
      for (int m = 0; m < MR; m++) sum[m] = eff_fp4_zero();
#pragma GCC unroll 8
      for (int v = 0; v < 8; v++)
#pragma GCC unroll 4
        for (int m = 0; m < MR; m++) sum[m] = eff_fp4_fma(eff_fp4_load(x + m * x_row + v * FP4_WIDTH), d->w[v], sum[m]);
      for (int m = 0; m < MR; m++) acc[n][m] = eff_fp4_fma(sum[m], d->scale[0], acc[n][m]);
    }
#else
#pragma GCC unroll 8
    for (int v = 0; v < 8; v++) {
      eff_fp4_vec xv[FP4_ROWS];
#pragma GCC unroll 4
      for (int m = 0; m < MR; m++) xv[m] = eff_fp4_load(x + m * x_row + v * FP4_WIDTH);
#pragma GCC unroll 4
      for (int n = 0; n < PANEL; n++) {
        eff_fp4_vec wide = w[n * BLOCK_STEPS + s].w[v];
        EFF_ROUNDED(wide); /* one load, not one for each multiply-add */
#pragma GCC unroll 4
        for (int m = 0; m < MR; m++) acc[n][m] = eff_fp4_fma(xv[m], wide, acc[n][m]);
      }
    }
#endif
  }
  for (int m = 0; m < MR; m++) {
    const eff_vf v[PANEL] = {eff_fp4_fold(acc[0][m]), eff_fp4_fold(acc[1][m]), eff_fp4_fold(acc[2][m]), eff_fp4_fold(acc[3][m])};
    add_lanes_of_four(v, sums + m * COLUMNS);
  }
}

/* One function per shape and format: each gets its own registers. */
#define FUSED(NAME, FORMAT, MR) \
  static __attribute__((noinline)) void fused_##NAME##_##MR(const job *j, int64_t n, float *out) { fused(FORMAT, MR, j, n, out); }
#define FUSED_ALL(NAME, FORMAT)                                                                                                \
  FUSED(NAME, FORMAT, 1) FUSED(NAME, FORMAT, 2) FUSED(NAME, FORMAT, 3) FUSED(NAME, FORMAT, 4)                                  \
  static void (*const fused_##NAME[FUSED_ROWS])(const job *, int64_t, float *) = {                                             \
      fused_##NAME##_1, fused_##NAME##_2, fused_##NAME##_3, fused_##NAME##_4};
FUSED_ALL(nvfp4, EFF_NVFP4)
FUSED_ALL(mxfp4, EFF_MXFP4)
#define BLOCK(MR)                                                                                                              \
  static __attribute__((noinline)) void block_##MR(const float *x, int64_t x_row, const step *w, int64_t steps, float *sums) { \
    block(MR, x, x_row, w, steps, sums);                                                                                       \
  }
BLOCK(1) BLOCK(2) BLOCK(3)
#if FP4_ROWS == 4
BLOCK(4)
#endif

/* y of `rows` rows and `columns` outputs from (m0, n0) on; the sums of a row of x lie `stride` apart. */
static void finish(const job *j, int64_t m0, int64_t n0, int64_t rows, int64_t columns, float *sums, int64_t stride) {
  const args *a = j->a;
  const eff_dtype dtype = (eff_dtype)a->y_dtype;
  for (int64_t n = 0; n < columns; n++) {
    const float factor = has_nan(a, n0 + n) ? NAN : j->factor, bias = a->bias ? a->bias[n0 + n] : 0.0f;
    for (int64_t m = 0; m < rows; m++) sums[m * stride + n] = sums[m * stride + n] * factor + bias;
  }
  for (int64_t m = 0; m < rows; m++)
    eff_store_row(dtype, sums + m * stride, eff_at_mut(a->y, dtype, (m0 + m) * a->n + n0), columns);
}

static void fused_item(void *ctx, int64_t item) {
  const job *j = ctx;
  const args *a = j->a;
  const int64_t n0 = item * j->run, columns = MIN(j->run, a->n - n0);
  float sums[FUSED_ROWS * FUSED_RUN];
  for (int64_t n = 0; n < columns; n += FP4_FUSED)
    (a->format == EFF_NVFP4 ? fused_nvfp4 : fused_mxfp4)[a->m - 1](j, n0 + n, sums + n);
  finish(j, 0, n0, a->m, columns, sums, FUSED_RUN);
}

static void panel_item(void *ctx, int64_t item) {
  static void (*const functions[])(const float *, int64_t, const step *, int64_t, float *) = {
      block_1, block_2, block_3,
#if FP4_ROWS == 4
      block_4,
#endif
  };
  const job *j = ctx;
  const args *a = j->a;
  const int64_t tiles = (a->n + COLUMNS - 1) / COLUMNS, m0 = item / tiles * ROWS, n0 = item % tiles * COLUMNS;
  const int64_t rows = MIN(ROWS, a->m - m0), columns = MIN(COLUMNS, a->n - n0);
  float sums[ROWS * COLUMNS] = {0};
  step panel[PANEL * BLOCK_STEPS];
  memset(panel, 0, sizeof panel);
  for (int64_t s0 = 0; s0 < j->steps; s0 += BLOCK_STEPS) {
    const int64_t steps = MIN(BLOCK_STEPS, j->steps - s0);
    for (int64_t n = 0; n < columns; n += PANEL) {
      for (int64_t i = 0; i < MIN(PANEL, columns - n); i++) /* what is left of another panel is summed, and not looked at */
        for (int64_t s = 0; s < steps; s++)
          if (a->format == EFF_NVFP4)
            decode_step(EFF_NVFP4, row_at(EFF_NVFP4, a, n0 + n + i), a->k, s0 + s, panel + i * BLOCK_STEPS + s);
          else
            decode_step(EFF_MXFP4, row_at(EFF_MXFP4, a, n0 + n + i), a->k, s0 + s, panel + i * BLOCK_STEPS + s);
      for (int64_t m = 0; m < rows; m += FP4_ROWS)
        functions[MIN(FP4_ROWS, rows - m) - 1](j->x + (m0 + m) * j->x_row + s0 * FP4_STEP, j->x_row, panel, steps,
                                               sums + m * COLUMNS + n);
    }
  }
  finish(j, m0, n0, rows, columns, sums, COLUMNS);
}

KERNEL(int, eff_fp4_linear, args) {
  job j = {.a = a, .steps = (a->k + FP4_STEP - 1) / FP4_STEP, .factor = a->format == EFF_NVFP4 ? EFF_E4M3_FACTOR : 1.0f};
  for (int i = 0; i < 2; i++) j.factor *= a->factors[i] ? *a->factors[i] : 1.0f;
  j.x_row = j.steps * FP4_STEP;
  j.x = eff_scratch((size_t)(a->m * j.x_row) * sizeof(float));
  if (!j.x) return 1;
  eff_parallel_for(a->m, a->m * a->k < 65536 ? 1 : (int)a->threads, prepare_row, &j);
  if (a->m <= FUSED_ROWS) {
    j.run = MAX(FP4_FUSED, MIN(FUSED_RUN, a->n / (a->threads * 4) / FP4_FUSED * FP4_FUSED));
    eff_parallel_for(a->m ? (a->n + j.run - 1) / j.run : 0, (int)a->threads, fused_item, &j);
  } else {
    eff_parallel_for((a->m + ROWS - 1) / ROWS * ((a->n + COLUMNS - 1) / COLUMNS), (int)a->threads, panel_item, &j);
  }
  free(j.x);
  return 0;
}
