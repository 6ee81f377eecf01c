/* Arguments of the product with a weight in packed 4-bit floats, as the launcher packs them. */
#pragma once
#include "eff.h"

typedef struct {
  const void *x; /* [m, k], rows x_stride elements apart */
  int64_t x_dtype, m, n, k, x_stride;
  const uint8_t *packed;   /* [n, k / 2] */
  const uint8_t *scale;    /* [n, k / block] */
  const float *factors[2]; /* of every output; NULL: 1 */
  const float *bias;       /* [n]; NULL: none */
  void *y;                 /* [m, n] */
  int64_t y_dtype, format, threads;
} eff_fp4_linear_args;

/* y = x w^T. Returns 0, or 1 when memory ran out. */
EXPORT int eff_fp4_linear(const eff_fp4_linear_args *a);
