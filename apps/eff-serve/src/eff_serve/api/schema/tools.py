"""Functions that a model may call, the choice among them, and calls in messages."""

from __future__ import annotations

import contextlib
from typing import Annotated, Any, Literal

from eff_http import ApiError, RequestModel, parse_json, refuse
from pydantic import BaseModel, Field, field_validator, model_validator

MAX_TOOLS = 128
MAX_DEPTH = 64
FunctionName = Annotated[str, Field(pattern=r"^[A-Za-z0-9_.\-]{1,64}$")]
CallId = Annotated[str, Field(pattern=r"^[A-Za-z0-9_.:|\-]{1,256}$")]


class FunctionDefinition(RequestModel):
    """A function: ``parameters`` is the JSON schema of its arguments, left out for a function without any.

    Arguments always follow the schema, with ``strict`` or without.
    """

    name: FunctionName
    description: str | None = None
    parameters: dict[str, Any] | None = None
    strict: bool | None = None

    @field_validator("parameters")
    @classmethod
    def _an_object(cls, value: dict[str, Any] | None) -> dict[str, Any] | None:
        kind = (value or {}).get("type", "object")
        if kind != "object":
            raise refuse(f"the parameters of a function are a JSON schema of type 'object', got {str(kind)[:40]!r}")
        return value


class Tool(RequestModel):
    """Something that the model may use; there are functions only."""

    type: Literal["function"]
    function: FunctionDefinition

    def described(self) -> dict[str, Any]:
        """The function as a chat template reads it."""
        given = self.function
        found: dict[str, Any] = {"name": given.name, "description": given.description or ""}
        found["parameters"] = given.parameters or {"type": "object", "properties": {}}
        return {"type": "function", "function": found}


class NamedFunction(RequestModel):
    """A function by name."""

    name: FunctionName


class NamedTool(RequestModel):
    """``tool_choice`` of one function."""

    type: Literal["function"]
    function: NamedFunction


class AllowedTools(RequestModel):
    """Some of the functions of a request."""

    mode: Literal["auto", "required"]
    tools: Annotated[list[NamedTool], Field(min_length=1, max_length=MAX_TOOLS)]


class AllowedChoice(RequestModel):
    """``tool_choice`` among some of the functions."""

    type: Literal["allowed_tools"]
    allowed_tools: AllowedTools


ToolChoice = Literal["none", "auto", "required"] | NamedTool | AllowedChoice


class ToolFields(RequestModel):
    """Fields of a chat request that say what may be called."""

    tools: Annotated[list[Tool], Field(max_length=MAX_TOOLS)] | None = None
    tool_choice: ToolChoice | None = None
    parallel_tool_calls: bool | None = None

    @model_validator(mode="after")
    def _known_functions(self) -> ToolFields:
        names = [tool.function.name for tool in self.tools or ()]
        for i, name in enumerate(names):
            if name in names[:i]:
                raise refuse(f"the function {name!r} is described twice", f"tools[{i}].function.name")
        choice = self.tool_choice
        if choice not in (None, "none") and not names:
            raise refuse("tool_choice needs tools to choose from", "tool_choice")
        chosen = [choice] if isinstance(choice, NamedTool) else []
        chosen += choice.allowed_tools.tools if isinstance(choice, AllowedChoice) else []
        for tool in chosen:
            if tool.function.name not in names:
                message = f"tool_choice names the function {tool.function.name!r}, which is not among the tools"
                raise refuse(message, "tool_choice")
        return self


class CalledFunction(RequestModel):
    """A function and the text of its arguments."""

    name: FunctionName
    arguments: str
    parsed_arguments: Any = None  # a note of the openai client, which sends it back


class MessageToolCall(RequestModel):
    """A call in a message of the assistant."""

    id: CallId
    type: Literal["function"] = "function"
    function: CalledFunction
    index: int | None = None  # clients that put a stream together leave it in

    def as_template_input(self) -> dict[str, Any]:
        """The call as a chat template reads it: arguments as what they stand for, if they are JSON of a sane depth."""
        arguments: Any = self.function.arguments
        with contextlib.suppress(ApiError):
            arguments = parse_json(arguments.encode(), MAX_DEPTH)
        return {"id": self.id, "type": "function", "function": {"name": self.function.name, "arguments": arguments}}


class AnswerFunction(BaseModel):
    """The function that the model calls; ``arguments`` is JSON, as text."""

    name: str
    arguments: str


class AnswerToolCall(BaseModel):
    """A call in an answer."""

    id: str
    type: Literal["function"] = "function"
    function: AnswerFunction


class DeltaFunction(BaseModel):
    """What a chunk adds to a call: the name comes first, then the arguments in pieces."""

    name: str | None = None
    arguments: str | None = None


class DeltaToolCall(BaseModel):
    """What a chunk adds to the call with this index; its first one brings the id."""

    index: int
    id: str | None = None
    type: Literal["function"] | None = None
    function: DeltaFunction
