/* Known answers, checked once after loading: a kernel for a processor that its author never saw must not fail silently. */
#include "int8_rows.h"

EXPORT int eff_int8_linear(const void *, int, int64_t, int64_t, int64_t, int64_t, const int8_t *, const float *, const void *, int, float,
                           int, void *, int, int);

/* Returns 0, or the number of the check that failed. */
EXPORT int eff_self_test(void) {
  enum { M = 5, N = 7, K = 83 }; /* ragged in every direction */
  float x[M * K], absmax[N], y[M * N];
  int8_t w[N * K];
  for (int i = 0; i < M * K; i++) x[i] = (float)((i * 37) % 255 - 127);
  for (int m = 0; m < M; m++) x[m * K] = 127.0f; /* absmax 127: the codes are the values */
  for (int i = 0; i < N * K; i++) w[i] = (int8_t)((i * 53) % 255 - 127);
  for (int n = 0; n < N; n++) absmax[n] = 127.0f;
  if (eff_int8_linear(x, EFF_F32, M, N, K, K, w, absmax, NULL, EFF_F32, 0.0f, 0, y, EFF_F32, 1)) return 1;
  for (int m = 0; m < M; m++)
    for (int n = 0; n < N; n++) {
      int32_t sum = 0;
      for (int k = 0; k < K; k++) sum += (int32_t)x[m * K + k] * w[n * K + k];
      if (fabsf(y[m * N + n] - (float)sum) > 1e-6f * 16129.0f * K) return 2;
    }
  if (eff_f32_to_bf16(1.00390625f) != 0x3f80 || eff_f32_to_bf16(1.01171875f) != 0x3f82) return 3; /* ties to even */
  return 0;
}
