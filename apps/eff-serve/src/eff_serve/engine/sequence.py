"""One request inside the engine: its tokens, its pages, and the stream that its reader holds."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass, field
from typing import Any

from eff_serve.engine.adapters import Adapter
from eff_serve.engine.grammar import GrammarMatcher
from eff_serve.engine.lookup import Guesser
from eff_serve.engine.prefix import Chain
from eff_serve.engine.sampler import Sampler
from eff_serve.engine.types import Sampling, Step, TokenScore
from eff_serve.pictures.prompt import PromptPictures


class TokenStream:
    """The steps of one request, for one reader in the asyncio loop in which it was made."""

    def __init__(self, on_cancel: Callable[[], None]) -> None:
        self._loop = asyncio.get_running_loop()
        self._queue: asyncio.Queue[Step] = asyncio.Queue()
        self._on_cancel = on_cancel
        self.cancelled = threading.Event()

    def put(self, step: Step) -> None:
        """Deliver a step; called from the engine's thread."""
        try:
            self._loop.call_soon_threadsafe(self._queue.put_nowait, step)
        except RuntimeError:  # the reader's loop is closed: nobody is left to read
            self.cancelled.set()

    def cancel(self) -> None:
        """Give up the request; safe from any thread and after the end."""
        self.cancelled.set()
        self._on_cancel()

    async def __aiter__(self) -> AsyncIterator[Step]:
        """Yield steps until one has a finish_reason."""
        while True:
            step = await self._queue.get()
            yield step
            if step.finish_reason is not None:
                return


@dataclass(eq=False, slots=True)
class Sequence:
    """State of a request between steps.

    Attributes:
        tokens: Prompt and output.
        adapter: What `Sampling.adapter` stood for when the request came.
        cached: How many of them have keys and values in the cache.
        block_table: The blocks that hold these, in order.
        shared: How many of these blocks other sequences may read.
        chain: What the blocks hold, for the prefix cache.
        reused: Tokens of the prompt whose keys were there when it was first read.
        guesser: Guesses how it goes on, where that was asked for.
        steered: Rules of its attention, from its first step on; see `steering`.
    """

    prompt_length: int
    tokens: list[int]
    sampling: Sampling
    sampler: Sampler
    stream: TokenStream
    grammar: GrammarMatcher | None = None
    pictures: PromptPictures | None = None
    adapter: Adapter | None = None
    cached: int = 0
    block_table: list[int] = field(default_factory=list)
    shared: int = 0
    chain: Chain | None = None
    reused: int | None = None
    guesser: Guesser | None = None
    steered: Any = None
    prompt_scores: list[TokenScore] = field(default_factory=list)
    submitted: float = field(default_factory=time.monotonic)

    @property
    def prompt(self) -> list[int]:
        """The prompt's tokens."""
        return self.tokens[: self.prompt_length]

    @property
    def output(self) -> list[int]:
        """Tokens generated so far."""
        return self.tokens[self.prompt_length :]

    @property
    def pending(self) -> int:
        """Tokens that the model has not seen yet."""
        return len(self.tokens) - self.cached

    @property
    def decoding(self) -> bool:
        """Whether the next step reads one token, a generated one."""
        return self.pending == 1 and self.cached >= self.prompt_length
