"""Log-probabilities in the forms of the two completion endpoints."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from eff_serve.api.schema.chat import ChatLogprobs, TokenLogprob, TopLogprob
from eff_serve.api.schema.common import PromptLogprob, PromptLogprobs
from eff_serve.api.schema.completions import CompletionLogprobs
from eff_serve.api.tokenizer import Tokenizer
from eff_serve.engine.types import TokenScore


class PlacedScore(NamedTuple):
    """A token's score and where its text begins in the answer, in characters."""

    score: TokenScore
    offset: int


def _readable(raw: bytes) -> str | None:
    try:
        return raw.decode()
    except UnicodeDecodeError:
        return None


def token_name(tokenizer: Tokenizer, token: int) -> str:
    r"""The token's text, or ``bytes:\\xe2\\x80`` where it is no whole character (so no two tokens share a name)."""
    raw = tokenizer.token_bytes(token)
    text = _readable(raw)
    return "bytes:" + "".join(f"\\x{b:02x}" for b in raw) if text is None else text


def _top(tokenizer: Tokenizer, token: int, logprob: float) -> TopLogprob:
    raw = tokenizer.token_bytes(token)
    text = _readable(raw)
    return TopLogprob(token=raw.decode(errors="replace") if text is None else text, logprob=logprob, bytes=list(raw))


def chat_logprobs(tokenizer: Tokenizer, scores: Sequence[PlacedScore]) -> ChatLogprobs:
    """Scores as /v1/chat/completions reports them."""
    content = []
    for score, _ in scores:
        own = _top(tokenizer, score.token, score.logprob)
        top = [_top(tokenizer, token, logprob) for token, logprob in score.top]
        content.append(TokenLogprob(token=own.token, logprob=own.logprob, bytes=own.bytes, top_logprobs=top))
    return ChatLogprobs(content=content)


def completion_logprobs(
    tokenizer: Tokenizer, scores: Sequence[PlacedScore], *, first: int | None = None, shift: int = 0
) -> CompletionLogprobs:
    """Scores as /v1/completions reports them.

    Args:
        tokenizer: Names the tokens.
        scores: One entry for each token.
        first: Token put in front without a score: the first of an echoed prompt.
        shift: Added to the offsets: length of the text in front.
    """
    result = CompletionLogprobs(tokens=[], token_logprobs=[], top_logprobs=[], text_offset=[])
    if first is not None:
        result.tokens.append(token_name(tokenizer, first))
        result.token_logprobs.append(None)
        result.top_logprobs.append(None)
        result.text_offset.append(0)
    for score, offset in scores:
        name = token_name(tokenizer, score.token)
        top = {token_name(tokenizer, token): logprob for token, logprob in score.top}
        result.tokens.append(name)
        result.token_logprobs.append(score.logprob)
        result.top_logprobs.append({**top, name: score.logprob})
        result.text_offset.append(shift + offset)
    return result


def prompt_logprobs(tokenizer: Tokenizer, scores: Sequence[TokenScore]) -> PromptLogprobs:
    """Scores of the prompt in vLLM's form: by token id, None for the first token."""
    result: PromptLogprobs = [None]
    for score in scores:
        entry: dict[str, PromptLogprob] = {}
        for rank, (token, logprob) in enumerate(score.top, start=1):
            entry[str(token)] = PromptLogprob(logprob=logprob, rank=rank, decoded_token=token_name(tokenizer, token))
        if str(score.token) not in entry:
            name = token_name(tokenizer, score.token)
            entry[str(score.token)] = PromptLogprob(logprob=score.logprob, rank=None, decoded_token=name)
        result.append(entry)
    return result


def placed_in_prompt(tokenizer: Tokenizer, prompt: Sequence[int], scores: Sequence[TokenScore]) -> list[PlacedScore]:
    """Scores of the prompt's tokens 1.. with the places of their texts."""
    decoder = tokenizer.decoder(skip_special_tokens=False)
    offsets = []
    length = 0
    for token in prompt:
        offsets.append(length)
        length += len(decoder.push(token))
    return [PlacedScore(score, offset) for score, offset in zip(scores, offsets[1:], strict=True)]
