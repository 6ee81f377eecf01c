"""Whole and streamed answers: order of events, text, scores, usage, stops, errors on the way."""

import pytest
from eff_serve.engine.types import Step

USAGE = {
    "prompt_tokens": 18,
    "completion_tokens": 6,
    "total_tokens": 24,
    "prompt_tokens_details": {"cached_tokens": 0},
}


def test_whole_chat_answer(chat):
    body = chat().json()
    assert body["object"] == "chat.completion"
    assert body["choices"] == [
        {
            "index": 0,
            "message": {"role": "assistant", "content": "Hello"},
            "logprobs": None,
            "finish_reason": "stop",
        }
    ]
    assert body["usage"] == USAGE


@pytest.mark.parametrize("usage", [None, False, True])
def test_order_of_stream_events(chat, events, usage):
    options = {} if usage is None else {"stream_options": {"include_usage": usage}}
    response = chat(stream=True, **options)
    assert response.headers["content-type"].startswith("text/event-stream")
    *chunks, done = events(response)
    assert done == "[DONE]"
    if usage:
        *chunks, last = chunks
        assert last["choices"] == []
        assert last["usage"] == USAGE
        assert all(chunk["usage"] is None for chunk in chunks)
    else:
        assert not any("usage" in chunk for chunk in chunks)
    assert {c["object"] for c in chunks} == {"chat.completion.chunk"}
    assert len({c["id"] for c in chunks}) == 1
    choices = [c["choices"][0] for c in chunks]
    assert choices[0]["delta"]["role"] == "assistant"
    assert all("role" not in c["delta"] for c in choices[1:])
    assert "".join(c["delta"].get("content") or "" for c in choices) == "Hello"
    assert [c["finish_reason"] for c in choices] == [None] * (len(choices) - 1) + ["stop"]


def test_length_is_told(chat, complete):
    choice = chat(max_tokens=2).json()["choices"][0]
    assert (choice["message"]["content"], choice["finish_reason"]) == ("He", "length")
    choice = complete(max_tokens=2).json()["choices"][0]
    assert (choice["text"], choice["finish_reason"]) == ("He", "length")


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize(
    ("stop", "include", "want"), [("lo", False, "Hel"), (["zz", "l"], False, "He"), ("lo", True, "Hello")]
)
def test_stop_strings(complete, engine, events, stream, stop, include, want):
    engine.text = "Hello world"
    response = complete(stop=stop, include_stop_str_in_output=include, stream=stream)
    choices = [e["choices"][0] for e in events(response)[:-1]] if stream else response.json()["choices"]
    assert "".join(c["text"] for c in choices) == want
    assert choices[-1]["finish_reason"] == "stop"
    assert engine.streams[0].cancelled


def test_only_whole_characters_are_streamed(complete, engine, events):
    engine.text = "\u00e9\u20ac\U0001f600!"
    texts = [e["choices"][0]["text"] for e in events(complete(stream=True))[:-1]]
    assert "".join(texts) == engine.text
    assert "\ufffd" not in "".join(texts)


def test_a_broken_character_at_the_end_is_replaced(complete, engine):
    engine.text = b"a\xe2\x82"
    assert complete().json()["choices"][0]["text"] == "a\ufffd"


def test_interleaved_choices_of_a_stream(chat, events):
    text = {0: "", 1: ""}
    ends = []
    for event in events(chat(stream=True, n=2))[:-1]:
        choice = event["choices"][0]
        text[choice["index"]] += choice["delta"].get("content") or ""
        ends += [choice["index"]] if choice["finish_reason"] else []
    assert text == {0: "Hello", 1: "Hello"}
    assert sorted(ends) == [0, 1]


def test_chat_logprobs(chat):
    content = chat(logprobs=True, top_logprobs=2).json()["choices"][0]["logprobs"]["content"]
    assert bytes(b for entry in content for b in entry["bytes"]) == b"Hello"
    assert content[0]["token"] == "H"
    assert content[0]["logprob"] == -0.5
    assert [t["token"] for t in content[0]["top_logprobs"]] == ["H", "A"]


def test_streamed_logprobs_equal_the_whole_ones(chat, events):
    whole = chat(logprobs=True).json()["choices"][0]["logprobs"]["content"]
    chunks = [e["choices"][0] for e in events(chat(logprobs=True, stream=True))[:-1]]
    assert [s for c in chunks for s in (c.get("logprobs") or {"content": []})["content"]] == whole


def test_completion_logprobs_and_offsets(complete):
    scores = complete(logprobs=1).json()["choices"][0]["logprobs"]
    assert scores["tokens"][:5] == list("Hello")
    assert scores["text_offset"][:5] == [0, 1, 2, 3, 4]
    assert scores["token_logprobs"] == [-0.5] * 6


def test_echo_scores_only_the_prompt(complete):
    choice = complete(echo=True, logprobs=1, max_tokens=0).json()["choices"][0]
    assert (choice["text"], choice["finish_reason"]) == ("hi", "length")
    assert choice["logprobs"]["tokens"] == ["h", "i"]
    assert choice["logprobs"]["token_logprobs"] == [None, -0.5]
    assert choice["logprobs"]["text_offset"] == [0, 1]


def test_echo_comes_before_the_text(complete, events):
    assert complete(echo=True).json()["choices"][0]["text"] == "hiHello"
    assert next(e["choices"][0]["text"] for e in events(complete(echo=True, stream=True))[:-1]) == "hi"


def test_several_prompts_with_n(complete, engine):
    body = complete(prompt=["a", "bc"], n=2).json()
    assert [c["index"] for c in body["choices"]] == [0, 1, 2, 3]
    assert [p for p, _ in engine.submitted] == [[97], [97], [98, 99], [98, 99]]
    assert body["usage"]["prompt_tokens"] == 3


def test_an_error_ends_a_stream_with_an_event(chat, engine, events):
    engine.steps = [Step(token=72), Step(finish_reason="error", error="out of pages")]
    response = chat(stream=True)
    *_, last = events(response)
    assert response.status_code == 200
    assert last["error"]["type"] == "server_error"
    assert "out of pages" in last["error"]["message"]
    assert engine.streams[0].cancelled


def test_an_error_of_a_whole_answer(chat, engine):
    engine.steps = [Step(token=72), Step(finish_reason="error", error="out of pages")]
    response = chat()
    assert response.status_code == 500
    assert response.json()["error"]["code"] == "internal_error"


@pytest.mark.parametrize("stream", [False, True])
def test_deadline(make_client, engine, events, stream):
    engine.steps = [Step(token=72), None]
    body = {"prompt": "a", "stream": stream}
    response = make_client(deadline=0.05).post("/v1/completions", json=body)
    error = events(response)[-1]["error"] if stream else response.json()["error"]
    assert error["code"] == "deadline_exceeded"
    assert response.status_code == (200 if stream else 504)
    assert engine.streams[0].cancelled
