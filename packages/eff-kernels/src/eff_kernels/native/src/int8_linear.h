/* Arguments of the int8 product, as the launcher packs them. */
#pragma once
#include "eff.h"

typedef struct {
  const void *x; /* [m, k], rows x_stride elements apart */
  int64_t x_dtype, m, n, k, x_stride;
  const int8_t *w;       /* [n, k] */
  const float *w_absmax; /* [n] */
  const void *bias;      /* [n]; NULL: none */
  int64_t bias_dtype;
  double threshold; /* 0: no outliers */
  int64_t per_token;
  int64_t group; /* columns of x with one scale, a multiple of 32; 0: all */
  void *y; /* [m, n] */
  int64_t y_dtype, threads;
} eff_int8_linear_args;

/* y = x w^T. Returns 0, or 1 when memory ran out. */
EXPORT int eff_int8_linear(const eff_int8_linear_args *a);
