/* The parallel loop, over the OpenMP runtime that PyTorch has loaded: its pool of threads is already there and warm. */
#include "eff.h"

typedef void (*parallel_fn)(void (*)(void *), void *, unsigned, unsigned);

static parallel_fn gomp_parallel = NULL;

/* Address of GOMP_parallel; without this call all loops run on one thread. */
EXPORT void eff_use_openmp(void *parallel) { gomp_parallel = (parallel_fn)parallel; }

typedef struct {
  int64_t next, items;
  eff_work work;
  void *ctx;
} loop;

static void run_items(void *argument) {
  loop *l = argument;
  for (;;) {
    int64_t item = __atomic_fetch_add(&l->next, 1, __ATOMIC_RELAXED);
    if (item >= l->items) return;
    l->work(l->ctx, item);
  }
}

void eff_parallel_for(int64_t items, int threads, eff_work work, void *ctx) {
  loop l = {0, items, work, ctx};
  if (threads > items) threads = (int)items;
  if (threads <= 1 || !gomp_parallel)
    run_items(&l);
  else
    gomp_parallel(run_items, &l, (unsigned)threads, 0);
}
