/* Several rows of x on matrix tiles: sums of int32, exact, so that the result is that of every other way to multiply. */
#pragma once
#include "int8_tile.h"
#include "tiles.h"

#if EFF_TILES
#include "transpose.h"
#define TILE_BYTES 64 /* codes that one product sums over */
#define TILED_ROWS 32 /* from here on: prompts; a step of decoding rarely has as many rows */

/* Whether a product goes over the tiles: groups have to end where tiles do. */
INLINE int tiles_fit(const tile_rows *t) {
  return t->rows >= TILED_ROWS && !t->packed && (t->groups == 1 || t->group % TILE_BYTES == 0) && eff_tiles_are_lent();
}

/* Bytes of the codes in quads. */
INLINE size_t quads_bytes(const tile_rows *t) { return (size_t)(eff_round_up(t->rows, TILE) * eff_round_up(t->k, TILE_BYTES)); }

/* Sixteen rows of codes in quads: [k / 64][16 quads][16 rows]. Rows that are not there repeat the last one. */
INLINE void put_quads(const tile_rows *t, int64_t r0, int32_t *quads) {
  for (int64_t k = 0; k < t->k; k += TILE_BYTES, quads += TILE_DWORDS) {
    __m512i v[TILE];
#pragma GCC unroll 16
    for (int i = 0; i < TILE; i++) v[i] = _mm512_loadu_si512(t->codes + MIN(r0 + i, t->rows - 1) * t->padded + k);
    transpose_dwords(v);
#pragma GCC unroll 16
    for (int i = 0; i < TILE; i++) _mm512_store_si512(quads + i * TILE, v[i]);
  }
}

/* Sums of sixteen outputs by sixteen rows become floats, scaled by the group of the row. */
INLINE void add_scaled(const tile_rows *t, const int32_t *exact, int64_t r0, int rows, int64_t g, float *sums) {
  __m512i v[TILE];
#pragma GCC unroll 16
  for (int i = 0; i < TILE; i++) v[i] = _mm512_load_si512(exact + i * TILE);
  transpose_dwords(v);
#pragma GCC unroll 16
  for (int i = 0; i < TILE; i++) {
    if (i >= rows) break;
    float *sum = sums + i * COLUMNS;
    const __m512 scale = _mm512_set1_ps(t->scale[(r0 + i) * t->groups + g]);
    _mm512_storeu_ps(sum, _mm512_fmadd_ps(_mm512_cvtepi32_ps(v[i]), scale, _mm512_loadu_ps(sum)));
  }
}

/* As tile_product. `quads`: those of all rows. */
static __attribute__((noinline)) void product_on_tiles(const tile_rows *t, const int32_t *quads, int64_t r0, int rows, const int8_t *w,
                                                       int columns, float *sums) {
  const int64_t of_tile = eff_round_up(t->k, TILE_BYTES) * TILE / 4;
  int8_t own[2 * TILE * TILE_BYTES] __attribute__((aligned(64)));
  int32_t exact[4][TILE_DWORDS] __attribute__((aligned(64)));
  memset(sums, 0, sizeof(float) * COLUMNS * (size_t)rows);
  for (int r = 0; r < rows; r += 2 * TILE) {
    const int two = r + TILE < rows;
    const int32_t *x = quads + (r0 + r) / TILE * of_tile;
    for (int64_t g = 0, k = 0; g < t->groups; g++) {
      const int64_t end = MIN(t->k, (g + 1) * t->group);
      _tile_zero(0);
      _tile_zero(1);
      _tile_zero(2);
      _tile_zero(3);
      for (; k < end; k += TILE_BYTES) {
        const int8_t *rows_of = w + k;
        int64_t stride = t->stride;
        if (columns < 2 * TILE || k + TILE_BYTES > t->k) { /* nothing is read behind the weights */
          memset(own, 0, sizeof own);
          for (int n = 0; n < columns; n++) memcpy(own + n * TILE_BYTES, w + n * t->stride + k, (size_t)MIN(TILE_BYTES, t->k - k));
          rows_of = own, stride = TILE_BYTES;
        }
        _tile_loadd(4, rows_of, stride);
        _tile_loadd(5, rows_of + TILE * stride, stride);
        _tile_loadd(6, x + k * TILE / 4, 64);
        _tile_dpbssd(0, 4, 6);
        _tile_dpbssd(1, 5, 6);
        if (two) {
          _tile_loadd(7, x + of_tile + k * TILE / 4, 64);
          _tile_dpbssd(2, 4, 7);
          _tile_dpbssd(3, 5, 7);
        }
      }
      _tile_stored(0, exact[0], 64);
      _tile_stored(1, exact[1], 64);
      add_scaled(t, exact[0], r0 + r, MIN(TILE, rows - r), g, sums + r * COLUMNS);
      add_scaled(t, exact[1], r0 + r, MIN(TILE, rows - r), g, sums + r * COLUMNS + TILE);
      if (two) {
        _tile_stored(2, exact[2], 64);
        _tile_stored(3, exact[3], 64);
        add_scaled(t, exact[2], r0 + r + TILE, MIN(TILE, rows - r - TILE), g, sums + (r + TILE) * COLUMNS);
        add_scaled(t, exact[3], r0 + r + TILE, MIN(TILE, rows - r - TILE), g, sums + (r + TILE) * COLUMNS + TILE);
      }
    }
  }
}
#else
INLINE int tiles_fit(const tile_rows *t) { return (void)t, 0; }
INLINE size_t quads_bytes(const tile_rows *t) { return (void)t, 0; }
INLINE void put_quads(const tile_rows *t, int64_t r0, int32_t *quads) { (void)t, (void)r0, (void)quads; }
INLINE void product_on_tiles(const tile_rows *t, const int32_t *quads, int64_t r0, int rows, const int8_t *w, int columns, float *sums) {
  (void)t, (void)quads, (void)r0, (void)rows, (void)w, (void)columns, (void)sums;
}
#endif
