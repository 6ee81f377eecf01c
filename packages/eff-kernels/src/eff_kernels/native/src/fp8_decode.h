/* FP8 weights as floats, a STEP of codes at a time, in four vectors.
 *
 * The vectors need not hold the codes in their order: code i of a step is found at place(i), and the activations are laid out in
 * the same way, once for a call. They may also be smaller than the values by the factor fp8_unit, a power of two.
 *   AVX-512 with VBMI  two table look-ups give the two bytes of a bfloat16, in which every FP8 number is exact
 *   AVX-512, AVX2      the bits of a float16, which the processor widens
 *   others             one code after the other */
#pragma once
#include "fp8.h"

#if defined(__AVX512BW__) && defined(__AVX512VL__) && !defined(EFF_GENERIC) && !defined(EFF_NO_AVX512)
#define LANES 16
typedef __m512 vf;
INLINE vf vload(const float *p) { return _mm512_loadu_ps(p); }
INLINE vf vzero(void) { return _mm512_setzero_ps(); }
INLINE vf vfma(vf a, vf b, vf c) { return _mm512_fmadd_ps(a, b, c); }
INLINE void vstore(float *p, vf v) { _mm512_storeu_ps(p, v); }
/* c[i] += the sum of v[i] */
INLINE void add_sums_of_four(const vf *v, float *c) {
  const __m512 ab = _mm512_add_ps(_mm512_unpacklo_ps(v[0], v[1]), _mm512_unpackhi_ps(v[0], v[1]));
  const __m512 cd = _mm512_add_ps(_mm512_unpacklo_ps(v[2], v[3]), _mm512_unpackhi_ps(v[2], v[3]));
  const __m512d lo = _mm512_unpacklo_pd((__m512d)ab, (__m512d)cd), hi = _mm512_unpackhi_pd((__m512d)ab, (__m512d)cd);
  const __m512 s = _mm512_add_ps((__m512)lo, (__m512)hi);
  const __m256 half = _mm256_add_ps(_mm512_castps512_ps256(s), _mm512_extractf32x8_ps(s, 1));
  const __m128 sum = _mm_add_ps(_mm256_castps256_ps128(half), _mm256_extractf128_ps(half, 1));
  _mm_storeu_ps(c, _mm_add_ps(_mm_loadu_ps(c), sum));
}
#elif defined(__AVX2__) && defined(__FMA__) && defined(__F16C__) && !defined(EFF_GENERIC)
#define LANES 8
typedef __m256 vf;
INLINE vf vload(const float *p) { return _mm256_loadu_ps(p); }
INLINE vf vzero(void) { return _mm256_setzero_ps(); }
INLINE vf vfma(vf a, vf b, vf c) { return _mm256_fmadd_ps(a, b, c); }
INLINE void vstore(float *p, vf v) { _mm256_storeu_ps(p, v); }
INLINE void add_sums_of_four(const vf *v, float *c) {
  const __m256 s = _mm256_hadd_ps(_mm256_hadd_ps(v[0], v[1]), _mm256_hadd_ps(v[2], v[3]));
  const __m128 sum = _mm_add_ps(_mm256_castps256_ps128(s), _mm256_extractf128_ps(s, 1));
  _mm_storeu_ps(c, _mm_add_ps(_mm_loadu_ps(c), sum));
}
#else
#define LANES EFF_LANES
typedef eff_vf vf;
INLINE vf vload(const float *p) { return eff_vload(p); }
INLINE vf vzero(void) { return eff_splat(0.0f); }
INLINE vf vfma(vf a, vf b, vf c) { return a * b + c; }
INLINE void vstore(float *p, vf v) { eff_vstore(p, v); }
INLINE void add_sums_of_four(const vf *v, float *c) {
  for (int i = 0; i < 4; i++) c[i] += eff_vsum(v[i]);
}
#endif

#define STEP (4 * LANES)

#if LANES == 16 && defined(__AVX512VBMI__) && !defined(EFF_NO_VBMI)
/* Bytes of the bfloat16 of each code without its sign. */
typedef struct {
  __m512i low[2], high[2];
} fp8_table;

INLINE fp8_table fp8_make_table(const eff_fp8 format) {
  uint8_t low[128], high[128];
  for (int code = 0; code < 128; code++) {
    const uint16_t bits = eff_f32_to_bf16(eff_fp8_value(format, (uint8_t)code));
    low[code] = (uint8_t)bits, high[code] = (uint8_t)(bits >> 8);
  }
  fp8_table t;
  for (int half = 0; half < 2; half++)
    t.low[half] = _mm512_loadu_si512(low + 64 * half), t.high[half] = _mm512_loadu_si512(high + 64 * half);
  return t;
}

INLINE float fp8_unit(const eff_fp8 format) {
  (void)format;
  return 1.0f;
}

INLINE int place(int i) { /* which vector and lane hold code i of a step */
  const int in_part = i % 16, word = in_part % 8;
  return (in_part / 8 * 2 + word % 2) * 16 + i / 16 * 4 + word / 2;
}

INLINE void fp8_decode(const eff_fp8 format, const fp8_table *t, const uint8_t *codes, vf *out) {
  (void)format;
  const __m512i u = _mm512_loadu_si512(codes);
  const __m512i low = _mm512_permutex2var_epi8(t->low[0], u, t->low[1]); /* the index is the code without its sign */
  const __m512i unsigned_high = _mm512_permutex2var_epi8(t->high[0], u, t->high[1]);
  const __m512i high = _mm512_ternarylogic_epi32(u, _mm512_set1_epi8((char)0x80), unsigned_high, 0xea); /* (u & 0x80) | it */
  const __m512i a = _mm512_unpacklo_epi8(low, high), b = _mm512_unpackhi_epi8(low, high);
  const __m512i upper = _mm512_set1_epi32((int)0xffff0000);
  out[0] = (vf)_mm512_slli_epi32(a, 16), out[1] = (vf)_mm512_and_si512(a, upper);
  out[2] = (vf)_mm512_slli_epi32(b, 16), out[3] = (vf)_mm512_and_si512(b, upper);
}

#else
INLINE int place(int i) { return i; }
#if defined(__AVX2__) && defined(__F16C__) && !defined(EFF_GENERIC)
typedef char fp8_table; /* none */
INLINE fp8_table fp8_make_table(const eff_fp8 format) { return (fp8_table)format; }

/* E4M3 has four bits of exponent with a bias of 7, float16 has five with 15: the bits moved over are 2^-8 of the value. */
INLINE float fp8_unit(const eff_fp8 format) { return format == E4M3 ? 256.0f : 1.0f; }

INLINE __m256i float16_bits(const eff_fp8 format, const uint8_t *codes) { /* of 16 codes */
  const __m256i wide = _mm256_cvtepi8_epi16(_mm_loadu_si128((const __m128i *)codes));
  if (format == E5M2) return _mm256_slli_epi16(wide, 8);
  const __m256i bits = _mm256_and_si256(_mm256_slli_epi16(wide, 7), _mm256_set1_epi16((short)0xbf80));
  const __m256i all = _mm256_set1_epi16(0x3f80);
  const __m256i nan = _mm256_cmpeq_epi16(_mm256_and_si256(bits, all), all);
  return _mm256_or_si256(bits, _mm256_and_si256(nan, _mm256_set1_epi16(0x7e00)));
}

INLINE void fp8_decode(const eff_fp8 format, const fp8_table *t, const uint8_t *codes, vf *out) {
  (void)t;
#if LANES == 16
  for (int i = 0; i < 4; i++) out[i] = _mm512_cvtph_ps(float16_bits(format, codes + 16 * i));
#else
  for (int i = 0; i < 2; i++) {
    const __m256i bits = float16_bits(format, codes + 16 * i);
    out[2 * i] = _mm256_cvtph_ps(_mm256_castsi256_si128(bits));
    out[2 * i + 1] = _mm256_cvtph_ps(_mm256_extracti128_si256(bits, 1));
  }
#endif
}

#else
typedef struct {
  float value[256];
} fp8_table;

INLINE fp8_table fp8_make_table(const eff_fp8 format) {
  fp8_table t;
  for (int code = 0; code < 256; code++) t.value[code] = eff_fp8_value(format, (uint8_t)code);
  return t;
}

INLINE float fp8_unit(const eff_fp8 format) {
  (void)format;
  return 1.0f;
}

INLINE void fp8_decode(const eff_fp8 format, const fp8_table *t, const uint8_t *codes, vf *out) {
  (void)format;
  float v[STEP];
  for (int i = 0; i < STEP; i++) v[i] = t->value[codes[i]];
  for (int i = 0; i < 4; i++) out[i] = vload(v + i * LANES);
}
#endif
#endif
