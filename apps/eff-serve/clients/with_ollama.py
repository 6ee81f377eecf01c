"""ollama's Python client."""

from ollama import Client
from pydantic import BaseModel, Field

from _checks import MODEL, QUESTION, SUNNY, URL, WEATHER, need, run

client = Client(host=URL)
GREEDY = {"temperature": 0, "num_predict": 200}


class Place(BaseModel):
    city: str = Field(max_length=20)
    country: str = Field(max_length=20)


def get_weather(city: str) -> str:
    """The weather of a city.

    Args:
        city: Its name.
    """
    return f"{city}: {SUNNY}"


def user(text: str) -> list[dict]:
    return [{"role": "user", "content": text}]


def chat() -> None:
    answer = client.chat(MODEL, user(QUESTION), options=GREEDY)
    need("Paris" in answer.message.content and answer.done_reason == "stop", answer)


def stream() -> None:
    pieces = [piece.message.content for piece in client.chat(MODEL, user(QUESTION), stream=True, options=GREEDY)]
    need(len(pieces) > 3 and "Paris" in "".join(pieces), pieces)


def generate() -> None:
    need("Paris" in client.generate(MODEL, QUESTION, options=GREEDY).response, "generate")
    raw = client.generate(MODEL, "The capital of France is", raw=True, options={**GREEDY, "num_predict": 4})
    need("Paris" in raw.response, raw)


def structured() -> None:
    answer = client.chat(MODEL, user(QUESTION), format=Place.model_json_schema(), options=GREEDY)
    need(Place.model_validate_json(answer.message.content), answer)


def tools() -> None:
    asked = client.chat(MODEL, user(WEATHER), tools=[get_weather], options=GREEDY).message
    calls = asked.tool_calls or [{"function": {"name": "get_weather", "arguments": {"city": "Paris"}}}]
    talk = [*user(WEATHER), {"role": "assistant", "content": "", "tool_calls": calls}]
    talk += [{"role": "tool", "tool_name": "get_weather", "content": SUNNY} for _ in calls]
    need(client.chat(MODEL, talk, options=GREEDY).message.content, talk)


def models() -> None:
    need([m.model for m in client.list().models] == [MODEL], client.list())
    need(client.show(MODEL).details.family == "llama", client.show(MODEL))
    need(client.ps().models, "ps")


def embed() -> None:
    found = client.embed(MODEL, ["bread", "butter"])
    need(len(found.embeddings) == 2 and len(found.embeddings[0]) == 576, found)


run(chat, stream, generate, structured, tools, models, embed)
