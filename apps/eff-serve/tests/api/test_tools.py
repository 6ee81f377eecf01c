"""Tools over HTTP: what reaches the prompt and the grammar, and how calls come back, whole and streamed."""

import json

import pytest
from eff_serve.models.dialects import LLAMA3, MISTRAL, SMOLLM2
from llguidance import LLMatcher

CITY = {
    "type": "function",
    "function": {
        "name": "city",
        "description": "Looks a city up.",
        "parameters": {"type": "object", "properties": {"n": {"type": "string"}}, "required": ["n"]},
    },
}
NOW = {"type": "function", "function": {"name": "now"}}
ONE = '<tool_call>\n{"name": "city", "arguments": {"n": "Par\\"}is"}}\n</tool_call>'
TWO = ONE + '\n<tool_call>\n{"name": "now", "arguments": {}}\n</tool_call>'
LISTED = '{"name": "city", "arguments": {"n": "Par\\"}is"}}, {"name": "now", "arguments": {}}'
ARGUMENTS = '{"n": "Par\\"}is"}'


def calls_of(message):
    return [(c["type"], c["function"]["name"], c["function"]["arguments"]) for c in message["tool_calls"]]


def gathered(events):
    """The message that a client puts together from a stream, and the finish reasons."""
    message, reasons = {"content": None, "tool_calls": []}, []
    for event in events[:-1]:
        for choice in event["choices"]:
            delta = choice["delta"]
            if delta.get("content"):
                message["content"] = (message["content"] or "") + delta["content"]
            for call in delta.get("tool_calls", ()):
                if call["index"] == len(message["tool_calls"]):
                    assert call["id"]
                    assert call["type"] == "function"
                    assert call["function"] == {"name": call["function"]["name"], "arguments": ""}
                    message["tool_calls"].append({**call, "function": dict(call["function"])})
                else:
                    assert set(call) == {"index", "function"}
                    assert set(call["function"]) == {"arguments"}
                    assert call["index"] == len(message["tool_calls"]) - 1
                    message["tool_calls"][-1]["function"]["arguments"] += call["function"]["arguments"]
            reasons.append(choice["finish_reason"])
    return message, [r for r in reasons if r]


def test_a_call_comes_back_whole(chat, engine):
    engine.text = ONE
    choice = chat(tools=[CITY, NOW]).json()["choices"][0]
    assert choice["finish_reason"] == "tool_calls"
    assert choice["message"]["content"] is None
    assert calls_of(choice["message"]) == [("function", "city", ARGUMENTS)]
    assert json.loads(choice["message"]["tool_calls"][0]["function"]["arguments"]) == {"n": 'Par"}is'}


def test_words_may_stand_in_front_of_several_calls(chat, engine):
    engine.text = "I look both up.\n" + TWO
    message = chat(tools=[CITY, NOW]).json()["choices"][0]["message"]
    assert message["content"] == "I look both up."
    assert calls_of(message) == [("function", "city", ARGUMENTS), ("function", "now", "{}")]
    assert len({c["id"] for c in message["tool_calls"]}) == 2


@pytest.mark.parametrize(
    ("dialect", "text"),
    [
        (None, TWO),
        (SMOLLM2, f"<tool_call>[{LISTED}]</tool_call>"),
        (MISTRAL, f"[TOOL_CALLS][{LISTED}]"),
        (LLAMA3, f'{{"name": "city", "parameters": {ARGUMENTS}}}; {{"name": "now", "parameters": {{}}}}'),
        (LLAMA3, f'<|python_tag|>{{"name": "city", "parameters": {ARGUMENTS}}}; {{"name": "now", "parameters": {{}}}}'),
    ],
)
def test_a_stream_has_the_id_and_name_first_and_the_arguments_in_pieces(chat, engine, tokenizer, events, dialect, text):
    tokenizer.dialect = dialect or tokenizer.dialect
    engine.text = text
    found = events(chat(tools=[CITY, NOW], stream=True))
    assert found[0]["choices"][0]["delta"] == {"role": "assistant", "content": None}
    message, reasons = gathered(found)
    assert message["content"] is None
    assert calls_of(message) == [("function", "city", ARGUMENTS), ("function", "now", "{}")]
    assert reasons == ["tool_calls"]
    pieces = [e for e in found[:-1] if e["choices"][0]["delta"].get("tool_calls")]
    assert len(pieces) > 10
    ids = {c["id"] for c in message["tool_calls"]}
    assert len(ids) == 2
    assert all(len(i) == 9 for i in ids) == (dialect is MISTRAL)


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize(
    "text", ["Plain words.", "a < b and <tool", '{"name": "other", "parameters": {}}', " {x", "", "  "]
)
def test_words_are_words(chat, engine, tokenizer, events, stream, text):
    for dialect in (tokenizer.dialect, LLAMA3):
        tokenizer.dialect = dialect
        engine.text = text
        response = chat(tools=[CITY], stream=stream)
        if stream:
            message, (reason,) = gathered(events(response))
            message["content"] = message["content"] or ""
        else:
            message, reason = response.json()["choices"][0]["message"], response.json()["choices"][0]["finish_reason"]
        assert (message["content"], reason) == (text, "stop")
        assert not message.get("tool_calls")


def test_a_call_that_is_cut_ends_by_length(chat, engine, events):
    engine.text = ONE
    choice = chat(tools=[CITY], max_tokens=50).json()["choices"][0]
    assert choice["finish_reason"] == "length"
    assert calls_of(choice["message"])[0][2] == ARGUMENTS[: len(calls_of(choice["message"])[0][2])]
    message, reasons = gathered(events(chat(tools=[CITY], max_tokens=50, stream=True)))
    assert reasons == ["length"]
    assert calls_of(message) == calls_of(choice["message"])


def test_choices_have_calls_of_their_own(chat, engine, events):
    engine.text = ONE
    choices = chat(tools=[CITY], n=2).json()["choices"]
    assert [calls_of(c["message"]) for c in choices] == [[("function", "city", ARGUMENTS)]] * 2
    assert choices[0]["message"]["tool_calls"][0]["id"] != choices[1]["message"]["tool_calls"][0]["id"]
    starts = [
        (c["index"], c["delta"]["tool_calls"][0]["index"])
        for e in events(chat(tools=[CITY], n=2, stream=True))[:-1]
        for c in e["choices"]
        if "id" in (c["delta"].get("tool_calls") or [{}])[0]
    ]
    assert sorted(starts) == [(0, 0), (1, 0)]


def test_scores_of_all_tokens_are_streamed(chat, engine, events):
    engine.text = ONE
    whole = chat(tools=[CITY], logprobs=True).json()["choices"][0]["logprobs"]["content"]
    chunks = [e["choices"][0] for e in events(chat(tools=[CITY], logprobs=True, stream=True))[:-1]]
    assert [s for c in chunks for s in (c.get("logprobs") or {"content": []})["content"]] == whole


def test_none_is_a_plain_answer(chat, engine, tokenizer):
    engine.text = ONE
    choice = chat(tools=[CITY], tool_choice="none").json()["choices"][0]
    assert choice["message"] == {"role": "assistant", "content": ONE}
    assert choice["finish_reason"] == "stop"
    assert engine.submitted[0][1].grammar is None
    assert tokenizer.laid_out["tools"] is None


def test_functions_calls_and_results_reach_the_template(chat, engine, tokenizer):
    call = {"id": "call_1", "type": "function", "function": {"name": "city", "arguments": '{"n": "Paris"}'}}
    odd = {"id": "call_2", "type": "function", "function": {"name": "city", "arguments": "[" * 1000}}
    messages = [
        {"role": "user", "content": "hi"},
        {"role": "assistant", "content": None, "tool_calls": [call, odd]},
        {"role": "tool", "tool_call_id": "call_1", "content": [{"type": "text", "text": "2 million"}]},
        {"role": "tool", "tool_call_id": "call_2", "content": "no", "name": "city"},
    ]
    assert chat(messages=messages, tools=[CITY, NOW]).status_code == 200
    given = tokenizer.laid_out
    assert [t["function"]["name"] for t in given["tools"]] == ["city", "now"]
    assert given["tools"][1]["function"]["parameters"] == {"type": "object", "properties": {}}
    asked, answer = given["messages"][1:3]
    assert asked["content"] == ""
    assert [c["function"]["arguments"] for c in asked["tool_calls"]] == [{"n": "Paris"}, "[" * 1000]
    assert answer == {"role": "tool", "content": "2 million", "tool_call_id": "call_1"}


def follows(grammar, text):
    """Whether a text follows a grammar to its end, by bytes."""
    import llguidance

    matcher = LLMatcher(llguidance.LLTokenizer("byte"), grammar)
    assert not matcher.is_error(), matcher.get_error()
    data = list(text.encode())
    return matcher.try_consume_tokens(data) == len(data) and matcher.is_accepting()


def test_the_grammar_of_each_choice(chat, engine):
    def grammar(**fields):
        response = chat(tools=[CITY, NOW], **fields)
        assert response.status_code == 200, response.text
        return engine.submitted[-1][1].grammar

    one = '<tool_call>\n{"name": "city", "arguments": {"n": "P"}}\n</tool_call>'
    now = '<tool_call>\n{"name": "now", "arguments": {}}\n</tool_call>'
    wrong = [
        one.replace('"P"', "1"),
        one.replace("city", "other"),
        one.replace('"n": "P"', ""),
        one.replace("}}", ', "x": 1}}'),
    ]
    auto = grammar()
    assert all(follows(auto, t) for t in ("words", one, f"Well. {one}", f"{one}\n{now}"))
    assert not any(follows(auto, t) for t in wrong)
    required = grammar(tool_choice="required")
    assert all(follows(required, t) for t in (one, now, f"{now}\n{one}"))
    assert not any(follows(required, t) for t in ("words", f"Well. {one}", *wrong))
    single = grammar(tool_choice="required", parallel_tool_calls=False)
    assert follows(single, now)
    assert not follows(single, f"{one}\n{now}")
    named = grammar(tool_choice={"type": "function", "function": {"name": "city"}})
    assert follows(named, one)
    assert not any(follows(named, t) for t in (now, f"{one}\n{one}", "words"))
    some = {"mode": "required", "tools": [{"type": "function", "function": {"name": "now"}}]}
    allowed = grammar(tool_choice={"type": "allowed_tools", "allowed_tools": some})
    assert follows(allowed, now)
    assert not follows(allowed, one)


def test_a_response_format_beside_tools_shapes_the_words(chat, engine):
    wanted = {"type": "json_schema", "json_schema": {"name": "s", "schema": {"type": "integer"}}}
    assert chat(tools=[CITY], response_format=wanted).status_code == 200
    grammar = engine.submitted[-1][1].grammar
    one = '<tool_call>\n{"name": "city", "arguments": {"n": "P"}}\n</tool_call>'
    assert follows(grammar, "12")
    assert follows(grammar, one)
    assert not follows(grammar, "words")
    assert not follows(grammar, f"12{one}")


def test_a_schema_with_definitions(chat, engine):
    deep = {
        "type": "object",
        "properties": {"at": {"$ref": "#/$defs/Place"}, "code": {"type": "string", "pattern": "^\\d$"}},
        "required": ["at", "code"],
        "$defs": {"Place": {"type": "object", "properties": {"x": {"type": "integer"}}, "required": ["x"]}},
    }
    tool = {"type": "function", "function": {"name": "go", "parameters": deep, "strict": True}}
    assert chat(tools=[tool], tool_choice="required").status_code == 200
    text = '<tool_call>\n{"name": "go", "arguments": {"at": {"x": 3}, "code": "7"}}\n</tool_call>'
    assert follows(engine.submitted[-1][1].grammar, text)
    assert not follows(engine.submitted[-1][1].grammar, text.replace("3", '"3"'))


def function(**fields):
    return {"type": "function", "function": {"name": "f", **fields}}


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"tools": "city"}, "tools"),
        ({"tools": [{"type": "web_search"}]}, "tools[0].type"),
        ({"tools": [{"type": "function"}]}, "tools[0].function"),
        ({"tools": [{"type": "function", "function": {}}]}, "tools[0].function.name"),
        ({"tools": [{"type": "function", "function": {"name": "a b"}}]}, "tools[0].function.name"),
        ({"tools": [CITY, CITY]}, "tools[1].function.name"),
        ({"tools": [function(parameters={"type": "string"})]}, "tools[0].function.parameters"),
        ({"tools": [function(parameters={"properties": 3})]}, "tools[0].function.parameters"),
        (
            {"tools": [CITY, function(parameters={"properties": {"a": {"pattern": "("}}})]},
            "tools[1].function.parameters",
        ),
        (
            {"tools": [function(strict=True, parameters={"properties": {"a": {"not": {}}}})]},
            "tools[0].function.parameters",
        ),
        ({"tools": [function(other=1)]}, "tools[0].function.other"),
        ({"tools": [CITY] * 129}, "tools"),
        ({"tools": [CITY], "tool_choice": "some"}, "tool_choice"),
        ({"tools": [CITY], "tool_choice": {"type": "function", "function": {"name": "x"}}}, "tool_choice"),
        ({"tool_choice": "required"}, "tool_choice"),
        ({"tools": [], "tool_choice": "auto"}, "tool_choice"),
        ({"tools": [CITY], "structured_outputs": {"regex": "a"}}, "structured_outputs"),
        ({"functions": [{"name": "f"}]}, "functions"),
        ({"messages": [{"role": "tool", "content": "x"}]}, "messages[0].tool_call_id"),
        ({"messages": [{"role": "tool", "content": "x", "tool_call_id": "a"}]}, "messages[0].tool_call_id"),
        ({"messages": [{"role": "user", "content": "x", "tool_call_id": "a"}]}, "messages[0].tool_call_id"),
        ({"messages": [{"role": "assistant", "content": None}]}, "messages[0].content"),
        ({"messages": [{"role": "user", "content": None}]}, "messages[0].content"),
        ({"messages": [{"role": "assistant", "tool_calls": [{"id": "a"}]}]}, "messages[0].tool_calls[0].function"),
        (
            {
                "messages": [
                    {
                        "role": "user",
                        "content": "",
                        "tool_calls": [{"id": "a", "function": {"name": "f", "arguments": ""}}],
                    }
                ]
            },
            "messages[0].tool_calls",
        ),
    ],
)
def test_bad_tools_are_refused_by_name(chat, engine, fields, param):
    response = chat(**fields)
    assert response.status_code == 400, response.text
    error = response.json()["error"]
    assert (error["type"], error["param"]) == ("invalid_request_error", param), error
    assert engine.submitted == []


def test_tokens_of_a_conversation_count_the_functions(client, tokenizer):
    body = {"messages": [{"role": "user", "content": "hi"}], "tools": [CITY]}
    assert client.post("/tokenize", json=body).status_code == 200
    assert tokenizer.laid_out["tools"][0]["function"]["name"] == "city"
