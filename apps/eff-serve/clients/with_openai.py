"""openai."""

import json
from typing import Literal

from openai import OpenAI, pydantic_function_tool
from pydantic import BaseModel, Field

from _checks import MODEL, QUESTION, SUNNY, URL, WEATHER, need, run

client = OpenAI(base_url=f"{URL}/v1", api_key="none", max_retries=0)


class Place(BaseModel):
    city: str = Field(max_length=20)
    country: str = Field(max_length=20)


class GetWeather(BaseModel):
    """The weather of a city."""

    city: str = Field(max_length=20)
    unit: Literal["celsius", "fahrenheit"]


ASK = {"model": MODEL, "messages": [{"role": "user", "content": QUESTION}], "temperature": 0}


def chat() -> None:
    text = client.chat.completions.create(**ASK).choices[0].message.content
    need("Paris" in text, text)


def stream() -> None:
    with client.chat.completions.stream(**ASK) as events:
        text = events.get_final_completion().choices[0].message.content
    need("Paris" in text, text)


def structured() -> None:
    parsed = client.chat.completions.parse(**ASK, response_format=Place).choices[0].message.parsed
    need(isinstance(parsed, Place), parsed)


def tools() -> None:
    messages = [{"role": "user", "content": WEATHER}]
    offer = {"model": MODEL, "temperature": 0, "tools": [pydantic_function_tool(GetWeather)]}
    answer = client.chat.completions.parse(
        messages=messages, tool_choice="required", parallel_tool_calls=False, **offer
    )
    (call,) = answer.choices[0].message.tool_calls
    need(isinstance(call.function.parsed_arguments, GetWeather), call)
    messages += [answer.choices[0].message, {"role": "tool", "tool_call_id": call.id, "content": SUNNY}]
    text = client.chat.completions.create(messages=messages, tool_choice="none", **offer).choices[0].message.content
    need("21" in text, text)


def streamed_tools() -> None:
    offer = {"model": MODEL, "temperature": 0, "tools": [pydantic_function_tool(GetWeather)], "tool_choice": "required"}
    with client.chat.completions.stream(messages=[{"role": "user", "content": WEATHER}], **offer) as events:
        kinds = [event.type for event in events]
        (call, *_) = events.get_final_completion().choices[0].message.tool_calls
    need("tool_calls.function.arguments.delta" in kinds, kinds)
    need(set(json.loads(call.function.arguments)) == {"city", "unit"}, call)


def models() -> None:
    need(MODEL in [m.id for m in client.models.list()], "models")


def responses() -> None:
    answer = client.responses.create(model=MODEL, input=QUESTION, temperature=0)
    need("Paris" in answer.output_text and answer.usage.output_tokens > 1, answer)
    parsed = client.responses.parse(model=MODEL, input=QUESTION, temperature=0, text_format=Place).output_parsed
    need(isinstance(parsed, Place), parsed)


def streamed_responses() -> None:
    with client.responses.stream(model=MODEL, input=QUESTION, temperature=0) as events:
        kinds = [event.type for event in events]
        text = events.get_final_response().output_text
    need("response.output_text.delta" in kinds and "Paris" in text, (kinds, text))


def embeddings() -> None:
    found = client.embeddings.create(model=MODEL, input=["bread", "butter"]).data  # base64 on the wire
    plain = client.embeddings.create(model=MODEL, input="bread", encoding_format="float").data[0].embedding
    need(max(abs(a - b) for a, b in zip(found[0].embedding, plain, strict=True)) < 1e-6, found[0])


run(chat, stream, structured, tools, streamed_tools, models, responses, streamed_responses, embeddings)
