"""instructor: answers as objects, by tools and by JSON schema."""

from typing import Literal

import instructor
from openai import OpenAI
from pydantic import BaseModel, Field

from _checks import MODEL, QUESTION, URL, WEATHER, need, run


class Place(BaseModel):
    city: str = Field(max_length=20)
    country: str = Field(max_length=20)


class GetWeather(BaseModel):
    """The weather of a city."""

    city: str = Field(max_length=20)
    unit: Literal["celsius", "fahrenheit"]


def client(mode: instructor.Mode):
    return instructor.from_openai(OpenAI(base_url=f"{URL}/v1", api_key="none", max_retries=0), mode=mode)


def ask(mode: instructor.Mode, kind: type, question: str = QUESTION):
    messages = [{"role": "user", "content": question}]
    found = client(mode).chat.completions.create(
        model=MODEL, messages=messages, response_model=kind, temperature=0, max_retries=0
    )
    need(isinstance(found, kind), found)
    return found


def tools() -> None:
    ask(instructor.Mode.TOOLS, GetWeather, WEATHER)


def json_schema() -> None:
    ask(instructor.Mode.JSON_SCHEMA, Place)


def stream() -> None:
    messages = [{"role": "user", "content": QUESTION}]
    partial = client(instructor.Mode.TOOLS).chat.completions.create_partial(
        model=MODEL, messages=messages, response_model=Place, temperature=0, max_retries=0
    )
    steps = list(partial)
    need(len(steps) > 2 and steps[-1].city, steps)


run(tools, json_schema, stream)
