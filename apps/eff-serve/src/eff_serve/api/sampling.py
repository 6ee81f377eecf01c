"""From request fields to the engine's `Sampling`, with the checks that need the model."""

from __future__ import annotations

import asyncio
from dataclasses import replace

from eff_http import ApiError, bad_request

from eff_serve.api.grammar import grammar_for
from eff_serve.api.schema.sampling import SamplingFields
from eff_serve.engine.types import Sampling


async def sampling_for(
    request: SamplingFields,
    *,
    max_tokens: int,
    logprobs: int | None,
    prompt_logprobs: int | None,
    vocab_size: int,
    adapter: str | None,
) -> Sampling:
    """Check what depends on the model and build the engine's request.

    Raises:
        ApiError: 400 for token ids outside the vocabulary, ``min_tokens`` above ``max_tokens``, a grammar that does
            not compile.
    """
    bias = {int(token): value for token, value in (request.logit_bias or {}).items()}
    _check_tokens(bias, vocab_size, "logit_bias")
    _check_tokens(request.stop_token_ids or (), vocab_size, "stop_token_ids")
    min_tokens = request.min_tokens or 0
    if min_tokens > max_tokens:
        raise bad_request(
            f"min_tokens={min_tokens} is more than the {max_tokens} tokens that may be generated", "min_tokens"
        )
    return Sampling(
        max_tokens=max_tokens,
        adapter=adapter,
        priority=request.priority or 0,
        min_tokens=min_tokens,
        temperature=_or(request.temperature, 1.0),
        top_p=_or(request.top_p, 1.0),
        top_k=max(0, request.top_k or 0),
        min_p=_or(request.min_p, 0.0),
        repetition_penalty=_or(request.repetition_penalty, 1.0),
        presence_penalty=_or(request.presence_penalty, 0.0),
        frequency_penalty=_or(request.frequency_penalty, 0.0),
        logit_bias=bias,
        seed=request.seed,
        stop_token_ids=frozenset(request.stop_token_ids or ()),
        ignore_eos=bool(request.ignore_eos),
        logprobs=logprobs,
        prompt_logprobs=prompt_logprobs,
        grammar=await asyncio.to_thread(grammar_for, request),
        steering=None if request.eff is None else request.eff.steering,
    )


def for_choice(sampling: Sampling, choice: int) -> Sampling:
    """The sampling of one of ``n`` choices: with a seed, each choice has its own, and the first has the seed itself."""
    if sampling.seed is None or choice == 0:
        return sampling
    seed = (sampling.seed + choice + 2**63) % 2**64 - 2**63
    return replace(sampling, seed=seed)


def token_limit(prompt: int, wanted: int | None, max_model_len: int, param: str) -> int:
    """Number of tokens that may follow a prompt of ``prompt`` tokens; None asks for as many as fit.

    Raises:
        ApiError: 400 with both numbers when prompt and output do not fit the context.
    """
    if prompt == 0:
        raise bad_request(f"{param} has no tokens; at least one is needed", param, "empty_prompt")
    room = max_model_len - prompt
    needed = 1 if wanted is None else wanted
    if needed > room:
        raise too_long(prompt, needed, max_model_len, param)
    return room if wanted is None else wanted


def too_long(prompt: int, needed: int, max_model_len: int, param: str) -> ApiError:
    """400 for a request that does not fit the context."""
    message = (
        f"this model's maximum context length is {max_model_len} tokens, but {prompt + needed} were asked for "
        f"({prompt} in the prompt, {needed} to generate); shorten the prompt or lower max_tokens"
    )
    return bad_request(message, param, "context_length_exceeded")


def _check_tokens(tokens: object, vocab_size: int, param: str) -> None:
    for token in tokens:  # type: ignore[attr-defined]
        if token >= vocab_size:
            raise bad_request(
                f"{param}: token {token} is outside the vocabulary of {vocab_size}", param, "invalid_value"
            )


def _or(value: float | None, default: float) -> float:
    return default if value is None else float(value)
