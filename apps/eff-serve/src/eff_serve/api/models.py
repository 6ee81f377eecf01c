"""The models of a server: found by name, loaded when a request asks for them, unloaded when others need the room."""

from __future__ import annotations

import asyncio
import gc
import logging
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from typing import TypeVar

from eff_http import ApiError, ClientGoneError, retry_later, unless_disconnected
from fastapi import Request
from starlette.types import ASGIApp, Receive, Scope, Send

from eff_serve.api.serving import Serving
from eff_serve.engine.threads import give_memory_back
from eff_serve.engine.types import Engine

CLIENT_CLOSED_REQUEST = 499
T = TypeVar("T")
_log = logging.getLogger("eff_serve.models")


class Models:
    """All models of an app, to be used from its asyncio loop.

    A model with a source is loaded for the first request that names it, one model after another. Where the models that
    are loaded would take more than the limit, those that no request has are unloaded, the one that was used longest ago
    first. While a model waits for room, new requests for those that are loaded wait behind it, so that busy models
    cannot keep it out.

    Args:
        servings: The models; the first is the one that requests without a name mean.
        memory_limit: Most bytes of all models together, weights and room for keys and values; None is no limit.
        load_timeout: Seconds that a request waits for its model.
    """

    def __init__(
        self, servings: Sequence[Serving], *, memory_limit: int | None = None, load_timeout: float = 300.0
    ) -> None:
        self.all = tuple(servings)
        self.default = self.all[0]
        self.families = self.default.metrics.families
        self._limit, self._timeout = memory_limit, load_timeout
        self._one_at_a_time = asyncio.Lock()
        self._wanting_room: asyncio.Future[None] | None = None
        self._released = asyncio.Event()
        self._draining = False

    @property
    def memory(self) -> int:
        """Bytes of the models that are loaded."""
        return sum(s.memory for s in self.all if s.state == "ready")

    def find(self, name: str | None) -> Serving:
        """The model of a name, which may have an adapter's behind a colon.

        Raises:
            ApiError: 404 for a name that is not served.
        """
        for serving in self.all:
            if serving.answers_to(name):
                return serving
        if len(self.all) == 1:
            self.default.check_model(name)  # says what there is
        served = ", ".join(repr(s.settings.model_id) for s in self.all)
        message = f"the model {(name or '')[:100]!r} is not served here; use {served}"
        raise ApiError(404, message, param="model", code="model_not_found")

    def check(self) -> None:
        """Raise 503 unless the server takes requests."""
        if self.default.source is None or self._draining:
            self.default.check()

    async def hold(self, serving: Serving, held: ExitStack) -> None:
        """Wait until a model is loaded, and keep it so until ``held`` is closed.

        Raises:
            ApiError: 503 when it is not loaded in time, cannot be loaded, or the server shuts down.
        """
        try:
            async with asyncio.timeout(self._timeout):
                while serving.state == "ready" and (turn := self._wanting_room) is not None:
                    await asyncio.wait([turn])
                serving.holders += 1
                held.callback(self._release, serving)
                while serving.state in ("unloaded", "loading"):
                    if serving.bringing is None:
                        serving.bringing = asyncio.create_task(self._bring(serving))
                        serving.bringing.add_done_callback(lambda _: setattr(serving, "bringing", None))
                    bringing = serving.bringing
                    await asyncio.wait([bringing])
                    if not bringing.cancelled() and (error := bringing.exception()) is not None:
                        raise error
        except TimeoutError:
            message = f"{serving.settings.model_id} was not loaded within {self._timeout:g} s; try again later"
            serving.metrics.rejected("load_timeout")
            raise retry_later(503, message, "loading", 5) from None

    async def unload(self, serving: Serving) -> bool:
        """Unload a model that no request has; whether it was."""
        if serving.source is None or serving.state != "ready" or serving.holders:
            return False
        await self._unload(serving)
        return True

    def drain(self) -> None:
        """Take no new requests from now on, and load nothing more; running ones go on."""
        self._draining = True
        for serving in self.all:
            serving.drain()
        self._released.set()

    def stop(self, grace: float) -> None:
        """Stop all engines."""
        for serving in self.all:
            serving.stop(grace)

    def _release(self, serving: Serving) -> None:
        serving.holders -= 1
        serving.used = time.monotonic()
        self._released.set()

    async def _bring(self, serving: Serving) -> None:
        """Load a model, once there is room; gives up where nobody waits for it any more."""
        source = serving.source
        if source is None:
            return
        async with self._one_at_a_time:
            needed = serving.memory
            if not needed and self._limit is not None:
                needed = await self._tried(serving, source.expected_memory)
            while serving.state == "unloaded" and await self._make_room(serving, needed):
                serving.state = "loading"
                begun = time.monotonic()
                model = await self._tried(serving, source.load)
                if self._draining:
                    await asyncio.to_thread(model.engine.stop, 0)
                    return
                serving.loaded(model, time.monotonic() - begun)
                _log.info("loaded %s, %.2f GiB", serving.settings.model_id, serving.memory / 2**30)
                del model
                needed = serving.memory
                if self._limit is not None and self.memory > self._limit:  # its files promised less
                    await self._unload(serving)

    async def _tried(self, serving: Serving, step: Callable[[], T]) -> T:
        """What a step on the way to a model gives, from a thread of its own; 503 where it fails."""
        try:
            return await asyncio.to_thread(step)
        except Exception as error:  # what libraries raise over a strange folder
            serving.metrics.load_failed()
            _log.error("%s cannot be loaded: %s: %s", serving.settings.model_id, type(error).__name__, error)
            if serving.state == "loading":
                serving.state = "unloaded"
            message = f"the model {serving.settings.model_id!r} cannot be loaded; the server's log says why"
            raise ApiError(503, message, code="model_failed", headers={"x-should-retry": "false"}) from error

    async def _make_room(self, serving: Serving, needed: int) -> bool:
        """Unload idle models until ``needed`` bytes are free; False where nobody waits for them any more."""
        if self._limit is None:
            return not self._draining
        if needed > self._limit:
            message = (
                f"{serving.settings.model_id} needs {needed / 2**30:.2f} GiB, weights and room for keys and values; "
                f"this server has {self._limit / 2**30:.2f} GiB for its models"
            )
            raise ApiError(503, message, code="model_too_large", headers={"x-should-retry": "false"})
        try:
            while self.memory + needed > self._limit:
                if serving.holders == 0 or self._draining:
                    return False
                idle = [s for s in self.all if s.state == "ready" and s.holders == 0]
                if idle:
                    await self._unload(min(idle, key=lambda s: s.used))
                    continue
                self._wanting_room = self._wanting_room or asyncio.get_running_loop().create_future()
                self._released.clear()
                await self._released.wait()
            return serving.holders > 0 and not self._draining
        finally:
            if self._wanting_room is not None:
                self._wanting_room.set_result(None)
                self._wanting_room = None

    async def _unload(self, serving: Serving) -> None:
        await asyncio.to_thread(_stop_and_free, [serving.unloaded()])
        _log.info("unloaded %s", serving.settings.model_id)


def _stop_and_free(engines: list[Engine | None]) -> None:
    """Stop the one engine of the list and give its memory back.

    It is taken out of the list: an argument is held by the pool's thread, whose hold would keep the weights.
    """
    engine = engines.pop()
    if engine is not None:
        engine.stop(0)
    del engine
    gc.collect()
    give_memory_back()


class HoldingModels:
    """ASGI middleware: models that a request holds are let go of when its response has ended, however that came."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Handle one connection (ASGI)."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        with ExitStack() as held:
            scope.setdefault("state", {})["held"] = held
            await self._app(scope, receive, send)


async def served(request: Request, name: str | None) -> tuple[Serving, str | None]:
    """The model that a request names, loaded, and the adapter of it; the request holds the model to its end.

    Raises:
        ApiError: 404 for a name that is not served, 503 where the model cannot be had, 499 where the client left first.
    """
    models: Models = request.app.state.models
    serving = models.find(name)
    adapter = serving.check_model(name)
    if serving.source is not None:
        try:
            await unless_disconnected(request.receive, models.hold(serving, request.state.held))
        except ClientGoneError:
            serving.metrics.client_gone(request.url.path)
            raise ApiError(CLIENT_CLOSED_REQUEST, "the client left while the model was being loaded") from None
    return serving, adapter
