/* Row-wise kernels walk a row in chunks: widen a chunk to floats on the stack, compute, round once. Nothing is allocated, and a
 * chunk stays in the first-level cache whatever the length of the row. */
#pragma once
#include "eff.h"

#define CHUNK 256
#define LANES 16 /* sums run in so many floats side by side */

/* n <= CHUNK elements from `i` on as floats: in place for float32, else in `buffer`. */
INLINE const float *eff_chunk(const eff_dtype dtype, const void *row, int64_t i, int64_t n, float *buffer) {
  if (dtype == EFF_F32) return (const float *)row + i;
  eff_load_row(dtype, eff_at(row, dtype, i), buffer, n);
  return buffer;
}

/* Where a chunk is computed: in place for float32, else in `buffer`; `eff_chunk_done` then rounds it. */
INLINE float *eff_chunk_out(const eff_dtype dtype, void *row, int64_t i, float *buffer) {
  return dtype == EFF_F32 ? (float *)row + i : buffer;
}

INLINE void eff_chunk_done(const eff_dtype dtype, void *row, int64_t i, int64_t n, const float *buffer) {
  if (dtype != EFF_F32) eff_store_row(dtype, buffer, eff_at_mut(row, dtype, i), n);
}

/* CALL(dtype) with the dtype as a compile-time constant, so that each gets its own loops. */
#define EFF_FOR_DTYPE(dtype, CALL) \
  switch (dtype) {                 \
    case EFF_F32: CALL(EFF_F32);   \
    case EFF_BF16: CALL(EFF_BF16); \
    default: CALL(EFF_F16);        \
  }

/* Rows that one item of parallel work should take: about 16K elements. */
INLINE int64_t eff_rows_per_item(int64_t d) { return MAX(1, 16384 / MAX(d, 1)); }
