"""POST /v1/chat/completions."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence

from eff_http import JsonRoute, bad_request
from fastapi import APIRouter, Request, Response
from pydantic import BaseModel

from eff_serve.api import pictures
from eff_serve.api.answer import Answer, Frame, assembler_for, includes_usage, respond
from eff_serve.api.documented import json_or_events
from eff_serve.api.generation import EndReason, Generation, Job, Piece
from eff_serve.api.logprobs import PlacedScore, chat_logprobs, prompt_logprobs
from eff_serve.api.sampling import for_choice, sampling_for, token_limit
from eff_serve.api.schema.chat import (
    AnswerMessage,
    ChatChoice,
    ChatChunk,
    ChatCompletion,
    ChatLogprobs,
    ChatRequest,
    ChunkChoice,
    Delta,
)
from eff_serve.api.schema.common import Usage
from eff_serve.api.schema.tokens import TokenizeRequest
from eff_serve.api.serving import Serving
from eff_serve.api.tokenizer import Tokenizer

router = APIRouter(route_class=JsonRoute, tags=["generation"])


@router.post("/v1/chat/completions", responses=json_or_events(ChatCompletion, ChatChunk), response_model=None)
async def chat_completions(body: ChatRequest, request: Request) -> Response:
    """Answer a conversation. Every field is honoured or refused with 400 naming it."""
    serving: Serving = request.app.state.serving
    adapter = serving.check_model(body.model)
    engine, tokenizer = serving.admit()
    n = body.n or 1
    if n > serving.settings.max_sequences:
        raise bad_request(f"n={n} is more than the {serving.settings.max_sequences} that this server allows", "n")
    pictures.check(body.messages, serving.eyes)
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
    frame = Frame.of(request, serving, "chatcmpl-", body.request_id, adapter)
    seen = await pictures.look(body.messages, prompt, serving.eyes)
    jobs = [Job(prompt, for_choice(sampling, i), assembler_for(tokenizer, body), seen) for i in range(n)]
    generation = Generation(
        serving, jobs, prompt_tokens=len(prompt), request_id=frame.id, arrival=frame.arrival, user=body.user
    )
    return await respond(request, body, generation, _ChatFormat(frame, tokenizer, body, generation), frame.id)


def chat_prompt(tokenizer: Tokenizer, body: ChatRequest | TokenizeRequest) -> list[int]:
    """Token ids of a conversation; the template writes all special tokens itself unless /tokenize asks for more.

    Raises:
        ApiError: 400 when the template refuses the messages.
    """
    extra = isinstance(body, TokenizeRequest) and bool(body.add_special_tokens)
    try:
        return tokenizer.encode_chat(
            [message.as_template_input() for message in body.messages or ()],
            add_special_tokens=extra,
            add_generation_prompt=body.opens_answer,
            continue_final_message=bool(body.continue_final_message),
            more=body.chat_template_kwargs,
        )
    except ValueError as error:
        raise bad_request(f"the model's chat template refuses these messages: {error}", "messages") from None


class _ChatFormat:
    """Pieces of answers as chat responses."""

    def __init__(self, frame: Frame, tokenizer: Tokenizer, body: ChatRequest, generation: Generation) -> None:
        self._frame = frame
        self._tokenizer = tokenizer
        self._logprobs = bool(body.logprobs)
        self._prompt_logprobs = body.prompt_logprobs is not None
        self._include_usage = includes_usage(body)
        self._generation = generation

    def opening(self) -> list[BaseModel]:
        return [self._chunk(choice.index, Delta(role="assistant", content="")) for choice in self._generation.choices]

    def events(self, piece: Piece) -> list[BaseModel]:
        chunks: list[BaseModel] = []
        scores = self._scores(piece.scores)
        if piece.text:
            chunks.append(self._chunk(piece.choice, Delta(content=piece.text), scores))
            scores = None
        if piece.finish_reason is not None:
            chunks.append(self._chunk(piece.choice, Delta(), scores, piece.finish_reason))
        return chunks

    def usage_event(self, usage: Usage) -> BaseModel:
        return ChatChunk(**self._frame.fields("chat.completion.chunk"), choices=[], usage=usage)

    def complete(self, answers: Sequence[Answer], usage: Usage) -> BaseModel:
        choices = [
            ChatChoice(
                index=index,
                message=AnswerMessage(role="assistant", content=answer.text),
                logprobs=self._scores(answer.scores),
                finish_reason=answer.finish_reason,
            )
            for index, answer in enumerate(answers)
        ]
        response = ChatCompletion(**self._frame.fields("chat.completion"), choices=choices, usage=usage)
        if self._prompt_logprobs:
            scores = self._generation.choices[0].prompt_scores or ()
            response.prompt_logprobs = prompt_logprobs(self._tokenizer, scores)
        return response

    def _scores(self, scores: Sequence[PlacedScore]) -> ChatLogprobs | None:
        return chat_logprobs(self._tokenizer, scores) if self._logprobs else None

    def _chunk(
        self, index: int, delta: Delta, logprobs: ChatLogprobs | None = None, finish_reason: EndReason | None = None
    ) -> ChatChunk:
        choice = ChunkChoice(index=index, delta=delta, logprobs=logprobs, finish_reason=finish_reason)
        chunk = ChatChunk(**self._frame.fields("chat.completion.chunk"), choices=[choice])
        if self._include_usage:
            chunk.usage = None
        return chunk
