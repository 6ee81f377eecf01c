/* The system lends the matrix tiles to a process that asks. */
#include "tiles.h"

#if EFF_TILES
#include <sys/syscall.h>
#include <unistd.h>

int eff_tiles_are_lent(void) {
  static int lent = -1; /* threads that ask at the same time get the same answer */
  int found = __atomic_load_n(&lent, __ATOMIC_RELAXED);
  if (found < 0) {
    found = syscall(SYS_arch_prctl, 0x1023 /* ARCH_REQ_XCOMP_PERM */, 18 /* tile data */) == 0;
    __atomic_store_n(&lent, found, __ATOMIC_RELAXED);
  }
  return found;
}
#endif
