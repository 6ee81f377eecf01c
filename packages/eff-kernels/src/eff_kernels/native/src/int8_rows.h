/* Row-wise int8 quantisation with outlier detection (LLM.int8(), sections 2 and 3), for int8_rows.c and int8_linear.c. */
#pragma once
#include "dot.h"

/* Largest |x| below the threshold among the n entries of a row (NaN when an entry is NaN, or infinite without being an
 * outlier: no code stands for it). Marks in `columns` those whose entry reaches the threshold, and sets `*found`.
 * threshold 0: no entry is an outlier. */
float eff_scan_row(const float *x, int64_t n, float threshold, uint8_t *columns, int *found);

/* codes = x * (127 * (1 / absmax)), rounded half to even, followed by zeros up to `padded`. A row whose absmax is 0 or NaN gets
 * codes of 0; entries beyond absmax (outliers) get a code without meaning. */
void eff_row_codes(const float *x, int64_t n, float absmax, eff_act *out, int64_t padded);

/* Eight floats, below 2^22 in size, as integers, rounded half to even: adding 1.5 * 2^23 leaves a float without room for a
 * fraction, and the integer in its low bits. */
INLINE eff_vi eff_rounded(eff_vf v) { return (eff_vi)(v + eff_splat(12582912.0f)) - 0x4b400000; }
