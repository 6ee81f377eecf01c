"""Bodies of /v1/responses."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from eff_http import Int, RequestModel, refuse
from pydantic import BaseModel, ConfigDict, Field, field_validator

from eff_serve.api.schema.accepted import Note
from eff_serve.api.schema.sampling import JsonSchema
from eff_serve.api.schema.steering import EffFields
from eff_serve.api.schema.tools import MAX_TOOLS, CallId, FunctionDefinition, FunctionName

Status = Literal["in_progress", "completed", "incomplete"]


class InputPart(RequestModel):
    """A piece of a message: text, or a picture as a data URL."""

    type: Literal["input_text", "output_text", "input_image", "refusal"]
    text: str | None = None
    image_url: str | None = None
    detail: Literal["auto", "low"] | None = None
    refusal: str | None = None
    annotations: Annotated[list[Any], Field(max_length=0)] | None = None
    logprobs: Annotated[list[Any], Field(max_length=0)] | None = None


class InputMessage(RequestModel):
    """A message of a conversation."""

    type: Literal["message"] = "message"
    role: Literal["system", "developer", "user", "assistant"]
    content: str | list[InputPart]
    id: str | None = None
    status: Status | None = None
    phase: str | None = None


class FunctionCall(RequestModel):
    """A call that the model made."""

    type: Literal["function_call"]
    call_id: CallId
    name: FunctionName
    arguments: str
    id: str | None = None
    status: Status | None = None


class FunctionCallOutput(RequestModel):
    """The result of a call."""

    type: Literal["function_call_output"]
    call_id: CallId
    output: str | list[InputPart]
    id: str | None = None
    status: Status | None = None


class ReasoningPart(RequestModel):
    """A piece of thoughts."""

    type: Literal["reasoning_text", "summary_text"]
    text: str


class Reasoning(RequestModel):
    """Thoughts before a message or a call."""

    type: Literal["reasoning"]
    summary: Annotated[list[ReasoningPart], Field(default_factory=list)]
    content: list[ReasoningPart] | None = None
    id: str | None = None
    status: Status | None = None
    encrypted_content: None = None


Item = InputMessage | FunctionCall | FunctionCallOutput | Reasoning


class ResponseTool(FunctionDefinition):
    """A function; other kinds of tools run at OpenAI and are refused."""

    type: Literal["function"]

    @field_validator("type", mode="before")
    @classmethod
    def _runs_here(cls, value: Any) -> Any:
        if value != "function":
            raise refuse(f"tools of type {str(value)[:40]!r} are not supported: use 'function'")
        return value


class NamedResponseTool(RequestModel):
    """``tool_choice`` of one function."""

    type: Literal["function"]
    name: FunctionName


class TextFormat(JsonSchema):
    """Shape of the text."""

    type: Literal["text", "json_object", "json_schema"]
    name: Annotated[str, Field(pattern=r"^[A-Za-z0-9_\-]{1,64}$")] | None = None  # type: ignore[assignment]


class TextFields(RequestModel):
    """How the text is to look."""

    format: TextFormat | None = None
    verbosity: Literal["medium"] | None = None


class ReasoningFields(RequestModel):
    """Asks for nothing here: a model thinks if its chat template says so."""

    effort: Literal["none"] | None = None
    summary: None = None


class ResponseStreamOptions(RequestModel):
    """Options of a stream."""

    include_obfuscation: Literal[False] | None = None


class ResponseRequest(RequestModel):
    """Body of POST /v1/responses. The server keeps no conversation: each request holds all of it."""

    input: str | Annotated[list[Item], Field(min_length=1)]
    model: str | None = None
    instructions: str | None = None
    max_output_tokens: Annotated[Int, Field(ge=1, le=2**31)] | None = None
    temperature: Annotated[float, Field(ge=0, le=2)] | None = None
    top_p: Annotated[float, Field(gt=0, le=1)] | None = None
    stream: bool | None = False
    stream_options: ResponseStreamOptions | None = None
    tools: Annotated[list[ResponseTool], Field(max_length=MAX_TOOLS)] | None = None
    tool_choice: Literal["none", "auto", "required"] | NamedResponseTool | None = None
    parallel_tool_calls: bool | None = None
    text: TextFields | None = None
    reasoning: ReasoningFields | None = None
    metadata: Annotated[dict[Note, Note], Field(max_length=16)] | None = None
    user: Annotated[str, Field(max_length=256)] | None = None
    safety_identifier: Note | None = None
    prompt_cache_key: Note | None = None
    prompt_cache_retention: Literal["in-memory", "in_memory", "24h"] | None = None
    truncation: Literal["disabled"] | None = None
    service_tier: Literal["auto", "default"] | None = None
    include: Annotated[list[Literal["reasoning.encrypted_content"]], Field(max_length=1)] | None = None
    store: bool | None = None
    background: Literal[False] | None = None
    previous_response_id: None = None
    conversation: None = None
    prompt: None = None
    max_tool_calls: None = None
    top_logprobs: Literal[0] | None = None
    eff: EffFields | None = None

    @field_validator("store")
    @classmethod
    def _nothing_is_kept(cls, value: bool | None) -> bool | None:
        if value:
            raise refuse("store=true is not supported: this server keeps no answers; send false, or leave it out")
        return value


class InputTokensDetails(BaseModel):
    """Where input tokens came from; nothing is charged for writing to the cache."""

    cached_tokens: int
    cache_write_tokens: int = 0


class OutputTokensDetails(BaseModel):
    """What output tokens were; thoughts are counted with all others."""

    reasoning_tokens: int


class ResponseUsage(BaseModel):
    """Exact token counts."""

    input_tokens: int
    input_tokens_details: InputTokensDetails
    output_tokens: int
    output_tokens_details: OutputTokensDetails
    total_tokens: int


class IncompleteDetails(BaseModel):
    """Why an answer was cut."""

    reason: Literal["max_output_tokens"]


class ResponseObject(BaseModel):
    """Response of POST /v1/responses; ``output`` holds thoughts, a message, calls of functions."""

    id: str
    object: Literal["response"] = "response"
    created_at: int
    status: Status
    model: str
    output: list[dict[str, Any]]
    error: None = None
    incomplete_details: IncompleteDetails | None = None
    instructions: str | None = None
    max_output_tokens: int | None = None
    metadata: dict[str, str] = {}
    parallel_tool_calls: bool = True
    previous_response_id: None = None
    reasoning: dict[str, None] = {"effort": None, "summary": None}
    service_tier: Literal["default"] = "default"
    store: Literal[False] = False
    temperature: float = 1.0
    text: dict[str, Any] = {"format": {"type": "text"}}
    tool_choice: str | dict[str, Any] = "auto"
    tools: list[dict[str, Any]] = []
    top_p: float = 1.0
    truncation: Literal["disabled"] = "disabled"
    usage: ResponseUsage | None = None
    user: str | None = None


class ResponseEvent(BaseModel):
    """One event of a streamed response; further fields depend on its type."""

    model_config = ConfigDict(extra="allow")

    type: str
    sequence_number: int
