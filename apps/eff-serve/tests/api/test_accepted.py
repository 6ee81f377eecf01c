"""Fields that ask for nothing are taken, and what would change the answer is refused."""

import pytest

DESCRIBED = {
    "type": "json_schema",
    "json_schema": {"name": "x", "description": "d", "schema": {"type": "object", "properties": {}}},
}
CALL = {"id": "c", "type": "function", "function": {"name": "f", "arguments": "{}", "parsed_arguments": {}}, "index": 0}


@pytest.mark.parametrize(
    "fields",
    [
        {"store": False},
        {"store": None},
        {"metadata": {"a": "b"}},
        {"parallel_tool_calls": False},
        {"parallel_tool_calls": True},
        {"functions": None},
        {"functions": []},
        {"function_call": "none"},
        {"tools": [], "tool_choice": "none"},
        {"response_format": DESCRIBED},
        {"reasoning_effort": None},
        {"reasoning_effort": "none"},
        {"service_tier": "auto"},
        {"modalities": ["text"]},
        {"prediction": None, "audio": None, "web_search_options": None},
        {"safety_identifier": "u1", "prompt_cache_key": "k"},
        {"stream_options": {"include_obfuscation": False}},
        {"messages": [{"role": "user", "content": "a", "name": "bob"}]},
        {"messages": [{"role": "assistant", "content": "a", "tool_calls": []}, {"role": "user", "content": "x"}]},
        {"messages": [{"role": "assistant", "content": "a", "annotations": [], "refusal": None, "parsed": {"a": 1}}]},
        {
            "messages": [
                {"role": "assistant", "tool_calls": [CALL]},
                {"role": "tool", "tool_call_id": "c", "content": ""},
            ]
        },
    ],
)
def test_taken(chat, fields):
    response = chat(**fields)
    assert response.status_code == 200, response.text


@pytest.mark.parametrize(
    "fields",
    [
        {"store": True},
        {"store": 0},
        {"functions": [{"name": "f"}]},
        {"reasoning_effort": "high"},
        {"modalities": ["text", "audio"]},
        {"prediction": {"type": "content", "content": "x"}},
        {"service_tier": "flex"},
        {"metadata": {"a": 1}},
    ],
)
def test_refused(chat, engine, fields):
    response = chat(**fields)
    assert response.status_code == 400
    assert response.json()["error"]["param"].split(".")[0] == next(iter(fields))
    assert engine.submitted == []
