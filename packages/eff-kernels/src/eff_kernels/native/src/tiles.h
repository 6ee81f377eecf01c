/* Matrix tiles (AMX): eight registers of 16 rows of 64 bytes, multiplied sixteen by sixteen rows at a time.
 *
 * The instruction wants its second factor in "quads": row i holds, for each of sixteen columns, the four int8 of it that lie at
 * 4 i. Products of int8 are exact sums of int32, and so those of every other instruction. */
#pragma once
#include "eff.h"

#if defined(__AMX_INT8__) && defined(__AVX512BW__) && defined(__AVX512VNNI__) && defined(__linux__) && !defined(EFF_NO_VNNI) && \
    !defined(EFF_EMULATE_VNNI) && !defined(EFF_NO_AVX512) && !defined(EFF_NO_TILES) && !defined(EFF_GENERIC)
#define EFF_TILES 1
#define TILE 16 /* rows, and columns of products */
#define TILE_DWORDS (TILE * TILE)

/* Whether the system lends this process the registers. */
int eff_tiles_are_lent(void);

/* What _tile_loadconfig reads; the palette is 1. */
typedef struct {
  uint8_t palette, start, reserved[14];
  uint16_t bytes[16]; /* of a row of each register */
  uint8_t rows[16];
} tile_shape;

/* All eight registers at their full size. */
INLINE void begin_whole_tiles(void) {
  const tile_shape shape = {.palette = 1, .bytes = {64, 64, 64, 64, 64, 64, 64, 64}, .rows = {16, 16, 16, 16, 16, 16, 16, 16}};
  _tile_loadconfig(&shape);
}
#else
#define EFF_TILES 0
INLINE int eff_tiles_are_lent(void) { return 0; }
#endif
