"""From the tools of a request to the grammar of its answer.

A model is not trusted to write a call well: the grammar lets it write words, or calls of the functions at hand with
arguments that follow their schemas, in the spelling that the model was trained on. So a choice can be forced on any
model, and no answer holds half a call or a function that nobody described.
"""

from __future__ import annotations

import functools
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from eff_http import bad_request
from llguidance import LLMatcher

from eff_serve.api.ecma import as_read_by_clients
from eff_serve.api.grammar import JSON_STYLE
from eff_serve.api.schema.chat import ChatRequest
from eff_serve.api.schema.sampling import MAX_GRAMMAR_CHARS, SamplingFields
from eff_serve.api.schema.tokens import TokenizeRequest
from eff_serve.api.schema.tools import AllowedChoice, NamedTool, Tool, ToolFields
from eff_serve.api.speech import THINK, THOUGHT, Calls
from eff_serve.api.tokenizer import Tokenizer
from eff_serve.models.dialects import PYTHON_TAG, Dialect

MAX_CALLS = 16
_COMBINED = ("allOf", "anyOf", "oneOf", "$ref", "if")


@dataclass(frozen=True, slots=True)
class ToolPlan:
    """What a request lets the model call.

    Attributes:
        functions: The schemas of the arguments, as text, by the names of the functions that may be called.
        required: A call must be made.
        most: Most calls of an answer.
        dialect: How the model writes them.
    """

    functions: Mapping[str, str]
    required: bool
    most: int
    dialect: Dialect

    def calls(self) -> Calls:
        """What finds the calls in one answer."""
        return Calls(self.dialect, frozenset(self.functions))


def offered(body: ToolFields | TokenizeRequest) -> list[dict[str, Any]] | None:
    """The functions that the prompt describes; none where none may be called."""
    if not body.tools or getattr(body, "tool_choice", None) == "none":
        return None
    return [tool.described() for tool in body.tools]


def plan_for(body: ChatRequest, dialect: Dialect) -> ToolPlan | None:
    """What a request lets the model call; None for nothing.

    Raises:
        ApiError: 400 for a schema that cannot be followed.
    """
    choice = body.tool_choice
    if choice == "none" or not body.tools:
        return None
    if body.structured_outputs is not None:
        raise bad_request(
            "give tools or structured_outputs, not both; response_format may be given", "structured_outputs"
        )
    names = None
    if isinstance(choice, NamedTool):
        names = {choice.function.name}
    elif isinstance(choice, AllowedChoice):
        names = {tool.function.name for tool in choice.allowed_tools.tools}
    functions: dict[str, str] = {}
    for i, tool in enumerate(body.tools):
        schema = _schema(tool)
        _check(schema, f"tools[{i}].function.parameters")
        if names is None or tool.function.name in names:
            functions[tool.function.name] = schema
    required = choice == "required" or isinstance(choice, NamedTool)
    required = required or (isinstance(choice, AllowedChoice) and choice.allowed_tools.mode == "required")
    one = isinstance(choice, NamedTool) or body.parallel_tool_calls is False
    return ToolPlan(functions, required, 1 if one else MAX_CALLS, dialect)


def grammar_of(plan: ToolPlan, body: SamplingFields, tokenizer: Tokenizer, *, thinks: bool | str) -> str:
    """The grammar of an answer: thoughts where the model has them, then words or calls.

    Args:
        plan: What may be called.
        body: The request; words follow its ``response_format``.
        tokenizer: Says which markers are tokens.
        thinks: See `eff_serve.api.speech.Speech`.
    """

    def piece(text: str) -> str:
        found = tokenizer.marker(text)
        return json.dumps(text) if found is None else f"<[{found[0]}]>"

    dialect = plan.dialect
    lines = ["%llguidance {}", "TEXT: /(.|\\n)*/"]
    lines += [f"call_{i}: {_call(*function, dialect.key)}" for i, function in enumerate(plan.functions.items())]
    lines.append("call: " + " | ".join(f"call_{i}" for i in range(len(plan.functions))))
    more = f" ({' '.join(map(piece, dialect.between))} call){{0,{plan.most - 1}}}" if plan.most > 1 else ""
    behind = " ".join([*map(piece, dialect.start[1:]), "call" + more, *map(piece, dialect.end)])
    marker = piece(dialect.start[0]) if dialect.start else ""
    lines.append(f"calls: {marker} {behind}")
    shape = _words(body)
    if plan.required:
        lines.append("said: calls")
    elif shape is not None:
        lines += [f"words: %json {shape}", "said: words | calls"]
    elif not dialect.start:
        tag = "" if tokenizer.marker(PYTHON_TAG) is None else f" | {piece(PYTHON_TAG)} calls"
        lines += ["WORDS: /[^{\\s](.|\\n)*/", f"said: WORDS? | calls{tag}"]
    elif marker.startswith("<["):
        lines.append(f"said: TEXT | TEXT {marker} {behind}")
    else:
        lines += [f"words_to_call[lazy]: TEXT {marker}", f"said: TEXT | words_to_call {behind}"]
    start = "said"
    if thinks:
        # A tag that is a token ends what TEXT can match; one of ordinary letters needs the shortest match.
        lazy = "[lazy]" if tokenizer.marker(THOUGHT) is None else ""
        lines += ["GAP: /\\n+/", f"thought{lazy}: TEXT {piece(THOUGHT)}"]
        # Thoughts may be left out unless the prompt has begun them.
        start = "thought GAP? said" if thinks == "open" else f"({piece(THINK)} thought GAP?)? said"
    lines.append(f"start: {start}")
    return LLMatcher.grammar_from_lark("\n".join(lines))


def _call(name: str, schema: str, key: str) -> str:
    front = json.dumps(f'{{"name": {json.dumps(name)}, "{key}": ')
    return f'{front} %json {schema} "}}"'


def _schema(tool: Tool) -> str:
    """The schema of a function's arguments. A function takes no argument that it does not name."""
    schema = {"type": "object", **(tool.function.parameters or {})}
    schema.setdefault("properties", {})
    if not any(key in schema for key in ("additionalProperties", "patternProperties", *_COMBINED)):
        schema["additionalProperties"] = False
    style = {**JSON_STYLE, "lenient": not tool.function.strict}
    return json.dumps({"x-guidance": style, **as_read_by_clients(schema)})


def _words(body: SamplingFields) -> str | None:
    wanted = body.response_format
    if wanted is None or wanted.type == "text":
        return None
    schema = {"type": "object"} if wanted.json_schema is None else wanted.json_schema.schema_
    return json.dumps({"x-guidance": JSON_STYLE, **as_read_by_clients(schema)})


def _check(schema: str, param: str) -> None:
    if len(schema) > MAX_GRAMMAR_CHARS:
        raise bad_request(f"{param} is longer than {MAX_GRAMMAR_CHARS} characters", param, "invalid_grammar")
    problem = _problem(schema)
    if problem is not None:
        raise bad_request(f"{param} cannot be used as a JSON schema: {problem[:500]}", param, "invalid_grammar")


@functools.lru_cache(maxsize=256)
def _problem(schema: str) -> str | None:
    """Why a schema cannot be followed; None if it can. Clients send the same ones over and over."""
    is_error, messages = LLMatcher.validate_grammar_with_warnings(LLMatcher.grammar_from_lark(f"start: %json {schema}"))
    return messages[0] if is_error and messages else None


def thinks(tokenizer: Tokenizer, prompt: Sequence[int]) -> bool | str:
    """Whether the model writes thoughts; "open" where the prompt has begun them."""
    if not tokenizer.thinks:
        return False
    return "open" if tokenizer.decode(prompt[-8:]).rstrip().endswith(THINK) else True


def shows_special(plan: ToolPlan | None, tokenizer: Tokenizer, *, thinks: bool | str) -> bool:
    """Whether a marker is a special token, which the text of an answer would leave out."""
    markers = [] if plan is None else [*plan.dialect.start, *plan.dialect.between, *plan.dialect.end, PYTHON_TAG]
    markers += [THINK, THOUGHT] if thinks else []
    return any((found := tokenizer.marker(text)) is not None and found[1] for text in markers)
