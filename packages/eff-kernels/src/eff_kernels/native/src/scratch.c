/* Scratch memory, and a way to run out of it on purpose. */
#include "eff.h"

static int64_t left = -1;

/* Let so many more requests for scratch memory succeed and all later ones fail; -1: let all succeed. For tests. */
EXPORT void eff_limit_scratch(int64_t requests) { __atomic_store_n(&left, requests, __ATOMIC_RELAXED); }

void *eff_scratch(size_t bytes) {
  if (__atomic_load_n(&left, __ATOMIC_RELAXED) >= 0 && __atomic_fetch_sub(&left, 1, __ATOMIC_RELAXED) <= 0) {
    __atomic_store_n(&left, 0, __ATOMIC_RELAXED);
    return NULL;
  }
  return aligned_alloc(64, (MAX(bytes, 1) + 63) / 64 * 64);
}
