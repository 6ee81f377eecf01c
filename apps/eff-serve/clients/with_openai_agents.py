"""openai-agents, over /v1/responses, which is its default, and over chat completions."""

import asyncio

from agents import (
    Agent,
    ModelSettings,
    OpenAIChatCompletionsModel,
    OpenAIResponsesModel,
    Runner,
    function_tool,
    set_tracing_disabled,
)
from openai import AsyncOpenAI
from pydantic import BaseModel, Field

from _checks import MODEL, QUESTION, SUNNY, URL, WEATHER, need, run

set_tracing_disabled(True)
SETTINGS = ModelSettings(temperature=0, max_tokens=200)


class Place(BaseModel):
    city: str = Field(max_length=20)
    country: str = Field(max_length=20)


@function_tool
def get_weather(city: str) -> str:
    """The weather of a city."""
    asked.append(city)
    return SUNNY


asked: list[str] = []


def agents(**fields):
    """An agent for each of the two APIs."""
    for kind in (OpenAIResponsesModel, OpenAIChatCompletionsModel):
        made = kind(MODEL, AsyncOpenAI(base_url=f"{URL}/v1", api_key="none", max_retries=0))
        shared = {"name": "a", "instructions": "Answer shortly.", "model": made, "model_settings": SETTINGS}
        yield Agent(**{**shared, **fields})


def chat() -> None:
    for agent in agents():
        text = Runner.run_sync(agent, QUESTION).final_output
        need("Paris" in text, text)


def stream() -> None:
    async def ask(agent):
        result = Runner.run_streamed(agent, QUESTION)
        kinds = [event.type async for event in result.stream_events()]
        return kinds, result.final_output

    for agent in agents():
        kinds, text = asyncio.run(ask(agent))
        need(kinds.count("raw_response_event") > 3 and "Paris" in text, (kinds, text))


def structured() -> None:
    for agent in agents(output_type=Place):
        found = Runner.run_sync(agent, QUESTION).final_output
        need(isinstance(found, Place), found)


def tools() -> None:
    settings = ModelSettings(temperature=0, max_tokens=200, tool_choice="required", parallel_tool_calls=False)
    for agent in agents(tools=[get_weather], model_settings=settings):
        asked.clear()
        text = Runner.run_sync(agent, WEATHER).final_output
        need(asked and text, (asked, text))


run(chat, stream, structured, tools)
