"""pydantic-ai."""

import asyncio

from pydantic import BaseModel, Field
from pydantic_ai import Agent, NativeOutput
from pydantic_ai.models.openai import OpenAIChatModel
from pydantic_ai.providers.openai import OpenAIProvider

from _checks import MODEL, QUESTION, SUNNY, URL, WEATHER, need, run

model = OpenAIChatModel(MODEL, provider=OpenAIProvider(base_url=f"{URL}/v1", api_key="none"))
SETTINGS = {"temperature": 0, "max_tokens": 200}


class Place(BaseModel):
    """A place."""

    city: str = Field(max_length=20)
    country: str = Field(max_length=20)


def chat() -> None:
    text = Agent(model, model_settings=SETTINGS).run_sync(QUESTION).output
    need("Paris" in text, text)


def stream() -> None:
    async def ask():
        async with Agent(model, model_settings=SETTINGS).run_stream(QUESTION) as answer:
            return [piece async for piece in answer.stream_text(delta=True, debounce_by=None)]

    pieces = asyncio.run(ask())
    need(len(pieces) > 3 and "Paris" in "".join(pieces), pieces)


def structured_by_tool() -> None:
    found = Agent(model, output_type=Place, model_settings=SETTINGS).run_sync(QUESTION).output
    need(isinstance(found, Place), found)


def structured_by_schema() -> None:
    found = Agent(model, output_type=NativeOutput(Place), model_settings=SETTINGS).run_sync(QUESTION).output
    need(isinstance(found, Place), found)


def tools() -> None:
    seen = []

    async def once(_, definition):
        return None if seen else definition  # the output is a tool too; the second turn has no other

    agent = Agent(model, output_type=Place, model_settings={**SETTINGS, "parallel_tool_calls": False})

    @agent.tool_plain(prepare=once)
    def get_weather(city: str) -> str:
        """The weather of a city."""
        seen.append(city)
        return SUNNY

    found = agent.run_sync(WEATHER).output
    need(isinstance(found, Place), (found, seen))


run(chat, stream, structured_by_tool, structured_by_schema, tools)
