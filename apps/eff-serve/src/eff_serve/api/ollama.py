"""Ollama's API over the same model: /api/chat, /api/generate, /api/tags, /api/ps, /api/show, /api/version."""

from __future__ import annotations

import asyncio
import hashlib
import json
from datetime import UTC, datetime
from importlib import metadata
from typing import Any, Literal

from eff_http import bad_request
from fastapi import APIRouter, Request, Response
from fastapi.exceptions import RequestValidationError
from pydantic import ValidationError

from eff_serve.api.answer import Frame, assembler_for, respond
from eff_serve.api.chat import Begun, begin
from eff_serve.api.documented import ollama_errors
from eff_serve.api.generation import Generation, Job
from eff_serve.api.models import Models, served
from eff_serve.api.ollama_text import LineStream, OllamaFormat, OllamaRoute
from eff_serve.api.sampling import sampling_for, token_limit
from eff_serve.api.schema.chat import ChatRequest
from eff_serve.api.schema.common import Version
from eff_serve.api.schema.ollama import (
    OllamaAnswer,
    OllamaAnswerMessage,
    OllamaChatRequest,
    OllamaDetails,
    OllamaFields,
    OllamaGenerateRequest,
    OllamaMessage,
    OllamaModel,
    OllamaModels,
    OllamaShow,
    ShowRequest,
)
from eff_serve.api.serving import Serving
from eff_serve.engine.embedding import embedding_size

router = APIRouter(route_class=OllamaRoute, tags=["ollama"])
DEFAULTS = {"temperature": 0.8, "top_p": 0.9, "top_k": 40}
_AT_ONCE = (0, "0", "0s")
_NEVER = datetime.max.replace(tzinfo=UTC).isoformat()  # nothing is unloaded for being old
_PNG, _JPEG = "iVBORw0KGgo", "/9j/"


@router.post("/api/chat", responses=ollama_errors(OllamaAnswer), response_model=None)
async def chat(body: OllamaChatRequest, request: Request) -> Response:
    """Answer a conversation; without messages, say that the model is loaded."""
    name = await _checked(request, body)
    if not body.messages:
        return await _loaded(request, body, bare=False)
    given = _as_chat(body, name, _turns(body.messages), _tools(body))
    return await _respond(body, given, request, await begin(given, request, "ollama-"), bare=False)


@router.post("/api/generate", responses=ollama_errors(OllamaAnswer), response_model=None)
async def generate(body: OllamaGenerateRequest, request: Request) -> Response:
    """Answer a prompt, or with ``raw`` continue it; without a prompt, say that the model is loaded."""
    name = await _checked(request, body)
    if not body.prompt:
        return await _loaded(request, body, bare=True)
    if body.raw and (body.system or body.images):
        raise bad_request("raw=true cannot be used with system or images", "raw")
    turns: list[dict[str, Any]] = [{"role": "system", "content": body.system}] if body.system else []
    turns.append({"role": "user", "content": _with_pictures(body.prompt, body.images)})
    given = _as_chat(body, name, turns, None)
    begun = await (_continue(given, body.prompt, request) if body.raw else begin(given, request, "ollama-"))
    return await _respond(body, given, request, begun, bare=True)


@router.get("/api/tags", responses=ollama_errors(), response_model_exclude_none=True)
async def tags(request: Request) -> OllamaModels:
    """The models that are served, loaded or not."""
    models: Models = request.app.state.models
    models.check()
    return OllamaModels(models=[_model(s, adapter) for s in models.all for adapter in (None, *s.adapters)])


@router.get("/api/ps", responses=ollama_errors(), response_model_exclude_none=True)
async def loaded(request: Request) -> OllamaModels:
    """The models that are loaded."""
    models: Models = request.app.state.models
    models.check()
    ready = [s for s in models.all if s.state == "ready"]
    return OllamaModels(models=[_running(s, adapter) for s in ready for adapter in (None, *s.adapters)])


@router.post("/api/show", responses=ollama_errors())
async def show(body: ShowRequest, request: Request) -> OllamaShow:
    """What a model is and can do."""
    serving, _ = await served(request, without_tag(body.model))
    engine, tokenizer = serving.admit()
    details = _details(serving)
    able = ["completion", "tools"]
    able += ["thinking"] if tokenizer.thinks else []
    able += ["vision"] if serving.eyes is not None else []
    able += ["embedding"] if embedding_size(engine) is not None else []
    info = {"general.architecture": details.family, f"{details.family}.context_length": engine.max_model_len}
    return OllamaShow(details=details, model_info=info, capabilities=able, modified_at=_time(serving.settings.created))


@router.get("/api/version")
async def version() -> Version:
    """Version of the server."""
    return Version(version=metadata.version("eff-serve"))


def without_tag(model: str) -> str:
    """The served name that a model of Ollama's means: the tag "latest" says nothing."""
    return model.removesuffix(":latest")


async def _checked(request: Request, body: OllamaFields) -> str:
    """The served name, once the model is known to read so long a context and to think where that is asked for."""
    name = without_tag(body.model)
    serving, _ = await served(request, name)
    engine, tokenizer = serving.admit()
    length = None if body.options is None else body.options.num_ctx
    if length is not None and length > engine.max_model_len:
        raise bad_request(f"num_ctx={length} is more than the {engine.max_model_len} tokens of this server", "num_ctx")
    if body.think and not tokenizer.thinks:
        raise bad_request(f"the model {body.model[:100]!r} does not support thinking", "think")
    return name


async def _respond(body: OllamaFields, given: ChatRequest, request: Request, begun: Begun, *, bare: bool) -> Response:
    form = OllamaFormat(begun, body.model, bare=bare)
    return await respond(request, given, begun.generation, form, begun.frame.id, LineStream)


async def _loaded(request: Request, body: OllamaFields, *, bare: bool) -> Response:
    """Says that a model is loaded; with ``keep_alive`` 0 one that comes and goes is unloaded instead."""
    models: Models = request.app.state.models
    reason: Literal["load", "unload"] = "load"
    if body.keep_alive in _AT_ONCE:
        request.state.held.close()
        reason = "unload" if await models.unload(models.find(without_tag(body.model))) else "load"
    answer = OllamaAnswer(model=body.model, created_at=datetime.now(UTC).isoformat(), done=True, done_reason=reason)
    if bare:
        answer.response = ""
    else:
        answer.message = OllamaAnswerMessage(role="assistant", content="")
    return Response(answer.model_dump_json(exclude_unset=True) + "\n", media_type="application/json")


def _sampling(body: OllamaFields) -> dict[str, Any]:
    given = {} if body.options is None else body.options.model_dump(exclude_none=True, exclude={"num_ctx"})
    limit = given.pop("num_predict", -1)
    penalty = given.pop("repeat_penalty", 1.0)
    return {**DEFAULTS, **given, "repetition_penalty": penalty, "max_tokens": limit if limit > 0 else None}


def _shape(body: OllamaFields) -> dict[str, Any] | None:
    if body.format is None or body.format == "":
        return None
    if body.format == "json":
        return {"type": "json_object"}
    return {"type": "json_schema", "json_schema": {"name": "format", "schema": body.format}}


def _as_chat(
    body: OllamaFields, name: str, turns: list[dict[str, Any]], tools: list[dict[str, Any]] | None
) -> ChatRequest:
    fields = {
        **_sampling(body),
        "model": name,
        "messages": turns,
        "tools": tools,
        "stream": body.stream is not False,
        "response_format": _shape(body),
        "chat_template_kwargs": None if body.think is None else {"enable_thinking": body.think},
    }
    try:
        return ChatRequest.model_validate(fields)
    except ValidationError as error:
        raise RequestValidationError(error.errors(), body=fields) from None


async def _continue(given: ChatRequest, prompt: str, request: Request) -> Begun:
    """A text that goes on without a chat template, as ``given`` says."""
    serving, adapter = await served(request, given.model)
    engine, tokenizer = serving.admit()
    ids = await asyncio.to_thread(tokenizer.encode, prompt)
    sampling = await sampling_for(
        given,
        max_tokens=token_limit(len(ids), given.limit, engine.max_model_len, "prompt"),
        logprobs=None,
        prompt_logprobs=None,
        vocab_size=tokenizer.vocab_size,
        adapter=adapter,
    )
    frame = Frame.of(request, serving, "ollama-", None, adapter)
    job = Job(ids, sampling, assembler_for(tokenizer, given))
    generation = Generation(serving, [job], prompt_tokens=len(ids), request_id=frame.id, arrival=frame.arrival)
    return Begun(frame, tokenizer, generation, None, False)


def _tools(body: OllamaChatRequest) -> list[dict[str, Any]] | None:
    return None if not body.tools else [tool.model_dump() for tool in body.tools]


def _turns(messages: list[OllamaMessage]) -> list[dict[str, Any]]:
    """Messages as OpenAI's API has them, where calls have ids: results belong to the calls by name, else by order."""
    turns: list[dict[str, Any]] = []
    open_calls: list[tuple[str, str]] = []
    for message in messages:
        turn: dict[str, Any] = {"role": message.role, "content": _with_pictures(message.content or "", message.images)}
        if message.thinking:
            turn["reasoning_content"] = message.thinking
        if message.tool_calls:
            open_calls = [(f"call_{len(turns)}_{i}", c.function.name) for i, c in enumerate(message.tool_calls)]
            turn["tool_calls"] = [
                {
                    "id": ident,
                    "type": "function",
                    "function": {"name": name, "arguments": json.dumps(call.function.arguments)},
                }
                for (ident, name), call in zip(open_calls, message.tool_calls, strict=True)
            ]
        elif message.role == "tool":
            found = next((c for c in open_calls if message.tool_name in (None, c[1])), None)
            if found is None:
                raise bad_request("a message of role 'tool' must follow the call that it answers", "messages")
            open_calls.remove(found)
            turn["tool_call_id"] = found[0]
        turns.append(turn)
    return turns


def _with_pictures(text: str, images: list[str] | None) -> str | list[dict[str, Any]]:
    if not images:
        return text
    kinds = {_PNG: "png", _JPEG: "jpeg"}
    urls = [
        f"data:image/{next((k for start, k in kinds.items() if data.startswith(start)), 'webp')};base64,{data}"
        for data in images
    ]
    return [*({"type": "image_url", "image_url": {"url": url}} for url in urls), {"type": "text", "text": text}]


def _model(serving: Serving, adapter: str | None) -> OllamaModel:
    name = serving.name_of(adapter)
    digest = hashlib.sha256(f"{serving.settings.fingerprint}:{name}".encode()).hexdigest()
    return OllamaModel(
        name=name,
        model=name,
        digest=digest,
        size=serving.settings.weight_bytes,
        modified_at=_time(serving.settings.created),
        details=_details(serving),
    )


def _running(serving: Serving, adapter: str | None) -> OllamaModel:
    more = {"size_vram": 0, "expires_at": _NEVER, "context_length": serving.max_model_len}
    return _model(serving, adapter).model_copy(update=more)


def _details(serving: Serving) -> OllamaDetails:
    settings = serving.settings
    return OllamaDetails(
        family=settings.family, families=[settings.family], parameter_size="", quantization_level=settings.quantization
    )


def _time(seconds: int) -> str:
    return datetime.fromtimestamp(seconds, UTC).isoformat()
