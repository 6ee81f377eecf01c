"""Regular expressions and formats mean what JSON Schema says."""

import json
import re

import pytest
from eff_serve.api.ecma import as_read_by_clients, ascii_classes
from llguidance import LLMatcher

SPACES = "\t\n\v\f\r \u00a0\u1680\u2000\u200a\u2028\u2029\u202f\u205f\u3000\ufeff"


def rust(pattern):
    """Python's spelling of what we write for Rust, and every letter kept to its own case and range."""
    return re.compile(re.sub(r"\\x\{(\w+)\}", lambda m: "\\u" + m[1].rjust(4, "0"), pattern))


@pytest.mark.parametrize(
    ("pattern", "fits", "not_"),
    [
        (r"\d", "07", "\u0665a"),
        (r"[\d.]", "7.", "\u0665a"),
        (r"\w", "aZ_9", "\u00e9-"),
        (r"\s", SPACES, "a\u200b\u0085"),
        (r"[^\s]", "a\u0085", SPACES),
        (r"\S", "a\u0085", SPACES),
        (r"\D", "a\u0665", "0"),
        (r"\W", "\u00e9", "a_"),
        (r"\\d", [r"\d"], "0"),
        (r"[\]\d]", "]5", "d\\"),
    ],
)
def test_classes(pattern, fits, not_):
    found = rust(ascii_classes(pattern))
    assert [x for x in fits if not found.fullmatch(x)] == []
    assert [x for x in not_ if found.fullmatch(x)] == []


@pytest.mark.parametrize("pattern", [r"\d{4}-\d\d", r"[\D]", r"[a\S]+", r"\s\S\w\W\d\D", r"[^\w\s]"])
def test_the_compiler_takes_them(pattern):
    assert LLMatcher.validate_grammar_with_warnings(LLMatcher.grammar_from_regex(ascii_classes(pattern))) == (False, [])


def test_schemas():
    schema = {
        "properties": {
            "pattern": {"type": "string", "pattern": r"\d"},
            "format": {"type": "string", "format": "password"},
            "when": {"type": "string", "format": "date"},
            "any": {"enum": [{"pattern": r"\d", "format": "password"}]},
        },
        "patternProperties": {r"^\d$": {"anyOf": [{"format": "iri"}, {}]}},
    }
    seen = as_read_by_clients(schema)
    assert seen["properties"]["pattern"]["pattern"] == "[0-9]"
    assert seen["properties"]["format"] == {"type": "string"}
    assert seen["properties"]["when"]["format"] == "date"
    assert seen["properties"]["any"] == schema["properties"]["any"]
    assert seen["patternProperties"] == {"^[0-9]$": {"anyOf": [{}, {}]}}


def test_unknown_formats_are_notes(chat):
    shape = {"type": "object", "properties": {"a": {"type": "string", "format": "password"}}}
    response = chat(response_format={"type": "json_schema", "json_schema": {"name": "x", "schema": shape}})
    assert response.status_code == 200, json.dumps(response.json())
