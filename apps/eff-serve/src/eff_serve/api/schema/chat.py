"""Bodies of /v1/chat/completions."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from eff_http import Int, RequestModel, refuse
from pydantic import BaseModel, Discriminator, Field, Tag, field_validator, model_validator

from eff_serve.api.schema.common import PromptLogprobs, Usage
from eff_serve.api.schema.sampling import MAX_TOP, SamplingFields
from eff_serve.api.schema.tools import AnswerToolCall, CallId, DeltaToolCall, MessageToolCall, ToolFields

ChatFinishReason = Literal["stop", "length", "tool_calls"]


class TextPart(RequestModel):
    """A piece of a message's text."""

    type: Literal["text"]
    text: str


class ImageUrl(RequestModel):
    """Where a picture is: inside the request, as ``data:image/png;base64,...``."""

    url: str
    detail: Literal["auto", "low"] | None = None

    @field_validator("detail", mode="before")
    @classmethod
    def _one_size(cls, value: Any) -> Any:
        if value == "high":
            raise refuse("detail='high' is not supported: pictures are seen at one size; leave the field out")
        return value


class ImagePart(RequestModel):
    """A picture."""

    type: Literal["image_url"]
    image_url: ImageUrl


class OtherPart(RequestModel):
    """Any other kind of part, which is refused."""

    type: str

    @model_validator(mode="before")
    @classmethod
    def _refused(cls, value: Any) -> Any:
        kind = value.get("type") if isinstance(value, dict) else None
        if isinstance(kind, str):
            raise refuse(
                f"content parts of type {kind[:40]!r} are not supported: use 'text', or 'image_url' where the model "
                "has eyes",
                "type",
            )
        return value


def _part_kind(value: Any) -> str:
    kind = value.get("type") if isinstance(value, dict) else getattr(value, "type", None)
    return kind if kind in ("text", "image_url") else "other"


Part = Annotated[
    Annotated[TextPart, Tag("text")] | Annotated[ImagePart, Tag("image_url")] | Annotated[OtherPart, Tag("other")],
    Discriminator(_part_kind),
]


def _texts(parts: list[Part]) -> list[str]:
    return [part.text for part in parts if isinstance(part, TextPart)]


class Message(RequestModel):
    """One message. ``developer`` is read as ``system``. Null and empty fields are those that clients send back.

    A message of the assistant may hold calls of functions, and one of role ``tool`` is the result of such a call.
    """

    role: Literal["system", "developer", "user", "assistant", "tool"]
    content: str | Annotated[list[Part], Field(min_length=1)] | None
    name: Annotated[str, Field(max_length=64)] | None = None
    tool_calls: Annotated[list[MessageToolCall], Field(max_length=128)] | None = None
    tool_call_id: CallId | None = None
    reasoning_content: str | None = None
    refusal: None = None
    function_call: None = None
    audio: None = None
    annotations: Annotated[list[Any], Field(max_length=0)] | None = None
    parsed: Any = None  # a note of the openai client, which sends it back

    @model_validator(mode="before")
    @classmethod
    def _calls_need_no_text(cls, value: Any) -> Any:
        if isinstance(value, dict) and value.get("tool_calls") and "content" not in value:
            return {**value, "content": None}
        return value

    @field_validator("role", mode="before")
    @classmethod
    def _no_function_role(cls, value: Any) -> Any:
        if value == "function":
            raise refuse("messages of role 'function' are not supported: use role 'tool' with tool_call_id")
        return value

    @field_validator("function_call", mode="before")
    @classmethod
    def _no_function_call(cls, value: Any) -> Any:
        if value:
            raise refuse("function_call in messages is not supported: use tool_calls")
        return value

    @model_validator(mode="after")
    def _fields_of_the_role(self) -> Message:
        if self.tool_calls and self.role != "assistant":
            raise refuse(f"tool_calls are only for messages of the assistant, got role {self.role!r}", "tool_calls")
        if self.content is None and not self.tool_calls:
            raise refuse("content is null; only a message with tool_calls needs no text", "content")
        if (self.role == "tool") != (self.tool_call_id is not None):
            raise refuse("tool_call_id belongs to messages of role 'tool', and each of them has one", "tool_call_id")
        return self

    def as_template_input(self) -> dict[str, Any]:
        """Role and text as a chat template reads them; parts are joined by line breaks, pictures are counted."""
        role = "system" if self.role == "developer" else self.role
        given = self.content or ""
        parts = [given] if isinstance(given, str) else _texts(given)
        pictures = 0 if isinstance(given, str) else len(given) - len(parts)
        found: dict[str, Any] = {"role": role, "content": "\n".join(parts)}
        if self.name is not None:
            found["name"] = self.name
        if pictures:
            found["pictures"] = pictures
        if self.tool_calls:
            found["tool_calls"] = [call.as_template_input() for call in self.tool_calls]
        if self.tool_call_id is not None:
            found["tool_call_id"] = self.tool_call_id
        if self.reasoning_content:
            found["reasoning_content"] = self.reasoning_content
        return found


Messages = Annotated[list[Message], Field(min_length=1)]


def refuse_strange_results(messages: list[Message]) -> None:
    """Refuse results of calls that nobody made."""
    made: set[str] = set()
    for i, message in enumerate(messages):
        made.update(call.id for call in message.tool_calls or ())
        if message.tool_call_id is not None and message.tool_call_id not in made:
            param = f"messages[{i}].tool_call_id"
            raise refuse(f"{param}: no message before this one makes the call {message.tool_call_id[:60]!r}", param)


class TemplateFields(RequestModel):
    """How messages become a prompt."""

    add_generation_prompt: bool | None = None
    continue_final_message: bool | None = False
    chat_template_kwargs: dict[str, Any] | None = None

    @field_validator("chat_template_kwargs")
    @classmethod
    def _not_reserved(cls, value: dict[str, Any] | None) -> dict[str, Any] | None:
        taken = sorted(RESERVED_TEMPLATE_NAMES & set(value or ()))
        if taken:
            raise refuse(f"chat_template_kwargs cannot set {taken[0]!r}; the template gets it from the request itself")
        return value

    @model_validator(mode="after")
    def _one_ending(self) -> TemplateFields:
        if self.add_generation_prompt and self.continue_final_message:
            raise refuse(
                "add_generation_prompt and continue_final_message exclude each other", "continue_final_message"
            )
        return self

    @property
    def opens_answer(self) -> bool:
        """Whether the prompt ends with the beginning of a new assistant message (the default)."""
        return not self.continue_final_message if self.add_generation_prompt is None else self.add_generation_prompt


RESERVED_TEMPLATE_NAMES = frozenset({
    "messages", "conversation", "conversations", "tools", "documents", "chat_template", "add_generation_prompt",
    "continue_final_message", "tokenize", "padding", "truncation", "max_length", "return_tensors", "return_dict",
    "return_assistant_tokens_mask", "tokenizer_kwargs", "template_kwargs", "bos_token", "eos_token", "pad_token",
    "unk_token",
})  # fmt: skip


class ChatRequest(SamplingFields, TemplateFields, ToolFields):
    """Body of POST /v1/chat/completions."""

    messages: Messages
    max_tokens: Annotated[Int, Field(ge=1, le=2**31)] | None = None
    max_completion_tokens: Annotated[Int, Field(ge=1, le=2**31)] | None = None
    logprobs: bool | None = False
    top_logprobs: Annotated[Int, Field(ge=0, le=MAX_TOP)] | None = None

    @model_validator(mode="after")
    def _fits(self) -> ChatRequest:
        refuse_strange_results(self.messages)
        if self.top_logprobs is not None and not self.logprobs:
            raise refuse("top_logprobs needs logprobs=true", "top_logprobs")
        both = (self.max_tokens, self.max_completion_tokens)
        if None not in both and both[0] != both[1]:
            raise refuse(
                f"max_tokens={both[0]} and max_completion_tokens={both[1]} disagree; give one of them",
                "max_completion_tokens",
            )
        return self

    @property
    def limit(self) -> int | None:
        """Most tokens to generate, None for as many as the context holds."""
        return self.max_tokens if self.max_completion_tokens is None else self.max_completion_tokens


class TopLogprob(BaseModel):
    """A token and its log-probability; ``bytes`` are the token's own, also where they are no whole character."""

    token: str
    logprob: float
    bytes: list[int] | None


class TokenLogprob(TopLogprob):
    """A generated token with the most likely alternatives."""

    top_logprobs: list[TopLogprob]


class ChatLogprobs(BaseModel):
    """One entry for each generated token."""

    content: list[TokenLogprob]


class AnswerMessage(BaseModel):
    """The answer."""

    role: Literal["assistant"] = "assistant"
    content: str | None
    reasoning_content: str | None = None
    tool_calls: list[AnswerToolCall] | None = None


class ChatChoice(BaseModel):
    """One answer and why it ended."""

    index: int
    message: AnswerMessage
    logprobs: ChatLogprobs | None = None
    finish_reason: ChatFinishReason


class ChatCompletion(BaseModel):
    """Response of POST /v1/chat/completions."""

    id: str
    object: Literal["chat.completion"] = "chat.completion"
    created: int
    model: str
    choices: list[ChatChoice]
    usage: Usage
    system_fingerprint: str
    prompt_logprobs: PromptLogprobs | None = None


class Delta(BaseModel):
    """What a chunk adds to the message."""

    role: Literal["assistant"] | None = None
    content: str | None = None
    reasoning_content: str | None = None
    tool_calls: list[DeltaToolCall] | None = None


class ChunkChoice(BaseModel):
    """A chunk's addition to one answer."""

    index: int
    delta: Delta
    logprobs: ChatLogprobs | None = None
    finish_reason: ChatFinishReason | None = None


class ChatChunk(BaseModel):
    """One event of a streamed chat completion."""

    id: str
    object: Literal["chat.completion.chunk"] = "chat.completion.chunk"
    created: int
    model: str
    choices: list[ChunkChoice]
    usage: Usage | None = None
    system_fingerprint: str
