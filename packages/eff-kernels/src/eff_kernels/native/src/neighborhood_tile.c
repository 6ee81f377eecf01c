/* Neighborhood attention: windows and tiles, and the packing of their keys and queries. */
#include "neighborhood.h"

static int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

/* Window of the query at place p of a dilation group with n positions (arXiv 2504.16922 for the leaders of strides). */
static void window_of(const na_args *a, int axis, int64_t p, int64_t n, int64_t *lo, int64_t *hi) {
  const int64_t k = a->window[axis], s = a->stride[axis], start = p / s * s;
  if (a->causal[axis]) {
    *lo = MAX(MIN(start + s - 1, n - 1) - k + 1, 0), *hi = p;
  } else {
    *lo = MIN(MAX(MIN(start + s / 2, n - 1) - k / 2, 0), n - k), *hi = *lo + k - 1;
  }
}

static int64_t group_length(const na_args *a, int axis, int64_t residue) {
  return ceil_div(a->length[axis] - residue, a->dilation[axis]);
}

/* Cuts an axis into tiles of `size` queries; returns their number and adds the lengths of their key ranges to *keys. */
static int64_t cut(const na_args *a, int axis, int64_t size, na_span *spans, int64_t *keys) {
  int64_t count = 0;
  for (int64_t g = 0; g < MIN(a->dilation[axis], a->length[axis]); g++) {
    const int64_t n = group_length(a, axis, g);
    for (int64_t first = 0; first < n; first += size) {
      na_span s = {g, first, MIN(size, n - first), n, -1};
      for (int64_t i = 0; i < s.count; i++) {
        int64_t lo, hi;
        window_of(a, axis, first + i, n, &lo, &hi);
        s.lo = MIN(s.lo, lo), s.hi = MAX(s.hi, hi);
      }
      *keys += s.hi - s.lo + 1;
      if (spans) spans[count] = s;
      count++;
    }
  }
  return count;
}

int na_plan_make(na_plan *p, const na_args *a) {
  *p = (na_plan){.a = a, .dp = (a->d + 15) / 16 * 16, .dvp = (a->dv + 15) / 16 * 16, .group = a->heads / a->kv_heads};
  int64_t keys[3][5] = {{0}}, counts[3][5];
  for (int axis = 0; axis < 3; axis++)
    for (int t = 0; t < 5; t++) counts[axis][t] = cut(a, axis, 1 << t, NULL, &keys[axis][t]);
  double best = INFINITY;
  int pick[4] = {0};
  for (int i = 0; i < 5; i++)
    for (int j = 0; i + j < 5; j++)
      for (int k = 0; i + j + k < 5; k++) {
        const int h = 4 - i - j - k;
        const double tiles = (double)counts[0][i] * (double)counts[1][j] * (double)counts[2][k];
        const double all = (double)keys[0][i] * (double)keys[1][j] * (double)keys[2][k] + tiles * (double)(a->extra + 12);
        const double cost = all * (double)ceil_div(p->group, 1 << h);
        if (cost < best) best = cost, pick[0] = i, pick[1] = j, pick[2] = k, pick[3] = h;
      }
  p->tiles = p->count[3] = ceil_div(p->group, 1 << pick[3]);
  p->size[3] = 1 << pick[3];
  for (int axis = 0; axis < 3; axis++) {
    int64_t unused = 0;
    p->size[axis] = 1 << pick[axis], p->count[axis] = counts[axis][pick[axis]];
    p->tiles *= p->count[axis];
    p->spans[axis] = malloc((size_t)MAX(p->count[axis], 1) * sizeof(na_span));
    if (!p->spans[axis]) return 1;
    cut(a, axis, p->size[axis], p->spans[axis], &unused);
  }
  return 0;
}

void na_plan_free(na_plan *p) {
  for (int axis = 0; axis < 3; axis++) free(p->spans[axis]);
}

int na_tile_new(na_tile *t, const na_plan *p) {
  const int64_t wide = MAX(p->dp, p->dvp), both = p->dp + p->dvp;
  const int64_t floats = NA_CHUNK * (both + 2 * AT_LANES) + AT_LANES * (2 * both + wide);
  int64_t bits = 0;
  for (int axis = 0; axis < 3; axis++) bits += p->a->length[axis];
  float *f = eff_scratch((size_t)floats * 4 + (size_t)bits * 2);
  if (!f) return 1;
  t->p = p, t->memory = f;
  t->k = f, f += NA_CHUNK * p->dp;
  t->v = f, f += NA_CHUNK * p->dvp;
  t->s = f, f += NA_CHUNK * AT_LANES;
  t->s2 = f, f += NA_CHUNK * AT_LANES;
  t->qr = f, f += AT_LANES * p->dp;
  t->qt = f, f += AT_LANES * p->dp;
  t->gr = f, f += AT_LANES * p->dvp;
  t->gt = f, f += AT_LANES * p->dvp;
  t->acc = f, f += AT_LANES * wide;
  uint16_t *h = (uint16_t *)f;
  for (int axis = 0; axis < 3; axis++) t->seen[axis] = h, h += p->a->length[axis];
  return 0;
}

void na_tile_set(na_tile *t, int64_t b, int64_t kv, int64_t index) {
  const na_plan *p = t->p;
  const na_args *a = p->a;
  t->b = b, t->kv = kv;
  t->first_head = kv * p->group + index % p->count[3] * p->size[3];
  index /= p->count[3];
  for (int axis = 2; axis >= 0; axis--) t->span[axis] = &p->spans[axis][index % p->count[axis]], index /= p->count[axis];

  int64_t real[3][AT_LANES];
  for (int axis = 0; axis < 3; axis++)
    for (int64_t i = 0; i < t->span[axis]->count; i++)
      real[axis][i] = (t->span[axis]->first + i) * a->dilation[axis] + t->span[axis]->group;
  const int64_t heads = MIN(p->size[3], (kv + 1) * p->group - t->first_head);
  uint16_t at[3][AT_LANES] = {{0}}; /* lanes at each place of an axis */
  t->every = 0;
  int lane = 0;
  for (int64_t i = 0; i < p->size[0]; i++)
    for (int64_t j = 0; j < p->size[1]; j++)
      for (int64_t k = 0; k < p->size[2]; k++)
        for (int64_t h = 0; h < p->size[3]; h++, lane++) {
          t->token[lane] = -1;
          if (i >= t->span[0]->count || j >= t->span[1]->count || k >= t->span[2]->count || h >= heads) continue;
          const int64_t x = real[0][i], y = real[1][j], z = real[2][k];
          t->token[lane] = (x * a->length[1] + y) * a->length[2] + z;
          t->head[lane] = t->first_head + h;
          t->q_at[lane] = b * a->q_stride[0] + x * a->q_stride[1] + y * a->q_stride[2] + z * a->q_stride[3] +
                          t->head[lane] * a->q_stride[4];
          const uint16_t bit = (uint16_t)(1 << lane);
          t->every |= bit, at[0][i] |= bit, at[1][j] |= bit, at[2][k] |= bit;
        }
  for (int axis = 0; axis < 3; axis++) {
    const na_span *s = t->span[axis];
    const int64_t n = group_length(a, axis, s->group);
    memset(t->seen[axis], 0, (size_t)(s->hi - s->lo + 1) * 2);
    for (int64_t i = 0; i < s->count; i++) {
      int64_t lo, hi;
      window_of(a, axis, s->first + i, n, &lo, &hi);
      for (int64_t j = lo; j <= hi; j++) t->seen[axis][j - s->lo] |= at[axis][i];
    }
    t->next[axis] = 0;
  }
  t->done_extra = 0;
}

INLINE int next_keys(const eff_dtype dtype, na_tile *t) {
  const na_plan *p = t->p;
  const na_args *a = p->a;
  const na_span *const *s = t->span;
  int n = 0;
  const int64_t n0 = s[0]->hi - s[0]->lo + 1, n1 = s[1]->hi - s[1]->lo + 1, n2 = s[2]->hi - s[2]->lo + 1;
  const int64_t z0 = s[2]->lo * a->dilation[2] + s[2]->group, zd = a->dilation[2];
  int64_t i = t->next[0], j = t->next[1], k = t->next[2];
  for (; i < n0 && n < NA_CHUNK; i++, j = 0) {
    const int64_t x = (s[0]->lo + i) * a->dilation[0] + s[0]->group;
    for (; j < n1 && n < NA_CHUNK; j++, k = 0) {
      const int64_t y = (s[1]->lo + j) * a->dilation[1] + s[1]->group;
      const uint16_t outer = t->seen[0][i] & t->seen[1][j];
      if (!outer) continue;
      const int64_t row = (x * a->length[1] + y) * a->length[2];
      const int64_t k_row = t->b * a->k_stride[0] + x * a->k_stride[1] + y * a->k_stride[2] + t->kv * a->k_stride[4];
      const int64_t v_row = t->b * a->v_stride[0] + x * a->v_stride[1] + y * a->v_stride[2] + t->kv * a->v_stride[4];
      for (; k < n2 && n < NA_CHUNK; k++) {
        const uint16_t mask = outer & t->seen[2][k];
        if (!mask) continue;
        const int64_t z = z0 + k * zd;
        t->mask[n] = mask, t->row[n] = row + z;
        at_load_row(dtype, a->k, k_row + z * a->k_stride[3], t->k + n * p->dp, a->d, p->dp);
        at_load_row(dtype, a->v, v_row + z * a->v_stride[3], t->v + n * p->dvp, a->dv, p->dvp);
        n++;
      }
      if (k < n2) break; /* the chunk is full inside this line */
    }
    if (j < n1) break;
  }
  t->next[0] = i, t->next[1] = j, t->next[2] = k;
  const int64_t tokens = a->length[0] * a->length[1] * a->length[2];
  for (; i >= n0 && t->done_extra < a->extra && n < NA_CHUNK; n++, t->done_extra++) {
    const int64_t m = t->done_extra;
    t->mask[n] = t->every, t->row[n] = tokens + m;
    at_load_row(dtype, a->extra_k, t->b * a->extra_k_stride[0] + m * a->extra_k_stride[1] + t->kv * a->extra_k_stride[2],
             t->k + n * p->dp, a->d, p->dp);
    at_load_row(dtype, a->extra_v, t->b * a->extra_v_stride[0] + m * a->extra_v_stride[1] + t->kv * a->extra_v_stride[2],
             t->v + n * p->dvp, a->dv, p->dvp);
  }
  for (; n % 4; n++) {
    t->mask[n] = 0, t->row[n] = -1;
    memset(t->k + n * p->dp, 0, (size_t)p->dp * 4), memset(t->v + n * p->dvp, 0, (size_t)p->dvp * 4);
  }
  return n;
}

int na_next_keys(na_tile *t) {
  switch (t->p->a->dtype) {
    case EFF_F32: return next_keys(EFF_F32, t);
    case EFF_BF16: return next_keys(EFF_BF16, t);
    default: return next_keys(EFF_F16, t);
  }
}

void na_lanes_load(const na_tile *t, const void *src, int strided, int64_t n, int64_t np, float scale, float *rows) {
  const na_args *a = t->p->a;
  const int64_t tokens = a->length[0] * a->length[1] * a->length[2];
  for (int lane = 0; lane < AT_LANES; lane++, rows += np) {
    if (t->token[lane] < 0) {
      memset(rows, 0, (size_t)np * 4);
      continue;
    }
    const int64_t at = strided ? t->q_at[lane] : ((t->b * tokens + t->token[lane]) * a->heads + t->head[lane]) * n;
    at_load_row((eff_dtype)a->dtype, src, at, rows, n, np);
    for (int64_t c = 0; c < np; c++) rows[c] *= scale;
  }
}
