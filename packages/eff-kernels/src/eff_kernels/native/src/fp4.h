/* Weights in packed 4-bit floats (E2M1): decoders of the codes and of the block scales, one version per instruction set.
 *
 * A step is FP4_STEP weights of a row, decoded into eight vectors of floats; vector v has its scales in lanes of scale vector
 * v / FP4_SHARE. Activations are stored in the order in which the weights come out of the decoder, see eff_fp4_place.
 *   AVX-512       a step's eight products are summed first, and multiplied by the scales once.
 *   AVX2, others  weights are multiplied by their scales, which is exact: with half as many registers, the blocks of several rows
 *                 have none to spare for a second sum. */
#pragma once
#include "lanes.h"

#define EFF_NVFP4 0 /* blocks of 16, scales E4M3 */
#define EFF_MXFP4 1 /* blocks of 32, scales E8M0 */

INLINE int64_t eff_fp4_block(const int format) { return format == EFF_NVFP4 ? 16 : 32; }

/* Kernels read E4M3 through float16, whose exponent has another bias: the scales come out 2^8 too small. */
#define EFF_E4M3_FACTOR 256.0f
INLINE float eff_e4m3_over_256(uint8_t u) { return eff_f16_to_f32((uint16_t)((u & 0x7f) << 7 | (u & 0x80) << 8)); }

/* 2^(b - 127); b = 255, which is NaN, aside. */
INLINE float eff_e8m0(uint8_t b) {
  const uint32_t u = b ? (uint32_t)b << 23 : 0x00400000u;
  float f;
  memcpy(&f, &u, 4);
  return f;
}

#if defined(__AVX512BW__) && defined(__AVX512VL__) && !defined(EFF_NO_AVX512) && !defined(EFF_GENERIC)
#define FP4_STEP 128
#define FP4_SHARE 8
#define FP4_WIDTH 16
#define FP4_ROWS 4 /* rows of x in a block of registers */
#define FP4_SUM_FIRST 1
#define FP4_FUSED 1 /* rows of the weight that are decoded side by side */
typedef __m512 eff_fp4_vec;
INLINE eff_fp4_vec eff_fp4_zero(void) { return _mm512_setzero_ps(); }
INLINE eff_fp4_vec eff_fp4_load(const float *p) { return _mm512_loadu_ps(p); }
INLINE eff_fp4_vec eff_fp4_fma(eff_fp4_vec a, eff_fp4_vec b, eff_fp4_vec c) { return _mm512_fmadd_ps(a, b, c); }
INLINE eff_vf eff_fp4_fold(eff_fp4_vec c) {
  return (eff_vf)_mm512_castps512_ps256(c) + (eff_vf)_mm256_castpd_ps(_mm512_extractf64x4_pd(_mm512_castps_pd(c), 1));
}

INLINE int eff_fp4_place(int v, int l) { return 8 * l + v; }
INLINE void eff_fp4_decode_vector(__m512i p, eff_fp4_vec *w) {
  const __m512 value =
      _mm512_setr_ps(0.0f, 0.5f, 1.0f, 1.5f, 2.0f, 3.0f, 4.0f, 6.0f, -0.0f, -0.5f, -1.0f, -1.5f, -2.0f, -3.0f, -4.0f, -6.0f);
  for (unsigned v = 0; v < 8; v++) w[v] = _mm512_permutexvar_ps(_mm512_srli_epi32(p, 4 * v), value); /* looks at four bits */
}
INLINE void eff_fp4_decode(const uint8_t *p, eff_fp4_vec *w) { eff_fp4_decode_vector(_mm512_loadu_si512(p), w); }
INLINE void eff_fp4_decode_tail(const uint8_t *p, int64_t bytes, eff_fp4_vec *w) {
  eff_fp4_decode_vector(_mm512_maskz_loadu_epi8(~0ull >> (64 - bytes), p), w);
}
/* The scales of a step's `blocks` blocks, each in its lanes. */
INLINE void eff_fp4_scales(const int format, const uint8_t *s, int64_t blocks, eff_fp4_vec *scale) {
  if (format == EFF_NVFP4) { /* 8 bytes, two lanes each, as the upper halves of words */
    const __m256i upper = _mm256_set_epi64x(0x0780078006800680, 0x0580058004800480, 0x0380038002800280, 0x0180018000800080);
    uint64_t bytes = 0;
    memcpy(&bytes, s, blocks == 8 ? 8 : (size_t)blocks);
    const __m256i words = _mm256_shuffle_epi8(_mm256_set1_epi64x((long long)bytes), upper);
    scale[0] = _mm512_cvtph_ps(_mm256_and_si256(_mm256_srai_epi16(words, 1), _mm256_set1_epi16((short)0xbfff)));
  } else { /* 4 bytes, four lanes each */
    const __m128i spread = _mm_set_epi32(0x03030303, 0x02020202, 0x01010101, 0);
    uint32_t bytes = 0;
    memcpy(&bytes, s, blocks == 4 ? 4 : (size_t)blocks);
    const __m512i wide = _mm512_cvtepu8_epi32(_mm_shuffle_epi8(_mm_set1_epi32((int)bytes), spread));
    scale[0] = _mm512_castsi512_ps(_mm512_max_epu32(_mm512_slli_epi32(wide, 23), _mm512_set1_epi32(0x00400000)));
  }
}

#else /* eight lanes: AVX2, or whatever the compiler makes of it */
#define FP4_STEP 64
#define FP4_SHARE 4
#define FP4_WIDTH 8
#define FP4_ROWS 3
#define FP4_SUM_FIRST 0
#define FP4_FUSED 4
typedef eff_vf eff_fp4_vec;
INLINE eff_fp4_vec eff_fp4_zero(void) { return eff_splat(0.0f); }
INLINE eff_fp4_vec eff_fp4_load(const float *p) { return eff_vload(p); }
INLINE eff_fp4_vec eff_fp4_fma(eff_fp4_vec a, eff_fp4_vec b, eff_fp4_vec c) { return multiply_add(a, b, c); }
INLINE eff_vf eff_fp4_fold(eff_fp4_vec c) { return c; }
INLINE int eff_fp4_place(int v, int l) { return 32 * (l / 4) + 16 * (v / 4) + 8 * (v / 2 % 2) + 2 * (l % 4) + v % 2; }

INLINE void eff_fp4_decode(const uint8_t *p, eff_fp4_vec *w) {
#if defined(__AVX2__) && !defined(EFF_GENERIC)
  /* The upper two bytes of each float, by two look-ups; in between the bytes of codes lie in the lanes of UNPACK. */
  const __m256i high = _mm256_broadcastsi128_si256(_mm_set_epi64x((long long)0xc0c0c0c0bfbfbf80, 0x404040403f3f3f00));
  const __m256i low = _mm256_broadcastsi128_si256(_mm_set_epi64x((long long)0xc0804000c0800000, (long long)0xc0804000c0800000));
  const __m256i mask = _mm256_set1_epi8(15), none = _mm256_setzero_si256();
  const __m256i both = _mm256_loadu_si256((const __m256i *)p);
  for (int odd = 0; odd < 2; odd++) {
    const __m256i code = _mm256_and_si256(odd ? _mm256_srli_epi16(both, 4) : both, mask);
    const __m256i h = _mm256_shuffle_epi8(high, code), l = _mm256_shuffle_epi8(low, code);
    const __m256i first = _mm256_unpacklo_epi8(l, h), second = _mm256_unpackhi_epi8(l, h);
    w[odd] = (eff_vf)_mm256_unpacklo_epi16(none, first), w[2 + odd] = (eff_vf)_mm256_unpackhi_epi16(none, first);
    w[4 + odd] = (eff_vf)_mm256_unpacklo_epi16(none, second), w[6 + odd] = (eff_vf)_mm256_unpackhi_epi16(none, second);
  }
#else
  static const float value[16] = {0.0f,  0.5f,  1.0f,  1.5f,  2.0f,  3.0f,  4.0f,  6.0f,
                                  -0.0f, -0.5f, -1.0f, -1.5f, -2.0f, -3.0f, -4.0f, -6.0f};
  for (int v = 0; v < 8; v++)
    for (int l = 0; l < EFF_LANES; l++) {
      const int i = eff_fp4_place(v, l);
      w[v][l] = value[(p[i / 2] >> 4 * (i % 2)) & 15];
    }
#endif
}
INLINE void eff_fp4_decode_tail(const uint8_t *p, int64_t bytes, eff_fp4_vec *w) {
  uint8_t padded[FP4_STEP / 2] = {0};
  memcpy(padded, p, (size_t)bytes);
  eff_fp4_decode(padded, w);
}
INLINE void eff_fp4_scales(const int format, const uint8_t *s, int64_t blocks, eff_fp4_vec *scale) {
  const int64_t whole = 64 / eff_fp4_block(format);
  uint8_t b[4] = {0};
  memcpy(b, s, (size_t)(blocks == whole ? whole : blocks));
#if defined(__AVX2__) && defined(__F16C__) && !defined(EFF_GENERIC)
  int32_t bytes;
  memcpy(&bytes, b, 4);
  const __m128i all = _mm_set1_epi32(bytes), clear = _mm_set1_epi16((short)0xbfff);
  if (format == EFF_NVFP4) {
    const __m128i even = _mm_set_epi32(0x02800280, 0x02800280, 0x00800080, 0x00800080);
    const __m128i odd = _mm_set_epi32(0x03800380, 0x03800380, 0x01800180, 0x01800180);
    scale[0] = (eff_vf)_mm256_cvtph_ps(_mm_and_si128(_mm_srai_epi16(_mm_shuffle_epi8(all, even), 1), clear));
    scale[1] = (eff_vf)_mm256_cvtph_ps(_mm_and_si128(_mm_srai_epi16(_mm_shuffle_epi8(all, odd), 1), clear));
  } else {
    const __m256i wide = _mm256_cvtepu8_epi32(_mm_shuffle_epi8(all, _mm_set_epi32(0, 0, 0x01010101, 0)));
    scale[0] = (eff_vf)_mm256_max_epu32(_mm256_slli_epi32(wide, 23), _mm256_set1_epi32(0x00400000));
    scale[1] = scale[0];
  }
#else
  for (int g = 0; g < 2; g++)
    for (int l = 0; l < EFF_LANES; l++)
      scale[g][l] = format == EFF_NVFP4 ? eff_e4m3_over_256(b[l / 4 * 2 + g]) : eff_e8m0(b[l / 4]);
#endif
}
#endif
