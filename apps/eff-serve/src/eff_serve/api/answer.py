"""From a running generation to its response, streamed or whole; the two endpoints differ only in their format."""

from __future__ import annotations

import time
import uuid
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

from eff_http import ClientGoneError, EventStream, SendEvent, unless_disconnected
from fastapi import Request, Response
from pydantic import BaseModel

from eff_serve.api.generation import EndReason, Generation, Piece
from eff_serve.api.logprobs import PlacedScore
from eff_serve.api.models import CLIENT_CLOSED_REQUEST
from eff_serve.api.schema.common import Usage
from eff_serve.api.schema.sampling import SamplingFields
from eff_serve.api.serving import Serving
from eff_serve.api.tokenizer import Tokenizer
from eff_serve.text import TextAssembler


@dataclass(slots=True)
class Answer:
    """What has come of one choice."""

    text: str = ""
    scores: list[PlacedScore] = field(default_factory=list)
    finish_reason: EndReason = "length"


@dataclass(frozen=True, slots=True)
class Frame:
    """What all chunks of a response, or the whole response, say alike."""

    id: str
    created: int
    model: str
    fingerprint: str
    arrival: float

    @classmethod
    def of(
        cls, request: Request, serving: Serving, prefix: str, request_id: str | None, adapter: str | None = None
    ) -> Frame:
        """Frame of a new response; ``prefix`` tells its kind."""
        settings = serving.settings
        name = prefix + (request_id or uuid.uuid4().hex)
        model = serving.name_of(adapter)
        return cls(name, int(time.time()), model, settings.fingerprint, request.state.arrival)

    def fields(self, kind: str) -> dict[str, Any]:
        """Fields of a response object of this kind."""
        return {
            "id": self.id,
            "object": kind,
            "created": self.created,
            "model": self.model,
            "system_fingerprint": self.fingerprint,
        }


class Format(Protocol):
    """How an endpoint spells its answers."""

    def opening(self) -> list[BaseModel]:
        """Events before the first piece."""
        ...

    def events(self, piece: Piece) -> list[BaseModel]:
        """Events of one piece."""
        ...

    def usage_event(self, usage: Usage) -> BaseModel:
        """The last event, with ``stream_options.include_usage``."""
        ...

    def complete(self, answers: Sequence[Answer], usage: Usage) -> BaseModel:
        """The whole response."""
        ...


def assembler_for(tokenizer: Tokenizer, body: SamplingFields, *, keep_special: bool = False) -> TextAssembler:
    """Fresh text assembler with the request's stop strings; ``keep_special`` shows special tokens in any case."""
    return TextAssembler(
        tokenizer.decoder(skip_special_tokens=body.skip_special_tokens is not False and not keep_special),
        stop=body.stops,
        include_stop=bool(body.include_stop_str_in_output),
        min_tokens=body.min_tokens or 0,
        silent=tokenizer.eos_token_ids | frozenset(body.stop_token_ids or ()),
    )


def includes_usage(body: SamplingFields) -> bool:
    """Whether a stream ends with a usage event (and every other event says ``"usage": null``)."""
    return body.stream_options is not None and bool(body.stream_options.include_usage)


async def respond(
    request: Request,
    body: SamplingFields,
    generation: Generation,
    form: Format,
    request_id: str,
    stream: type[EventStream] = EventStream,
) -> Response:
    """Answer with a stream or a whole body; when the client leaves, the generation ends and is counted as left."""
    endpoint = request.url.path
    metrics = generation.metrics
    headers = {"x-request-id": request_id}

    async def produce(send: SendEvent) -> None:
        for event in form.opening():
            await send(event)

        async def emit(piece: Piece) -> None:
            for event in form.events(piece):
                await send(event)

        await generation.run(emit)
        if includes_usage(body):
            await send(form.usage_event(generation.usage))

    if body.stream:
        return stream(
            produce, client_gone=lambda: metrics.client_gone(endpoint), close=generation.close, headers=headers
        )
    answers = [Answer() for _ in generation.choices]

    async def collect(piece: Piece) -> None:
        answer = answers[piece.choice]
        answer.text += piece.text
        answer.scores.extend(piece.scores)
        answer.finish_reason = piece.finish_reason or answer.finish_reason

    try:
        await unless_disconnected(request.receive, generation.run(collect))
    except ClientGoneError:
        metrics.client_gone(endpoint)
        return Response(status_code=CLIENT_CLOSED_REQUEST)
    finally:
        generation.close()
    content = form.complete(answers, generation.usage).model_dump_json(exclude_unset=True)
    return Response(content, media_type="application/json", headers=headers)
