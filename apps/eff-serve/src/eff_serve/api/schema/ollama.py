"""Bodies of Ollama's API."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from eff_http import Int, RequestModel, refuse
from pydantic import BaseModel, Field, field_validator

from eff_serve.api.schema.common import Seed
from eff_serve.api.schema.sampling import MAX_STOPS, StopString
from eff_serve.api.schema.tools import MAX_TOOLS, FunctionDefinition, FunctionName

KeepAlive = str | int | float | None


class Options(RequestModel):
    """How tokens are chosen; the defaults are Ollama's. Settings of the machine are the server's own."""

    temperature: Annotated[float, Field(ge=0, le=2)] | None = None
    top_p: Annotated[float, Field(gt=0, le=1)] | None = None
    top_k: Annotated[Int, Field(ge=0, le=2**31)] | None = None
    min_p: Annotated[float, Field(ge=0, le=1)] | None = None
    seed: Seed | None = None
    num_predict: Annotated[Int, Field(ge=-2, le=2**31)] | None = None
    num_ctx: Annotated[Int, Field(ge=1, le=2**31)] | None = None
    stop: StopString | Annotated[list[StopString], Field(max_length=MAX_STOPS)] | None = None
    repeat_penalty: Annotated[float, Field(ge=0.01, le=10)] | None = None
    presence_penalty: Annotated[float, Field(ge=-2, le=2)] | None = None
    frequency_penalty: Annotated[float, Field(ge=-2, le=2)] | None = None


class OllamaFunction(RequestModel):
    """A function and its arguments, as an object."""

    name: FunctionName
    arguments: dict[str, Any]
    index: int | None = None


class OllamaCall(RequestModel):
    """A call in a message."""

    function: OllamaFunction
    id: str | None = None
    type: Literal["function"] | None = None


class OllamaMessage(RequestModel):
    """One message; the result of a call has role ``tool``, and ``tool_name`` where there were several."""

    role: Literal["system", "user", "assistant", "tool"]
    content: str | None = None
    thinking: str | None = None
    images: Annotated[list[str], Field(max_length=64)] | None = None
    tool_calls: Annotated[list[OllamaCall], Field(max_length=128)] | None = None
    tool_name: FunctionName | None = None
    tool_call_id: str | None = None


class OllamaTool(RequestModel):
    """A function that the model may call."""

    type: Literal["function"] = "function"
    function: FunctionDefinition


class OllamaFields(RequestModel):
    """What /api/chat and /api/generate have in common."""

    model: str
    stream: bool | None = True
    format: Literal["json", ""] | dict[str, Any] | None = None
    options: Options | None = None
    keep_alive: KeepAlive = None
    think: bool | None = None


class OllamaChatRequest(OllamaFields):
    """Body of POST /api/chat."""

    messages: list[OllamaMessage] = Field(default_factory=list)
    tools: Annotated[list[OllamaTool], Field(max_length=MAX_TOOLS)] | None = None


class OllamaGenerateRequest(OllamaFields):
    """Body of POST /api/generate."""

    prompt: str | None = None
    system: str | None = None
    images: Annotated[list[str], Field(max_length=64)] | None = None
    raw: bool | None = False
    suffix: str | None = None
    template: str | None = None
    context: list[int] | None = None

    @field_validator("suffix", "template", "context")
    @classmethod
    def _unsupported(cls, value: Any, info: Any) -> Any:
        if value:
            raise refuse(f"{info.field_name} is not supported; leave it out")
        return value


class OllamaAnswerMessage(BaseModel):
    """What an answer, or a line of it, says."""

    role: Literal["assistant"] = "assistant"
    content: str
    thinking: str | None = None
    tool_calls: list[dict[str, Any]] | None = None


class OllamaAnswer(BaseModel):
    """A line of an answer, or the whole; the last one has counts, and durations in nanoseconds."""

    model: str
    created_at: str
    message: OllamaAnswerMessage | None = None
    response: str | None = None
    thinking: str | None = None
    done: bool
    done_reason: Literal["stop", "length", "load", "unload"] | None = None
    total_duration: int | None = None
    load_duration: int | None = None
    prompt_eval_count: int | None = None
    prompt_eval_duration: int | None = None
    eval_count: int | None = None
    eval_duration: int | None = None


class ShowRequest(RequestModel):
    """Body of POST /api/show."""

    model: str
    verbose: bool | None = None


class OllamaDetails(BaseModel):
    """What a model is."""

    parent_model: str = ""
    format: str = "safetensors"
    family: str
    families: list[str]
    parameter_size: str
    quantization_level: str


class OllamaModel(BaseModel):
    """A model in the list."""

    name: str
    model: str
    modified_at: str
    size: int
    digest: str
    details: OllamaDetails
    size_vram: int | None = None
    expires_at: str | None = None
    context_length: int | None = None


class OllamaModels(BaseModel):
    """Body of /api/tags and /api/ps."""

    models: list[OllamaModel]


class OllamaShow(BaseModel):
    """Response of POST /api/show."""

    modelfile: str = ""
    parameters: str = ""
    template: str = ""
    details: OllamaDetails
    model_info: dict[str, Any]
    capabilities: list[str]
    modified_at: str


class OllamaError(BaseModel):
    """Body of every response that is not a success."""

    error: str
