"""Each request field reaches the engine, or shapes the answer, or is refused with 400 that names it."""

import pytest

CHAT_TO_ENGINE = [
    ({"max_tokens": 3}, "max_tokens", 3),
    ({"max_completion_tokens": 4}, "max_tokens", 4),
    ({"logprobs": True}, "logprobs", 0),
    ({"logprobs": True, "top_logprobs": 5}, "logprobs", 5),
]
BOTH_TO_ENGINE = [
    ({"temperature": 0}, "temperature", 0.0),
    ({"temperature": None}, "temperature", 1.0),
    ({"top_p": 0.5}, "top_p", 0.5),
    ({"top_k": 7}, "top_k", 7),
    ({"top_k": -1}, "top_k", 0),
    ({"min_p": 0.1}, "min_p", 0.1),
    ({"repetition_penalty": 1.5}, "repetition_penalty", 1.5),
    ({"presence_penalty": -1}, "presence_penalty", -1.0),
    ({"frequency_penalty": 1}, "frequency_penalty", 1.0),
    ({"logit_bias": {"65": -100}}, "logit_bias", {65: -100.0}),
    ({"seed": 11}, "seed", 11),
    ({"stop_token_ids": [65, 66]}, "stop_token_ids", frozenset({65, 66})),
    ({"ignore_eos": True}, "ignore_eos", True),
    ({"min_tokens": 2}, "min_tokens", 2),
    ({"prompt_logprobs": 2}, "prompt_logprobs", 2),
    ({"priority": -3}, "priority", -3),
]


@pytest.mark.parametrize(("fields", "name", "value"), CHAT_TO_ENGINE + BOTH_TO_ENGINE)
def test_chat_field_reaches_the_engine(chat, engine, fields, name, value):
    assert chat(**fields).status_code == 200
    assert getattr(engine.submitted[0][1], name) == value


@pytest.mark.parametrize(("fields", "name", "value"), [*BOTH_TO_ENGINE, ({"logprobs": 3}, "logprobs", 3)])
def test_completion_field_reaches_the_engine(complete, engine, fields, name, value):
    assert complete(**fields).status_code == 200
    assert getattr(engine.submitted[0][1], name) == value


BAD_BOTH = [
    ({"temperature": 2.1}, "temperature"),
    ({"temperature": "hot"}, "temperature"),
    ({"temperature": True}, "temperature"),
    ({"top_p": 0}, "top_p"),
    ({"top_k": -2}, "top_k"),
    ({"top_k": 1.5}, "top_k"),
    ({"min_p": 1.1}, "min_p"),
    ({"repetition_penalty": 0}, "repetition_penalty"),
    ({"presence_penalty": 2.1}, "presence_penalty"),
    ({"frequency_penalty": -2.1}, "frequency_penalty"),
    ({"logit_bias": {"258": 1}}, "logit_bias"),
    ({"logit_bias": {"1": 101}}, "logit_bias.1"),
    ({"logit_bias": {"x": 1}}, "logit_bias.x"),
    ({"seed": "one"}, "seed"),
    ({"seed": 2**64}, "seed"),
    ({"stop": ""}, "stop"),
    ({"stop": ["a"] * 17}, "stop"),
    ({"stop": ["a", 1]}, "stop[1]"),
    ({"stop": "a" * 257}, "stop"),
    ({"stop_token_ids": [258]}, "stop_token_ids"),
    ({"stop_token_ids": [-1]}, "stop_token_ids[0]"),
    ({"n": 0}, "n"),
    ({"n": 65}, "n"),
    ({"n": True}, "n"),
    ({"max_tokens": -1}, "max_tokens"),
    ({"max_tokens": "many"}, "max_tokens"),
    ({"max_tokens": 2**40}, "max_tokens"),
    ({"max_tokens": 2, "min_tokens": 3}, "min_tokens"),
    ({"stream": "yes"}, "stream"),
    ({"stream_options": {"include_usage": True}}, "stream_options"),
    ({"stream": True, "stream_options": {"other": 1}}, "stream_options.other"),
    ({"stream": True, "prompt_logprobs": 1}, "prompt_logprobs"),
    ({"prompt_logprobs": 21}, "prompt_logprobs"),
    ({"priority": 1001}, "priority"),
    ({"priority": 0.5}, "priority"),
    ({"user": "u" * 257}, "user"),
    ({"unknown": 1}, "unknown"),
    ({"best_of": 2}, "best_of"),
    ({"response_format": {"type": "xml"}}, "response_format.type"),
    ({"response_format": {"type": "json_schema"}}, "response_format.json_schema"),
    ({"structured_outputs": {}}, "structured_outputs"),
    ({"structured_outputs": {"regex": "a", "choice": ["b"]}}, "structured_outputs"),
    ({"structured_outputs": {"regex": "a"}, "response_format": {"type": "json_object"}}, "structured_outputs"),
]
BAD_CHAT = [
    ({"tool_choice": "auto"}, "tool_choice"),
    ({"messages": []}, "messages"),
    ({"messages": "hi"}, "messages"),
    ({"messages": [{"role": "function", "content": "x"}]}, "messages[0].role"),
    ({"messages": [{"role": "user"}]}, "messages[0].content"),
    ({"messages": [{"role": "user", "content": [{"type": "input_audio"}]}]}, "messages[0].content[0].type"),
    ({"messages": [{"role": "user", "content": "", "function_call": {"name": "a"}}]}, "messages[0].function_call"),
    ({"max_tokens": 0}, "max_tokens"),
    ({"max_tokens": 1, "max_completion_tokens": 2}, "max_completion_tokens"),
    ({"top_logprobs": 1}, "top_logprobs"),
    ({"logprobs": True, "top_logprobs": 21}, "top_logprobs"),
    ({"logprobs": 1}, "logprobs"),
    ({"add_generation_prompt": True, "continue_final_message": True}, "continue_final_message"),
    ({"chat_template_kwargs": {"messages": []}}, "chat_template_kwargs"),
    ({"max_tokens": 500}, "messages"),
]
BAD_COMPLETION = [
    ({"suffix": "x"}, "suffix"),
    ({"prompt": []}, "prompt"),
    ({"prompt": ""}, "prompt"),
    ({"prompt": [258]}, "prompt"),
    ({"prompt": ["a", 1]}, "prompt"),
    ({"prompt": [True]}, "prompt"),
    ({"prompt": ["a"] * 65}, "prompt"),
    ({"logprobs": 21}, "logprobs"),
    ({"echo": True, "stream": True, "logprobs": 1}, "logprobs"),
    ({"max_tokens": 499}, "prompt"),
    ({"tools": []}, "tools"),
]


def refused(response, param):
    assert response.status_code == 400, response.text
    error = response.json()["error"]
    assert set(error) == {"message", "type", "param", "code"}
    assert error["type"] == "invalid_request_error"
    assert error["param"] == param, error
    assert error["message"]


@pytest.mark.parametrize(("fields", "param"), BAD_BOTH + BAD_CHAT)
def test_chat_refuses(chat, engine, fields, param):
    refused(chat(**fields), param)
    assert engine.submitted == []


@pytest.mark.parametrize(("fields", "param"), BAD_BOTH + BAD_COMPLETION)
def test_completions_refuses(complete, engine, fields, param):
    refused(complete(**fields), param)
    assert engine.submitted == []


def test_context_overflow_says_both_numbers(chat):
    message = chat(max_tokens=500).json()["error"]["message"]
    assert "500" in message
    assert "518" in message  # 18 tokens of "user:hi|assistant:" and 500 asked for


@pytest.mark.parametrize(
    ("fields", "status"), [({"model": "fake"}, 200), ({"model": None}, 200), ({"model": "gpt-9"}, 404)]
)
def test_model_name(chat, fields, status):
    assert chat(**fields).status_code == status


def test_wrong_model_is_named(chat):
    error = chat(model="gpt-9").json()["error"]
    assert (error["param"], error["code"]) == ("model", "model_not_found")
    assert "gpt-9" in error["message"]
    assert "fake" in error["message"]


@pytest.mark.parametrize(
    "fields",
    [
        {"response_format": {"type": "json_object"}},
        {"response_format": {"type": "json_schema", "json_schema": {"name": "s", "schema": {"type": "object"}}}},
        {"structured_outputs": {"regex": "[a-z]+"}},
        {"structured_outputs": {"choice": ["a", "b"]}},
        {"structured_outputs": {"json": {"type": "integer"}}},
        {"structured_outputs": {"grammar": 'start: "a"'}},
    ],
)
def test_shapes_become_a_grammar(chat, engine, fields):
    assert chat(**fields).status_code == 200
    assert engine.submitted[0][1].grammar


def test_text_format_needs_no_grammar(chat, engine):
    assert chat(response_format={"type": "text"}).status_code == 200
    assert engine.submitted[0][1].grammar is None


def test_n_choices_have_seeds_of_their_own(chat, engine):
    response = chat(n=3, seed=5).json()
    assert [c["index"] for c in response["choices"]] == [0, 1, 2]
    seeds = [s.seed for _, s in engine.submitted]
    assert seeds[0] == 5
    assert len(set(seeds)) == 3


def test_request_id_names_the_response(chat):
    response = chat(request_id="abc")
    assert response.json()["id"] == response.headers["x-request-id"] == "chatcmpl-abc"


@pytest.mark.parametrize(
    ("fields", "prompt"),
    [
        ({}, b"user:hi|assistant:"),
        ({"add_generation_prompt": False}, b"user:hi"),
        ({"continue_final_message": True}, b"user:hi"),
        ({"messages": [{"role": "developer", "content": "d"}]}, b"system:d|assistant:"),
        (
            {"messages": [{"role": "user", "content": [{"type": "text", "text": t} for t in "ab"]}]},
            b"user:a\nb|assistant:",
        ),
    ],
)
def test_messages_become_a_prompt(chat, engine, fields, prompt):
    assert chat(**fields).status_code == 200
    assert bytes(engine.submitted[0][0]) == prompt


@pytest.mark.parametrize("prompt", ["ab", ["ab"], [97, 98], [[97, 98]]])
def test_forms_of_a_prompt(complete, engine, prompt):
    assert complete(prompt=prompt).status_code == 200
    assert [p for p, _ in engine.submitted] == [[97, 98]]
