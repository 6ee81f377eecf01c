r"""Patterns and formats as JSON Schema means them, for a compiler that reads both in its own way.

The regular expressions of JSON Schema, and of the clients that send ``regex``, are ECMAScript's: ``\d`` and ``\w`` are
ASCII, ``\s`` is a fixed list. llguidance reads Rust's, where all three follow Unicode, so that a ``\d`` would let
through digits that no caller parses. A ``format`` that is unknown is a note (JSON Schema 2020-12, section 7.2.3).
"""

from __future__ import annotations

from typing import Any

FORMATS = frozenset({"date-time", "time", "date", "duration", "email", "hostname", "ipv4", "ipv6", "uuid", "uri"})
_DATA = frozenset({"const", "enum", "default", "examples"})  # keywords that hold values, not schemas
_IN_CLASS = {
    "d": "0-9",
    "w": "A-Za-z0-9_",
    "s": r"\t-\r\x20\xa0\x{1680}\x{2000}-\x{200a}\x{2028}\x{2029}\x{202f}\x{205f}\x{3000}\x{feff}",
}


def ascii_classes(pattern: str) -> str:
    r"""The same pattern with ``\d``, ``\w``, ``\s`` and their opposites spelt out as ECMAScript defines them."""
    out: list[str] = []
    inside = False  # a class
    i = 0
    while i < len(pattern):
        pair = pattern[i : i + 2]
        if pair[0] != "\\":
            inside = pair[0] == "[" or (inside and pair[0] != "]")
            out.append(pair[0])
            i += 1
            continue
        listed = _IN_CLASS.get(pair[1:].lower())
        if listed is None:
            out.append(pair)
        elif pair[1].isupper():
            out.append(f"[^{listed}]")  # inside a class too: Rust's classes nest, as a union
        else:
            out.append(listed if inside else f"[{listed}]")
        i += 2
    return "".join(out)


def as_read_by_clients(schema: Any) -> Any:
    """A JSON schema with ECMAScript's classes in its patterns, and without formats that nobody knows."""
    if isinstance(schema, list):
        return [as_read_by_clients(s) for s in schema]
    if not isinstance(schema, dict):
        return schema
    result = {}
    for key, value in schema.items():
        if key in _DATA or (key == "format" and isinstance(value, str) and value not in FORMATS):
            if key in _DATA:
                result[key] = value
        elif key == "pattern" and isinstance(value, str):
            result[key] = ascii_classes(value)
        elif key == "patternProperties" and isinstance(value, dict):
            result[key] = {ascii_classes(name): as_read_by_clients(s) for name, s in value.items()}
        elif key in ("properties", "$defs", "definitions", "dependentSchemas") and isinstance(value, dict):
            result[key] = {name: as_read_by_clients(s) for name, s in value.items()}  # names are not keywords
        else:
            result[key] = as_read_by_clients(value)
    return result
