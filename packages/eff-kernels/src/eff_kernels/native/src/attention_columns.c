/* What each key gets from all queries of a causal attention, and the log-sum-exp of each query, without a map in memory.
 *
 * Sixteen queries are taken at a time, one in each lane: their scores with all keys that they see fit the cache. A bfloat16
 * product runs in the tiles of AMX where the processor has them: keys are the left matrix as they lie, queries the right one. */
#include "attention_tile.h"

#if defined(__AMX_BF16__) && defined(__linux__) && defined(__AVX512F__) && !defined(EFF_GENERIC) && !defined(EFF_NO_AVX512) && !defined(EFF_NO_AMX)
#define WITH_TILES 1
#include <sys/syscall.h>
#include <unistd.h>
#else
#define WITH_TILES 0
#endif

typedef struct {
  const void *q; /* [batch, heads, queries, d], the last dimension contiguous */
  int64_t q_batch, q_head, q_row;
  const void *k; /* [batch, kv_heads, keys, d] of the same dtype */
  int64_t k_batch, k_head, k_row;
  int64_t dtype, batch, heads, kv_heads, queries, keys, d; /* d a multiple of 16 */
  const int64_t *which; /* [chosen] query heads */
  int64_t chosen;
  double scale; /* above 0 */
  float *sums; /* [batch, chosen, keys] */
  float *lse;  /* [batch, chosen, queries] */
  int64_t threads;
  const float *known; /* [batch, heads, queries] or NULL: the log-sum-exps, if they are known already */
  int64_t known_batch, known_head, known_row;
} args;

#if AT_W == 16
/* `at_exp` in fewer instructions. */
INLINE at_v exp_of(at_v x) {
  const __m512 n = _mm512_roundscale_ps((__m512)(x * 1.44269504f), _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
  const at_v r = (x - (at_v)n * 0.693359375f) + (at_v)n * 2.12194440e-4f;
  at_v e = at_splat(1.9875691500e-4f);
  e = e * r + 1.3981999507e-3f;
  e = e * r + 8.3334519073e-3f;
  e = e * r + 4.1665795894e-2f;
  e = e * r + 1.6666665459e-1f;
  e = e * r + 5.0000001201e-1f;
  e = e * r * r + r + 1.0f;
  const __mmask16 is_seen = _mm512_cmp_ps_mask((__m512)x, _mm512_set1_ps(-87.0f), _CMP_NLT_UQ); /* or NaN */
  return (at_v)_mm512_maskz_scalef_ps(is_seen, (__m512)e, n);
}
#else
INLINE at_v exp_of(at_v x) { return at_exp(x); }
#endif

typedef struct {
  const args *a;
  int tiles;
  char *scratch;
  int64_t room, rows; /* bytes of scratch of an item; floats of its keys */
} job;

#if WITH_TILES
/* Whether this thread may use tiles: Linux gives their state to a process that asks for it. */
static int may_use_tiles(void) {
  static int known = 0; /* 1: yes, 2: no */
  int found = __atomic_load_n(&known, __ATOMIC_RELAXED);
  if (!found) {
    found = syscall(SYS_arch_prctl, 0x1023 /* ARCH_REQ_XCOMP_PERM */, 18 /* tile data */) ? 2 : 1;
    __atomic_store_n(&known, found, __ATOMIC_RELAXED);
  }
  return found == 1;
}

typedef struct {
  uint8_t palette, start, reserved[14];
  uint16_t row_bytes[16];
  uint8_t rows[16];
} tile_config;

/* s[key, lane] of keys 0 .. n - 1, a multiple of 16, and sixteen queries as pairs of features [d / 2, 16, 2]. */
static void tile_scores(const uint16_t *keys, int64_t stride, const uint16_t *pairs, int64_t d, int64_t n, float *s) {
  tile_config config = {.palette = 1};
  for (int t = 0; t < 6; t++) config.row_bytes[t] = 64, config.rows[t] = 16;
  _tile_loadconfig(&config);
  for (int64_t i = 0; i < n; i += 32) {
    const int two = i + 16 < n;
    _tile_zero(0);
    _tile_zero(1);
    for (int64_t c = 0; c < d; c += 32) {
      _tile_loadd(4, pairs + c * 16, 64);
      _tile_loadd(2, keys + i * stride + c, stride * 2);
      _tile_dpbf16ps(0, 2, 4);
      if (two) {
        _tile_loadd(3, keys + (i + 16) * stride + c, stride * 2);
        _tile_dpbf16ps(1, 3, 4);
      }
    }
    _tile_stored(0, s + i * 16, 64);
    if (two) _tile_stored(1, s + (i + 16) * 16, 64);
  }
  _tile_release();
}
#endif

/* Add what the lanes of sixteen keys sum up to to `count` of them. */
INLINE void add(at_v *parts, float *sums, int64_t count) {
  float got[16];
  at_sums(parts, got);
  for (int64_t y = 0; y < count; y++) sums[y] += got[y];
}

/* One head of one sequence. */
static void look(void *ctx, int64_t item) {
  const job *j = ctx;
  const args *a = j->a;
  const int64_t b = item / a->chosen, head = a->which[item % a->chosen], kv = head / (a->heads / a->kv_heads), d = a->d;
  const eff_dtype dtype = (eff_dtype)a->dtype;
  const int64_t first_query = b * a->q_batch + head * a->q_head, first_key = b * a->k_batch + kv * a->k_head;
  char *scratch = j->scratch + item * j->room;
  const int64_t padded = eff_round_up(a->keys, 16);
  float *s = eff_take(&scratch, (size_t)(padded * AT_LANES) * 4), *xt = eff_take(&scratch, (size_t)(d * AT_LANES) * 4);
  float *x = eff_take(&scratch, (size_t)(d * AT_LANES) * 4), *rows = eff_take(&scratch, (size_t)j->rows * 4);
  float *sums = a->sums + item * a->keys, *lse = a->lse + item * a->queries;
  if (!j->tiles)
    for (int64_t i = 0; i < padded; i++) {
      if (i < a->keys)
        at_load_row(dtype, a->k, first_key + i * a->k_row, rows + i * d, d, d);
      else
        memset(rows + i * d, 0, (size_t)d * 4);
    }
#if WITH_TILES
  uint16_t *last = (uint16_t *)rows; /* the keys behind the last whole sixteen, with zeros behind them */
  if (j->tiles) {
    memset(last, 0, (size_t)(16 * d) * 2);
    for (int64_t i = a->keys / 16 * 16; i < a->keys; i++)
      memcpy(last + i % 16 * d, eff_at(a->k, dtype, first_key + i * a->k_row), (size_t)d * 2);
  }
#endif
  memset(sums, 0, (size_t)a->keys * 4);
  for (int64_t start = 0; start < a->queries; start += AT_LANES) {
    const int64_t lanes = MIN(AT_LANES, a->queries - start);
    const int64_t seen = a->keys - a->queries + start + 1; /* keys that the first of these queries sees */
    const int64_t end = MIN(a->keys, seen + AT_LANES - 1), n = eff_round_up(end, 16);
#if WITH_TILES
    if (j->tiles) {
      uint32_t *pairs = (uint32_t *)xt;
      memset(pairs, 0, (size_t)(d / 2 * 16) * 4);
      for (int64_t l = 0; l < lanes; l++) {
        const char *row = eff_at(a->q, dtype, first_query + (start + l) * a->q_row);
        for (int64_t c = 0; c < d / 2; c++) memcpy(pairs + c * 16 + l, row + c * 4, 4);
      }
      const int64_t whole = MIN(n, a->keys / 16 * 16);
      tile_scores(eff_at(a->k, dtype, first_key), a->k_row, (const uint16_t *)pairs, d, whole, s);
      if (whole < n) tile_scores(last, d, (const uint16_t *)pairs, d, 16, s + whole * AT_LANES);
    } else
#endif
    {
      memset(x, 0, (size_t)(d * AT_LANES) * 4);
      for (int64_t l = 0; l < lanes; l++) at_load_row(dtype, a->q, first_query + (start + l) * a->q_row, x + l * d, d, d);
      at_transpose(x, d, xt, AT_LANES, AT_LANES, d);
      for (int64_t i = 0; i < n; i += 16) at_scores(rows + i * d, d, xt, d, 16, s + i * AT_LANES);
    }
    for (int64_t i = seen; i < n; i++) /* what is later than a query */
      for (int64_t l = 0; l < AT_LANES; l++)
        if (i >= seen + l || i >= a->keys) s[i * AT_LANES + l] = -INFINITY;
    const at_v scale = at_splat((float)a->scale);
    if (a->known) {
      const float *known = a->known + b * a->known_batch + head * a->known_head;
      at_v of[AT_V] = {{0}};
      for (int l = 0; l < AT_LANES; l++) of[l / AT_W][l % AT_W] = l < lanes ? known[(start + l) * a->known_row] : INFINITY;
      for (int64_t i = 0; i < n; i += 16) {
        at_v parts[16];
#pragma GCC unroll 16
        for (int y = 0; y < 16; y++) {
          parts[y] = exp_of(at_load(s + (i + y) * AT_LANES) * scale - of[0]);
#pragma GCC unroll 4
          for (int u = 1; u < AT_V; u++) parts[y] += exp_of(at_load(s + (i + y) * AT_LANES + u * AT_W) * scale - of[u]);
        }
        add(parts, sums + i, MIN(16, a->keys - i));
      }
      continue;
    }
    at_v top[AT_V], total[AT_V], share[AT_V];
    for (int u = 0; u < AT_V; u++) top[u] = at_splat(-INFINITY), total[u] = (at_v){0};
    for (int64_t i = 0; i < n; i++)
#pragma GCC unroll 4
      for (int u = 0; u < AT_V; u++) {
        const at_v e = at_load(s + i * AT_LANES + u * AT_W);
        top[u] = at_select((at_i)(e > top[u]), e, top[u]); /* a NaN is passed over; it shows in the weights */
      }
    for (int u = 0; u < AT_V; u++) top[u] *= scale;
    for (int64_t i = 0; i < n; i++)
#pragma GCC unroll 4
      for (int u = 0; u < AT_V; u++) {
        const at_v e = exp_of(at_load(s + i * AT_LANES + u * AT_W) * scale - top[u]);
        at_store(s + i * AT_LANES + u * AT_W, e);
        total[u] += e;
      }
    for (int u = 0; u < AT_V; u++)
      for (int l = 0; l < AT_W; l++) {
        const int64_t lane = u * AT_W + l;
        if (lane < lanes) lse[start + lane] = top[u][l] + logf(total[u][l]);
        share[u][l] = lane < lanes ? 1.0f / total[u][l] : 0.0f; /* lanes without a query */
      }
    for (int64_t i = 0; i < n; i += 16) {
      at_v parts[16];
#pragma GCC unroll 16
      for (int y = 0; y < 16; y++) {
        parts[y] = at_load(s + (i + y) * AT_LANES) * share[0];
#pragma GCC unroll 4
        for (int u = 1; u < AT_V; u++) parts[y] += at_load(s + (i + y) * AT_LANES + u * AT_W) * share[u];
      }
      add(parts, sums + i, MIN(16, a->keys - i));
    }
  }
}

/* Query i sees keys 0 .. keys - queries + i. Returns 0, or 1 when memory ran out. */
KERNEL(int, eff_attention_columns, args) {
  const int64_t items = a->batch * a->chosen;
  if (!items || !a->queries) return 0;
  job j = {.a = a};
#if WITH_TILES
  j.tiles = a->dtype == EFF_BF16 && a->d % 32 == 0 && may_use_tiles();
#endif
  const int64_t padded = eff_round_up(a->keys, 16);
  j.rows = j.tiles ? 8 * a->d : padded * a->d;
  j.room = (padded * AT_LANES + 2 * a->d * AT_LANES + j.rows) * 4 + 4 * 64;
  j.room = eff_round_up(j.room, 64);
  j.scratch = eff_scratch((size_t)(items * j.room));
  if (!j.scratch) return 1;
  const int small = a->queries * a->keys * a->d * items < 1 << 20;
  eff_parallel_for(items, small ? 1 : (int)a->threads, look, &j);
  free(j.scratch);
  return 0;
}
