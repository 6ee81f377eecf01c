"""Ending work when its client leaves.

A server framework cancels a streaming response when the client goes, but lets an ordinary handler compute to its end
for nobody. `unless_disconnected` treats both alike: it runs the work beside a watcher of the connection.
"""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine
from typing import Any, TypeVar

from starlette.types import Receive

T = TypeVar("T")


class ClientGoneError(Exception):
    """The client closed the connection before its answer was complete."""


async def unless_disconnected(receive: Receive, work: Coroutine[Any, Any, T]) -> T:
    """Run ``work``; cancel it and raise when the client leaves first.

    The body of the request must have been read, so that only a disconnect can come in. Work that ends in the same
    instant as the connection counts as done. When this call itself is cancelled, so is the work.

    Raises:
        ClientGoneError: the client left; the work has ended, its ``finally`` blocks included.
    """
    task = asyncio.ensure_future(work)
    watcher = asyncio.ensure_future(_disconnected(receive))
    try:
        await asyncio.wait((task, watcher), return_when=asyncio.FIRST_COMPLETED)
        if task.done():
            return task.result()
        raise ClientGoneError
    finally:
        watcher.cancel()
        task.cancel()
        await asyncio.gather(task, watcher, return_exceptions=True)


async def _disconnected(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass
