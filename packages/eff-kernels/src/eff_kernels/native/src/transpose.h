/* Sixteen rows of sixteen entries of four bytes, turned in registers (AVX-512). */
#pragma once
#include "eff.h"

/* v becomes its transpose: 16 vectors of 16 entries of four bytes. */
INLINE void transpose_dwords(__m512i *v) {
  __m512i s[16];
#pragma GCC unroll 8
  for (int i = 0; i < 16; i += 2)
    s[i] = _mm512_unpacklo_epi32(v[i], v[i + 1]), s[i + 1] = _mm512_unpackhi_epi32(v[i], v[i + 1]);
#pragma GCC unroll 4
  for (int i = 0; i < 16; i += 4) { /* now v[i + j] holds, in each quarter, column j of that quarter of rows i to i + 3 */
    v[i] = _mm512_unpacklo_epi64(s[i], s[i + 2]), v[i + 1] = _mm512_unpackhi_epi64(s[i], s[i + 2]);
    v[i + 2] = _mm512_unpacklo_epi64(s[i + 1], s[i + 3]), v[i + 3] = _mm512_unpackhi_epi64(s[i + 1], s[i + 3]);
  }
#pragma GCC unroll 4
  for (int j = 0; j < 4; j++) {
    const __m512i a = _mm512_shuffle_i32x4(v[j], v[j + 4], 0x88), b = _mm512_shuffle_i32x4(v[j], v[j + 4], 0xdd);
    const __m512i c = _mm512_shuffle_i32x4(v[j + 8], v[j + 12], 0x88), d = _mm512_shuffle_i32x4(v[j + 8], v[j + 12], 0xdd);
    s[j] = _mm512_shuffle_i32x4(a, c, 0x88), s[j + 8] = _mm512_shuffle_i32x4(a, c, 0xdd);
    s[j + 4] = _mm512_shuffle_i32x4(b, d, 0x88), s[j + 12] = _mm512_shuffle_i32x4(b, d, 0xdd);
  }
#pragma GCC unroll 16
  for (int i = 0; i < 16; i++) v[i] = s[i];
}
