"""Bodies of /v1/completions."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from eff_http import MAX_INT, Int, refuse
from pydantic import BaseModel, Field, WithJsonSchema, model_validator
from pydantic.functional_validators import BeforeValidator

from eff_serve.api.schema.common import PromptLogprobs, Usage
from eff_serve.api.schema.sampling import MAX_TOP, SamplingFields

_IDS = {"type": "array", "minItems": 1, "items": {"type": "integer", "minimum": 0, "maximum": MAX_INT}}
PROMPT_SCHEMA = {
    "anyOf": [
        {"type": "string"},
        {"type": "array", "minItems": 1, "items": {"type": "string"}},
        _IDS,
        {"type": "array", "minItems": 1, "items": _IDS},
    ],
}


def prompts(value: Any) -> list[str] | list[list[int]]:
    """Bring the four forms of ``prompt`` to a list of texts or a list of lists of token ids."""
    if isinstance(value, str):
        return [value]
    if isinstance(value, list) and value:
        if all(isinstance(v, str) for v in value):
            return value
        if all(_is_id(v) for v in value):
            return [[int(v) for v in value]]
        if all(isinstance(v, list) and v and all(_is_id(t) for t in v) for v in value):
            return [[int(t) for t in v] for v in value]
    raise refuse(
        "prompt: give a text, a list of texts, a list of token ids, or a list of such lists, none of them empty"
    )


def _is_id(value: Any) -> bool:
    if isinstance(value, float):
        return value.is_integer() and 0 <= value <= MAX_INT
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value <= MAX_INT


class CompletionRequest(SamplingFields):
    """Body of POST /v1/completions."""

    prompt: Annotated[list[str] | list[list[int]], BeforeValidator(prompts), WithJsonSchema(PROMPT_SCHEMA)]
    max_tokens: Annotated[Int, Field(ge=0, le=2**31)] | None = 16
    echo: bool | None = False
    logprobs: Annotated[Int, Field(ge=0, le=MAX_TOP)] | None = None

    @model_validator(mode="after")
    def _fits(self) -> CompletionRequest:
        if self.echo and self.stream and self.logprobs is not None:
            raise refuse("echo with logprobs cannot be streamed; use stream=false", "logprobs")
        return self


class CompletionLogprobs(BaseModel):
    r"""Four lists with one entry for each token of the choice; with ``echo`` the prompt's tokens come first.

    ``text_offset`` counts characters from the beginning of the choice's text. A token that is no whole character is
    spelt ``bytes:\xe2\x80``.
    """

    tokens: list[str]
    token_logprobs: list[float | None]
    top_logprobs: list[dict[str, float] | None]
    text_offset: list[int]


class CompletionChoice(BaseModel):
    """One continuation and why it ended."""

    index: int
    text: str
    logprobs: CompletionLogprobs | None = None
    finish_reason: Literal["stop", "length"]
    prompt_logprobs: PromptLogprobs | None = None


class Completion(BaseModel):
    """Response of POST /v1/completions."""

    id: str
    object: Literal["text_completion"] = "text_completion"
    created: int
    model: str
    choices: list[CompletionChoice]
    usage: Usage
    system_fingerprint: str


class CompletionChunkChoice(BaseModel):
    """A chunk's addition to one continuation."""

    index: int
    text: str
    logprobs: CompletionLogprobs | None = None
    finish_reason: Literal["stop", "length"] | None = None


class CompletionChunk(BaseModel):
    """One event of a streamed completion."""

    id: str
    object: Literal["text_completion"] = "text_completion"
    created: int
    model: str
    choices: list[CompletionChunkChoice]
    usage: Usage | None = None
    system_fingerprint: str
