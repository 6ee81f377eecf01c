"""One request's sequences: put in line together, read together, given back together."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Awaitable, Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, Literal

from eff_http import ApiError, bad_request, internal_error, retry_later

from eff_serve.api.errors import draining, queue_full
from eff_serve.api.logprobs import PlacedScore
from eff_serve.api.metrics import Metrics, SequenceMetrics
from eff_serve.api.schema.common import PromptTokensDetails, Usage
from eff_serve.api.serving import Serving
from eff_serve.engine.types import DrainingError, QueueFullError, Sampling, Step, Stream, TokenScore
from eff_serve.text import TextAssembler

log = logging.getLogger("eff_serve.request")
EndReason = Literal["stop", "length"]


@dataclass(slots=True)
class Piece:
    """What a choice gains at once: visible text, scores of its new tokens, at the end the reason."""

    choice: int
    text: str = ""
    scores: tuple[PlacedScore, ...] = ()
    finish_reason: EndReason | None = None


Emit = Callable[[Piece], Awaitable[None]]


@dataclass(slots=True)
class Job:
    """A sequence to generate: a prompt, how to sample, what makes text of the tokens, and what the pictures show."""

    prompt: list[int]
    sampling: Sampling
    text: TextAssembler
    pictures: Any = None


@dataclass(slots=True)
class Choice:
    """A sequence in the engine, and what has come of it."""

    index: int
    job: Job
    stream: Stream
    metrics: SequenceMetrics
    tokens: int = 0
    cached_tokens: int = 0
    prompt_scores: tuple[TokenScore, ...] | None = None
    finish_reason: EndReason | None = None
    _scores: list[PlacedScore] = field(default_factory=list)

    async def run(self, emit: Emit) -> None:
        """Read the stream to its end, and emit whatever becomes visible."""
        async for step in self.stream:
            self.cached_tokens = max(self.cached_tokens, step.cached_tokens)
            self.metrics.step(token=step.token is not None, cached_tokens=step.cached_tokens)
            if step.prompt_scores is not None:
                self.prompt_scores = step.prompt_scores
            text = self._take(step)
            if self.finish_reason is not None:
                self.stream.cancel()
                self.metrics.end(self.finish_reason)
            if text or self.finish_reason is not None:
                scores, self._scores = tuple(self._scores), []
                await emit(Piece(self.index, text, scores, self.finish_reason))
            if self.finish_reason is not None:
                return
        raise internal_error("the engine ended this answer without a reason")

    def _take(self, step: Step) -> str:
        """Text that a step makes visible; sets ``finish_reason``."""
        told_of_end(step)
        assembler = self.job.text
        text = ""
        if step.token is not None:
            self.tokens += 1
            if step.score is not None:
                self._scores.append(PlacedScore(step.score, assembler.length))
            text = assembler.push(step.token, last=step.finish_reason == "stop")
        if assembler.stopped:
            self.finish_reason = "stop"
        elif step.finish_reason is not None:
            text += assembler.finish()
            self.finish_reason = "stop" if assembler.stopped or step.finish_reason == "stop" else "length"
        return text


def told_of_end(step: Step) -> None:
    """Say why a sequence ended that did not come to its own end.

    Raises:
        ApiError: 500 where the engine failed, 503 where it is shut down.
    """
    if step.finish_reason == "error":
        log.error("the engine failed: %s", step.error)
        raise internal_error(f"generation failed: {step.error}")
    if step.finish_reason == "cancelled":
        raise retry_later(503, "generation was cancelled because the server is shutting down", "draining", 5)


@contextmanager
def in_line(serving: Serving) -> Iterator[None]:
    """What the engine refuses while sequences are put in line, as answers to the client.

    Raises:
        ApiError: 400, 429 or 503.
    """
    try:
        yield
    except QueueFullError as error:
        serving.metrics.rejected("queue_full")
        raise queue_full(error) from None
    except DrainingError as error:
        serving.metrics.rejected("draining")
        raise draining(error) from None
    except ValueError as error:
        raise bad_request(f"the model cannot take this request: {error}") from None


def deadline_passed(seconds: float) -> ApiError:
    """504 for an answer that took too long."""
    message = f"the answer was not complete after {seconds:g} s; ask for fewer tokens or try again later"
    headers = {"x-should-retry": "false"}
    return ApiError(504, message, kind="timeout_error", code="deadline_exceeded", headers=headers)


class Generation:
    """The sequences of one request.

    Creating it puts all of them in line, or none. `run` reads them to the end. Whoever creates one must `close` it,
    whatever happens, which gives back all slots.

    Args:
        serving: The app's state.
        jobs: The sequences, in the order of the response's choices.
        prompt_tokens: For ``usage``: tokens of all prompts, each counted once.
        request_id: For the log, like ``user``.
        arrival: ``time.perf_counter()`` when the request came in.
        user: The request's field ``user``.

    Raises:
        ApiError: 400 when the engine refuses the request, 429 when the waiting line is full, 503 when the server is
            shutting down.
    """

    def __init__(
        self,
        serving: Serving,
        jobs: Sequence[Job],
        *,
        prompt_tokens: int,
        request_id: str,
        arrival: float,
        user: str | None = None,
    ) -> None:
        self._serving = serving
        self._prompt_tokens = prompt_tokens
        self._request_id = request_id
        self._arrival = arrival
        self._user = user
        self._outcome = "abort"
        self._closed = False
        self.choices: list[Choice] = []
        try:
            with in_line(serving):
                for index, job in enumerate(jobs):
                    stream = serving.engine.submit(job.prompt, job.sampling, job.pictures)
                    metrics = serving.metrics.sequence(arrival, len(job.prompt))
                    self.choices.append(Choice(index, job, stream, metrics))
        except BaseException:
            self.close()
            raise

    async def run(self, emit: Emit) -> None:
        """Read all sequences; ``emit`` is awaited for each piece, one piece at a time.

        Raises:
            ApiError: 504 past the deadline, 500 when the engine fails, 503 when it is shut down.
        """
        seconds = self._serving.settings.deadline
        try:
            async with asyncio.timeout(seconds):
                await self._run_all(emit)
        except TimeoutError:
            self._outcome = "error"
            raise deadline_passed(seconds) from None
        except Exception:
            self._outcome = "error"
            raise

    async def _run_all(self, emit: Emit) -> None:
        if len(self.choices) == 1:
            await self.choices[0].run(emit)
            return
        lock = asyncio.Lock()

        async def emit_alone(piece: Piece) -> None:
            async with lock:
                await emit(piece)

        tasks = [asyncio.ensure_future(choice.run(emit_alone)) for choice in self.choices]
        try:
            await asyncio.gather(*tasks)
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)

    @property
    def metrics(self) -> Metrics:
        """Metrics of the model."""
        return self._serving.metrics

    @property
    def usage(self) -> Usage:
        """Tokens so far."""
        new = sum(choice.tokens for choice in self.choices)
        # Choices of one prompt share what the first of them computed; only what none had to compute counts.
        cached: dict[tuple[int, ...], int] = {}
        for choice in self.choices:
            prompt = tuple(choice.job.prompt)
            cached[prompt] = min(choice.cached_tokens, cached.get(prompt, choice.cached_tokens))
        return Usage(
            prompt_tokens=self._prompt_tokens,
            completion_tokens=new,
            total_tokens=self._prompt_tokens + new,
            prompt_tokens_details=PromptTokensDetails(cached_tokens=sum(cached.values())),
        )

    def close(self) -> None:
        """Give all slots back and write the log line; further calls do nothing."""
        if self._closed:
            return
        self._closed = True
        for choice in self.choices:
            choice.stream.cancel()
            choice.metrics.end(self._outcome)
        log.info(
            "%s user=%r prompt_tokens=%d completion_tokens=%d finished=%s seconds=%.3f",
            self._request_id,
            self._user or "-",
            self._prompt_tokens,
            sum(choice.tokens for choice in self.choices),
            ",".join(choice.finish_reason or self._outcome for choice in self.choices) or "rejected",
            time.perf_counter() - self._arrival,
        )
