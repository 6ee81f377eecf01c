"""Running an app: the banner once the port is open, draining from the first signal on, a clean end."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable
from typing import Any

import uvicorn

from eff_http.half_closed import HalfClosedProtocol

AFTER_GRACE = 5  # seconds that cut answers get to say so before the server closes their connections


class DrainingServer(uvicorn.Server):
    """A uvicorn server that ends with status 0 and lets running answers end first.

    Args:
        app: The ASGI app.
        host: Address to listen on.
        port: Port to listen on; 0 takes a free one.
        grace: Seconds that running answers get after the first signal.
        on_open: Called with the port once it is open.
        on_drain: Called at the first signal; must return at once.
        on_cut: Called ``grace`` seconds later, from a thread of its own: running work is to end now, each answer with
            an error of its own.
    """

    def __init__(
        self,
        app: Any,
        *,
        host: str,
        port: int,
        grace: float,
        on_open: Callable[[int], None],
        on_drain: Callable[[], None],
        on_cut: Callable[[], None],
    ) -> None:
        config = uvicorn.Config(
            app,
            host=host,
            port=port,
            log_level="warning",
            timeout_graceful_shutdown=int(grace) + AFTER_GRACE,
            http=HalfClosedProtocol,
        )
        super().__init__(config)
        self._grace, self._on_open, self._on_drain, self._on_cut = grace, on_open, on_drain, on_cut
        self._timer: threading.Timer | None = None

    async def startup(self, sockets: Any = None) -> None:
        """Open the port, then say where."""
        await super().startup(sockets)
        if self.started:
            self._on_open(self.servers[0].sockets[0].getsockname()[1])

    def handle_exit(self, sig: int, frame: Any) -> None:
        """Begin to drain."""
        if self._timer is None:
            self._on_drain()
            self._timer = threading.Timer(self._grace, self._on_cut)
            self._timer.daemon = True
            self._timer.start()
        super().handle_exit(sig, frame)
        self._captured_signals.clear()  # uvicorn would raise the signal once more at the end, and the process die of it

    async def shutdown(self, sockets: Any = None) -> None:
        """End; what the timer would have cut has ended by then, or is cut by uvicorn."""
        await super().shutdown(sockets)
        if self._timer is not None:
            self._timer.cancel()


def log_to_stderr(level: int, *names: str) -> None:
    """Send the records of these loggers to standard error, with the time."""
    handler = logging.StreamHandler()
    handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(message)s"))
    for name in names:
        logger = logging.getLogger(name)
        logger.handlers[:] = [handler]
        logger.setLevel(level)
        logger.propagate = False
