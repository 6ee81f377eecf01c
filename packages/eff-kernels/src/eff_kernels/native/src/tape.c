/* Kernel calls, one after the other, without a word of Python between them. */
#include "eff.h"

typedef struct {
  void *run;
  const void *arguments;
  int64_t fallible; /* whether it returns 0 or the reason why it failed */
} step;

/* Returns 0, or 1 more than the number of the step that failed. */
EXPORT int64_t eff_replay(const step *steps, int64_t count) {
  for (int64_t i = 0; i < count; i++) {
    if (!steps[i].fallible)
      ((void (*)(const void *))steps[i].run)(steps[i].arguments);
    else if (((int (*)(const void *))steps[i].run)(steps[i].arguments))
      return i + 1;
  }
  return 0;
}
