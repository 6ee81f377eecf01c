/* What the forward and the backward of neighborhood attention share: windows, tiles and packing.
 *
 * A tile is AT_LANES queries of one batch entry, one key-value head and one dilation group, in a box on the map that is chosen
 * for the least surplus work. Its keys are the box of all keys that any of its queries sees. A mask of one bit a lane takes out
 * what is not in the window of the lane's query. So borders, strides, dilation and causal axes need no code of their own. */
#pragma once
#include "attention_tile.h"

#define NA_CHUNK 128 /* keys that are packed at once */

typedef struct {
  int64_t batch, heads, kv_heads, d, dv, extra;
  int64_t length[3], window[3], stride[3], dilation[3], causal[3];
  const void *q, *k, *v, *extra_k, *extra_v;
  int64_t q_stride[5], k_stride[5], v_stride[5]; /* batch, three axes, head */
  int64_t extra_k_stride[3], extra_v_stride[3];  /* batch, key, head */
  double scale;
  int64_t dtype, threads;
  void *out;  /* [batch, tokens, heads, dv] */
  float *lse; /* [batch, tokens, heads] */
  const void *grad;
  const float *grad_lse;
  void *dq, *dk, *dv_out, *d_extra_k, *d_extra_v;
} na_args;

typedef struct {
  int64_t group, first, count, lo, hi; /* residue, first query, number of queries, first and last key; in the group */
} na_span;

typedef struct {
  const na_args *a;
  int64_t dp, dvp; /* d and dv rounded up to lanes */
  int64_t group;   /* query heads of a key-value head */
  int64_t size[4]; /* tile: three axes, heads */
  na_span *spans[3];
  int64_t count[4]; /* tiles: three axes, heads */
  int64_t tiles;
} na_plan;

typedef struct {
  const na_plan *p;
  const na_span *span[3];
  int64_t b, kv, first_head;
  int64_t token[AT_LANES]; /* flat index; -1: no query in this lane */
  int64_t head[AT_LANES];
  int64_t q_at[AT_LANES];
  int64_t next[3], done_extra; /* the key to be packed next */
  uint16_t every;              /* lanes that hold a query */
  /* scratch */
  uint16_t *seen[3];          /* for each axis and key of the box: lanes whose window has it */
  float *k, *v;               /* [NA_CHUNK, dp], [NA_CHUNK, dvp] */
  float *s, *s2;              /* [NA_CHUNK, lanes] */
  uint16_t mask[NA_CHUNK];    /* lanes that see the key */
  int64_t row[NA_CHUNK];      /* flat index of the key; additional ones follow the tokens; -1: padding */
  float *qr, *qt, *gr, *gt;   /* queries and gradients, [lanes, dp or dvp] and transposed */
  float *acc;                 /* [max(dp, dvp), lanes] */
  void *memory;
} na_tile;

int na_plan_make(na_plan *p, const na_args *a);
void na_plan_free(na_plan *p);
int na_tile_new(na_tile *t, const na_plan *p);
void na_tile_set(na_tile *t, int64_t b, int64_t kv, int64_t index);
/* Packs the next keys, padded to a multiple of 4; 0 when there are no more. */
int na_next_keys(na_tile *t);
/* Rows of the tile's lanes, from a contiguous [batch, tokens, heads, n] when strides are not given; zeros where there is none. */
void na_lanes_load(const na_tile *t, const void *src, int strided, int64_t n, int64_t np, float scale, float *rows);
