"""What models look at in pictures whatever is asked, remembered by picture."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine, Hashable
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import Tensor

KEPT = 64
"""Pictures that are remembered."""


class GeneralRequests:
    """Answers to the general request of `second_look`, running or done, for one app."""

    def __init__(self, kept: int = KEPT) -> None:
        self._kept = kept
        self._tasks: dict[Hashable, asyncio.Task[Tensor]] = {}

    async def answer(self, key: Hashable, record: Callable[[], Coroutine[Any, Any, Tensor]]) -> Tensor:
        """What the general request looks at; all who ask for one key share one answer, a failed one is forgotten."""
        task = self._tasks.pop(key, None)
        if task is None or (task.done() and (task.cancelled() or task.exception() is not None)):
            task = asyncio.ensure_future(record())
        self._tasks[key] = task  # behind all others: the first is the one that was last asked for the longest ago
        if len(self._tasks) > self._kept:
            self._tasks.pop(next(iter(self._tasks)))
        return await asyncio.shield(task)
