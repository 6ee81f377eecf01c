"""Clients that close their sending half and wait for the answer, beside clients that have left.

Both look the same to a server: the end of what the client sends. They differ once something is written, for the system
of a client that has left answers with a reset. So a request that has not been answered yet gets a ``100 Continue``,
which every client of HTTP/1.1 skips (RFC 9110, section 15.2), and then another each second: the second one fails where
nobody listens.

An answer that is being sent already, a stream of events, has no room for such a question, and HTTP/1.0 has no interim
answers; there the end of sending still means that the client has left. Otherwise a stream that waits for its turn would
hold its place for nobody.
"""

from __future__ import annotations

import asyncio
from typing import Any

from uvicorn.protocols.http.auto import AutoHTTPProtocol

INTERIM = b"HTTP/1.1 100 Continue\r\n\r\n"
FIRST, LATER = 0.05, 1.0  # seconds between the first two questions, long enough for a reset, and between others


class HalfClosed:
    """Stands before one of uvicorn's protocols: the end of sending is not taken for the end of the client."""

    transport: asyncio.Transport
    loop: asyncio.AbstractEventLoop
    cycle: Any
    _asking: asyncio.TimerHandle | None = None
    _half_closed = False

    def eof_received(self) -> bool | None:
        """Keep the connection where an answer to a whole request is due: True says so to the event loop."""
        if not self._answer_is_due():
            return None
        self._half_closed = True
        self._ask(FIRST)
        return True

    def on_response_complete(self) -> None:
        """Close behind the last answer: no request can follow."""
        super().on_response_complete()  # type: ignore[misc]
        if self._half_closed and self.cycle.response_complete:
            self.transport.close()

    def connection_lost(self, exc: Exception | None) -> None:
        """Ask no more."""
        if self._asking is not None:
            self._asking.cancel()
        super().connection_lost(exc)  # type: ignore[misc]

    def _answer_is_due(self) -> bool:
        cycle = self.cycle
        if cycle is None or cycle.more_body or cycle.response_started:
            return False
        return bool(cycle.scope["http_version"] == "1.1")

    def _ask(self, wait: float) -> None:
        if self.transport.is_closing() or not self._answer_is_due():
            return
        if not getattr(self, "pipeline", None):  # an earlier answer may be half written
            self.transport.write(INTERIM)
        self._asking = self.loop.call_later(wait, self._ask, LATER)


class HalfClosedProtocol(HalfClosed, AutoHTTPProtocol):  # type: ignore[misc, valid-type]
    """The protocol that uvicorn would choose by itself."""
