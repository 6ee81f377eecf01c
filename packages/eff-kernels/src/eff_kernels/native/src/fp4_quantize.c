/* Rounding to 4-bit floats (OCP Microscaling v1.0, section 6.3; NVIDIA NVFP4) and back, rows in parallel. */
#include "fp4.h"

#define NAN_E8M0 255
#define NAN_E4M3 127
#define ROWS_PER_ITEM 4

enum { FLOOR, EVEN, CEIL, RCEIL };

INLINE uint32_t bits_of(float f) {
  uint32_t u;
  memcpy(&u, &f, 4);
  return u;
}
INLINE float float_of(uint32_t u) {
  float f;
  memcpy(&f, &u, 4);
  return f;
}

typedef struct {
  const void *x; /* [rows, k], rows x_stride elements apart */
  int64_t x_dtype, rows, k, x_stride;
  const float *global_scale; /* nvfp4 */
  int64_t format, rounding;
  uint8_t *packed; /* [rows, k / 2] */
  uint8_t *scale;  /* [rows, k / block] */
  int64_t threads;
} args;

/* The largest magnitude of a block, NaN if there is one: the bits of magnitudes are ordered as these are, NaN above all. */
INLINE float block_absmax(const int block, const float *x) {
  eff_vi best = {0};
  for (int i = 0; i < block; i += EFF_LANES) {
    const eff_vi v = (eff_vi)eff_vload(x + i) & 0x7fffffff, more = v > best;
    best = (v & more) | (best & ~more);
  }
  int32_t top = 0;
  for (int l = 0; l < EFF_LANES; l++) top = MAX(top, best[l]);
  return float_of((uint32_t)top);
}

/* Byte of the power of two that is the block's scale, from the bits of the largest magnitude. */
INLINE uint8_t e8m0_of(float absmax, int64_t rounding) {
  if (absmax != absmax) return NAN_E8M0;
  const uint32_t u = bits_of(rounding == RCEIL ? absmax / 6.0f : absmax) + (rounding == EVEN ? 1u << 21 : 0u);
  const uint32_t rest = u & 0x7fffffu;
  int32_t exponent = (int32_t)(u >> 23);
  if (rounding == RCEIL) /* below the normal numbers, only what is above 2^-127 has an exponent of -126 */
    exponent += rest > (exponent ? 0u : 0x400000u);
  else
    exponent += (rounding == CEIL && rest) - 2;
  return (uint8_t)MAX(0, MIN(254, exponent));
}

/* 1 / 2^(b - 127); b = 254 belongs to infinity alone. */
INLINE float inverse_e8m0(uint8_t b) { return b == 254 ? float_of(0x00400000u) : float_of((254u - b) << 23); }

/* E4M3 of a number that is clamped to [2^-6, 448], half to even. */
INLINE uint8_t e4m3_of(float f) {
  if (f != f) return NAN_E4M3;
  const uint32_t u = bits_of(f < 0.015625f ? 0.015625f : f > 448.0f ? 448.0f : f);
  return (uint8_t)(((u + 0x7ffffu + ((u >> 20) & 1u)) >> 20) - (120u << 3));
}

/* Eight codes, one in the low half of each byte: the nearest of 0, 0.5, 1, 1.5, 2, 3, 4, 6 to x * inverse, half to even.
 * Adding 1.5 * 2^n leaves a float without room for what is to be rounded off, and the code in its low bits. */
INLINE uint64_t codes_of_eight(const float *x, float inverse) {
  typedef uint8_t bytes __attribute__((vector_size(EFF_LANES)));
  eff_vf v = eff_vload(x) * eff_splat(inverse);
  EFF_ROUNDED(v);
  const eff_vf size = eff_vabs(v), capped = eff_vselect(size < eff_splat(6.0f), size, eff_splat(6.0f));
  const eff_vi below2 = capped < eff_splat(2.0f), below4 = capped < eff_splat(4.0f);
  const eff_vf above2 = eff_vselect(below4, eff_splat(0x1.8p23f), eff_splat(0x1.8p24f));
  const eff_vf rounder = eff_vselect(below2, eff_splat(0x1.8p22f), above2);
  const eff_vi start = (~below2 & 2) + (~below4 & 2);
  const eff_vi code = (eff_vi)(capped + rounder) - (eff_vi)rounder + start, sign = ((eff_vi)v >> 28) & 8;
  const bytes narrow = __builtin_convertvector(code | sign, bytes);
  uint64_t out;
  memcpy(&out, &narrow, 8);
  return out;
}

/* Eight bytes with a code each -> four with two. */
INLINE uint32_t pack_eight(uint64_t codes) {
  codes = (codes | codes >> 4) & 0x00ff00ff00ff00ffull;
  codes = (codes | codes >> 8) & 0x0000ffff0000ffffull;
  return (uint32_t)(codes | codes >> 16);
}

INLINE void quantize_row(const int format, const args *a, const float *x, int64_t blocks, uint8_t *packed, uint8_t *scale) {
  const int block = (int)eff_fp4_block(format);
  const float global = format == EFF_NVFP4 ? *a->global_scale : 1.0f, inverse_global = 1.0f / global;
  for (int64_t b = 0; b < blocks; b++, x += block, packed += block / 2) {
    const float absmax = block_absmax(block, x);
    float inverse;
    if (format == EFF_MXFP4) {
      scale[b] = e8m0_of(absmax, a->rounding);
      inverse = inverse_e8m0(scale[b]);
    } else { /* in these steps, as torchao: a division of x by the two scales would break some ties differently */
      scale[b] = e4m3_of(absmax / 6.0f / global);
      inverse = inverse_global / (EFF_E4M3_FACTOR * eff_e4m3_over_256(scale[b]));
    }
    if (scale[b] == (format == EFF_MXFP4 ? NAN_E8M0 : NAN_E4M3)) {
      memset(packed, 0, (size_t)block / 2);
      continue;
    }
    for (int i = 0; i < block; i += EFF_LANES) {
      const uint32_t four = pack_eight(codes_of_eight(x + i, inverse));
      memcpy(packed + i / 2, &four, 4);
    }
  }
}

#define CHUNK 1024 /* values that are widened at a time, a multiple of either block */

static void quantize_item(void *ctx, int64_t item) {
  const args *a = ctx;
  const eff_dtype dtype = (eff_dtype)a->x_dtype;
  const int64_t block = eff_fp4_block((int)a->format);
  float wide[CHUNK];
  for (int64_t r = item * ROWS_PER_ITEM; r < MIN(a->rows, (item + 1) * ROWS_PER_ITEM); r++)
    for (int64_t i = 0; i < a->k; i += CHUNK) {
      const int64_t n = MIN(CHUNK, a->k - i);
      const void *source = eff_at(a->x, dtype, r * a->x_stride + i);
      if (dtype != EFF_F32) eff_load_row(dtype, source, wide, n);
      const float *x = dtype == EFF_F32 ? source : wide;
      uint8_t *packed = a->packed + (r * a->k + i) / 2, *scale = a->scale + (r * a->k + i) / block;
      if (a->format == EFF_NVFP4)
        quantize_row(EFF_NVFP4, a, x, n / block, packed, scale);
      else
        quantize_row(EFF_MXFP4, a, x, n / block, packed, scale);
    }
}

KERNEL(void, eff_fp4_quantize, args) {
  eff_parallel_for((a->rows + ROWS_PER_ITEM - 1) / ROWS_PER_ITEM, (int)a->threads, quantize_item, (void *)a);
}

typedef struct {
  const uint8_t *packed; /* [rows, k / 2] */
  const uint8_t *scale;  /* [rows, k / block] */
  const float *global_scale; /* nvfp4 */
  int64_t format, rows, k;
  void *out; /* [rows, k] */
  int64_t out_dtype, threads;
} back_args;

static void dequantize_item(void *ctx, int64_t item) {
  static const float value[8] = {0.0f, 0.5f, 1.0f, 1.5f, 2.0f, 3.0f, 4.0f, 6.0f};
  const back_args *a = ctx;
  const eff_dtype dtype = (eff_dtype)a->out_dtype;
  const int64_t block = eff_fp4_block((int)a->format);
  float wide[32];
  for (int64_t r = item * ROWS_PER_ITEM; r < MIN(a->rows, (item + 1) * ROWS_PER_ITEM); r++)
    for (int64_t i = 0; i < a->k; i += block) {
      const uint8_t *packed = a->packed + (r * a->k + i) / 2, s = a->scale[(r * a->k + i) / block];
      float scale;
      if (a->format == EFF_MXFP4)
        scale = s == NAN_E8M0 ? NAN : eff_e8m0(s);
      else
        scale = (s & 0x7f) == NAN_E4M3 ? NAN : EFF_E4M3_FACTOR * eff_e4m3_over_256(s) * *a->global_scale;
      float scaled[16];
      for (int c = 0; c < 8; c++) scaled[c] = value[c] * scale, scaled[8 + c] = -scaled[c];
      for (int64_t b = 0; b < block / 2; b++) wide[2 * b] = scaled[packed[b] & 15], wide[2 * b + 1] = scaled[packed[b] >> 4];
      eff_store_row(dtype, wide, eff_at_mut(a->out, dtype, r * a->k + i), block);
    }
}

KERNEL(void, eff_fp4_dequantize, back_args) {
  eff_parallel_for((a->rows + ROWS_PER_ITEM - 1) / ROWS_PER_ITEM, (int)a->threads, dequantize_item, (void *)a);
}
