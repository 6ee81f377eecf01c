"""Answers in Ollama's form: lines of JSON."""

from __future__ import annotations

import contextlib
import json
import time
from collections.abc import Callable, Coroutine, Sequence
from datetime import UTC, datetime
from typing import Any

from eff_http import ApiError, ErrorBody, EventStream, JsonRoute
from eff_http.validation import from_validation
from fastapi import Request, Response
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from pydantic import BaseModel

from eff_serve.api.answer import Answer
from eff_serve.api.chat import Begun, message_of
from eff_serve.api.generation import EndReason, Piece
from eff_serve.api.schema.chat import AnswerMessage
from eff_serve.api.schema.common import Usage
from eff_serve.api.schema.ollama import OllamaAnswer, OllamaAnswerMessage, OllamaError
from eff_serve.api.speech import CallPart, Words


class OllamaRoute(JsonRoute):
    """A route whose errors are Ollama's: ``{"error": "what was wrong"}``."""

    def get_route_handler(self) -> Callable[[Request], Coroutine[Any, Any, Response]]:
        """Wrap the strict handler."""
        handle = super().get_route_handler()

        async def told(request: Request) -> Response:
            try:
                return await handle(request)
            except RequestValidationError as error:
                found = from_validation(error.errors(), error.body)
            except ApiError as error:
                found = error
            content = OllamaError(error=found.body.message).model_dump()
            return JSONResponse(content, found.status_code, found.headers)

        return told


class LineStream(EventStream):
    """One JSON object a line; an error is the last of them."""

    media_type = "application/x-ndjson"

    ending = b""

    def encode(self, event: BaseModel) -> bytes:
        """One line; fields that were not set are left out."""
        return event.model_dump_json(exclude_unset=True).encode() + b"\n"

    def failure(self, error: ErrorBody, sent: int) -> BaseModel:
        """The line that tells of an error."""
        return OllamaError(error=error.message)


class OllamaFormat:
    """Pieces of an answer as lines of /api/chat, or of /api/generate where ``bare``."""

    def __init__(self, begun: Begun, name: str, *, bare: bool) -> None:
        self._begun, self._name, self._bare = begun, name, bare
        self._speech = begun.speech()
        self._calls: list[CallPart] = []
        self._first: float | None = None

    def opening(self) -> list[BaseModel]:
        """Nothing comes before the first piece."""
        return []

    def events(self, piece: Piece) -> list[BaseModel]:
        """Lines of one piece."""
        self._first = self._first or time.perf_counter()
        parts = self._speech.feed(piece.text, final=piece.finish_reason is not None)
        self._calls += [part for part in parts if isinstance(part, CallPart)]
        lines: list[BaseModel] = [
            self._line({"thinking" if part.thought else "content": part.text})
            for part in parts
            if isinstance(part, Words)
        ]
        if piece.finish_reason is not None:
            calls = _whole_calls(message_of(self._calls))
            lines += [self._line({"tool_calls": calls})] if calls else []
            lines.append(self._last({}, piece.finish_reason))
        return lines

    def usage_event(self, usage: Usage) -> BaseModel:
        """Counts are part of the last line."""
        raise NotImplementedError("counts are part of the last line")

    def complete(self, answers: Sequence[Answer], usage: Usage) -> BaseModel:
        """The whole answer."""
        (answer,) = answers
        message = message_of(self._speech.feed(answer.text, final=True))
        found: dict[str, Any] = {"content": message.content or ""}
        if message.reasoning_content:
            found["thinking"] = message.reasoning_content
        if calls := _whole_calls(message):
            found["tool_calls"] = calls
        return self._last(found, answer.finish_reason)

    def _line(self, found: dict[str, Any], **more: Any) -> OllamaAnswer:
        fields: dict[str, Any] = {"model": self._name, "created_at": datetime.now(UTC).isoformat(), "done": False}
        if self._bare:
            fields["response"] = found.get("content", "")
            fields |= {"thinking": found["thinking"]} if "thinking" in found else {}
        else:
            fields["message"] = OllamaAnswerMessage(**{"role": "assistant", "content": "", **found})
        return OllamaAnswer(**{**fields, **more})

    def _last(self, found: dict[str, Any], reason: EndReason) -> OllamaAnswer:
        now, usage = time.perf_counter(), self._begun.generation.usage
        start = self._begun.frame.arrival
        first = self._first or now
        return self._line(
            found,
            done=True,
            done_reason=reason,
            total_duration=_nanoseconds(now - start),
            load_duration=0,
            prompt_eval_count=usage.prompt_tokens,
            prompt_eval_duration=_nanoseconds(first - start),
            eval_count=usage.completion_tokens,
            eval_duration=_nanoseconds(now - first),
        )


def _whole_calls(message: AnswerMessage) -> list[dict[str, Any]]:
    """Calls with their arguments as an object; one that was cut is left out."""
    found = []
    for call in message.tool_calls or ():
        with contextlib.suppress(ValueError):
            arguments = json.loads(call.function.arguments)
            found.append({"function": {"name": call.function.name, "arguments": arguments}})
    return found


def _nanoseconds(seconds: float) -> int:
    return int(seconds * 1e9)
