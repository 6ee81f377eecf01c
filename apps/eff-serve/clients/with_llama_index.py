"""llama-index's OpenAILike."""

from llama_index.core.base.llms.types import ChatMessage
from llama_index.core.prompts import PromptTemplate
from llama_index.core.tools import FunctionTool
from llama_index.llms.openai_like import OpenAILike
from pydantic import BaseModel, Field

from _checks import MODEL, QUESTION, SUNNY, URL, WEATHER, need, run

llm = OpenAILike(
    model=MODEL,
    api_base=f"{URL}/v1",
    api_key="none",
    is_chat_model=True,
    is_function_calling_model=True,
    context_window=8192,
    temperature=0,
    max_tokens=200,
    max_retries=0,
)
ASK = [ChatMessage(role="user", content=QUESTION)]


class Place(BaseModel):
    """A place."""

    city: str = Field(max_length=20)
    country: str = Field(max_length=20)


def get_weather(city: str) -> str:
    """The weather of a city."""
    return f"{city}: {SUNNY}"


WEATHER_TOOL = FunctionTool.from_defaults(get_weather)


def chat() -> None:
    text = llm.chat(ASK).message.content
    need("Paris" in text, text)


def stream() -> None:
    pieces = [piece.delta for piece in llm.stream_chat(ASK)]
    need(len(pieces) > 3 and "Paris" in "".join(p or "" for p in pieces), pieces)


def structured() -> None:
    found = llm.structured_predict(Place, PromptTemplate("{question}"), question=QUESTION)
    need(isinstance(found, Place), found)


def tools() -> None:
    asked = llm.chat_with_tools([WEATHER_TOOL], user_msg=WEATHER, tool_required=True, allow_parallel_tool_calls=False)
    (call,) = llm.get_tool_calls_from_response(asked)
    need(call.tool_name == "get_weather" and call.tool_kwargs["city"], call)
    result = ChatMessage(
        role="tool", content=get_weather(**call.tool_kwargs), additional_kwargs={"tool_call_id": call.tool_id}
    )
    answer = llm.chat([ChatMessage(role="user", content=WEATHER), asked.message, result])
    need(answer.message.content, answer)


run(chat, stream, structured, tools)
