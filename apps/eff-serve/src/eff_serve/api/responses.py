"""POST /v1/responses: the same answers in OpenAI's newer form, without keeping any of them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from eff_http import ApiError, JsonRoute, bad_request
from eff_http.validation import from_validation
from fastapi import APIRouter, Request, Response
from pydantic import BaseModel, ValidationError

from eff_serve.api.answer import Answer, respond
from eff_serve.api.chat import Begun, begin
from eff_serve.api.documented import json_or_events
from eff_serve.api.generation import EndReason, Piece
from eff_serve.api.response_stream import Output, ResponseStream
from eff_serve.api.schema.chat import ChatRequest
from eff_serve.api.schema.common import Usage
from eff_serve.api.schema.responses import (
    FunctionCall,
    FunctionCallOutput,
    IncompleteDetails,
    InputMessage,
    InputPart,
    InputTokensDetails,
    Item,
    OutputTokensDetails,
    ResponseEvent,
    ResponseObject,
    ResponseRequest,
    ResponseUsage,
)

router = APIRouter(route_class=JsonRoute, tags=["generation"])


@router.post("/v1/responses", responses=json_or_events(ResponseObject, ResponseEvent, done=False), response_model=None)
async def responses(body: ResponseRequest, request: Request) -> Response:
    """Answer a conversation. Every field is honoured or refused with 400 naming it."""
    chat = as_chat(body)
    begun = await begin(chat, request, "resp_")
    form = _ResponseFormat(begun, body)
    return await respond(request, chat, begun.generation, form, begun.frame.id, ResponseStream)


def as_chat(body: ResponseRequest) -> ChatRequest:
    """The same request in the form of /v1/chat/completions."""
    messages: list[dict[str, Any]] = []
    if body.instructions:
        messages.append({"role": "system", "content": body.instructions})
    told = body.input
    items: list[Item] = [InputMessage(role="user", content=told)] if isinstance(told, str) else told
    for item in items:
        _add(item, messages)
    choice: Any = body.tool_choice
    if choice is not None and not isinstance(choice, str):
        choice = {"type": "function", "function": {"name": choice.name}}
    fields: dict[str, Any] = {
        "messages": messages,
        "model": body.model,
        "max_tokens": body.max_output_tokens,
        "temperature": body.temperature,
        "top_p": body.top_p,
        "stream": body.stream,
        "tools": [{"type": "function", "function": t.model_dump(exclude={"type"})} for t in body.tools or ()],
        "tool_choice": None if choice == "auto" and not body.tools else choice,
        "parallel_tool_calls": body.parallel_tool_calls,
        "user": body.user,
    }
    shape = None if body.text is None else body.text.format
    if shape is not None and shape.type == "json_schema":
        schema = {"name": shape.name or "answer", "schema": shape.schema_, "strict": shape.strict}
        fields["response_format"] = {"type": "json_schema", "json_schema": schema}
    elif shape is not None:
        fields["response_format"] = {"type": shape.type}
    try:
        chat = ChatRequest.model_validate(fields)
    except ValidationError as error:
        raise _renamed(from_validation(error.errors(), fields)) from None
    return chat.model_copy(update={"eff": body.eff})


def _renamed(error: ApiError) -> ApiError:
    """An error of the conversation with the names of this endpoint's fields."""
    field = (error.body.param or "").split(".")[0].split("[")[0]
    names = {"messages": "input", "max_tokens": "max_output_tokens", "response_format": "text", "json_schema": "text"}
    return bad_request(error.body.message, names.get(field, error.body.param), error.body.code)


def _add(item: Item, messages: list[dict[str, Any]]) -> None:
    """Add an item to the conversation; thoughts, a message and calls that follow each other are one turn."""
    last = messages[-1] if messages and messages[-1]["role"] == "assistant" else None
    if isinstance(item, FunctionCallOutput):
        messages.append({"role": "tool", "tool_call_id": item.call_id, "content": _content(item.output) or ""})
    elif isinstance(item, FunctionCall):
        call = {"id": item.call_id, "type": "function", "function": {"name": item.name, "arguments": item.arguments}}
        if last is None:
            messages.append(last := {"role": "assistant", "content": None})
        last.setdefault("tool_calls", []).append(call)
    elif isinstance(item, InputMessage):
        content = _content(item.content)
        if item.role == "assistant" and last is not None and not last["content"] and "tool_calls" not in last:
            last["content"] = content
        else:
            messages.append({"role": item.role, "content": content})
    else:
        thoughts = "".join(part.text for part in item.content or ())
        messages.append({"role": "assistant", "content": "", "reasoning_content": thoughts})


def _content(parts: str | list[InputPart]) -> str | list[dict[str, Any]]:
    if isinstance(parts, str):
        return parts
    found: list[dict[str, Any]] = []
    for part in parts:
        if part.type == "input_image":
            if part.image_url is None:
                raise bad_request("an input_image needs image_url, a data URL", "input")
            found.append({"type": "image_url", "image_url": {"url": part.image_url, "detail": part.detail}})
        else:
            found.append({"type": "text", "text": part.text or part.refusal or ""})
    return found or ""


class _ResponseFormat:
    """Pieces of an answer as the events and the object of this endpoint."""

    def __init__(self, begun: Begun, body: ResponseRequest) -> None:
        self._begun, self._body = begun, body
        self._output = Output()
        self._speech = begun.speech()
        self._events = 0

    def opening(self) -> list[BaseModel]:
        begun = self._object("in_progress", [], None)
        return [self._event({"type": f"response.{kind}", "response": begun}) for kind in ("created", "in_progress")]

    def events(self, piece: Piece) -> list[BaseModel]:
        final = piece.finish_reason is not None
        found = [e for part in self._speech.feed(piece.text, final=final) for e in self._output.add(part)]
        if piece.finish_reason is not None:
            found += self._output.close(cut=piece.finish_reason == "length")
            whole = self._ended(piece.finish_reason)
            found.append({"type": f"response.{whole.status}", "response": whole})
        return [self._event(event) for event in found]

    def usage_event(self, usage: Usage) -> BaseModel:
        raise NotImplementedError("usage is part of the last event")

    def complete(self, answers: Sequence[Answer], usage: Usage) -> BaseModel:
        for part in self._speech.feed(answers[0].text, final=True):
            self._output.add(part)
        self._output.close(cut=answers[0].finish_reason == "length")
        return self._ended(answers[0].finish_reason)

    def _ended(self, reason: EndReason) -> ResponseObject:
        status = "incomplete" if reason == "length" else "completed"
        return self._object(status, self._output.items, self._begun.generation.usage)

    def _event(self, fields: dict[str, Any]) -> ResponseEvent:
        self._events += 1
        return ResponseEvent(**fields, sequence_number=self._events - 1)

    def _object(self, status: Any, output: list[dict[str, Any]], usage: Usage | None) -> ResponseObject:
        body, frame = self._body, self._begun.frame
        told = body.model_dump(include={"tool_choice", "text"}, exclude_none=True, by_alias=True)
        found = ResponseObject(
            id=frame.id,
            created_at=frame.created,
            model=frame.model,
            status=status,
            output=output,
            incomplete_details=IncompleteDetails(reason="max_output_tokens") if status == "incomplete" else None,
            instructions=body.instructions,
            max_output_tokens=body.max_output_tokens,
            metadata=body.metadata or {},
            parallel_tool_calls=body.parallel_tool_calls is not False,
            temperature=1.0 if body.temperature is None else body.temperature,
            text={"format": {"type": "text"}, **told.get("text", {})},
            tool_choice=told.get("tool_choice", "auto"),
            tools=[tool.model_dump() for tool in body.tools or ()],
            top_p=1.0 if body.top_p is None else body.top_p,
            user=body.user,
        )
        if usage is not None:
            cached = 0 if usage.prompt_tokens_details is None else usage.prompt_tokens_details.cached_tokens
            found.usage = ResponseUsage(
                input_tokens=usage.prompt_tokens,
                input_tokens_details=InputTokensDetails(cached_tokens=cached, cache_write_tokens=0),
                output_tokens=usage.completion_tokens,
                output_tokens_details=OutputTokensDetails(reasoning_tokens=0),
                total_tokens=usage.total_tokens,
            )
        # Every field is told, null or not: clients read them as required ones.
        return found.model_copy(update={name: getattr(found, name) for name in ResponseObject.model_fields})
