/* The tile of int8_linear with AVX-512 VNNI.
 *
 * The instruction multiplies unsigned by signed bytes: weights are made unsigned on their way (w + 128, one exclusive or; w + 8
 * for packed ones), and the surplus, 128 or 8 times the sum of the activation codes, is known before any weight is read. All is
 * exact in int32 as in dot.h.
 *
 * Several rows of x: weights are transposed as they come, so that a lane is an output. No sum then runs across lanes, and what
 * a group costs at its end is shared by 16 outputs. A lone row of x: weights are read as they lie, in one stream. */
#pragma once
#include "int8_rows.h"
#include "transpose.h"

#define ROWS 64
#define COLUMNS 32 /* two vectors of outputs */
#define LONE 16    /* columns at a time of a lone row of x */
#define TILE_CHUNK 256

typedef int8_t tile_code;

/* From what eff_row_codes has written: signed codes, and the surplus of each group. */
INLINE void tile_codes(eff_act *codes, const tile_rows *t, int64_t r) {
  const __m512i flip = _mm512_set1_epi8((char)0x80), offset = _mm512_set1_epi8((char)(t->packed ? 8 : 128));
  for (int64_t i = 0; i < t->padded; i += 64)
    _mm512_storeu_si512(codes + i, _mm512_xor_si512(_mm512_loadu_si512(codes + i), flip));
  for (int64_t g = 0, i = 0; g < t->groups; g++) {
    __m512i sum = _mm512_setzero_si512();
    const int64_t end = MIN(t->k, i + t->group);
    for (; i + 64 <= end; i += 64) sum = _mm512_dpbusd_epi32(sum, offset, _mm512_loadu_si512(codes + i));
    if (i < end) sum = _mm512_dpbusd_epi32(sum, offset, _mm512_maskz_loadu_epi8(~0ull >> (64 - (end - i)), codes + i));
    i = end;
    t->surplus[r * t->groups + g] = _mm512_reduce_add_epi32(sum);
  }
}

INLINE __m512i unsigned_weights(const int8_t *w, int64_t left) {
  const __m512i v = left >= 64 ? _mm512_loadu_si512(w) : _mm512_maskz_loadu_epi8(~0ull >> (64 - left), w);
  return _mm512_xor_si512(v, _mm512_set1_epi8((char)0x80));
}

/* The same for one half of each of 64 pairs: the low one, or with `up` = 4 the high one. */
INLINE __m512i unsigned_halves(const int8_t *w, int64_t left, __m128i up) {
  const __m512i v = left >= 64 ? _mm512_loadu_si512(w) : _mm512_maskz_loadu_epi8(~0ull >> (64 - left), w);
  const __m512i flip = _mm512_set1_epi8(8), mask = _mm512_set1_epi8(15);
  return _mm512_ternarylogic_epi64(_mm512_srl_epi16(v, up), flip, mask, 0x28); /* (half ^ 8) & 15 */
}

/* Lane i of the result is the sum of the lanes of v[i]. */
INLINE __m512i sums_of_16(const __m512i *v) {
  __m512i a[4];
#pragma GCC unroll 4
  for (int i = 0; i < 4; i++) {
    const __m512i *p = v + 4 * i;
    const __m512i b = _mm512_add_epi32(_mm512_unpacklo_epi32(p[0], p[1]), _mm512_unpackhi_epi32(p[0], p[1]));
    const __m512i c = _mm512_add_epi32(_mm512_unpacklo_epi32(p[2], p[3]), _mm512_unpackhi_epi32(p[2], p[3]));
    a[i] = _mm512_add_epi32(_mm512_unpacklo_epi64(b, c), _mm512_unpackhi_epi64(b, c));
  }
  const __m512i b = _mm512_add_epi32(_mm512_shuffle_i32x4(a[0], a[1], 0x88), _mm512_shuffle_i32x4(a[0], a[1], 0xdd));
  const __m512i c = _mm512_add_epi32(_mm512_shuffle_i32x4(a[2], a[3], 0x88), _mm512_shuffle_i32x4(a[2], a[3], 0xdd));
  return _mm512_add_epi32(_mm512_shuffle_i32x4(b, c, 0x88), _mm512_shuffle_i32x4(b, c, 0xdd));
}

/* The dot product of a lone row, one group. */
INLINE float whole_row(const tile_rows *t, const int8_t *w) {
  const tile_code *a = (const tile_code *)t->codes;
  __m512i acc[4];
  for (int i = 0; i < 4; i++) acc[i] = _mm512_setzero_si512();
  int64_t k = 0;
  for (; k + 256 <= t->k; k += 256) {
    for (int i = 0; i < 256; i += 64) __builtin_prefetch(w + k + TILE_AHEAD + i);
#pragma GCC unroll 4
    for (int i = 0; i < 4; i++) {
      const __m512i b = unsigned_weights(w + k + 64 * i, 64);
      acc[i] = _mm512_dpbusd_epi32(acc[i], b, _mm512_loadu_si512(a + k + 64 * i));
    }
  }
  for (; k < t->k; k += 64) acc[0] = _mm512_dpbusd_epi32(acc[0], unsigned_weights(w + k, t->k - k), _mm512_loadu_si512(a + k));
  acc[0] = _mm512_add_epi32(_mm512_add_epi32(acc[0], acc[1]), _mm512_add_epi32(acc[2], acc[3]));
  return (float)(int32_t)((uint32_t)_mm512_reduce_add_epi32(acc[0]) - (uint32_t)t->surplus[0]) * t->scale[0];
}

/* The same with groups of `steps` times 64 columns, 16 groups at a time. */
INLINE float grouped_row(const tile_rows *t, const int8_t *w, const int steps) {
  const tile_code *a = (const tile_code *)t->codes;
  const int64_t whole = t->k / t->group; /* the last group may be shorter */
  float sum = 0.0f;
  for (int64_t g = 0; g < t->groups; g += 16) {
    __m512i acc[16];
    const int n = (int)MIN(16, t->groups - g);
    const int8_t *b = w + g * t->group;
    const tile_code *c = a + g * t->group;
    for (int i = 0; i < 16; i++) {
      acc[i] = _mm512_setzero_si512();
      if (g + i < whole)
        for (int s = 0; s < steps; s++, b += 64, c += 64) {
          __builtin_prefetch(b + TILE_AHEAD);
          acc[i] = _mm512_dpbusd_epi32(acc[i], unsigned_weights(b, 64), _mm512_loadu_si512(c));
        }
      else
        for (int64_t left = i < n ? t->k - (g + i) * t->group : 0; left > 0; left -= 64, b += 64, c += 64)
          acc[i] = _mm512_dpbusd_epi32(acc[i], unsigned_weights(b, left), _mm512_loadu_si512(c));
    }
    const __mmask16 mask = (__mmask16)(0xffffu >> (16 - n));
    const __m512i exact = _mm512_sub_epi32(sums_of_16(acc), _mm512_maskz_loadu_epi32(mask, t->surplus + g));
    float part[16];
    _mm512_storeu_ps(part, _mm512_cvtepi32_ps(exact));
    for (int i = 0; i < n; i++) sum = fmaf(part[i], t->scale[g + i], sum);
  }
  return sum;
}

INLINE float lone_row(const tile_rows *t, const int8_t *w) {
  if (t->groups == 1) return whole_row(t, w);
  return t->group == 64 ? grouped_row(t, w, 1) : t->group == 128 ? grouped_row(t, w, 2) : grouped_row(t, w, (int)(t->group / 64));
}

/* 16 rows of 64 weights -> 16 vectors, each with four weights of every row. Rows from `rows` on and columns from `left` on are
 * without meaning. Of packed weights these are the low halves of 64 bytes, or with `up` = 4 the high ones. */
INLINE void transpose(const int8_t *w, int64_t ldw, const int packed, const int rows, const int64_t left, __m128i up,
                      int32_t *out) {
  __m512i r[16];
#pragma GCC unroll 16
  for (int i = 0; i < 16; i++) {
    const int8_t *row = w + MIN(i, rows - 1) * ldw;
    r[i] = packed ? unsigned_halves(row, left, up) : unsigned_weights(row, left);
  }
  transpose_dwords(r);
#pragma GCC unroll 16
  for (int i = 0; i < 16; i++) _mm512_storeu_si512(out + i * COLUMNS, r[i]);
}

/* MR rows of x, 4 * quads columns of one group, all outputs of the tile: sums of int32 from the `first` part of a group on, a
 * float for each group after the `last`. */
INLINE void group_block(const int MR, const tile_rows *t, int64_t r, int64_t g, const tile_code *a, const int32_t *w,
                        int64_t quads, int first, int last, int32_t *whole, float *sums) {
  __m512i acc[8][2];
#pragma GCC unroll 8
  for (int m = 0; m < MR; m++) {
    const __m512i start = _mm512_set1_epi32((int32_t)(0u - (uint32_t)t->surplus[(r + m) * t->groups + g]));
    acc[m][0] = first ? start : _mm512_loadu_si512(whole + m * COLUMNS);
    acc[m][1] = first ? start : _mm512_loadu_si512(whole + m * COLUMNS + 16);
  }
  for (int64_t q = 0; q < quads; q++) {
    const __m512i w0 = _mm512_loadu_si512(w + q * COLUMNS), w1 = _mm512_loadu_si512(w + q * COLUMNS + 16);
#pragma GCC unroll 8
    for (int m = 0; m < MR; m++) {
      int32_t four;
      memcpy(&four, a + m * t->padded + 4 * q, 4);
      const __m512i x = _mm512_set1_epi32(four);
      acc[m][0] = _mm512_dpbusd_epi32(acc[m][0], w0, x), acc[m][1] = _mm512_dpbusd_epi32(acc[m][1], w1, x);
    }
  }
#pragma GCC unroll 8
  for (int m = 0; m < MR; m++)
    for (int h = 0; h < 2; h++) {
      float *sum = sums + m * COLUMNS + 16 * h;
      const __m512 scale = _mm512_set1_ps(t->scale[(r + m) * t->groups + g]);
      if (last)
        _mm512_storeu_ps(sum, _mm512_fmadd_ps(_mm512_cvtepi32_ps(acc[m][h]), scale, _mm512_loadu_ps(sum)));
      else
        _mm512_storeu_si512(whole + m * COLUMNS + 16 * h, acc[m][h]);
    }
}

/* One function per number of rows: each gets its own registers. */
#define BLOCK(MR)                                                                                                              \
  static __attribute__((noinline)) void group_block_##MR(const tile_rows *t, int64_t r, int64_t g, const tile_code *a,         \
                                                         const int32_t *w, int64_t quads, int first, int last, int32_t *whole, \
                                                         float *sums) {                                                        \
    group_block(MR, t, r, g, a, w, quads, first, last, whole, sums);                                                           \
  }
BLOCK(8) BLOCK(4) BLOCK(2) BLOCK(1)

/* sums[m * COLUMNS + n] = the int8 product of rows r0 + m of x and n of w, scaled by the groups of x. */
INLINE void tile_product(const tile_rows *t, int64_t r0, int rows, const int8_t *w, int columns, float *sums) {
  if (t->rows == 1 && !t->packed && (t->groups == 1 || t->group % 64 == 0)) {
    for (int n = 0; n < columns; n++) sums[n] = lone_row(t, w + n * t->stride);
    return;
  }
  const tile_code *codes = (const tile_code *)t->codes + r0 * t->padded;
  int32_t quads_of[TILE_CHUNK / 4 * COLUMNS] __attribute__((aligned(64)));
  int32_t whole[ROWS * COLUMNS] __attribute__((aligned(64)));
  memset(sums, 0, sizeof(float) * COLUMNS * (size_t)rows);
  const int64_t many = t->group < TILE_CHUNK ? TILE_CHUNK / t->group * t->group : 0; /* whole groups of a chunk; 0: part of one */
  for (int64_t k0 = 0, k1; k0 < t->k; k0 = k1) {
    k1 = MIN(t->k, many ? k0 + many : MIN(k0 + TILE_CHUNK, (k0 / t->group + 1) * t->group));
    for (int64_t k = k0; k < k1; k += 64)
      for (int n = 0; n < columns; n += 16) {
        int32_t *out = quads_of + (k - k0) / 4 * COLUMNS + n;
        const int64_t at = t->packed ? k / (2 * PAIRS) * PAIRS : k, left = t->stride - at;
        const int8_t *b = w + n * t->stride + at;
        const int some = MIN(16, columns - n), whole = some == 16 && left >= 64;
        const __m128i up = _mm_cvtsi32_si128(k & PAIRS ? 4 : 0);
        for (int i = 0; i < some && t->packed; i++) /* what the next tile reads */
          __builtin_prefetch(b + (COLUMNS + i) * t->stride, 0, 2);
        if (t->packed)
          whole ? transpose(b, t->stride, 1, 16, 64, up, out) : transpose(b, t->stride, 1, some, left, up, out);
        else
          whole ? transpose(b, t->stride, 0, 16, 64, up, out) : transpose(b, t->stride, 0, some, left, up, out);
      }
    for (int64_t k = k0, end; k < k1; k = end) {
      const int64_t g = k / t->group, group_end = MIN(t->k, (g + 1) * t->group), quads = (MIN(k1, group_end) - k + 3) / 4;
      end = MIN(k1, group_end);
      const int first = k == g * t->group, last = end == group_end;
      int m = 0;
#define ARGUMENTS t, r0 + m, g, codes + m * t->padded + k, quads_of + (k - k0) / 4 * COLUMNS, quads, first, last, \
                  whole + m * COLUMNS, sums + m * COLUMNS
      for (; m + 8 <= rows; m += 8) group_block_8(ARGUMENTS);
      if (rows - m >= 4) group_block_4(ARGUMENTS), m += 4;
      if (rows - m >= 2) group_block_2(ARGUMENTS), m += 2;
      if (rows - m >= 1) group_block_1(ARGUMENTS);
#undef ARGUMENTS
    }
  }
}
