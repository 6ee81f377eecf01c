"""POST /v1/completions."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from dataclasses import replace

from eff_http import JsonRoute, bad_request
from fastapi import APIRouter, Request, Response
from pydantic import BaseModel

from eff_serve.api.answer import Answer, Frame, assembler_for, includes_usage, respond
from eff_serve.api.documented import json_or_events
from eff_serve.api.generation import EndReason, Generation, Job, Piece
from eff_serve.api.logprobs import PlacedScore, completion_logprobs, placed_in_prompt, prompt_logprobs
from eff_serve.api.models import served
from eff_serve.api.sampling import for_choice, sampling_for, token_limit
from eff_serve.api.schema.common import Usage
from eff_serve.api.schema.completions import (
    Completion,
    CompletionChoice,
    CompletionChunk,
    CompletionChunkChoice,
    CompletionLogprobs,
    CompletionRequest,
)
from eff_serve.api.tokenizer import Tokenizer

router = APIRouter(route_class=JsonRoute, tags=["generation"])


@router.post("/v1/completions", responses=json_or_events(Completion, CompletionChunk), response_model=None)
async def completions(body: CompletionRequest, request: Request) -> Response:
    """Continue texts. Every field is honoured or refused with 400 naming it.

    Choices come in the order of the prompts, ``n`` for each. With ``echo``, ``logprobs`` and ``max_tokens`` 0 the
    prompts are only scored.
    """
    serving, adapter = await served(request, body.model)
    if body.eff is not None and body.eff.second_look is not None:
        raise bad_request("eff.carve looks twice at a picture, and only conversations hold pictures", "eff.carve")
    n = body.n or 1
    sequences = n * len(body.prompt)
    most = serving.settings.max_sequences
    if sequences > most:
        message = (
            f"{len(body.prompt)} prompts with n={n} make {sequences} sequences; this server allows {most} a request"
        )
        raise bad_request(message, "n" if n > 1 else "prompt")
    engine, tokenizer = serving.admit()
    prompts = await asyncio.to_thread(_tokens, tokenizer, body.prompt)
    wanted = 16 if body.max_tokens is None else body.max_tokens
    for prompt in prompts:
        token_limit(len(prompt), wanted, engine.max_model_len, "prompt")
    sampling = await sampling_for(
        body,
        max_tokens=wanted,
        logprobs=body.logprobs,
        prompt_logprobs=_prompt_scores(body),
        vocab_size=tokenizer.vocab_size,
        adapter=adapter,
    )
    jobs = [
        Job(prompt, for_choice(sampling, i), assembler_for(tokenizer, body)) for prompt in prompts for i in range(n)
    ]
    frame = Frame.of(request, serving, "cmpl-", body.request_id, adapter)
    total = sum(map(len, prompts))
    generation = Generation(
        serving, jobs, prompt_tokens=total, request_id=frame.id, arrival=frame.arrival, user=body.user
    )
    return await respond(request, body, generation, _CompletionFormat(frame, tokenizer, body, generation), frame.id)


def _tokens(tokenizer: Tokenizer, prompts: Sequence[str | list[int]]) -> list[list[int]]:
    result = []
    for prompt in prompts:
        ids = tokenizer.encode(prompt) if isinstance(prompt, str) else prompt
        outside = next((token for token in ids if token >= tokenizer.vocab_size), None)
        if outside is not None:
            message = f"prompt: token {outside} is outside the vocabulary of {tokenizer.vocab_size}"
            raise bad_request(message, "prompt", "invalid_value")
        result.append(ids)
    return result


def _prompt_scores(body: CompletionRequest) -> int | None:
    """How many alternatives to score at each place of the prompt: what ``echo`` with ``logprobs`` needs, or more."""
    wanted = [body.prompt_logprobs, body.logprobs if body.echo else None]
    return max((w for w in wanted if w is not None), default=None)


class _CompletionFormat:
    """Pieces of continuations as completion responses."""

    def __init__(self, frame: Frame, tokenizer: Tokenizer, body: CompletionRequest, generation: Generation) -> None:
        self._frame = frame
        self._tokenizer = tokenizer
        self._body = body
        self._include_usage = includes_usage(body)
        self._generation = generation

    def opening(self) -> list[BaseModel]:
        if not self._body.echo:
            return []
        return [self._chunk(choice.index, self._prompt_text(choice.index)) for choice in self._generation.choices]

    def events(self, piece: Piece) -> list[BaseModel]:
        return [self._chunk(piece.choice, piece.text, self._scores(piece.scores), piece.finish_reason)]

    def usage_event(self, usage: Usage) -> BaseModel:
        return CompletionChunk(**self._frame.fields("text_completion"), choices=[], usage=usage)

    def complete(self, answers: Sequence[Answer], usage: Usage) -> BaseModel:
        choices = [self._choice(index, answer) for index, answer in enumerate(answers)]
        return Completion(**self._frame.fields("text_completion"), choices=choices, usage=usage)

    def _choice(self, index: int, answer: Answer) -> CompletionChoice:
        logprobs = self._scores(answer.scores)
        text = answer.text
        source = self._generation.choices[index]
        scores = source.prompt_scores or ()
        if self._body.echo:
            front = self._prompt_text(index)
            text = front + text
            if self._body.logprobs is not None:
                prompt = source.job.prompt
                k = self._body.logprobs
                own = [
                    PlacedScore(replace(s, top=s.top[:k]), at)
                    for s, at in placed_in_prompt(self._tokenizer, prompt, scores)
                ]
                logprobs = completion_logprobs(self._tokenizer, own, first=prompt[0])
                logprobs = _joined(logprobs, completion_logprobs(self._tokenizer, answer.scores, shift=len(front)))
        choice = CompletionChoice(index=index, text=text, logprobs=logprobs, finish_reason=answer.finish_reason)
        if self._body.prompt_logprobs is not None:
            k = self._body.prompt_logprobs
            choice.prompt_logprobs = prompt_logprobs(self._tokenizer, [replace(s, top=s.top[:k]) for s in scores])
        return choice

    def _prompt_text(self, index: int) -> str:
        prompt = self._body.prompt[index // (self._body.n or 1)]
        return prompt if isinstance(prompt, str) else self._tokenizer.decode(prompt)

    def _scores(self, scores: Sequence[PlacedScore]) -> CompletionLogprobs | None:
        return None if self._body.logprobs is None else completion_logprobs(self._tokenizer, scores)

    def _chunk(
        self,
        index: int,
        text: str,
        logprobs: CompletionLogprobs | None = None,
        finish_reason: EndReason | None = None,
    ) -> CompletionChunk:
        choice = CompletionChunkChoice(index=index, text=text, logprobs=logprobs, finish_reason=finish_reason)
        chunk = CompletionChunk(**self._frame.fields("text_completion"), choices=[choice])
        if self._include_usage:
            chunk.usage = None
        return chunk


def _joined(a: CompletionLogprobs, b: CompletionLogprobs) -> CompletionLogprobs:
    return CompletionLogprobs(
        tokens=a.tokens + b.tokens,
        token_logprobs=a.token_logprobs + b.token_logprobs,
        top_logprobs=a.top_logprobs + b.top_logprobs,
        text_offset=a.text_offset + b.text_offset,
    )
