"""What the HTTP layer and the engine say to each other: a request, a stream of tokens, the reason why it ended."""

from __future__ import annotations

from collections.abc import AsyncIterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal, Protocol

if TYPE_CHECKING:
    from eff_serve.engine.steering import Steering
    from eff_serve.engine.watch import PictureWatch

FinishReason = Literal["stop", "length", "cancelled", "error"]


@dataclass(frozen=True, kw_only=True, slots=True)
class Sampling:
    """How tokens are chosen and when generation ends. Checked by the HTTP layer; the engine trusts it.

    Attributes:
        max_tokens: Most tokens to generate; 0 only scores the prompt.
        min_tokens: End-of-text and ``stop_token_ids`` are not sampled before this many tokens.
        temperature: 0 is greedy.
        top_p, top_k, min_p: Truncation; 1, 0 and 0 switch each off.
        repetition_penalty: Divides positive and multiplies negative logits of tokens in prompt and output; 1 is off.
        presence_penalty, frequency_penalty: Subtracted once / per occurrence for tokens of the output.
        logit_bias: Added to the logits, by token id.
        seed: Makes sampling repeatable, whatever else is in the batch. None takes entropy from the system.
        stop_token_ids: End generation like end-of-text.
        ignore_eos: Do not end at end-of-text.
        logprobs: How many of the likeliest alternatives to report for each token (0: only its own); None reports none.
        prompt_logprobs: The same for the prompt's tokens.
        grammar: An llguidance grammar (JSON, from ``LLMatcher.grammar_from_json_schema`` and the like) for the output.
        adapter: Name of a LoRA adapter that the engine holds; None is the base model.
        priority: Place in the waiting line: smaller numbers first, equal ones in the order in which they came.
        steering: Rules of attention, which the engine checks; None changes nothing.
        watch: Notes where the sequence looks in its picture.
    """

    max_tokens: int
    min_tokens: int = 0
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    logit_bias: Mapping[int, float] = field(default_factory=dict)
    seed: int | None = None
    stop_token_ids: frozenset[int] = frozenset()
    ignore_eos: bool = False
    logprobs: int | None = None
    prompt_logprobs: int | None = None
    grammar: str | None = None
    adapter: str | None = None
    priority: int = 0
    steering: Steering | None = None
    watch: PictureWatch | None = None

    @property
    def ruled(self) -> bool:
        """Whether something acts on or looks at its attention, for which its prompt is read in one piece."""
        return self.steering is not None or self.watch is not None


@dataclass(frozen=True, slots=True)
class TokenScore:
    """Log-probability of one token, and of the most likely alternatives at its place (best first)."""

    token: int
    logprob: float
    top: tuple[tuple[int, float], ...] = ()


@dataclass(frozen=True, slots=True)
class Step:
    """One message of a stream.

    The first message has no token when ``prompt_scores`` were asked for; each later one has one token; the last carries
    ``finish_reason`` (and its token, unless generation ended without one).

    Attributes:
        token: The generated id, the end-of-text or stop token included.
        score: Its log-probability, where asked for.
        prompt_scores: Scores of prompt tokens 1.. (the first token has none), where asked for.
        finish_reason: Why the stream ends here; None while it goes on.
        error: With ``finish_reason="error"``, what went wrong.
        cached_tokens: Tokens of the prompt that were not computed, because an earlier text began with them.
    """

    token: int | None = None
    score: TokenScore | None = None
    prompt_scores: tuple[TokenScore, ...] | None = None
    finish_reason: FinishReason | None = None
    error: str | None = None
    cached_tokens: int = 0


@dataclass(frozen=True, slots=True)
class EngineStats:
    """Snapshot for /metrics: counts of requests, and the use of the key-value cache from 0 to 1.

    Attributes:
        reusing: Running requests that are long enough for layer reuse.
        kv_kept: Part of the key-value cache that no request uses, kept for later ones.
    """

    running: int
    waiting: int
    kv_usage: float
    reusing: int = 0
    kv_kept: float = 0.0


class QueueFullError(RuntimeError):
    """The waiting line is full; ``retry_after`` is the expected time until a place is free, in seconds."""

    def __init__(self, retry_after: float) -> None:
        super().__init__(f"the waiting line is full; try again in {retry_after:.0f} s")
        self.retry_after = retry_after


class DrainingError(RuntimeError):
    """The engine is shutting down and takes no new requests."""


def check_prompt(prompt: Sequence[int], max_tokens: int, *, vocab_size: int, max_model_len: int) -> None:
    """Refuse a prompt that a model cannot go on from.

    Raises:
        ValueError: it is empty, has ids outside the vocabulary, or leaves no room for ``max_tokens`` new ones.
    """
    if not prompt or not 0 <= min(prompt) <= max(prompt) < vocab_size:
        raise ValueError(f"a prompt must hold at least one token id, all from 0 to {vocab_size - 1}")
    if len(prompt) + max_tokens > max_model_len:
        raise ValueError(f"{len(prompt)} prompt tokens and {max_tokens} new exceed the model's {max_model_len}")


class Stream(Protocol):
    """The tokens of one request, for one reader in an asyncio loop."""

    def __aiter__(self) -> AsyncIterator[Step]:
        """Yield steps until one has a finish_reason."""
        ...

    def cancel(self) -> None:
        """Give the slot and its memory back; safe from any thread, and after the end."""
        ...


class Engine(Protocol):
    """Runs many requests at once on one model, on its own thread."""

    max_model_len: int
    """Most tokens of prompt and output together."""

    def submit(self, prompt: list[int], sampling: Sampling, pictures: Any = None) -> Stream:
        """Put a request in line; call it inside the asyncio loop that reads the stream.

        Args:
            prompt: Token ids.
            sampling: How to go on from them.
            pictures: What `Eyes.look` gave for this prompt, if it holds pictures.

        Raises:
            QueueFullError: too many requests or too many prompt tokens are waiting.
            DrainingError: `stop` was called.
        """
        ...

    def stats(self) -> EngineStats:
        """Counts at this moment."""
        ...

    def start(self) -> None:
        """Start the engine's thread."""
        ...

    def stop(self, grace: float) -> None:
        """Refuse new requests, give running ones ``grace`` seconds to end, then cancel them and join the thread."""
        ...
