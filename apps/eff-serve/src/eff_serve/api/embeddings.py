"""POST /v1/embeddings and Ollama's /api/embed."""

from __future__ import annotations

import asyncio
import base64
import time
from collections.abc import Sequence
from typing import Any, Literal

from eff_http import ApiError, ClientGoneError, JsonRoute, bad_request, unless_disconnected
from fastapi import APIRouter, Request, Response
from pydantic import BaseModel

from eff_serve.api.documented import errors, ollama_errors
from eff_serve.api.models import CLIENT_CLOSED_REQUEST, served
from eff_serve.api.ollama import without_tag
from eff_serve.api.ollama_text import OllamaRoute
from eff_serve.api.schema.embeddings import (
    Embedding,
    EmbeddingList,
    EmbeddingRequest,
    EmbeddingUsage,
    OllamaEmbedRequest,
    OllamaEmbedResponse,
)
from eff_serve.api.serving import Serving
from eff_serve.engine.embedding import embed_with, embedding_size

router = APIRouter(route_class=JsonRoute, tags=["embeddings"])
ollama_router = APIRouter(route_class=OllamaRoute, tags=["ollama"])


@router.post(
    "/v1/embeddings", responses={**errors(400, 401, 404, 413, 503), 200: {"model": EmbeddingList}}, response_model=None
)
async def embeddings(body: EmbeddingRequest, request: Request) -> Response:
    """Vectors of texts: hidden states behind the last norm, pooled, of length one."""
    serving = await _base_only(request, body.model)
    _, tokenizer = serving.admit()
    texts = await asyncio.to_thread(lambda: [_tokens(tokenizer, t) for t in body.input])
    _check(serving, texts, body.dimensions)

    async def work() -> BaseModel:
        vectors = await _vectors(serving, texts, body.pooling or "mean", body.dimensions)
        as_text = body.encoding_format == "base64"
        data = [Embedding(index=i, embedding=_base64(v) if as_text else v.tolist()) for i, v in enumerate(vectors)]
        count = sum(map(len, texts))
        usage = EmbeddingUsage(prompt_tokens=count, total_tokens=count)
        return EmbeddingList(data=data, model=serving.name_of(None), usage=usage)

    return await _unless_gone(request, serving, work)


@ollama_router.post(
    "/api/embed", responses={**ollama_errors(), 200: {"model": OllamaEmbedResponse}}, response_model=None
)
async def ollama_embed(body: OllamaEmbedRequest, request: Request) -> Response:
    """The same for Ollama's clients; a text that is too long is cut unless ``truncate`` is false."""
    serving = await _base_only(request, without_tag(body.model))
    engine, tokenizer = serving.admit()
    given = [body.input] if isinstance(body.input, str) else body.input
    texts = await asyncio.to_thread(lambda: [_tokens(tokenizer, t) for t in given])
    if body.truncate is not False:
        texts = [t[: engine.max_model_len] for t in texts]
    _check(serving, texts, body.dimensions)

    async def work() -> BaseModel:
        start = time.perf_counter()
        vectors = [v.tolist() for v in await _vectors(serving, texts, "mean", body.dimensions)]
        spent = int((time.perf_counter() - start) * 1e9)
        count = sum(map(len, texts))
        return OllamaEmbedResponse(
            model=body.model, embeddings=vectors, total_duration=spent, load_duration=0, prompt_eval_count=count
        )

    return await _unless_gone(request, serving, work)


async def _base_only(request: Request, name: str | None) -> Serving:
    serving, adapter = await served(request, name)
    if adapter is not None:
        raise bad_request("embeddings are those of the base model; leave the adapter out", "model")
    return serving


def _tokens(tokenizer: Any, text: str | list[int]) -> list[int]:
    return tokenizer.encode(text) if isinstance(text, str) else text


def _check(serving: Serving, texts: Sequence[Sequence[int]], dimensions: int | None) -> None:
    engine = serving.engine
    size = embedding_size(engine)
    if size is None:
        raise bad_request("this model gives no embeddings: it does not run on eff's own decoder", "model")
    if dimensions is not None and dimensions > size:
        raise bad_request(f"dimensions={dimensions} is more than the {size} that the model has", "dimensions")
    limit, vocab = engine.max_model_len, serving.tokenizer.vocab_size
    for i, text in enumerate(texts):
        if not 1 <= len(text) <= limit:
            raise bad_request(f"input[{i}] has {len(text)} tokens; the limits are 1 and {limit}", f"input[{i}]")
        if max(text) >= vocab:
            raise bad_request(f"input[{i}]: token {max(text)} is outside the vocabulary of {vocab}", f"input[{i}]")


async def _vectors(
    serving: Serving, texts: Sequence[list[int]], pooling: Literal["mean", "last"], dimensions: int | None
) -> list[Any]:
    """One text after the other, so that a client that leaves stops the work and others are not held up for long."""
    found = []
    for text in texts:
        async with serving.one_embedding:
            vector = await asyncio.to_thread(embed_with, serving.engine, text, pooling)
        if dimensions is not None:
            vector = vector[:dimensions]
            vector = vector / max(float((vector * vector).sum()) ** 0.5, 1e-12)
        found.append(vector)
    return found


def _base64(vector: Any) -> str:
    return base64.b64encode(vector.astype("<f4").tobytes()).decode()


async def _unless_gone(request: Request, serving: Serving, work: Any) -> Response:
    try:
        async with asyncio.timeout(serving.settings.deadline):
            done = await unless_disconnected(request.receive, work())
    except ClientGoneError:
        serving.metrics.client_gone(request.url.path)
        return Response(status_code=CLIENT_CLOSED_REQUEST)
    except TimeoutError:
        message = f"the vectors were not complete after {serving.settings.deadline:g} s; send fewer texts"
        raise ApiError(504, message, kind="timeout_error", code="deadline_exceeded") from None
    return Response(done.model_dump_json(), media_type="application/json")
