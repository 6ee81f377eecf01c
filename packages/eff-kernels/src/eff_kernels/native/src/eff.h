/* What all kernels share: dtypes, conversion of rows to and from float, and a parallel loop over PyTorch's thread pool.
 *
 * Every kernel computes in float32 (or int32) whatever the dtype of its tensors, and rounds once when it stores.
 * Exported functions take raw pointers, sizes in elements and strides in elements; they check nothing: the Python launcher
 * has done so. */
#pragma once
#include <math.h>
#include <stddef.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>
#if defined(__x86_64__)
#include <immintrin.h>
#endif

#define INLINE static inline __attribute__((always_inline))
#define EXPORT __attribute__((visibility("default")))
/* Head of an exported function of one struct `a`, whose size the launcher compares with what it packs. */
#define KERNEL(result, name, struct_type) \
  EXPORT const int64_t name##_takes = sizeof(struct_type); \
  EXPORT result name(const struct_type *a)
#define MIN(a, b) ((a) < (b) ? (a) : (b))
#define MAX(a, b) ((a) > (b) ? (a) : (b))

INLINE int64_t eff_round_up(int64_t n, int64_t to) { return (n + to - 1) / to * to; }

typedef enum { EFF_F32 = 0, EFF_BF16 = 1, EFF_F16 = 2 } eff_dtype;

INLINE size_t eff_size(eff_dtype dtype) { return dtype == EFF_F32 ? 4 : 2; }

INLINE float eff_bf16_to_f32(uint16_t h) {
  uint32_t u = (uint32_t)h << 16;
  float f;
  memcpy(&f, &u, 4);
  return f;
}

/* Round to nearest, ties to even; a NaN stays a (quiet) NaN. */
INLINE uint16_t eff_f32_to_bf16(float f) {
  uint32_t u;
  memcpy(&u, &f, 4);
  uint32_t rounded = (u + 0x7fffu + ((u >> 16) & 1u)) >> 16;
  return (uint16_t)((u & 0x7fffffffu) > 0x7f800000u ? ((u >> 16) | 0x40u) : rounded);
}

#if defined(__F16C__)
INLINE float eff_f16_to_f32(uint16_t h) { return _cvtsh_ss(h); }
INLINE uint16_t eff_f32_to_f16(float f) { return _cvtss_sh(f, _MM_FROUND_TO_NEAREST_INT); }
#else
INLINE float eff_f16_to_f32(uint16_t h) {
  _Float16 v;
  memcpy(&v, &h, 2);
  return (float)v;
}
INLINE uint16_t eff_f32_to_f16(float f) {
  _Float16 v = (_Float16)f;
  uint16_t h;
  memcpy(&h, &v, 2);
  return h;
}
#endif

/* Eight floats, or as many int32; the compiler maps them to whatever vectors the processor has. Comparing two eff_vf gives an
 * eff_vi of 0 (false) and -1 (true). */
#define EFF_LANES 8
typedef float eff_vf __attribute__((vector_size(32)));
typedef int32_t eff_vi __attribute__((vector_size(32)));

INLINE eff_vf eff_vload(const float *p) {
  eff_vf v;
  memcpy(&v, p, sizeof v);
  return v;
}
INLINE void eff_vstore(float *p, eff_vf v) { memcpy(p, &v, sizeof v); }
INLINE eff_vf eff_splat(float f) { return (eff_vf){f, f, f, f, f, f, f, f}; }
INLINE eff_vf eff_vabs(eff_vf v) { return (eff_vf)((eff_vi)v & 0x7fffffff); }
INLINE eff_vf eff_vselect(eff_vi mask, eff_vf a, eff_vf b) { return (eff_vf)(((eff_vi)a & mask) | ((eff_vi)b & ~mask)); }
/* Keeps the compiler from fusing the product `v` with a following sum: where a result is compared bit for bit with PyTorch's,
 * it must be rounded in between. */
#if defined(__x86_64__)
#define EFF_ROUNDED(v) __asm__("" : "+x"(v))
#else
#define EFF_ROUNDED(v) __asm__("" : "+w"(v))
#endif
INLINE float eff_vsum(eff_vf v) { return ((v[0] + v[4]) + (v[2] + v[6])) + ((v[1] + v[5]) + (v[3] + v[7])); }
INLINE float eff_vmax(eff_vf v) {
  float m = v[0];
  for (int i = 1; i < EFF_LANES; i++) m = v[i] > m ? v[i] : m;
  return m;
}

/* n elements at `src` of any dtype -> floats. */
INLINE void eff_load_row(eff_dtype dtype, const void *restrict src, float *restrict out, int64_t n) {
  const uint16_t *h = src;
  int64_t i = 0;
  if (dtype == EFF_F32) {
    memcpy(out, src, (size_t)n * 4);
  } else if (dtype == EFF_BF16) {
    for (; i < n; i++) out[i] = eff_bf16_to_f32(h[i]);
  } else {
#if defined(__F16C__)
    for (; i + 8 <= n; i += 8) _mm256_storeu_ps(out + i, _mm256_cvtph_ps(_mm_loadu_si128((const __m128i *)(h + i))));
#endif
    for (; i < n; i++) out[i] = eff_f16_to_f32(h[i]);
  }
}

/* n floats -> elements of any dtype at `dst`, rounded to nearest even. */
INLINE void eff_store_row(eff_dtype dtype, const float *restrict src, void *restrict dst, int64_t n) {
  uint16_t *h = dst;
  int64_t i = 0;
  if (dtype == EFF_F32) {
    memcpy(dst, src, (size_t)n * 4);
  } else if (dtype == EFF_BF16) {
    for (; i < n; i++) h[i] = eff_f32_to_bf16(src[i]);
  } else {
#if defined(__F16C__)
    for (; i + 8 <= n; i += 8)
      _mm_storeu_si128((__m128i *)(h + i), _mm256_cvtps_ph(_mm256_loadu_ps(src + i), _MM_FROUND_TO_NEAREST_INT));
#endif
    for (; i < n; i++) h[i] = eff_f32_to_f16(src[i]);
  }
}

/* Pointer to element `i` of a tensor of any dtype. */
INLINE const void *eff_at(const void *base, eff_dtype dtype, int64_t i) { return (const char *)base + i * (int64_t)eff_size(dtype); }
INLINE void *eff_at_mut(void *base, eff_dtype dtype, int64_t i) { return (char *)base + i * (int64_t)eff_size(dtype); }

/* Scratch memory aligned for any vector, to be freed; NULL when there is no more, which every caller reports. */
void *eff_scratch(size_t bytes);

/* The next `bytes` of scratch memory, aligned for any vector. */
INLINE void *eff_take(char **scratch, size_t bytes) {
  void *p = *scratch;
  *scratch += (bytes + 63) / 64 * 64;
  return p;
}

/* Call work(ctx, item) for item = 0 .. items-1 on up to `threads` threads. Threads take the next item when they are free, so
 * a busy core delays the others little. With one thread or one item it is a plain loop. */
typedef void (*eff_work)(void *ctx, int64_t item);
void eff_parallel_for(int64_t items, int threads, eff_work work, void *ctx);
