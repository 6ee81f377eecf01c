"""Ollama's API: lines of JSON, calls, thoughts, errors in its own form."""

import json

import pytest
from eff_serve.api.settings import Settings
from eff_serve.engine.types import Step

CITY = {
    "type": "function",
    "function": {"name": "city", "parameters": {"type": "object", "properties": {"n": {"type": "string"}}}},
}
CALL = '<tool_call>\n{"name": "city", "arguments": {"n": "P"}}\n</tool_call>'
ASK = [{"role": "user", "content": "hi"}]


@pytest.fixture
def post(client):
    return lambda path, **fields: client.post(path, json={"model": "fake", **fields})


def lines(response):
    assert response.headers["content-type"].startswith("application/x-ndjson")
    return [json.loads(line) for line in response.text.splitlines()]


def test_chat_streams_lines_unless_told_otherwise(post, engine):
    found = lines(post("/api/chat", messages=ASK))
    assert all(line["model"] == "fake" and line["created_at"] for line in found)
    assert "".join(line["message"]["content"] for line in found) == "Hello"
    assert [line["done"] for line in found] == [False] * (len(found) - 1) + [True]
    last = found[-1]
    assert (last["done_reason"], last["prompt_eval_count"], last["eval_count"]) == ("stop", 18, 6)
    assert last["total_duration"] >= last["eval_duration"] >= 0
    whole = post("/api/chat", messages=ASK, stream=False).json()
    assert (whole["message"], whole["done"]) == ({"role": "assistant", "content": "Hello"}, True)
    sampling = engine.submitted[-1][1]
    assert (sampling.temperature, sampling.top_p, sampling.top_k) == (0.8, 0.9, 40)


def test_generate(post, engine):
    found = lines(post("/api/generate", prompt="hi", system="s"))
    assert "".join(line["response"] for line in found) == "Hello"
    assert bytes(engine.submitted[-1][0]) == b"system:s|user:hi|assistant:"
    assert post("/api/generate", prompt="hi", raw=True, stream=False).json()["response"] == "Hello"
    assert bytes(engine.submitted[-1][0]) == b"hi"
    loaded = post("/api/generate").json()
    assert (loaded["response"], loaded["done_reason"], loaded["done"]) == ("", "load", True)
    assert post("/api/chat").json()["done_reason"] == "load"


def test_options_reach_the_engine(post, engine):
    options = {
        "temperature": 0, "top_p": 0.5, "top_k": 3, "min_p": 0.1, "seed": 4, "num_predict": 3, "stop": ["zz"],
        "repeat_penalty": 1.2, "presence_penalty": 1, "frequency_penalty": -1, "num_ctx": 100,
    }  # fmt: skip
    answer = post("/api/chat", messages=ASK, options=options, keep_alive="5m", stream=False)
    assert answer.json()["done_reason"] == "length"
    s = engine.submitted[-1][1]
    assert (s.temperature, s.top_p, s.top_k, s.min_p, s.seed, s.max_tokens) == (0, 0.5, 3, 0.1, 4, 3)
    assert (s.repetition_penalty, s.presence_penalty, s.frequency_penalty) == (1.2, 1, -1)


@pytest.mark.parametrize("shape", ["json", {"type": "object", "properties": {}}])
def test_format_becomes_a_grammar(post, engine, shape):
    assert post("/api/chat", messages=ASK, format=shape, stream=False).status_code == 200
    assert engine.submitted[-1][1].grammar


@pytest.mark.parametrize("stream", [False, True])
def test_calls_and_thoughts(post, engine, tokenizer, stream):
    tokenizer.thinks = True
    engine.text = f"<think>\nHm.</think>\n\nI look.\n{CALL}\n{CALL}"
    answer = post("/api/chat", messages=ASK, tools=[CITY], stream=stream)
    messages = [line["message"] for line in lines(answer)] if stream else [answer.json()["message"]]
    assert "".join(m.get("thinking", "") for m in messages) == "Hm."
    assert "".join(m["content"] for m in messages) == "I look."
    calls = [c["function"] for m in messages for c in m.get("tool_calls", ())]
    assert calls == [{"name": "city", "arguments": {"n": "P"}}] * 2


@pytest.mark.parametrize("stream", [False, True])
def test_a_call_that_is_cut_is_left_out(post, engine, stream):
    engine.text = f"{CALL}\n{CALL}"
    cut = len(CALL) + CALL.index('"n"')
    answer = post("/api/chat", messages=ASK, tools=[CITY], options={"num_predict": cut}, stream=stream)
    found = lines(answer) if stream else [answer.json()]
    assert found[-1]["done_reason"] == "length"
    calls = [c["function"] for line in found for c in line["message"].get("tool_calls", ())]
    assert calls == [{"name": "city", "arguments": {"n": "P"}}]


def test_results_belong_to_their_calls(post, tokenizer):
    called = {"role": "assistant", "content": "", "tool_calls": [
        {"function": {"name": "city", "arguments": {"n": "P"}}},
        {"function": {"name": "now", "arguments": {}}},
    ]}  # fmt: skip
    named = [
        {"role": "tool", "tool_name": "now", "content": "noon"},
        {"role": "tool", "tool_name": "city", "content": "big"},
    ]
    assert post("/api/chat", messages=[*ASK, called, *named], stream=False).status_code == 200
    turns = tokenizer.laid_out["messages"]
    ids = [c["id"] for c in turns[1]["tool_calls"]]
    assert [t["tool_call_id"] for t in turns[2:]] == ids[::-1]
    plain = [{"role": "tool", "content": "big"}, {"role": "tool", "content": "noon"}]
    assert post("/api/chat", messages=[*ASK, called, *plain], stream=False).status_code == 200
    assert [t["tool_call_id"] for t in tokenizer.laid_out["messages"][2:]] == ids
    assert post("/api/chat", messages=[*ASK, plain[0]]).status_code == 400


def test_what_is_served(make_client):
    client = make_client(family="llama", quantization="int8", weight_bytes=12)
    (model,) = client.get("/api/tags").json()["models"]
    assert (model["name"], model["size"], len(model["digest"])) == ("fake", 12, 64)
    assert model["details"] == client.post("/api/show", json={"model": "fake:latest"}).json()["details"]
    assert (model["details"]["family"], model["details"]["quantization_level"]) == ("llama", "int8")
    (running,) = client.get("/api/ps").json()["models"]
    assert running.items() >= model.items()
    assert (running["size_vram"], running["context_length"]) == (0, 500)
    assert "completion" in client.post("/api/show", json={"model": "fake"}).json()["capabilities"]
    assert client.get("/api/version").json()["version"]


@pytest.mark.parametrize(
    ("path", "fields", "status"),
    [
        ("/api/chat", {"model": "other", "messages": ASK}, 404),
        ("/api/show", {"model": "other"}, 404),
        ("/api/chat", {"messages": [{"role": "robot", "content": ""}]}, 400),
        ("/api/chat", {"messages": ASK, "options": {"num_gpu": 1}}, 400),
        ("/api/chat", {"messages": ASK, "options": {"num_ctx": 501}}, 400),
        ("/api/chat", {"messages": ASK, "think": True}, 400),
        ("/api/chat", {"messages": ASK, "options": {"num_predict": 1000}}, 400),
        ("/api/generate", {"prompt": "a", "suffix": "b"}, 400),
        ("/api/generate", {"prompt": "a", "raw": True, "system": "b"}, 400),
        ("/api/generate", {"prompt": "a", "images": ["iVBORw0KGgo="]}, 400),
        ("/api/embed", {"input": "a"}, 400),
    ],
)
def test_errors_are_one_line_of_text(post, engine, path, fields, status):
    answer = post(path, **fields)
    assert answer.status_code == status, answer.text
    assert set(answer.json()) == {"error"}
    assert isinstance(answer.json()["error"], str)
    assert engine.submitted == []


def test_an_error_on_the_way_is_the_last_line(post, engine):
    engine.steps = [Step(token=72), Step(finish_reason="error", error="out of pages")]
    *_, last = lines(post("/api/chat", messages=ASK))
    assert "out of pages" in last["error"]


def test_names_and_aliases(make_client):
    client = make_client(aliases=("gpt-4o", "small"))
    for name in ("fake", "gpt-4o", "small"):
        assert client.post("/v1/completions", json={"prompt": "a", "model": name}).json()["model"] == "fake"
    assert (
        client.post("/api/generate", json={"model": "small:latest", "prompt": "a", "stream": False}).status_code == 200
    )
    assert Settings(model_id="a").aliases == ()
