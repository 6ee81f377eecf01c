"""What the launchers of the compiled kernels share: dtype codes and the choice of a thread count."""

from __future__ import annotations

from typing import Final

import torch

DTYPE_CODES: Final = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}
"""Codes of ``eff_dtype`` in eff.h."""

_PARALLEL_FROM: Final = 65536
"""Entering and leaving a parallel region costs about 5 us, the time in which one core handles this many simple elements."""


def threads_for(work: int) -> int:
    """Threads to use for ``work`` elements: 1 for small work, else `torch.get_num_threads`."""
    return 1 if work < _PARALLEL_FROM else torch.get_num_threads()
