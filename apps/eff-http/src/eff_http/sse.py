"""Server-sent events: a response that sends models as they come, and ends its work when the client leaves."""

from __future__ import annotations

import logging
from collections.abc import Awaitable, Callable

from pydantic import BaseModel
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from eff_http.disconnect import ClientGoneError, unless_disconnected
from eff_http.errors import ApiError, internal_error
from eff_http.schema import ErrorBody, ErrorResponse

log = logging.getLogger("eff_http")
SendEvent = Callable[[BaseModel], Awaitable[None]]


class EventStream(Response):
    """Runs ``produce(send_event)`` and sends each model given to ``send_event`` as one event, then ``[DONE]``.

    An error after the first byte can no longer change the status: it is sent as an event ``{"error": ...}``, and the
    stream ends there, without ``[DONE]``. Streams of another form override `encode`, `failure` and ``ending``.

    Args:
        produce: Makes the events; cancelled when the client leaves.
        client_gone: Called when it did.
        close: Called at the end, however it comes about, also when ``produce`` never ran.
        headers: Further response headers.
    """

    media_type = "text/event-stream"
    ending = b"data: [DONE]\n\n"
    """What follows the last event of a stream that did not fail."""

    def __init__(
        self,
        produce: Callable[[SendEvent], Awaitable[None]],
        *,
        client_gone: Callable[[], None],
        close: Callable[[], None],
        headers: dict[str, str],
    ) -> None:
        # Proxies that buffer would turn a stream into one late block; the last header is nginx's switch against that.
        super().__init__(headers={**headers, "cache-control": "no-store", "x-accel-buffering": "no"})
        del self.headers["content-length"]
        self._close = close
        self._produce = produce
        self._client_gone = client_gone

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Send the response (ASGI)."""
        try:
            await unless_disconnected(receive, self._send_all(send))
        except ClientGoneError:
            self._client_gone()
        finally:
            self._close()

    def encode(self, event: BaseModel) -> bytes:
        """One event; fields that were not set are left out."""
        return f"data: {event.model_dump_json(exclude_unset=True)}\n\n".encode()

    def failure(self, error: ErrorBody, sent: int) -> BaseModel:
        """The event that tells of an error behind ``sent`` others."""
        return ErrorResponse(error=error)

    async def _send_all(self, send: Send) -> None:
        sent = 0

        async def send_bytes(data: bytes) -> None:
            await send({"type": "http.response.body", "body": data, "more_body": True})

        async def send_event(event: BaseModel) -> None:
            nonlocal sent
            sent += 1
            await send_bytes(self.encode(event))

        await send({"type": "http.response.start", "status": 200, "headers": self.raw_headers})
        try:
            await self._produce(send_event)
        except ApiError as error:
            await send_event(self.failure(error.body, sent))
        except Exception as error:
            log.error("a stream failed", exc_info=error)
            await send_event(self.failure(internal_error().body, sent))
        else:
            if self.ending:
                await send_bytes(self.ending)
        await send({"type": "http.response.body", "body": b"", "more_body": False})
