"""LangChain's ChatOpenAI."""

from langchain_core.messages import HumanMessage, ToolMessage
from langchain_core.tools import tool
from langchain_openai import ChatOpenAI
from pydantic import BaseModel, Field

from _checks import MODEL, QUESTION, SUNNY, URL, WEATHER, need, run

llm = ChatOpenAI(model=MODEL, base_url=f"{URL}/v1", api_key="none", temperature=0, max_retries=0, max_tokens=200)


class Place(BaseModel):
    """A place."""

    city: str = Field(max_length=20)
    country: str = Field(max_length=20)


@tool
def get_weather(city: str, unit: str) -> str:
    """The weather of a city."""
    return f"{city} in {unit}: {SUNNY}"


def chat() -> None:
    answer = llm.invoke(QUESTION)
    need("Paris" in answer.content and answer.usage_metadata["output_tokens"] > 1, answer)


def stream() -> None:
    pieces = [chunk.content for chunk in llm.stream(QUESTION)]
    need(len(pieces) > 3 and "Paris" in "".join(pieces), pieces)


def structured_by_function() -> None:
    found = llm.with_structured_output(Place, method="function_calling").invoke(QUESTION)
    need(isinstance(found, Place), found)


def structured_by_schema() -> None:
    found = llm.with_structured_output(Place, method="json_schema").invoke(QUESTION)
    need(isinstance(found, Place), found)


def tools() -> None:
    bound = llm.bind_tools([get_weather], tool_choice="any", parallel_tool_calls=False)
    asked = bound.invoke([HumanMessage(WEATHER)])
    (call,) = asked.tool_calls
    result = get_weather.invoke(call)
    need(isinstance(result, ToolMessage), result)
    answer = llm.bind_tools([get_weather], tool_choice="none").invoke([HumanMessage(WEATHER), asked, result])
    need(answer.content and not answer.tool_calls, answer)


def streamed_tools() -> None:
    bound = llm.bind_tools([get_weather], tool_choice="get_weather")
    whole = None
    for chunk in bound.stream(WEATHER):
        whole = chunk if whole is None else whole + chunk
    need(set(whole.tool_calls[0]["args"]) == {"city", "unit"}, whole)


run(chat, stream, structured_by_function, structured_by_schema, tools, streamed_tools)
