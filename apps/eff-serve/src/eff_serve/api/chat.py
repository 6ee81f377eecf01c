"""POST /v1/chat/completions."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial

from eff_http import JsonRoute, bad_request
from fastapi import APIRouter, Request, Response
from pydantic import BaseModel

from eff_serve.api import pictures, second_look
from eff_serve.api.answer import Answer, Frame, assembler_for, includes_usage, respond
from eff_serve.api.documented import json_or_events
from eff_serve.api.generation import Generation, Job, Piece
from eff_serve.api.logprobs import PlacedScore, chat_logprobs, prompt_logprobs
from eff_serve.api.models import served
from eff_serve.api.sampling import for_choice, sampling_for, token_limit
from eff_serve.api.schema.chat import (
    AnswerMessage,
    ChatChoice,
    ChatChunk,
    ChatCompletion,
    ChatFinishReason,
    ChatLogprobs,
    ChatRequest,
    ChunkChoice,
    Delta,
)
from eff_serve.api.schema.common import Usage
from eff_serve.api.schema.tokens import TokenizeRequest
from eff_serve.api.schema.tools import (
    AnswerFunction,
    AnswerToolCall,
    DeltaFunction,
    DeltaToolCall,
)
from eff_serve.api.speech import CallPart, Part, Speech, Words
from eff_serve.api.tokenizer import Tokenizer
from eff_serve.api.tools import ToolPlan, grammar_of, offered, plan_for, shows_special, thinks

router = APIRouter(route_class=JsonRoute, tags=["generation"])


@router.post("/v1/chat/completions", responses=json_or_events(ChatCompletion, ChatChunk), response_model=None)
async def chat_completions(body: ChatRequest, request: Request) -> Response:
    """Answer a conversation. Every field is honoured or refused with 400 naming it."""
    begun = await begin(body, request, "chatcmpl-")
    return await respond(request, body, begun.generation, _ChatFormat(begun, body), begun.frame.id)


@dataclass(frozen=True, slots=True)
class Begun:
    """A conversation whose answer is in line, and what is needed to read it."""

    frame: Frame
    tokenizer: Tokenizer
    generation: Generation
    plan: ToolPlan | None
    thoughts: bool | str

    def speech(self) -> Speech:
        """What takes one answer's text apart."""
        return Speech(thinks=self.thoughts, calls=None if self.plan is None else self.plan.calls())


async def begin(body: ChatRequest, request: Request, prefix: str) -> Begun:
    """Check a conversation and put its answer in line.

    Args:
        body: The conversation.
        request: Where it came from.
        prefix: Of the id of the response.

    Raises:
        ApiError: 400, 404, 429 or 503.
    """
    serving, adapter = await served(request, body.model)
    engine, tokenizer = serving.admit()
    n = body.n or 1
    if n > serving.settings.max_sequences:
        raise bad_request(f"n={n} is more than the {serving.settings.max_sequences} that this server allows", "n")
    pictures.check(body.messages, serving.eyes)
    carve = second_look.check(body, serving)
    asked, body = body, body if carve is None else second_look.shown_again(body, carve)
    plan = await asyncio.to_thread(plan_for, body, tokenizer.dialect)
    prompt = await asyncio.to_thread(chat_prompt, tokenizer, body)
    limit = token_limit(len(prompt), body.limit, engine.max_model_len, "messages")
    sampling = await sampling_for(
        body,
        max_tokens=limit,
        logprobs=(body.top_logprobs or 0) if body.logprobs else None,
        prompt_logprobs=body.prompt_logprobs,
        vocab_size=tokenizer.vocab_size,
        adapter=adapter,
    )
    thoughts = thinks(tokenizer, prompt)
    if plan is not None:
        grammar = await asyncio.to_thread(grammar_of, plan, body, tokenizer, thinks=thoughts)
        sampling = replace(sampling, grammar=grammar)
    special = shows_special(plan, tokenizer, thinks=thoughts)
    frame = Frame.of(request, serving, prefix, body.request_id, adapter)
    if carve is None:
        seen = await pictures.look(body.messages, prompt, serving.eyes)
    else:
        encode = partial(chat_prompt, tokenizer)
        seen = await second_look.look(asked, encode, serving, carve, prompt, sampling)
    jobs = [
        Job(prompt, for_choice(sampling, i), assembler_for(tokenizer, body, keep_special=special), seen)
        for i in range(n)
    ]
    generation = Generation(
        serving, jobs, prompt_tokens=len(prompt), request_id=frame.id, arrival=frame.arrival, user=body.user
    )
    return Begun(frame, tokenizer, generation, plan, thoughts)


def chat_prompt(tokenizer: Tokenizer, body: ChatRequest | TokenizeRequest) -> list[int]:
    """Token ids of a conversation; the template writes all special tokens itself unless /tokenize asks for more.

    Raises:
        ApiError: 400 when the template refuses the messages.
    """
    extra = isinstance(body, TokenizeRequest) and bool(body.add_special_tokens)
    try:
        return tokenizer.encode_chat(
            [message.as_template_input() for message in body.messages or ()],
            tools=offered(body),
            add_special_tokens=extra,
            add_generation_prompt=body.opens_answer,
            continue_final_message=bool(body.continue_final_message),
            more=body.chat_template_kwargs,
        )
    except ValueError as error:
        raise bad_request(f"the model's chat template refuses these messages: {error}", "messages") from None


class _ChatFormat:
    """Pieces of answers as chat responses."""

    def __init__(self, begun: Begun, body: ChatRequest) -> None:
        self._begun = begun
        self._frame, self._tokenizer, self._generation = begun.frame, begun.tokenizer, begun.generation
        self._logprobs = bool(body.logprobs)
        self._prompt_logprobs = body.prompt_logprobs is not None
        self._include_usage = includes_usage(body)
        self._speech = [begun.speech() for _ in begun.generation.choices]

    def opening(self) -> list[BaseModel]:
        text = "" if self._begun.plan is None else None
        return [self._chunk(choice.index, Delta(role="assistant", content=text)) for choice in self._generation.choices]

    def events(self, piece: Piece) -> list[BaseModel]:
        chunks: list[BaseModel] = []
        scores = self._scores(piece.scores)
        speech = self._speech[piece.choice]
        for part in speech.feed(piece.text, final=piece.finish_reason is not None):
            for delta in _deltas(part):
                chunks.append(self._chunk(piece.choice, delta, scores))
                scores = None
        if piece.finish_reason is not None:
            chunks.append(self._chunk(piece.choice, Delta(), scores, _reason(piece.finish_reason, speech)))
        elif not chunks and scores is not None and scores.content:
            chunks.append(self._chunk(piece.choice, Delta(), scores))
        return chunks

    def usage_event(self, usage: Usage) -> BaseModel:
        return ChatChunk(**self._frame.fields("chat.completion.chunk"), choices=[], usage=usage)

    def complete(self, answers: Sequence[Answer], usage: Usage) -> BaseModel:
        choices = []
        for index, (answer, speech) in enumerate(zip(answers, self._speech, strict=True)):
            choices.append(
                ChatChoice(
                    index=index,
                    message=message_of(speech.feed(answer.text, final=True)),
                    logprobs=self._scores(answer.scores),
                    finish_reason=_reason(answer.finish_reason, speech),
                )
            )
        response = ChatCompletion(**self._frame.fields("chat.completion"), choices=choices, usage=usage)
        if self._prompt_logprobs:
            scores = self._generation.choices[0].prompt_scores or ()
            response.prompt_logprobs = prompt_logprobs(self._tokenizer, scores)
        return response

    def _scores(self, scores: Sequence[PlacedScore]) -> ChatLogprobs | None:
        return chat_logprobs(self._tokenizer, scores) if self._logprobs else None

    def _chunk(
        self,
        index: int,
        delta: Delta,
        logprobs: ChatLogprobs | None = None,
        finish_reason: ChatFinishReason | None = None,
    ) -> ChatChunk:
        choice = ChunkChoice(index=index, delta=delta, logprobs=logprobs, finish_reason=finish_reason)
        chunk = ChatChunk(**self._frame.fields("chat.completion.chunk"), choices=[choice])
        if self._include_usage:
            chunk.usage = None
        return chunk


def _reason(reason: ChatFinishReason, speech: Speech) -> ChatFinishReason:
    return "tool_calls" if reason == "stop" and speech.called else reason


def _deltas(part: Part) -> Iterator[Delta]:
    """What a stream says of a part: a call's id and name come alone, in front of its arguments."""
    if isinstance(part, Words):
        yield Delta(reasoning_content=part.text) if part.thought else Delta(content=part.text)
        return
    if part.name is not None:
        named = DeltaFunction(name=part.name, arguments="")
        yield Delta(tool_calls=[DeltaToolCall(index=part.index, id=part.id, type="function", function=named)])
    if part.arguments:
        more = DeltaFunction(arguments=part.arguments)
        yield Delta(tool_calls=[DeltaToolCall(index=part.index, function=more)])


def message_of(parts: Sequence[Part]) -> AnswerMessage:
    """The whole answer; its text is null where there are only calls."""
    words = "".join(p.text for p in parts if isinstance(p, Words) and not p.thought)
    thoughts = "".join(p.text for p in parts if isinstance(p, Words) and p.thought)
    calls: list[AnswerToolCall] = []
    for part in parts:
        if isinstance(part, CallPart):
            if part.name is not None:
                function = AnswerFunction(name=part.name, arguments="")
                calls.append(AnswerToolCall(id=part.id or "", type="function", function=function))
            calls[-1].function.arguments += part.arguments
    message = AnswerMessage(role="assistant", content=words or None if calls else words)
    if thoughts:
        message.reasoning_content = thoughts
    if calls:
        message.tool_calls = calls
    return message
