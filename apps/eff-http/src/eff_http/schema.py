"""Pieces of request and response bodies that every server shares: strictness, number types, errors."""

from __future__ import annotations

from typing import Annotated, Any

from pydantic import BaseModel, BeforeValidator, ConfigDict
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


class RequestModel(BaseModel):
    """Base of request bodies: no unknown fields, no guessing of types, no infinities."""

    model_config = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False)


class ErrorBody(BaseModel):
    """What went wrong."""

    message: str
    type: str
    param: str | None = None
    code: str | None = None


class ErrorResponse(BaseModel):
    """Body of every response that is not a success."""

    error: ErrorBody
