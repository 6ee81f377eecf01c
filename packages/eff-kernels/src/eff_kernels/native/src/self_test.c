/* Known answers, checked once after loading: a kernel for a processor that its author never saw must not fail silently. */
#include "int8_linear.h"

/* Returns 0, or the number of the check that failed. */
EXPORT int eff_self_test(void) {
  enum { M = 5, N = 7, K = 83 }; /* ragged in every direction */
  float x[M * K], absmax[N], y[M * N];
  int8_t w[N * K];
  for (int i = 0; i < M * K; i++) x[i] = (float)((i * 37) % 255 - 127);
  for (int m = 0; m < M; m++) x[m * K] = 127.0f; /* absmax 127: the codes are the values */
  for (int i = 0; i < N * K; i++) w[i] = (int8_t)((i * 53) % 255 - 127);
  for (int n = 0; n < N; n++) absmax[n] = 127.0f;
  for (int m = 0; m < M; m++) x[m * K + 32] = x[m * K + 64] = -127.0f; /* the same in each group */
  for (int lone = 0; lone <= 1; lone++) /* the two ways through the kernel, with groups of every length */
    for (int group = 0; group <= 64; group += 32) {
      const eff_int8_linear_args a = {.x = x, .m = lone ? 1 : M, .n = N, .k = K, .x_stride = K, .w = w, .w_absmax = absmax,
                                      .group = group, .y = y, .threads = 1};
      if (eff_int8_linear(&a)) return 1;
      for (int m = 0; m < a.m; m++)
        for (int n = 0; n < N; n++) {
          int32_t sum = 0;
          for (int k = 0; k < K; k++) sum += (int32_t)x[m * K + k] * w[n * K + k];
          if (fabsf(y[m * N + n] - (float)sum) > 1e-6f * 16129.0f * K) return 2;
        }
    }
  if (eff_f32_to_bf16(1.00390625f) != 0x3f80 || eff_f32_to_bf16(1.01171875f) != 0x3f82) return 3; /* ties to even */
  return 0;
}
