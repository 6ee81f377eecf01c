"""From ``response_format`` and ``structured_outputs`` to a grammar that the engine's sampler follows."""

from __future__ import annotations

import json
from typing import Any

from eff_http import bad_request
from llguidance import LLMatcher

from eff_serve.api.ecma import as_read_by_clients, ascii_classes
from eff_serve.api.schema.sampling import MAX_GRAMMAR_CHARS, SamplingFields

# JSON as Python's json.dumps writes it. Free white space would let a small model write blanks until its tokens are
# spent.
JSON_STYLE = {"whitespace_flexible": False, "item_separator": ", ", "key_separator": ": ", "lenient": False}


def grammar_for(request: SamplingFields) -> str | None:
    """Return the grammar that the request asks for, None for free text.

    Raises:
        ApiError: 400 for a schema, pattern or grammar that cannot be compiled, naming the field.
    """
    source = _source(request)
    if source is None:
        return None
    param, grammar = source
    is_error, messages = LLMatcher.validate_grammar_with_warnings(grammar)
    if messages:
        kind = "cannot be compiled" if is_error else "would not be followed in full"
        raise bad_request(f"{param} {kind}: {messages[0][:500]}", param, "invalid_grammar")
    return grammar


def _source(request: SamplingFields) -> tuple[str, str] | None:
    shape = request.structured_outputs
    if shape is not None:
        if shape.json_ is not None:
            return "structured_outputs.json", _json(shape.json_, "structured_outputs.json")
        if shape.regex is not None:
            return "structured_outputs.regex", LLMatcher.grammar_from_regex(ascii_classes(shape.regex))
        if shape.choice is not None:
            choices = " | ".join(json.dumps(choice, ensure_ascii=False) for choice in shape.choice)
            return "structured_outputs.choice", LLMatcher.grammar_from_lark(f"start: {choices}")
        if shape.grammar is not None:
            return "structured_outputs.grammar", LLMatcher.grammar_from_lark(shape.grammar)
        return "structured_outputs.json_object", _json({"type": "object"}, "structured_outputs.json_object")
    wanted = request.response_format
    if wanted is None or wanted.type == "text":
        return None
    if wanted.type == "json_object" or wanted.json_schema is None:
        return "response_format", _json({"type": "object"}, "response_format")
    return "response_format.json_schema.schema", _json(wanted.json_schema.schema_, "response_format.json_schema.schema")


def _json(schema: Any, param: str) -> str:
    try:
        text = schema if isinstance(schema, str) else json.dumps(schema)
        if len(text) > MAX_GRAMMAR_CHARS:
            raise ValueError(f"{len(text)} characters; at most {MAX_GRAMMAR_CHARS} are taken")
        text = json.dumps(as_read_by_clients(json.loads(text)))
        return LLMatcher.grammar_from_json_schema(text, overrides=JSON_STYLE)
    except ValueError as error:
        raise bad_request(f"{param} cannot be used as a JSON schema: {error}", param, "invalid_grammar") from None
