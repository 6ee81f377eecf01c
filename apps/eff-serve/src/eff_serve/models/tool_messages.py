"""Functions, calls and results in the form that a chat template reads, also where it has no place for them."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from eff_serve.models.chat_template import ChatTemplate
from eff_serve.models.dialects import Dialect

Messages = Sequence[Mapping[str, Any]]
_SHORT_ID = re.compile(r"[A-Za-z0-9]{9}")


def arranged(
    messages: Messages, tools: Sequence[Mapping[str, Any]] | None, template: ChatTemplate, dialect: Dialect
) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    """Messages and further names for a template.

    A template without a place for functions gets them in the system message, one without calls gets these as the text
    that the model would have written, and one without results gets them as a turn of the user.

    Args:
        messages: As `eff_serve.api` spells them: ``tool_calls`` hold arguments as objects.
        tools: Functions as OpenAI describes them; None or empty for none.
        template: The model's template.
        dialect: How the model writes calls.

    Returns:
        The messages, and what else the template is to know.
    """
    turns = [dict(m) for m in messages]
    if any("tool_calls" in m or m["role"] == "tool" for m in turns):
        turns = _named(turns)
        turns = list(_calls_as_text(turns, dialect)) if not template.takes_calls else turns
        turns = list(_results_as_questions(turns)) if not template.takes_results else turns
        if template.takes_calls and dialect.one_call:
            turns = list(_one_by_one(turns))
        if template.takes_calls and dialect.short_ids:
            turns = [_shortened(m) for m in turns]
    if not tools:
        return turns, {}
    if template.takes_tools:
        return turns, {"tools": list(tools)}
    if template.takes_xml_tools:
        return turns, {"xml_tools": list(tools)}
    return _told(turns, tools, dialect), {}


def _named(turns: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Results with the name of their function, which some templates want."""
    names: dict[str, str] = {}
    out = []
    for turn in turns:
        for call in turn.get("tool_calls", ()):
            names[call["id"]] = call["function"]["name"]
        if turn["role"] == "tool":
            turn = {"name": names.get(turn["tool_call_id"], "function"), **turn}
        out.append(turn)
    return out


def _spelt(call: Mapping[str, Any], key: str) -> str:
    function = call["function"]
    return json.dumps({"name": function["name"], key: function["arguments"]}, ensure_ascii=False)


def _calls_as_text(turns: list[dict[str, Any]], dialect: Dialect) -> Iterator[dict[str, Any]]:
    for turn in turns:
        calls = turn.pop("tool_calls", None)
        if calls:
            text = dialect.spell([_spelt(call, dialect.key) for call in calls])
            turn["content"] = f"{turn['content']}\n{text}" if turn["content"] else text
        yield turn


def _results_as_questions(turns: list[dict[str, Any]]) -> Iterator[dict[str, Any]]:
    """Results that follow each other make one turn, since many templates want the roles to alternate."""
    held: list[str] = []
    for turn in turns:
        if turn["role"] == "tool":
            held.append(f"<tool_response>\n{turn['content']}\n</tool_response>")
            continue
        if held:
            yield {"role": "user", "content": "\n".join(held)}
            held = []
        yield turn
    if held:
        yield {"role": "user", "content": "\n".join(held)}


def _one_by_one(turns: list[dict[str, Any]]) -> Iterator[dict[str, Any]]:
    """Each call in a message of its own, followed by its result."""
    results = {t["tool_call_id"]: t for t in turns if t["role"] == "tool"}
    split: set[str] = set()
    for turn in turns:
        calls = turn.get("tool_calls", ())
        if len(calls) > 1:
            for call in calls:
                yield {**turn, "tool_calls": [call]}
                if call["id"] in results:
                    split.add(call["id"])
                    yield results[call["id"]]
        elif turn["role"] != "tool" or turn["tool_call_id"] not in split:
            yield turn


def _shortened(turn: dict[str, Any]) -> dict[str, Any]:
    if "tool_calls" in turn:
        turn = {**turn, "tool_calls": [{**c, "id": _short(c["id"])} for c in turn["tool_calls"]]}
    return {**turn, "tool_call_id": _short(turn["tool_call_id"])} if turn["role"] == "tool" else turn


def _short(name: str) -> str:
    return name if _SHORT_ID.fullmatch(name) else hashlib.sha256(name.encode()).hexdigest()[:9]


def _told(turns: list[dict[str, Any]], tools: Sequence[Mapping[str, Any]], dialect: Dialect) -> list[dict[str, Any]]:
    """The functions at the end of the system message."""
    lines = "\n".join(json.dumps(tool.get("function", tool), ensure_ascii=False) for tool in tools)
    example = dialect.spell([f'{{"name": "function", "{dialect.key}": {{"parameter": "value"}}}}'])
    told = (
        f"You may call these functions, each described in JSON:\n<tools>\n{lines}\n</tools>\n"
        f"To call one, write nothing but its name and arguments, in this form:\n{example}\n"
        "When no function is needed, answer in plain text."
    )
    if turns and turns[0]["role"] == "system":
        first = turns[0]
        return [{**first, "content": f"{first['content']}\n\n{told}" if first["content"] else told}, *turns[1:]]
    return [{"role": "system", "content": told}, *turns]
