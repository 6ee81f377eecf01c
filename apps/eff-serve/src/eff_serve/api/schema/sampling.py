"""Fields that chat and text completions share: choice of tokens, end of generation, shape of the output."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from eff_http import Int, RequestModel, refuse
from pydantic import Field, model_validator

from eff_serve.api.schema.accepted import AcceptedFields
from eff_serve.api.schema.common import RequestId, Seed, Token
from eff_serve.api.schema.steering import EffFields

MAX_STOPS = 16
MAX_STOP_CHARS = 256
MAX_STOP_TOKENS = 64
MAX_BIASES = 1024
MAX_TOP = 20
MAX_CHOICES = 128
MAX_GRAMMAR_CHARS = 65536

StopString = Annotated[str, Field(min_length=1, max_length=MAX_STOP_CHARS)]
Grammar = Annotated[str, Field(min_length=1, max_length=MAX_GRAMMAR_CHARS)]


class StreamOptions(RequestModel):
    """Options of a streamed response."""

    include_usage: bool | None = None
    include_obfuscation: Literal[False] | None = None


class JsonSchema(RequestModel):
    """A named JSON schema that the answer follows.

    ``strict`` makes no difference, for it is always enforced; ``description`` is a note that no model is shown.
    """

    name: Annotated[str, Field(pattern=r"^[A-Za-z0-9_\-]{1,64}$")]
    description: str | None = None
    schema_: Annotated[dict[str, Any] | None, Field(alias="schema")] = None
    strict: bool | None = None


class ResponseFormat(RequestModel):
    """OpenAI's way to ask for JSON."""

    type: Literal["text", "json_object", "json_schema"]
    json_schema: JsonSchema | None = None

    @model_validator(mode="after")
    def _consistent(self) -> ResponseFormat:
        if self.type == "json_schema" and (self.json_schema is None or self.json_schema.schema_ is None):
            raise refuse("response_format.json_schema.schema is required with type 'json_schema'", "json_schema")
        if self.type != "json_schema" and self.json_schema is not None:
            raise refuse(f"response_format.json_schema needs type 'json_schema', got {self.type!r}", "json_schema")
        return self


class StructuredOutputs(RequestModel):
    """vLLM's way to ask for a shape: exactly one of the fields.

    ``json`` is a JSON schema (object, or text holding one), ``grammar`` a Lark grammar in llguidance's dialect.
    """

    json_: Annotated[dict[str, Any] | Grammar | None, Field(alias="json")] = None
    regex: Grammar | None = None
    choice: Annotated[list[Grammar], Field(min_length=1, max_length=256)] | None = None
    grammar: Grammar | None = None
    json_object: bool | None = None

    @model_validator(mode="after")
    def _one(self) -> StructuredOutputs:
        given = [
            name
            for name in ("json", "regex", "choice", "grammar")
            if getattr(self, "json_" if name == "json" else name) is not None
        ]
        given += ["json_object"] if self.json_object else []
        if len(given) != 1:
            raise refuse(
                "structured_outputs: give exactly one of json, regex, choice, grammar, json_object; "
                f"got {', '.join(given) or 'none'}"
            )
        return self


class SamplingFields(AcceptedFields):
    """What chat and text completions have in common. Null means the default everywhere."""

    model: str | None = None
    n: Annotated[Int, Field(ge=1, le=MAX_CHOICES)] | None = 1
    stream: bool | None = False
    stream_options: StreamOptions | None = None
    temperature: Annotated[float, Field(ge=0, le=2)] | None = 1.0
    top_p: Annotated[float, Field(gt=0, le=1)] | None = 1.0
    top_k: Annotated[Int, Field(ge=-1, le=2**31)] | None = 0
    min_p: Annotated[float, Field(ge=0, le=1)] | None = 0.0
    repetition_penalty: Annotated[float, Field(ge=0.01, le=10)] | None = 1.0  # smaller ones overflow float32
    presence_penalty: Annotated[float, Field(ge=-2, le=2)] | None = 0.0
    frequency_penalty: Annotated[float, Field(ge=-2, le=2)] | None = 0.0
    logit_bias: (
        Annotated[
            dict[Annotated[str, Field(pattern=r"^[0-9]{1,10}$")], Annotated[float, Field(ge=-100, le=100)]],
            Field(max_length=MAX_BIASES),
        ]
        | None
    ) = None
    seed: Seed | None = None
    stop: StopString | Annotated[list[StopString], Field(max_length=MAX_STOPS)] | None = None
    stop_token_ids: Annotated[list[Token], Field(max_length=MAX_STOP_TOKENS)] | None = None
    include_stop_str_in_output: bool | None = False
    ignore_eos: bool | None = False
    min_tokens: Annotated[Int, Field(ge=0, le=2**31)] | None = 0
    skip_special_tokens: bool | None = True
    prompt_logprobs: Annotated[Int, Field(ge=0, le=MAX_TOP)] | None = None
    response_format: ResponseFormat | None = None
    structured_outputs: StructuredOutputs | None = None
    eff: EffFields | None = None
    request_id: RequestId | None = None
    user: Annotated[str, Field(max_length=256)] | None = None
    priority: Annotated[Int, Field(ge=-1000, le=1000)] | None = 0

    @model_validator(mode="after")
    def _sampling_fits(self) -> SamplingFields:
        if self.stream_options is not None and self.stream_options.include_usage and not self.stream:
            raise refuse("stream_options.include_usage needs stream=true", "stream_options")
        if self.prompt_logprobs is not None and self.stream:
            raise refuse("prompt_logprobs cannot be streamed; use stream=false", "prompt_logprobs")
        if (
            self.structured_outputs is not None
            and self.response_format is not None
            and self.response_format.type != "text"
        ):
            raise refuse("give response_format or structured_outputs, not both", "structured_outputs")
        return self

    @property
    def stops(self) -> tuple[str, ...]:
        """The stop strings as a tuple."""
        return (self.stop,) if isinstance(self.stop, str) else tuple(self.stop or ())
