"""litellm."""

import json

import litellm
from pydantic import BaseModel, Field

from _checks import MODEL, QUESTION, SUNNY, URL, WEATHER, need, run

ASK = {"model": f"openai/{MODEL}", "api_base": f"{URL}/v1", "api_key": "none", "temperature": 0, "num_retries": 0}
TOOL = {
    "type": "function",
    "function": {
        "name": "get_weather",
        "description": "The weather of a city.",
        "parameters": {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]},
    },
}


class Place(BaseModel):
    city: str = Field(max_length=20)
    country: str = Field(max_length=20)


def user(text: str) -> list[dict]:
    return [{"role": "user", "content": text}]


def chat() -> None:
    text = litellm.completion(messages=user(QUESTION), **ASK).choices[0].message.content
    need("Paris" in text, text)


def stream() -> None:
    pieces = [c.choices[0].delta.content for c in litellm.completion(messages=user(QUESTION), stream=True, **ASK)]
    need(len(pieces) > 3 and "Paris" in "".join(p or "" for p in pieces), pieces)


def structured() -> None:
    answer = litellm.completion(messages=user(QUESTION), response_format=Place, **ASK)
    need(Place.model_validate_json(answer.choices[0].message.content), answer)


def tools() -> None:
    asked = litellm.completion(messages=user(WEATHER), tools=[TOOL], tool_choice="required", **ASK).choices[0]
    need(asked.finish_reason == "tool_calls", asked)
    results = [
        {"role": "tool", "tool_call_id": call.id, "content": SUNNY}
        for call in asked.message.tool_calls
        if json.loads(call.function.arguments)["city"]
    ]
    talk = [*user(WEATHER), asked.message, *results]
    text = litellm.completion(messages=talk, tools=[TOOL], tool_choice="none", **ASK).choices[0].message.content
    need(text, text)


run(chat, stream, structured, tools)
