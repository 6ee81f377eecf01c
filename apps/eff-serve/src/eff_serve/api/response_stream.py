"""The items of a response as they grow, and the events that say so."""

from __future__ import annotations

import uuid
from collections.abc import Iterator
from typing import Any

from eff_http import ErrorBody, EventStream
from pydantic import BaseModel

from eff_serve.api.schema.responses import ResponseEvent
from eff_serve.api.speech import CallPart, Part, Words

Event = dict[str, Any]


class Output:
    """The list of items: thoughts, a message, calls. One item is open at a time."""

    def __init__(self) -> None:
        self.items: list[dict[str, Any]] = []
        self._open = False

    def add(self, part: Part) -> list[Event]:
        """Take a part in; the events that it makes."""
        return list(self._call(part) if isinstance(part, CallPart) else self._words(part))

    def close(self, *, cut: bool) -> list[Event]:
        """End the last item; an answer without any gets an empty message. ``cut`` marks it as incomplete."""
        events = [] if self.items else list(self._begin("message"))
        return events + list(self._end("incomplete" if cut else "completed"))

    def _words(self, words: Words) -> Iterator[Event]:
        kind = "reasoning" if words.thought else "message"
        if not self._open or self.items[-1]["type"] != kind:
            yield from self._end("completed")
            yield from self._begin(kind)
        self.items[-1]["content"][0]["text"] += words.text
        if words.thought:
            yield {"type": "response.reasoning_text.delta", **self._place(), "delta": words.text}
        else:
            yield {"type": "response.output_text.delta", **self._place(), "delta": words.text, "logprobs": []}

    def _call(self, part: CallPart) -> Iterator[Event]:
        if part.name is not None:
            yield from self._end("completed")
            self.items.append(
                {
                    "type": "function_call",
                    "id": _new_id("fc"),
                    "call_id": part.id,
                    "name": part.name,
                    "arguments": "",
                    "status": "in_progress",
                }
            )
            self._open = True
            yield self._item("added")
        if part.arguments:
            self.items[-1]["arguments"] += part.arguments
            place = {"item_id": self.items[-1]["id"], "output_index": len(self.items) - 1}
            yield {"type": "response.function_call_arguments.delta", **place, "delta": part.arguments}

    def _begin(self, kind: str) -> Iterator[Event]:
        self._open = True
        if kind == "reasoning":
            content = [{"type": "reasoning_text", "text": ""}]
            self.items.append(
                {"type": kind, "id": _new_id("rs"), "summary": [], "content": [], "status": "in_progress"}
            )
            yield self._item("added")
            self.items[-1]["content"] = content
            return
        self.items.append({
            "type": kind, "id": _new_id("msg"), "role": "assistant", "content": [], "status": "in_progress"
        })  # fmt: skip
        yield self._item("added")
        part = {"type": "output_text", "text": "", "annotations": [], "logprobs": []}
        self.items[-1]["content"] = [part]
        yield {"type": "response.content_part.added", **self._place(), "part": dict(part)}

    def _end(self, status: str) -> Iterator[Event]:
        if not self._open:
            return
        self._open = False
        item = self.items[-1]
        item["status"] = status
        if item["type"] == "message":
            part = item["content"][0]
            yield {"type": "response.output_text.done", **self._place(), "text": part["text"], "logprobs": []}
            yield {"type": "response.content_part.done", **self._place(), "part": dict(part)}
        elif item["type"] == "reasoning":
            yield {"type": "response.reasoning_text.done", **self._place(), "text": item["content"][0]["text"]}
        else:
            place = {"item_id": item["id"], "output_index": len(self.items) - 1, "name": item["name"]}
            yield {"type": "response.function_call_arguments.done", **place, "arguments": item["arguments"]}
        yield self._item("done")

    def _item(self, what: str) -> Event:
        item = {**self.items[-1], "content": list(self.items[-1].get("content", ()))}
        if item["type"] == "function_call":
            del item["content"]
        return {"type": f"response.output_item.{what}", "output_index": len(self.items) - 1, "item": item}

    def _place(self) -> dict[str, Any]:
        return {"item_id": self.items[-1]["id"], "output_index": len(self.items) - 1, "content_index": 0}


class ResponseStream(EventStream):
    """Events with names, and an error as one of them; there is no ``[DONE]``."""

    ending = b""

    def encode(self, event: BaseModel) -> bytes:
        """One event with its name; fields are told whether they were set or not."""
        return f"event: {getattr(event, 'type', 'error')}\ndata: {event.model_dump_json()}\n\n".encode()

    def failure(self, error: ErrorBody, sent: int) -> BaseModel:
        """The event ``error``, numbered like the others."""
        fields = {"code": error.code, "message": error.message, "param": error.param}
        return ResponseEvent(type="error", sequence_number=sent, **fields)


def _new_id(kind: str) -> str:
    return f"{kind}_{uuid.uuid4().hex}"
