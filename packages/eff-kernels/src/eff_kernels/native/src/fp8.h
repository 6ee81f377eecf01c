/* FP8: E4M3 (fn: no infinity, NaN is S.1111.111, largest 448) and E5M2 (infinity and NaN as in IEEE 754, largest 57344).
 * Rounding to them and their scales, for fp8_rows.c and fp8_linear.c. */
#pragma once
#include "eff.h"

typedef enum { E4M3 = 0, E5M2 = 1 } eff_fp8;

#define FP8_NAN 0x7f
#define FP8_EPS 1e-12f /* the least magnitude that a row is scaled by: a row of zeros has a scale, too */

INLINE float eff_fp8_max(const eff_fp8 format) { return format == E4M3 ? 448.0f : 57344.0f; }

/* The value of one code; exact. */
INLINE float eff_fp8_value(const eff_fp8 format, uint8_t code) {
  const int magnitude = code & 0x7f, mantissa = format == E4M3 ? 3 : 2, bias = format == E4M3 ? 7 : 15;
  const int exponent = magnitude >> mantissa, fraction = magnitude & ((1 << mantissa) - 1);
  uint32_t bits;
  if (format == E4M3 ? magnitude == 0x7f : magnitude >= 0x7c)
    bits = format == E4M3 || fraction ? 0x7fc00000u : 0x7f800000u;
  else if (exponent)
    bits = (uint32_t)(exponent + 127 - bias) << 23 | (uint32_t)fraction << (23 - mantissa);
  else {
    const float value = (float)fraction * (format == E4M3 ? 0x1p-9f : 0x1p-16f);
    memcpy(&bits, &value, 4);
  }
  bits |= (uint32_t)(code & 0x80) << 24;
  float value;
  memcpy(&value, &bits, 4);
  return value;
}

/* The scale of a row: its largest magnitude over the largest number of the format, NaN when an entry is NaN or infinite.
 * power_of_two: rounded up to one. */
INLINE float eff_fp8_scale(const eff_fp8 format, const float *x, int64_t n, int power_of_two) {
  eff_vf best = eff_splat(0.0f);
  eff_vi bad = {0};
  int64_t i = 0;
  for (; i + EFF_LANES <= n; i += EFF_LANES) {
    const eff_vf v = eff_vabs(eff_vload(x + i));
    bad |= ~(v < eff_splat(INFINITY));
    best = eff_vselect(v > best, v, best);
  }
  float top = MAX(eff_vmax(best), FP8_EPS);
  int any_bad = 0;
  for (int j = 0; j < EFF_LANES; j++) any_bad |= bad[j];
  for (; i < n; i++) {
    any_bad |= !(fabsf(x[i]) < INFINITY);
    top = fabsf(x[i]) > top ? fabsf(x[i]) : top;
  }
  if (any_bad) return NAN;
  float scale = top / eff_fp8_max(format);
  if (power_of_two) {
    uint32_t bits;
    memcpy(&bits, &scale, 4);
    bits = (bits + 0x7fffffu) & 0xff800000u;
    memcpy(&scale, &bits, 4);
  }
  return scale;
}

/* x / scale clamped and rounded to a number of the format, half to even; `codes`, if wanted, are their bytes. No entry is NaN. */
INLINE eff_vf eff_fp8_round(const eff_fp8 format, eff_vf x, float scale, eff_vi *codes) {
  const int drop = format == E4M3 ? 20 : 21; /* bits of a float's fraction that have no room */
  const float least = format == E4M3 ? 0x1p-6f : 0x1p-14f; /* the smallest normal number */
  const float ulp_one = format == E4M3 ? 0x1p14f : 0x1p7f; /* added to a smaller one, the sum is rounded as it must be */
  const eff_vf top = eff_splat(eff_fp8_max(format));
  const eff_vf scaled = x / eff_splat(scale);
  eff_vf v = eff_vabs(scaled);
  v = eff_vselect(v > top, top, v);
  const eff_vi bits = (eff_vi)v, sign = (eff_vi)scaled & (int32_t)0x80000000;
  const eff_vi rounded = (bits + ((1 << (drop - 1)) - 1) + ((bits >> drop) & 1)) & ~((1 << drop) - 1);
  eff_vf sum = v + eff_splat(ulp_one);
  EFF_ROUNDED(sum);
  const eff_vi small = v < eff_splat(least);
  const eff_vf value = eff_vselect(small, sum - eff_splat(ulp_one), (eff_vf)rounded);
  if (codes) {
    const eff_vi normal = (rounded >> drop) - (format == E4M3 ? 120 << 3 : 112 << 2);
    const eff_vi subnormal = (eff_vi)sum - (eff_vi)eff_splat(ulp_one);
    *codes = (subnormal & small) | (normal & ~small) | ((sign >> 24) & 0x80);
  }
  return (eff_vf)((eff_vi)value | sign);
}
