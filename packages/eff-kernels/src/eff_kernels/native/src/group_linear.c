/* y = x W^T + bias for weights in groups of 32 columns, each with a scale and, if wanted, a minimum: the layout of 4- and 8-bit
 * GGUF blocks, and of GPTQ, AWQ and compressed-tensors.
 *
 * weight[n, k] = scale[n, g] * (code[n, k] - offset) + minimum[n, g], codes unsigned. Each group of a row of x becomes int8 by
 * its own largest magnitude, so that the product of a group is one exact integer:
 *   y[n] = sum over groups of  scale * step * (sum code * a - offset * sum a)  +  minimum * step * sum a
 *
 * Weights are packed for sixteen outputs at a time (see pack.py): a vector then holds four consecutive codes of each, one
 * instruction multiplies them by four codes of x, and no sum ever runs across lanes. Scales lie beside their codes, so that
 * weights are one stream. Each output is the same sum in the same order for every number of rows of x. */
#include "group_linear.h"
#include "tiles.h"

#include <float.h>

#define GROUP 32
#define OUTPUTS 16  /* of a block of weights */
#define ROW_TILE 8  /* rows of x that share unpacked weights */
#define ITEM_ROWS 64
#define ITEM_BLOCKS 4

typedef eff_group_linear_args args;

typedef struct {
  const args *a;
  int8_t *codes; /* [m, k] */
  float *step;   /* [m, groups]: what one unit of a code is worth, NaN for a group that no codes stand for */
  int32_t *sum;  /* [m, groups] */
  int64_t groups, block;
} job;

INLINE int64_t code_bytes(int64_t bits) { return OUTPUTS * GROUP * bits / 8; }
INLINE int64_t block_bytes(const args *a) { return code_bytes(a->bits) + OUTPUTS * (a->wide ? 4 : 2) * (a->minima ? 2 : 1); }

/* One row of x in groups of int8. */
static void quantize_row(void *ctx, int64_t r) {
  job *j = ctx;
  const args *a = j->a;
  const eff_dtype dtype = (eff_dtype)a->x_dtype;
  for (int64_t g = 0; g < j->groups; g++) {
    float x[GROUP];
    eff_load_row(dtype, eff_at(a->x, dtype, r * a->x_stride + g * GROUP), x, GROUP);
    eff_vf top = eff_splat(0.0f);
    eff_vi bad = {0};
    for (int i = 0; i < GROUP; i += EFF_LANES) {
      const eff_vf v = eff_vabs(eff_vload(x + i));
      bad |= ~(v <= eff_splat(FLT_MAX));
      top = eff_vselect(v > top, v, top);
    }
    const float largest = eff_vmax(top);
    int any = 0;
    for (int i = 0; i < EFF_LANES; i++) any |= bad[i];
    const float inverse = largest > 1e-36f && !any ? 127.0f / largest : 0.0f;
    int8_t *codes = j->codes + r * a->k + g * GROUP;
    int32_t sum = 0;
    for (int i = 0; i < GROUP; i++) {
      const int32_t code = (int32_t)nearbyintf(any ? 0.0f : x[i] * inverse);
      codes[i] = (int8_t)code, sum += code;
    }
    j->step[r * j->groups + g] = any ? NAN : inverse > 0.0f ? largest / 127.0f : 0.0f;
    j->sum[r * j->groups + g] = sum;
  }
}

#if defined(__AVX512VNNI__) && defined(__AVX512BW__) && !defined(EFF_NO_VNNI) && !defined(EFF_GENERIC)
typedef __m512 floats;
INLINE floats zeros(void) { return _mm512_setzero_ps(); }
INLINE void put(float *p, floats v) { _mm512_storeu_ps(p, v); }

/* Sixteen scales or minima. */
INLINE floats factors(const uint8_t *p, const int wide) {
  return wide ? _mm512_loadu_ps(p) : _mm512_cvtph_ps(_mm256_loadu_si256((const __m256i *)p));
}

/* One group of sixteen outputs for MR rows of x. */
INLINE void group_of(const int MR, const int bits, const int minima, const int wide, int32_t offset, const uint8_t *w,
                     const int8_t *codes, int64_t k, const float *step, const int32_t *sum, int64_t groups, floats *total) {
  __m512i quads[8];
  if (bits == 4) {
    const __m512i mask = _mm512_set1_epi8(15);
#pragma GCC unroll 4
    for (int i = 0; i < 4; i++) {
      const __m512i both = _mm512_loadu_si512(w + 64 * i);
      quads[i] = _mm512_and_si512(both, mask), quads[i + 4] = _mm512_and_si512(_mm512_srli_epi16(both, 4), mask);
    }
  } else {
#pragma GCC unroll 8
    for (int i = 0; i < 8; i++) quads[i] = _mm512_loadu_si512(w + 64 * i);
  }
  const int64_t at = code_bytes(bits);
  const __m512 scale = factors(w + at, wide), low = minima ? factors(w + at + OUTPUTS * (wide ? 4 : 2), wide) : zeros();
#pragma GCC unroll 8
  for (int m = 0; m < MR; m++) {
    const int8_t *c = codes + m * k;
    __m512i a = _mm512_set1_epi32(-offset * sum[m * groups]), b = _mm512_setzero_si512();
#pragma GCC unroll 4
    for (int i = 0; i < 8; i += 2) {
      int32_t four[2];
      memcpy(four, c + 4 * i, 8);
      a = _mm512_dpbusd_epi32(a, quads[i], _mm512_set1_epi32(four[0]));
      b = _mm512_dpbusd_epi32(b, quads[i + 1], _mm512_set1_epi32(four[1]));
    }
    const __m512 exact = _mm512_cvtepi32_ps(_mm512_add_epi32(a, b)), unit = _mm512_set1_ps(step[m * groups]);
    total[m] = _mm512_fmadd_ps(exact, _mm512_mul_ps(scale, unit), total[m]);
    if (minima) total[m] = _mm512_fmadd_ps(low, _mm512_mul_ps(unit, _mm512_set1_ps((float)sum[m * groups])), total[m]);
  }
}
#else
typedef struct {
  float v[OUTPUTS];
} floats;
INLINE floats zeros(void) { return (floats){{0}}; }
INLINE void put(float *p, floats v) { memcpy(p, v.v, sizeof v.v); }

INLINE floats factors(const uint8_t *p, const int wide) {
  floats f;
  eff_load_row(wide ? EFF_F32 : EFF_F16, p, f.v, OUTPUTS);
  return f;
}

/* sums[output] += four codes of each of sixteen outputs times four of x. */
INLINE void add_quads(const uint8_t *quads, const int8_t *four, int32_t *sums) {
#if defined(__AVX2__) && !defined(EFF_GENERIC)
  const __m256i x = _mm256_set1_epi64x((int64_t)((uint64_t)(uint16_t)four[0] | (uint64_t)(uint16_t)four[1] << 16 |
                                                 (uint64_t)(uint16_t)four[2] << 32 | (uint64_t)(uint16_t)four[3] << 48));
  for (int i = 0; i < OUTPUTS; i += 8) {
    const __m256i a = _mm256_cvtepu8_epi16(_mm_loadu_si128((const __m128i *)(quads + 4 * i)));
    const __m256i b = _mm256_cvtepu8_epi16(_mm_loadu_si128((const __m128i *)(quads + 4 * i + 16)));
    const __m256i pairs = _mm256_hadd_epi32(_mm256_madd_epi16(a, x), _mm256_madd_epi16(b, x));
    const __m256i four_each = _mm256_permute4x64_epi64(pairs, 0xd8);
    _mm256_storeu_si256((__m256i *)(sums + i), _mm256_add_epi32(_mm256_loadu_si256((const __m256i *)(sums + i)), four_each));
  }
#else
  for (int o = 0; o < OUTPUTS; o++)
    for (int i = 0; i < 4; i++) sums[o] += (int32_t)quads[4 * o + i] * four[i];
#endif
}

INLINE void group_of(const int MR, const int bits, const int minima, const int wide, int32_t offset, const uint8_t *w,
                     const int8_t *codes, int64_t k, const float *step, const int32_t *sum, int64_t groups, floats *total) {
  uint8_t unpacked[OUTPUTS * GROUP];
  const uint8_t *quads = w;
  if (bits == 4) {
    for (int i = 0; i < 256; i++) unpacked[i] = w[i] & 15, unpacked[256 + i] = w[i] >> 4;
    quads = unpacked;
  }
  const int64_t at = code_bytes(bits);
  const floats scale = factors(w + at, wide), low = minima ? factors(w + at + OUTPUTS * (wide ? 4 : 2), wide) : zeros();
  for (int m = 0; m < MR; m++) {
    int32_t exact[OUTPUTS];
    for (int o = 0; o < OUTPUTS; o++) exact[o] = -offset * sum[m * groups];
    for (int i = 0; i < 8; i++) add_quads(quads + 64 * i, codes + m * k + 4 * i, exact);
    const float unit = step[m * groups], whole = unit * (float)sum[m * groups];
    for (int o = 0; o < OUTPUTS; o++) {
      total[m].v[o] += (float)exact[o] * (scale.v[o] * unit);
      if (minima) total[m].v[o] += low.v[o] * whole;
    }
  }
}
#endif

/* Tiles multiply sixteen rows of x by sixteen outputs at once: the same integers, and so the same bits. Linux lends them to a
 * process that asks. */
#if EFF_TILES
#define TILED 16

/* Of each of two groups in turn: 0 and 1 are products, 2 and 3 codes of x, 4 and 5 weights. */
static void begin_tiles(void) {
  const tile_shape shape = {.palette = 1, .bytes = {64, 64, GROUP, GROUP, 64, 64}, .rows = {16, 16, 16, 16, 8, 8}};
  _tile_loadconfig(&shape);
}

#define MULTIPLY(C, A, B, CODES, WEIGHTS, OUT) \
  _tile_zero(C);                               \
  _tile_loadd(A, CODES, k);                    \
  _tile_loadd(B, WEIGHTS, 64);                 \
  _tile_dpbsud(C, A, B);                       \
  _tile_stored(C, OUT, 64);

/* The exact products of group g, into half g % 2 of `exact`. */
INLINE void multiply_group(const int bits, const uint8_t *w, const int8_t *codes, int64_t k, int64_t g, uint8_t *unpacked,
                           int32_t *exact) {
  const uint8_t *weights = w;
  if (bits == 4) {
    const __m512i mask = _mm512_set1_epi8(15);
    unpacked += g % 2 * 512;
    for (int i = 0; i < 256; i += 64) {
      const __m512i both = _mm512_loadu_si512(w + i);
      _mm512_store_si512(unpacked + i, _mm512_and_si512(both, mask));
      _mm512_store_si512(unpacked + 256 + i, _mm512_and_si512(_mm512_srli_epi16(both, 4), mask));
    }
    weights = unpacked;
  }
  if (g % 2) {
    MULTIPLY(1, 3, 5, codes, weights, exact + TILED * OUTPUTS)
  } else {
    MULTIPLY(0, 2, 4, codes, weights, exact)
  }
}

/* Sixteen outputs of sixteen rows of x. */
INLINE void tile_of(const int bits, const int minima, const int wide, const job *j, int64_t r, const uint8_t *w, float *out) {
  const int64_t k = j->a->k, block = code_bytes(bits) + OUTPUTS * (wide ? 4 : 2) * (minima ? 2 : 1), at = code_bytes(bits);
  const int8_t *codes = j->codes + r * k;
  const float *step = j->step + r * j->groups;
  const int32_t *sum = j->sum + r * j->groups, offset = (int32_t)j->a->offset;
  uint8_t unpacked[1024] __attribute__((aligned(64)));
  int32_t exact[2 * TILED * OUTPUTS] __attribute__((aligned(64)));
  __m512 total[TILED];
#pragma GCC unroll 16
  for (int m = 0; m < TILED; m++) total[m] = zeros();
  multiply_group(bits, w, codes, k, 0, unpacked, exact);
  for (int64_t g = 0; g < j->groups; g++, w += block) {
    if (g + 1 < j->groups) multiply_group(bits, w + block, codes + (g + 1) * GROUP, k, g + 1, unpacked, exact);
    const __m512 scale = factors(w + at, wide), low = minima ? factors(w + at + OUTPUTS * (wide ? 4 : 2), wide) : zeros();
    const int32_t *of = exact + g % 2 * TILED * OUTPUTS;
#pragma GCC unroll 16
    for (int m = 0; m < TILED; m++) {
      const int32_t all = sum[m * j->groups + g];
      const __m512 unit = _mm512_set1_ps(step[m * j->groups + g]);
      __m512i product = _mm512_load_si512(of + m * OUTPUTS);
      if (offset) product = _mm512_sub_epi32(product, _mm512_set1_epi32(offset * all));
      total[m] = _mm512_fmadd_ps(_mm512_cvtepi32_ps(product), _mm512_mul_ps(scale, unit), total[m]);
      if (minima) total[m] = _mm512_fmadd_ps(low, _mm512_mul_ps(unit, _mm512_set1_ps((float)all)), total[m]);
    }
  }
#pragma GCC unroll 16
  for (int m = 0; m < TILED; m++) put(out + m * OUTPUTS, total[m]);
}
#else
#define TILED 0
INLINE void begin_tiles(void) {}
INLINE void _tile_release(void) {}
#endif

/* Sixteen outputs of MR rows of x. */
INLINE void block_of(const int MR, const int bits, const int minima, const int wide, const job *j, int64_t r, const uint8_t *w,
                     float *out) {
  const int64_t k = j->a->k, block = code_bytes(bits) + OUTPUTS * (wide ? 4 : 2) * (minima ? 2 : 1);
  floats total[ROW_TILE];
  for (int m = 0; m < MR; m++) total[m] = zeros();
  for (int64_t g = 0; g < j->groups; g++, w += block) {
    if (MR == 1) /* memory is quickest when it is asked for in the order in which it lies */
      for (int64_t i = 0; i < block; i += 64) __builtin_prefetch(w + 2048 + i);
    group_of(MR, bits, minima, wide, (int32_t)j->a->offset, w, j->codes + r * k + g * GROUP, k, j->step + r * j->groups + g,
             j->sum + r * j->groups + g, j->groups, total);
  }
  for (int m = 0; m < MR; m++) put(out + m * OUTPUTS, total[m]);
}

/* One function for each shape and layout: each gets its own registers. */
#define BLOCK(MR, BITS, MINIMA, WIDE)                                                                                            \
  static __attribute__((noinline)) void block_##MR##_##BITS##_##MINIMA##_##WIDE(const job *j, int64_t r, const uint8_t *w,       \
                                                                                float *out) {                                    \
    block_of(MR, BITS, MINIMA, WIDE, j, r, w, out);                                                                              \
  }
#if TILED
#define TILE_OF(BITS, MINIMA, WIDE)                                                                                             \
  static __attribute__((noinline)) void tile_##BITS##_##MINIMA##_##WIDE(const job *j, int64_t r, const uint8_t *w, float *out) { \
    tile_of(BITS, MINIMA, WIDE, j, r, w, out);                                                                               \
  }
#else
#define TILE_OF(BITS, MINIMA, WIDE) \
  static void tile_##BITS##_##MINIMA##_##WIDE(const job *j, int64_t r, const uint8_t *w, float *out) { (void)j, (void)r, (void)w, (void)out; }
#endif
#define TILES(BITS, MINIMA, WIDE)                                                                                        \
  BLOCK(1, BITS, MINIMA, WIDE) BLOCK(2, BITS, MINIMA, WIDE) BLOCK(4, BITS, MINIMA, WIDE) BLOCK(8, BITS, MINIMA, WIDE) \
  TILE_OF(BITS, MINIMA, WIDE)
TILES(4, 0, 0) TILES(4, 0, 1) TILES(4, 1, 0) TILES(4, 1, 1) TILES(8, 0, 0) TILES(8, 0, 1) TILES(8, 1, 0) TILES(8, 1, 1)
typedef void (*block_fn)(const job *, int64_t, const uint8_t *, float *);
#define ROW(BITS, MINIMA, WIDE)                                                                               \
  {block_1_##BITS##_##MINIMA##_##WIDE, block_2_##BITS##_##MINIMA##_##WIDE, block_4_##BITS##_##MINIMA##_##WIDE, \
   block_8_##BITS##_##MINIMA##_##WIDE, tile_##BITS##_##MINIMA##_##WIDE}
static const block_fn blocks[8][5] = {ROW(4, 0, 0), ROW(4, 0, 1), ROW(4, 1, 0), ROW(4, 1, 1),
                                      ROW(8, 0, 0), ROW(8, 0, 1), ROW(8, 1, 0), ROW(8, 1, 1)};

static void product_item(void *ctx, int64_t item) {
  const job *j = ctx;
  const args *a = j->a;
  const int64_t all = (a->n + OUTPUTS - 1) / OUTPUTS, columns = (all + ITEM_BLOCKS - 1) / ITEM_BLOCKS;
  const int64_t b0 = item % columns * ITEM_BLOCKS, r0 = item / columns * ITEM_ROWS, end = MIN(a->m, r0 + ITEM_ROWS);
  const block_fn *of = blocks[(a->bits == 8) * 4 + (a->minima != 0) * 2 + (a->wide != 0)];
  const eff_dtype dtype = (eff_dtype)a->y_dtype;
  float out[16 * OUTPUTS];
  const int tiled = end - r0 >= 16 && eff_tiles_are_lent();
  if (tiled) begin_tiles();
  for (int64_t b = b0; b < MIN(all, b0 + ITEM_BLOCKS); b++) {
    const uint8_t *w = a->weight + b * j->groups * j->block;
    const int64_t n0 = b * OUTPUTS, some = MIN(OUTPUTS, a->n - n0);
    for (int64_t r = r0; r < end;) {
      const int64_t left = end - r;
      const int size = tiled && left >= 16 ? 4 : left >= 8 ? 3 : left >= 4 ? 2 : left >= 2 ? 1 : 0;
      of[size](j, r, w, out);
      for (int m = 0; m < 1 << size; m++, r++) {
        float *row = out + m * OUTPUTS;
        for (int64_t o = 0; a->bias && o < some; o++) row[o] += a->bias[n0 + o];
        eff_store_row(dtype, row, eff_at_mut(a->y, dtype, r * a->n + n0), some);
      }
    }
  }
  if (tiled) _tile_release();
}

/* k is a multiple of 32. Returns 0, or 1 when memory ran out. */
KERNEL(int, eff_group_linear, args) {
  job j = {.a = a, .groups = a->k / GROUP, .block = block_bytes(a)};
  const int64_t counts = a->m * j.groups;
  char *scratch = eff_scratch((size_t)(a->m * a->k + counts * 8) + 192), *next = scratch;
  if (!scratch) return 1;
  j.codes = eff_take(&next, (size_t)(a->m * a->k)), j.step = eff_take(&next, (size_t)counts * 4);
  j.sum = eff_take(&next, (size_t)counts * 4);
  eff_parallel_for(a->m, a->m * a->k < 65536 ? 1 : (int)a->threads, quantize_row, &j);
  const int64_t all = (a->n + OUTPUTS - 1) / OUTPUTS;
  eff_parallel_for((all + ITEM_BLOCKS - 1) / ITEM_BLOCKS * ((a->m + ITEM_ROWS - 1) / ITEM_ROWS), (int)a->threads, product_item, &j);
  free(scratch);
  return 0;
}
