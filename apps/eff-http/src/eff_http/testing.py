"""For tests of apps: an app that is really served, in this process."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager

import uvicorn
from starlette.types import ASGIApp

from eff_http.half_closed import HalfClosedProtocol


@contextmanager
def served_in_a_thread(app: ASGIApp) -> Iterator[str]:
    """Serve an app on a free port, in a thread of its own; gives its address.

    Raises:
        RuntimeError: it did not start.
    """
    server = uvicorn.Server(uvicorn.Config(app, port=0, log_level="warning", http=HalfClosedProtocol))
    thread = threading.Thread(target=lambda: asyncio.run(server.serve()))
    thread.start()
    while not server.started:
        if not thread.is_alive():
            raise RuntimeError("the server ended before it was open")
        time.sleep(0.01)
    try:
        yield f"http://127.0.0.1:{server.servers[0].sockets[0].getsockname()[1]}"
    finally:
        server.should_exit = True
        thread.join(30)
