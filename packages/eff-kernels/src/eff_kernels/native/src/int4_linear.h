/* Arguments of the integer products with a scale for each weight row, as the launcher packs them. */
#pragma once
#include "eff.h"

typedef struct {
  const void *x; /* [m, k], rows x_stride elements apart */
  int64_t x_dtype, m, n, k, x_stride;
  const uint8_t *w; /* [n, k / 2] pairs of 4-bit codes, or [n, k] int8 codes */
  int64_t packed;
  const float *w_scale; /* [n] */
  const float *x_scale; /* [k], static scale of each column of x; NULL: each row by its largest magnitude */
  const void *bias;     /* [n]; NULL: none */
  int64_t bias_dtype;
  void *y; /* [m, n] */
  int64_t y_dtype, threads;
} eff_int4_linear_args;

/* y = x w^T. Returns 0, or 1 when memory ran out. */
EXPORT int eff_int4_linear(const eff_int4_linear_args *a);
