"""/v1/responses: what comes in reaches the conversation, and what goes out is what OpenAI's own types read."""

import json

import pytest
from eff_serve.engine.types import Step
from openai.types.responses import Response, ResponseStreamEvent
from pydantic import TypeAdapter

CITY = {
    "type": "function",
    "name": "city",
    "parameters": {"type": "object", "properties": {"n": {"type": "string"}}, "required": ["n"]},
    "strict": True,
}
CALL = '<tool_call>\n{"name": "city", "arguments": {"n": "P"}}\n</tool_call>'


@pytest.fixture
def respond(client):
    return lambda **fields: client.post("/v1/responses", json={"input": "hi", **fields})


def events(response):
    """Data of each event, which must say its type in the line before."""
    found = []
    for block in response.text.split("\n\n")[:-1]:
        name, data = block.split("\n")
        data = json.loads(data.removeprefix("data: "))
        assert name == f"event: {data['type']}"
        TypeAdapter(ResponseStreamEvent).validate_python(data)
        found.append(data)
    assert [e["sequence_number"] for e in found] == list(range(len(found)))
    return found


def test_a_whole_answer(respond):
    answer = respond(instructions="Be kind.", metadata={"a": "b"}, temperature=0)
    assert answer.status_code == 200, answer.text
    read = Response.model_validate(answer.json())
    assert read.output_text == "Hello"
    assert (read.status, read.store if hasattr(read, "store") else False) == ("completed", False)
    assert read.usage.input_tokens + read.usage.output_tokens == read.usage.total_tokens
    assert (read.instructions, read.metadata, read.temperature) == ("Be kind.", {"a": "b"}, 0)
    assert read.id.startswith("resp_")


def test_a_cut_answer_says_so(respond):
    read = Response.model_validate(respond(max_output_tokens=2).json())
    assert (read.output_text, read.status) == ("He", "incomplete")
    assert read.incomplete_details.reason == "max_output_tokens"


def test_the_events_of_a_text(respond):
    found = events(respond(stream=True))
    kinds = [e["type"].removeprefix("response.") for e in found]
    assert kinds[:4] == ["created", "in_progress", "output_item.added", "content_part.added"]
    assert kinds[-4:] == ["output_text.done", "content_part.done", "output_item.done", "completed"]
    assert set(kinds[4:-4]) == {"output_text.delta"}
    assert "".join(e["delta"] for e in found[4:-4]) == "Hello" == found[-4]["text"]
    last = found[-1]["response"]
    assert last["output"] == [found[-2]["item"]]
    assert last["usage"]["output_tokens"] == 6
    assert found[0]["response"]["output"] == []
    assert len({e["item_id"] for e in found if "item_id" in e}) == 1


@pytest.mark.parametrize("stream", [False, True])
def test_thoughts_words_and_calls_are_items(respond, engine, tokenizer, stream):
    tokenizer.thinks = True
    engine.text = f"<think>\nHm.</think>\n\nI look.\n{CALL}\n{CALL}"
    answer = respond(tools=[CITY], stream=stream)
    if stream:
        found = events(answer)
        output = found[-1]["response"]["output"]
        starts = [e["item"]["type"] for e in found if e["type"] == "response.output_item.added"]
        assert starts == [item["type"] for item in output]
        for i, item in enumerate(output[2:], 2):
            deltas = [e["delta"] for e in found if e.get("item_id") == item["id"] and "delta" in e]
            assert len(deltas) > 3
            assert "".join(deltas) == item["arguments"]
            (done,) = [e for e in found if e["type"] == "response.output_item.done" and e["output_index"] == i]
            assert done["item"] == item
    else:
        output = answer.json()["output"]
    assert [i["type"] for i in output] == ["reasoning", "message", "function_call", "function_call"]
    assert {i["status"] for i in output} == {"completed"}
    assert output[0]["content"] == [{"type": "reasoning_text", "text": "Hm."}]
    assert output[1]["content"][0]["text"] == "I look."
    assert (output[2]["name"], output[2]["arguments"]) == ("city", '{"n": "P"}')
    assert output[2]["call_id"] != output[3]["call_id"]


def test_what_came_out_goes_in_again(respond, engine, tokenizer):
    tokenizer.thinks = True
    engine.text = f"<think>\nHm.</think>\n\n{CALL}"
    first = respond(tools=[CITY]).json()["output"]
    result = {"type": "function_call_output", "call_id": first[-1]["call_id"], "output": "big"}
    parts = [{"type": "input_text", "text": "hi"}]
    talk = [{"role": "user", "content": parts}, *first, result]
    answer = respond(input=talk, tools=[CITY], tool_choice={"type": "function", "name": "city"})
    assert answer.status_code == 200, answer.text
    given = tokenizer.laid_out["messages"]
    assert [m["role"] for m in given] == ["user", "assistant", "tool"]
    assert given[1]["reasoning_content"] == "Hm."
    assert given[1]["tool_calls"][0]["function"] == {"name": "city", "arguments": {"n": "P"}}
    assert given[2]["content"] == "big"
    assert "city" in engine.submitted[-1][1].grammar


def test_the_shape_of_the_text(respond, engine):
    shape = {"type": "json_schema", "name": "x", "schema": {"type": "integer"}, "strict": True}
    assert respond(text={"format": shape}).json()["text"]["format"]["name"] == "x"
    assert engine.submitted[-1][1].grammar
    assert respond(text={"format": {"type": "text"}}).status_code == 200
    assert engine.submitted[-1][1].grammar is None


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"store": True}, "store"),
        ({"previous_response_id": "resp_1"}, "previous_response_id"),
        ({"tools": [{"type": "web_search"}]}, "tools[0].type"),
        ({"input": []}, "input"),
        ({"input": [{"type": "function_call_output", "call_id": "a", "output": ""}]}, "input"),
        ({"input": [{"role": "user", "content": [{"type": "input_image"}]}]}, "input"),
        ({"input": [{"role": "robot", "content": "a"}]}, "input[0].role"),
        ({"text": {"format": {"type": "json_schema"}}}, "text"),
        ({"unknown": 1}, "unknown"),
        ({"max_output_tokens": 0}, "max_output_tokens"),
        ({"reasoning": {"effort": "high"}}, "reasoning.effort"),
        ({"tool_choice": "required"}, "tool_choice"),
    ],
)
def test_refused_by_name(respond, engine, fields, param):
    answer = respond(**fields)
    assert answer.status_code == 400, answer.text
    assert answer.json()["error"]["param"] == param, answer.json()
    assert engine.submitted == []


def test_an_error_on_the_way_is_an_event(respond, engine):
    engine.steps = [Step(token=72), Step(finish_reason="error", error="out of pages")]
    *_, last = events(respond(stream=True))
    assert last["type"] == "error"
    assert "out of pages" in last["message"]


def test_pictures_need_eyes(respond):
    part = {"type": "input_image", "image_url": "data:image/png;base64,aaaa"}
    answer = respond(input=[{"role": "user", "content": [part]}])
    assert answer.status_code == 400
    assert "text only" in answer.json()["error"]["message"]


def test_the_schema_says_how_each_stream_ends(client):
    paths = client.get("/openapi.json").json()["paths"]
    for path, done in (("/v1/responses", False), ("/v1/chat/completions", True), ("/v1/completions", True)):
        event = paths[path]["post"]["responses"]["200"]["content"]["text/event-stream"]["schema"]
        assert ("[DONE]" in event["description"]) == done
