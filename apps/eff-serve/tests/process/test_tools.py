"""Tools of the openai client on the real server and model."""

import json

import openai
import pytest

pytestmark = pytest.mark.slow

MODEL = "SmolLM2-135M-Instruct"
WEATHER = {
    "type": "function",
    "function": {
        "name": "get_weather",
        "description": "The weather of a city.",
        "parameters": {
            "type": "object",
            "properties": {
                "city": {"type": "string", "maxLength": 20},
                "unit": {"type": "string", "enum": ["celsius", "fahrenheit"]},
            },
            "required": ["city", "unit"],
            "additionalProperties": False,
        },
        "strict": True,
    },
}
CLOCK = {"type": "function", "function": {"name": "get_time", "description": "The time."}}
ASK = [{"role": "user", "content": "What is the weather in Paris, in celsius?"}]


@pytest.fixture(scope="module")
def create(server):
    with openai.OpenAI(base_url=f"{server.address}/v1", api_key="none", max_retries=0, timeout=60) as client:
        yield lambda **fields: client.chat.completions.create(
            **{"model": MODEL, "messages": ASK, "temperature": 0, "max_tokens": 200, **fields}
        )


def test_a_forced_call_follows_its_schema_and_its_result_is_answered(create):
    chosen = {"type": "function", "function": {"name": "get_weather"}}
    (choice,) = create(tools=[WEATHER, CLOCK], tool_choice=chosen).choices
    assert choice.finish_reason == "tool_calls"
    (call,) = choice.message.tool_calls
    arguments = json.loads(call.function.arguments)
    assert call.function.name == "get_weather"
    assert arguments["unit"] in ("celsius", "fahrenheit")
    assert "Paris" in arguments["city"]
    result = {"role": "tool", "tool_call_id": call.id, "content": "Sunny, 21 degrees celsius."}
    talk = [*ASK, choice.message.model_dump(exclude_none=True), result]
    answer = create(messages=talk, tools=[WEATHER, CLOCK], tool_choice="none").choices[0]
    assert "21" in answer.message.content
    assert answer.message.tool_calls is None


def test_required_calls_are_among_the_tools_and_streamed_like_the_whole(create):
    fields = {"tools": [WEATHER, CLOCK], "tool_choice": "required", "parallel_tool_calls": False}
    whole = create(**fields).choices[0]
    (call,) = whole.message.tool_calls
    assert call.function.name in ("get_weather", "get_time")
    name, arguments, reason = None, "", None
    for chunk in create(**fields, stream=True):
        (choice,) = chunk.choices
        reason = choice.finish_reason or reason
        for delta in choice.delta.tool_calls or ():
            name = delta.function.name or name
            arguments += delta.function.arguments or ""
    assert (name, arguments, reason) == (call.function.name, call.function.arguments, "tool_calls")
    json.loads(arguments)


def test_auto_writes_words_or_whole_calls(create):
    for question in ("Hello!", "What is the weather in Rome, in celsius?", "Tell me the time."):
        message = (
            create(messages=[{"role": "user", "content": question}], tools=[WEATHER, CLOCK], max_tokens=60)
            .choices[0]
            .message
        )
        assert message.content or message.tool_calls
        for call in message.tool_calls or ():
            assert call.function.name in ("get_weather", "get_time")
