/* Sums whose rounding does not depend on the caller: multiply-adds of eight lanes, and the lanes of a vector in one order. */
#pragma once
#include "eff.h"

/* a * b + c with one rounding where the processor has the instruction, for every caller alike. */
INLINE eff_vf multiply_add(eff_vf a, eff_vf b, eff_vf c) {
#if defined(__FMA__)
  c = (eff_vf)_mm256_fmadd_ps((__m256)a, (__m256)b, (__m256)c);
  __asm__ volatile("" : "+x"(c)); /* one instruction in every caller: the compiler is not to choose */
  return c;
#else
  return c + a * b;
#endif
}

INLINE float sum_lanes(eff_vf v) { return ((v[0] + v[1]) + (v[2] + v[3])) + ((v[4] + v[5]) + (v[6] + v[7])); }

/* Sums of the eight lanes of four vectors, in the order of sum_lanes. */
INLINE void add_lanes_of_four(const eff_vf *v, float *c) {
#if defined(__AVX2__)
  const __m256 ab = _mm256_hadd_ps((__m256)v[0], (__m256)v[1]), cd = _mm256_hadd_ps((__m256)v[2], (__m256)v[3]);
  const __m256 s = _mm256_hadd_ps(ab, cd);
  const __m128 sum = _mm_add_ps(_mm256_castps256_ps128(s), _mm256_extractf128_ps(s, 1));
  _mm_storeu_ps(c, _mm_add_ps(_mm_loadu_ps(c), sum));
#else
  for (int n = 0; n < 4; n++) c[n] += sum_lanes(v[n]);
#endif
}
