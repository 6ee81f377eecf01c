/* Known answers, checked once after loading: a kernel for a processor that its author never saw must not fail silently. */
#include "fp4.h"
#include "fp4_linear.h"
#include "fp8_decode.h"
#include "group_linear.h"
#include "int4_linear.h"
#include "int8_linear.h"

/* 4-bit floats in either format, with whole steps of 128 weights and a rest, multiplied in registers and from a panel. */
static int fp4_is_wrong(void) {
  enum { M = 6, N = 3, K = 160 };
  static const float value[8] = {0.0f, 0.5f, 1.0f, 1.5f, 2.0f, 3.0f, 4.0f, 6.0f};
  float x[M * K], y[M * N];
  uint8_t packed[N * K / 2], scale[N * K / 16];
  for (int i = 0; i < M * K; i++) x[i] = (float)((i * 7) % 17 - 8);
  for (int i = 0; i < N * K / 2; i++) packed[i] = (uint8_t)(i * 37);
  for (int format = EFF_NVFP4; format <= EFF_MXFP4; format++)
    for (int m = M; m >= 1; m -= M - 1) {
      const int block = (int)eff_fp4_block(format);
      for (int i = 0; i < N * K / block; i++) scale[i] = (uint8_t)((format == EFF_NVFP4 ? 52 : 124) + i % 8);
      const eff_fp4_linear_args a = {.x = x, .m = m, .n = N, .k = K, .x_stride = K, .packed = packed, .scale = scale, .y = y,
                                     .format = format, .threads = 1};
      if (eff_fp4_linear(&a)) return 1;
      for (int i = 0; i < m * N; i++) {
        double sum = 0.0, size = 0.0;
        for (int k = 0; k < K; k++) {
          const int at = i % N * K + k, code = packed[at / 2] >> 4 * (at % 2) & 15;
          const uint8_t s = scale[at / block];
          const float factor = format == EFF_NVFP4 ? EFF_E4M3_FACTOR * eff_e4m3_over_256(s) : eff_e8m0(s);
          const double w = (code & 8 ? -1.0 : 1.0) * value[code & 7] * factor;
          sum += w * x[i / N * K + k], size += fabs(w * x[i / N * K + k]);
        }
        if (!(fabs(y[i] - sum) <= 1e-5 * size)) return 1;
      }
    }
  return 0;
}

/* Whether each code is decoded to its value, and each value rounded to its code. */
static int fp8_is_right(const eff_fp8 format) {
  const fp8_table table = fp8_make_table(format);
  for (int first = 0; first < 256; first += STEP) {
    uint8_t codes[STEP];
    vf wide[4];
    float decoded[STEP];
    for (int i = 0; i < STEP; i++) codes[i] = (uint8_t)(first + i);
    fp8_decode(format, &table, codes, wide);
    for (int v = 0; v < 4; v++) vstore(decoded + v * LANES, wide[v]);
    for (int i = 0; i < STEP; i++) {
      const float value = eff_fp8_value(format, codes[i]), found = decoded[place(i)] * fp8_unit(format);
      eff_vi code;
      if (value != value ? found == found : found != value) return 0;
      if (!(fabsf(value) < INFINITY)) continue;
      eff_fp8_round(format, eff_splat(value), 1.0f, &code);
      if (code[0] != codes[i]) return 0;
    }
  }
  return 1;
}

/* Packed weights of 4 bits, for one row of x and for several, with codes at both ends. */
static int int4_is_wrong(int64_t m) {
  enum { M = 5, N = 7, K = 654 };
  float x[M * K], step[K], scale[N], y[M * N];
  uint8_t w[N * K / 2];
  for (int i = 0; i < M * K; i++) x[i] = (float)((i * 37) % 256 - 128);
  for (int i = 0; i < N * K / 2; i++) w[i] = (uint8_t)(i * 53);
  for (int k = 0; k < K; k++) step[k] = 1.0f;
  for (int n = 0; n < N; n++) scale[n] = 1.0f;
  const eff_int4_linear_args a = {.x = x, .m = m, .n = N, .k = K, .x_stride = K, .w = w, .packed = 1, .w_scale = scale,
                                  .x_scale = step, .y = y, .threads = 1};
  if (eff_int4_linear(&a)) return 1;
  for (int i = 0; i < m * N; i++) {
    int32_t sum = 0;
    for (int k = 0; k < K; k++) {
      const int half = w[i % N * (K / 2) + k / 2] >> (k % 2 * 4) & 15;
      sum += (int32_t)x[i / N * K + k] * (half < 8 ? half : half - 16);
    }
    if (y[i] != (float)sum) return 1;
  }
  return 0;
}

/* Groups of 4 and 8 bits with minima, for one row of x and for several: activations whose codes are their values. */
static int group_is_wrong(int64_t bits) {
  enum { M = 11, N = 16, K = 64 };
  float x[M * K], y[M * N];
  uint8_t weight[K / 32 * (N * 32 + N * 8)];
  const int64_t codes = N * 32 * bits / 8, block = codes + N * 8;
  for (int i = 0; i < M * K; i++) x[i] = i % 32 ? (float)((i * 37) % 255 - 127) : 127.0f;
  for (int g = 0; g < K / 32; g++) {
    uint8_t *w = weight + g * block;
    for (int i = 0; i < codes; i++) w[i] = (uint8_t)(i * 53 + g);
    for (int n = 0; n < 2 * N; n++) {
      const float factor = n < N ? (float)(n % 3 + 1) : (float)(n - 20);
      memcpy(w + codes + 4 * n, &factor, 4);
    }
  }
  for (int64_t m = 1; m <= M; m += M - 1) {
    const eff_group_linear_args a = {.x = x, .m = m, .n = N, .k = K, .x_stride = K, .weight = weight, .bits = bits, .offset = 3,
                                     .minima = 1, .wide = 1, .y = y, .threads = 1};
    if (eff_group_linear(&a)) return 1;
    for (int i = 0; i < m * N; i++) {
      const int n = i % N;
      double sum = 0.0;
      for (int k = 0; k < K; k++) {
        const uint8_t *w = weight + k / 32 * block;
        const int in = k % 32, at = bits == 8 ? in / 4 * 64 + 4 * n + in % 4 : in % 16 / 4 * 64 + 4 * n + in % 4;
        const int code = bits == 8 ? w[at] : w[at] >> (in / 16 * 4) & 15;
        sum += ((code - 3) * (double)(n % 3 + 1) + (n - 4)) * x[i / N * K + k];
      }
      if (!(fabs(y[i] - sum) <= 1e-6 * K * 127 * 800)) return 1;
    }
  }
  return 0;
}

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
  if (fp4_is_wrong()) return 6;
  if (!fp8_is_right(E4M3)) return 4;
  if (!fp8_is_right(E5M2)) return 5;
  if (int4_is_wrong(1) || int4_is_wrong(M)) return 7;
  if (group_is_wrong(4) || group_is_wrong(8)) return 8;
  return 0;
}
