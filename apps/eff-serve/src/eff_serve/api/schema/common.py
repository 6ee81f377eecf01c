"""Pieces that several bodies share: number types, usage, models."""

from __future__ import annotations

from typing import Annotated, Literal

from eff_http import MAX_INT, Int
from pydantic import BaseModel, Field

Token = Annotated[Int, Field(ge=0, le=MAX_INT)]
Seed = Annotated[Int, Field(ge=-MAX_INT - 1, le=MAX_INT)]
RequestId = Annotated[str, Field(pattern=r"^[A-Za-z0-9._:\-]{1,128}$")]


class PromptTokensDetails(BaseModel):
    """Where prompt tokens came from."""

    cached_tokens: int


class Usage(BaseModel):
    """Exact token counts; every generated token counts, the end-of-text and the tokens of a stop string included."""

    prompt_tokens: int
    completion_tokens: int
    total_tokens: int
    prompt_tokens_details: PromptTokensDetails | None = None


class PromptLogprob(BaseModel):
    """Log-probability of one token at a place of the prompt; ``rank`` is known for the most likely tokens only."""

    logprob: float
    rank: int | None
    decoded_token: str


PromptLogprobs = list[dict[str, PromptLogprob] | None]
"""One entry for each prompt token, by token id; the first token has none."""


class Health(BaseModel):
    """Body of /health."""

    status: str


class Version(BaseModel):
    """Body of /version."""

    version: str


class ModelCard(BaseModel):
    """One model of /v1/models.

    ``input_modalities`` says whether it sees pictures, ``steering`` which methods the field ``eff`` may ask for,
    ``quantization`` how its weights are stored, ``state`` whether it is loaded. What is not known before a
    model is loaded is null or empty until then.
    """

    id: str
    object: str = "model"
    created: int
    owned_by: str = "eff"
    max_model_len: int | None
    input_modalities: list[str] = ["text"]
    steering: list[str] = []
    quantization: str = ""
    state: Literal["unloaded", "loading", "ready", "draining", "failed"] = "ready"


class ModelList(BaseModel):
    """Body of /v1/models."""

    object: str = "list"
    data: list[ModelCard]
