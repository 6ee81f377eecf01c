"""Pieces that several bodies share: strictness, number types, usage, errors."""

from __future__ import annotations

from typing import Annotated, Any

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field
from pydantic_core import PydanticCustomError

MAX_INT = 2**63 - 1


def refuse(message: str, param: str = "") -> PydanticCustomError:
    """The error of a validator that refuses a value.

    Args:
        message: Shown to the client as it is.
        param: Field at fault, where the validator belongs to a whole model; a field's validator needs none.
    """
    return PydanticCustomError("refused", "{message}", {"message": message, "param": param})


def _whole(value: Any) -> Any:
    """JSON does not tell 1.0 from 1: whole floats are integers."""
    return int(value) if isinstance(value, float) and value.is_integer() and abs(value) < MAX_INT else value


Int = Annotated[int, BeforeValidator(_whole)]
Token = Annotated[Int, Field(ge=0, le=MAX_INT)]
Seed = Annotated[Int, Field(ge=-MAX_INT - 1, le=MAX_INT)]
RequestId = Annotated[str, Field(pattern=r"^[A-Za-z0-9._:\-]{1,128}$")]


class RequestModel(BaseModel):
    """Base of request bodies: no unknown fields, no guessing of types, no infinities."""

    model_config = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False)


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


class ErrorBody(BaseModel):
    """What went wrong."""

    message: str
    type: str
    param: str | None = None
    code: str | None = None


class ErrorResponse(BaseModel):
    """Body of every response that is not a success."""

    error: ErrorBody


class Health(BaseModel):
    """Body of /health."""

    status: str


class Version(BaseModel):
    """Body of /version."""

    version: str


class ModelCard(BaseModel):
    """One model of /v1/models."""

    id: str
    object: str = "model"
    created: int
    owned_by: str = "eff"
    max_model_len: int


class ModelList(BaseModel):
    """Body of /v1/models."""

    object: str = "list"
    data: list[ModelCard]
