"""Thousands of requests that are wrong in one or more places: none fails the server, none keeps a place."""

import copy
import json
import random

import pytest

TOOL = {
    "type": "function",
    "function": {"name": "f", "parameters": {"type": "object", "properties": {"a": {"type": "string"}}}},
}
CALL = {"id": "c1", "type": "function", "function": {"name": "f", "arguments": "{}"}}
TALK = [
    {"role": "system", "content": "s"},
    {"role": "user", "content": [{"type": "text", "text": "hi"}]},
    {"role": "assistant", "content": None, "tool_calls": [CALL]},
    {"role": "tool", "tool_call_id": "c1", "content": "r"},
]
SCHEMA = {"type": "json_schema", "json_schema": {"name": "x", "schema": {"type": "object", "properties": {"a": {}}}}}
WHOLE = {
    "/v1/chat/completions": {
        "messages": TALK, "tools": [TOOL], "tool_choice": "auto", "parallel_tool_calls": True, "temperature": 0.5,
        "max_tokens": 5, "n": 2, "stop": ["a"], "seed": 1, "stream": True, "logprobs": True, "top_logprobs": 2,
        "response_format": SCHEMA, "logit_bias": {"65": 1}, "stream_options": {"include_usage": True}, "user": "u",
    },
    "/v1/completions": {
        "prompt": ["a", "b"], "max_tokens": 4, "echo": True, "n": 2, "structured_outputs": {"regex": "a+"},
    },
    "/v1/responses": {
        "input": [
            {"role": "user", "content": [{"type": "input_text", "text": "hi"}]},
            {"type": "function_call", "call_id": "c1", "name": "f", "arguments": "{}"},
            {"type": "function_call_output", "call_id": "c1", "output": "r"},
        ],
        "tools": [{"type": "function", "name": "f", "parameters": {"type": "object"}}], "stream": True,
        "text": {"format": {"type": "text"}}, "instructions": "i", "metadata": {"a": "b"}, "max_output_tokens": 5,
    },
    "/v1/embeddings": {"input": ["a", "b"], "encoding_format": "base64", "dimensions": 4},
    "/api/chat": {
        "model": "fake", "messages": [{"role": "user", "content": "hi", "images": []}], "tools": [TOOL],
        "options": {"temperature": 1, "num_predict": 4}, "format": {"type": "object"}, "stream": True,
    },
    "/api/generate": {"model": "fake", "prompt": "hi", "raw": True, "options": {"seed": 1}, "stream": False},
    "/api/embed": {"model": "fake", "input": ["a"]},
    "/api/show": {"model": "fake"},
    "/tokenize": {"messages": TALK, "tools": [TOOL], "return_token_strs": True},
    "/detokenize": {"tokens": [1, 2]},
}  # fmt: skip
STRANGE = [
    None, True, False, 0, -1, 1, 2, 1e308, 5e-324, 2**63, -(2**63), 2**31, 0.1,
    "", " ", "a", "\x00", "\u2028", "\ue000", "{}", "[", "null", "a" * 300, "(" * 50, "(?:", "^$",
    "<tool_call>", "</think>", "<|im_end|>", "data:image/png;base64,aaaa",
    [], [None], [[]], [{}] * 3, ["a", 1], {}, {"": ""}, {"a": {"a": {"a": {}}}},
    {"type": "function"}, {"type": "object"},
    {"$ref": "#/nowhere"}, {"$ref": "#"}, {"pattern": "["}, {"enum": []}, {"minimum": 2, "maximum": 1},
    {"allOf": [{"type": "string"}, {"type": "integer"}]},
    {"type": "object", "required": ["z"], "additionalProperties": False, "properties": {}},
]  # fmt: skip


def places(value, path=()):
    """Paths of all values inside a value."""
    yield path
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, inner in items:
        yield from places(inner, (*path, key))


def spoilt(body, random_):
    """A copy with one to three values replaced, taken out, doubled or added."""
    body = copy.deepcopy(body)
    for _ in range(random_.choice([1, 1, 1, 2, 3])):
        path = random_.choice(list(places(body)))
        if not path:
            continue
        *before, last = path
        holder = body
        for key in before:
            holder = holder[key]
        what = random_.random()
        if what < 0.7:
            holder[last] = copy.deepcopy(random_.choice(STRANGE))
        elif what < 0.85:
            del holder[last]
        elif isinstance(holder, list):
            holder.append(copy.deepcopy(holder[last]))
        else:
            holder[random_.choice(["extra", "", "self", "model", "stream", "tools"])] = copy.deepcopy(
                random_.choice(STRANGE)
            )
    return body


@pytest.mark.parametrize("path", WHOLE)
def test_spoilt_requests_are_answered_and_leave_nothing(client, engine, tokenizer, path):
    tokenizer.thinks = True
    engine.text = '<think>a</think>\n<tool_call>\n{"name": "f", "arguments": {"a": "b"}}\n</tool_call>'
    random_ = random.Random(path)
    assert client.post(path, json=WHOLE[path]).status_code == (400 if "embed" in path else 200)
    statuses = {}
    for _ in range(300):
        body = spoilt(WHOLE[path], random_)
        response = client.post(path, json=body)
        statuses[response.status_code] = statuses.get(response.status_code, 0) + 1
        assert response.status_code in (200, 400, 404), (response.status_code, response.text, json.dumps(body))
        assert '"code":"internal_error"' not in response.text, (response.text, json.dumps(body))
        if response.status_code != 200:
            assert response.json()["error"]
    assert statuses[400] > 30
    assert engine.stats().running == 0


@pytest.mark.parametrize("path", WHOLE)
def test_bodies_that_are_no_json(client, engine, path):
    text = json.dumps(WHOLE[path])
    random_ = random.Random(path)
    for _ in range(60):
        at = random_.randrange(len(text))
        broken = (
            text[:at] + random_.choice(["", "\x00", "}", '"', "\\ud800", "1e999", "NaN", "[" * 70]) + text[at + 1 :]
        )
        response = client.post(path, content=broken.encode(), headers={"content-type": "application/json"})
        assert response.status_code in (200, 400, 404), (response.status_code, broken)
    assert client.post(path, content=b"\xff", headers={"content-type": "application/json"}).status_code == 400
    assert client.post(path, content=b"{}").status_code == 400
    assert engine.stats().running == 0
