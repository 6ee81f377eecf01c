"""Decoding steps of few sequences: recorded once for each number of them, then repeated without Python in between."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
from eff_kernels.native.tape import NotRecordableError, Recorded
from torch import Tensor

_MOST_ROWS = 4
"""More sequences give kernels so much to do that Python no longer shows, and every recording keeps its tensors."""


class Steps:
    """A step that is recorded when it is first taken with a number of sequences.

    Args:
        step: ``step(residual, cos, sin, at, lengths, block_table)`` gives hidden states; the first dimension of each is
            that of the sequences (of ``at``: a multiple of it).
        widest: Most pages of a sequence.
    """

    def __init__(self, step: Callable[..., Tensor], *, widest: int) -> None:
        self._step, self._widest = step, widest
        self._recorded: dict[tuple[int, int], Recorded | None] = {}

    def __call__(self, *inputs: Tensor) -> Tensor:
        """Take a step; the result is overwritten by the next one."""
        table, rows = inputs[-1], inputs[0].size(0)
        if rows > _MOST_ROWS or table.size(1) > self._widest:
            return self._step(*inputs)
        key = rows, torch.get_num_threads()
        if key not in self._recorded:
            wide = table.new_zeros(rows, self._widest)
            wide[:, : table.size(1)] = table
            try:
                self._recorded[key] = Recorded(self._step, *inputs[:-1], wide)
            except NotRecordableError:
                self._recorded[key] = None
        recorded = self._recorded[key]
        return self._step(*inputs) if recorded is None else recorded(*inputs)

    @property
    def recorded(self) -> int:
        """How many numbers of sequences are on tape."""
        return sum(r is not None for r in self._recorded.values())


class StepsOf:
    """`Steps` that also depend on something that may be replaced; recordings of what was before are dropped then.

    Args:
        step: ``step(owner, *inputs)``.
        widest: As in `Steps`.
    """

    def __init__(self, step: Callable[..., Tensor], *, widest: int) -> None:
        self._step, self._widest = step, widest
        self._owner: object = None
        self._steps: Steps | None = None

    def __call__(self, owner: object, *inputs: Tensor) -> Tensor:
        """Take a step; the result is overwritten by the next one."""
        if self._steps is None or self._owner is not owner:
            self._owner, self._steps = owner, Steps(partial(self._step, owner), widest=self._widest)
        return self._steps(*inputs)

    @property
    def recorded(self) -> int:
        """How many numbers of sequences are on tape."""
        return 0 if self._steps is None else self._steps.recorded
