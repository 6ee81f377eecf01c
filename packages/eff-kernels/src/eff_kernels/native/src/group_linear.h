/* Arguments of the product with weights in groups of 32 columns, as the launcher packs them. */
#pragma once
#include "eff.h"

typedef struct {
  const void *x; /* [m, x_stride] */
  int64_t x_dtype, m, n, k, x_stride;
  const uint8_t *weight; /* [n / 16, k / 32, block], n rounded up */
  int64_t bits, offset, minima, wide; /* wide: scales and minima are float32, not float16 */
  const float *bias; /* [n]; NULL: none */
  void *y;           /* [m, n] */
  int64_t y_dtype, threads;
} eff_group_linear_args;

/* y = x w^T + bias; k is a multiple of 32. Returns 0, or 1 when memory ran out. */
EXPORT int eff_group_linear(const eff_group_linear_args *a);
