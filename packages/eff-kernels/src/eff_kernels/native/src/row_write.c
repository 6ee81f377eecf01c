/* Rows of a table overwritten with rows from anywhere: new keys or values of a paged cache. */
#include "eff.h"

typedef struct {
  char *table; /* [rows, bytes] */
  int64_t rows, bytes;
  const int64_t *at; /* [outer * inner], which row each goes to */
  const char *values; /* [outer, inner], outer_stride and inner_stride bytes apart */
  int64_t outer, inner, outer_stride, inner_stride;
} args;

/* Returns 0, or 2 when a row lies outside of the table; nothing is written then. */
KERNEL(int, eff_row_write, args) {
  for (int64_t i = 0; i < a->outer * a->inner; i++)
    if (a->at[i] < 0 || a->at[i] >= a->rows) return 2;
  for (int64_t o = 0; o < a->outer; o++)
    for (int64_t i = 0; i < a->inner; i++)
      memcpy(a->table + a->at[o * a->inner + i] * a->bytes, a->values + o * a->outer_stride + i * a->inner_stride,
             (size_t)a->bytes);
  return 0;
}
