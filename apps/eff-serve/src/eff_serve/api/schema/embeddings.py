"""Bodies of /v1/embeddings, and of Ollama's /api/embed."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from eff_http import Int, RequestModel
from pydantic import BaseModel, Field, WithJsonSchema
from pydantic.functional_validators import BeforeValidator

from eff_serve.api.schema.completions import PROMPT_SCHEMA, prompts
from eff_serve.api.schema.ollama import KeepAlive

MAX_INPUTS = 256


class EmbeddingRequest(RequestModel):
    """Body of POST /v1/embeddings.

    ``pooling`` is an addition of this server: the mean of all tokens' hidden states, or that of the last token.
    """

    input: Annotated[
        Annotated[list[str] | list[list[int]], Field(max_length=MAX_INPUTS)],
        BeforeValidator(prompts),
        WithJsonSchema(PROMPT_SCHEMA),
    ]
    model: str | None = None
    encoding_format: Literal["float", "base64"] | None = "float"
    dimensions: Annotated[Int, Field(ge=1, le=2**20)] | None = None
    pooling: Literal["mean", "last"] | None = "mean"
    user: Annotated[str, Field(max_length=256)] | None = None


class Embedding(BaseModel):
    """One vector: numbers, or little-endian float32 in base64."""

    object: Literal["embedding"] = "embedding"
    index: int
    embedding: list[float] | str


class EmbeddingUsage(BaseModel):
    """Tokens read."""

    prompt_tokens: int
    total_tokens: int


class EmbeddingList(BaseModel):
    """Response of POST /v1/embeddings."""

    object: Literal["list"] = "list"
    data: list[Embedding]
    model: str
    usage: EmbeddingUsage


class OllamaEmbedRequest(RequestModel):
    """Body of POST /api/embed."""

    model: str
    input: str | Annotated[list[str], Field(max_length=MAX_INPUTS)]
    truncate: bool | None = True
    dimensions: Annotated[Int, Field(ge=1, le=2**20)] | None = None
    options: Annotated[dict[str, Any], Field(max_length=0)] | None = None
    keep_alive: KeepAlive = None


class OllamaEmbedResponse(BaseModel):
    """Response of POST /api/embed; durations in nanoseconds."""

    model: str
    embeddings: list[list[float]]
    total_duration: int
    load_duration: int = 0
    prompt_eval_count: int
