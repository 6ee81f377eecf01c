/* The tile of int8_linear and int4_linear: ROWS x COLUMNS outputs, whose activation codes stay in the second-level cache and
 * whose weights stay in the first. AVX-512 has one of its own; this one is on the dot products of dot.h. */
#pragma once
#include "int8_rows.h"

#define PAIRS 64 /* bytes of packed weights that are unpacked together */

/* The codes of all rows of x: k columns in groups, each group of each row with a scale of its own; and how weights are stored.
 * Packed weights hold two columns in a byte. Of each 2 * PAIRS columns the codes of x are then in another order, the even ones
 * before the odd ones, with zeros for what is missing of the last; k counts these zeros, and there is one group. */
typedef struct {
  eff_act *codes; /* [rows, padded] */
  eff_row *row;   /* [padded to EFF_ROW_STEP], for one row: the codes as eff_dot_row takes them */
  float *scale;   /* [rows, groups] */
  int32_t *surplus; /* [rows, groups] */
  int64_t rows, k, padded, group, groups;
  int64_t stride; /* bytes of a weight row */
  int packed;
} tile_rows;

#define TILE_AHEAD 8192 /* bytes of weights that are fetched ahead for a lone row with AVX-512 */

#if EFF_STEP == 64
#include "int8_tile_512.h"
#else

#define ROWS 64
#define COLUMNS 24
#define LONE 8 /* columns at a time of a lone row of x */
#define K_BLOCK 2048

INLINE void tile_codes(eff_act *codes, const tile_rows *t, int64_t r) {
  for (int64_t i = 0; t->rows == 1 && i < t->padded; i++) t->row[i] = (eff_row)codes[i];
  (void)r;
}

/* One function per block shape: each gets its own registers. */
#define DOT(MR, NR, FIRST)                                                                                                   \
  static __attribute__((noinline)) void dot_##MR##x##NR##_##FIRST(const eff_act *a, int64_t lda, const int8_t *b, int64_t ldb, \
                                                                  int64_t k, int32_t *surplus, int32_t *c) {                 \
    eff_dot_block(MR, NR, FIRST, a, lda, b, ldb, k, surplus, c, COLUMNS);                                                    \
  }
DOT(1, 3, 0) DOT(2, 3, 0) DOT(3, 3, 0) DOT(1, 3, 1) DOT(2, 3, 1) DOT(3, 3, 1)
DOT(1, 1, 0) DOT(1, 1, 1)

/* sum + exact * scale, with one rounding where the processor has the instruction, in every path alike. */
INLINE float add_scaled(int32_t exact, float scale, float sum) {
#if defined(__FMA__)
  return fmaf((float)exact, scale, sum);
#else
  float product = (float)exact * scale;
  EFF_ROUNDED(product);
  return sum + product;
#endif
}

/* `len` columns of some weight rows from k on as int8, unpacked into `room` if they are not. */
INLINE const int8_t *weights_at(const tile_rows *t, const int8_t *w, int rows, int64_t k, int64_t len, int8_t *room) {
  if (!t->packed) return w + k;
  for (int n = 0; n < rows; n++)
    for (int64_t i = 0; i < len; i += 2 * PAIRS) {
      uint8_t tail[PAIRS] = {0};
      const int64_t at = (k + i) / 2;
      const uint8_t *pairs = (const uint8_t *)w + n * t->stride + at;
      int8_t *restrict out = room + n * K_BLOCK + i;
      if (t->stride - at < PAIRS) pairs = memcpy(tail, pairs, (size_t)(t->stride - at));
      for (int j = 0; j < PAIRS; j++) out[j] = (int8_t)(((pairs[j] & 15) ^ 8) - 8);
      for (int j = 0; j < PAIRS; j++) out[PAIRS + j] = (int8_t)(((pairs[j] >> 4) ^ 8) - 8);
    }
  return room;
}

/* c += the exact sums over columns k0 to k1. */
INLINE void exact_sums(const tile_rows *t, const eff_act *codes, int rows, const int8_t *w, int columns, int64_t k0, int64_t k1,
                       int32_t *c) {
  int32_t surplus[COLUMNS];
  int8_t room[3 * K_BLOCK];
  const int64_t ldb = t->packed ? K_BLOCK : t->stride;
  for (int64_t k = k0; k < k1; k += K_BLOCK) {
    const int64_t len = MIN(K_BLOCK, k1 - k);
    const eff_act *a = codes + k;
    int n = 0;
    for (; n + 3 <= columns; n += 3) { /* three weight rows stay in the first-level cache while all rows of x pass */
      const int8_t *b = weights_at(t, w + n * t->stride, 3, k, len, room);
      int m = 0;
#define ARGUMENTS a + m * t->padded, t->padded, b, ldb, len, surplus + n, c + m * COLUMNS + n
      if (rows >= 3) dot_3x3_1(ARGUMENTS), m = 3;
      for (; m + 3 <= rows; m += 3) dot_3x3_0(ARGUMENTS);
      if (rows - m == 2) m ? dot_2x3_0(ARGUMENTS) : dot_2x3_1(ARGUMENTS);
      if (rows - m == 1) m ? dot_1x3_0(ARGUMENTS) : dot_1x3_1(ARGUMENTS);
#undef ARGUMENTS
    }
    for (; n < columns; n++) {
      const int8_t *b = weights_at(t, w + n * t->stride, 1, k, len, room);
      for (int m = 0; m < rows; m++)
        (m ? dot_1x1_0 : dot_1x1_1)(a + m * t->padded, t->padded, b, ldb, len, surplus + n, c + m * COLUMNS + n);
    }
  }
}

/* sums[m * COLUMNS + n] = the int8 product of rows r0 + m of x and n of w, scaled by the groups of x. */
INLINE void tile_product(const tile_rows *t, int64_t r0, int rows, const int8_t *w, int columns, float *sums) {
  int32_t exact[ROWS * COLUMNS];
  memset(sums, 0, sizeof(float) * COLUMNS * (size_t)rows);
  for (int64_t n = 0; t->rows == 1 && n < columns; n++)
    for (int64_t g = 0; g < t->groups; g++) {
      const int64_t k = g * t->group;
      sums[n] = add_scaled(eff_dot_row(t->row + k, w + n * t->stride + k, MIN(t->group, t->k - k)), t->scale[g], sums[n]);
    }
  for (int64_t g = 0; t->rows > 1 && g < t->groups; g++) {
    memset(exact, 0, sizeof(int32_t) * COLUMNS * (size_t)rows);
    exact_sums(t, t->codes + r0 * t->padded, rows, w, columns, g * t->group, MIN(t->k, (g + 1) * t->group), exact);
    for (int m = 0; m < rows; m++)
      for (int n = 0; n < columns; n++) {
        const int i = m * COLUMNS + n;
        sums[i] = add_scaled(exact[i], t->scale[(r0 + m) * t->groups + g], sums[i]);
      }
  }
}
#endif
