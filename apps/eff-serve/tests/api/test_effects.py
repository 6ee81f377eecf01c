"""What fields do beyond the engine: special tokens, scores of the prompt, the log, metrics, tokens of messages."""

import logging

import pytest
from eff_serve.engine.types import EngineStats, Step

MESSAGES = [{"role": "system", "content": "s"}, {"role": "user", "content": "hi"}]


@pytest.mark.parametrize(("fields", "want"), [({}, "ab"), ({"skip_special_tokens": False}, "a<special>b")])
def test_special_tokens_are_shown_on_request(chat, complete, engine, events, fields, want):
    engine.steps = [Step(token=97), Step(token=257), Step(token=98, finish_reason="length")]
    assert chat(**fields).json()["choices"][0]["message"]["content"] == want
    assert complete(**fields).json()["choices"][0]["text"] == want
    streamed = [e["choices"][0]["text"] for e in events(complete(stream=True, **fields))[:-1]]
    assert "".join(streamed) == want


def test_scores_of_the_prompt(chat, complete):
    scores = complete(prompt_logprobs=2).json()["choices"][0]["prompt_logprobs"]
    i, a = ord("i"), ord("A")
    assert scores == [
        None,
        {
            str(i): {"logprob": -0.5, "rank": 1, "decoded_token": "i"},
            str(a): {"logprob": -66.0, "rank": 2, "decoded_token": "A"},
        },
    ]
    alone = complete(prompt_logprobs=0).json()["choices"][0]["prompt_logprobs"]
    assert alone == [None, {str(i): {"logprob": -0.5, "rank": None, "decoded_token": "i"}}]
    assert len(chat(prompt_logprobs=1).json()["prompt_logprobs"]) == 18


def test_the_log_names_request_and_user(chat, caplog):
    caplog.set_level(logging.INFO, "eff_serve.request")
    chat(user="ann", request_id="r-7")
    (line,) = [r.getMessage() for r in caplog.records if r.name == "eff_serve.request"]
    assert line.startswith("chatcmpl-r-7 user='ann' prompt_tokens=18 completion_tokens=6 finished=stop")


def test_the_log_is_one_line_whatever_the_user_is_called(chat, caplog):
    caplog.set_level(logging.INFO, "eff_serve.request")
    assert chat(user="a\nfaked line").status_code in (200, 400)
    assert not any("\n" in r.getMessage() for r in caplog.records)


def test_metrics_tell_the_waiting_line(client, engine, monkeypatch):
    monkeypatch.setattr(engine, "stats", lambda: EngineStats(running=3, waiting=5, kv_usage=0.25))
    lines = client.get("/metrics").text.splitlines()
    assert 'eff_num_requests_running{model_name="fake"} 3.0' in lines
    assert 'eff_num_requests_waiting{model_name="fake"} 5.0' in lines


def test_tokens_of_messages_are_those_of_the_chat(client, engine):
    body = {"messages": MESSAGES, "return_token_strs": True}
    found = client.post("/tokenize", json=body).json()
    client.post("/v1/chat/completions", json={"messages": MESSAGES})
    assert found["tokens"] == engine.submitted[0][0]
    assert found["count"] == len(found["tokens"])
    assert "".join(found["token_strs"]) == "system:s|user:hi|assistant:"
    open_end = client.post("/tokenize", json={**body, "add_generation_prompt": False}).json()
    assert "".join(open_end["token_strs"]) == "system:s|user:hi"


@pytest.mark.parametrize("body", [{}, {"prompt": "a", "messages": MESSAGES}])
def test_tokenize_wants_one_input(client, body):
    answer = client.post("/tokenize", json=body)
    assert (answer.status_code, answer.json()["error"]["param"]) == (400, "prompt")
