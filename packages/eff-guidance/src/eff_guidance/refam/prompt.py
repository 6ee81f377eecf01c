"""The expression with its magnets as tokens, and what each token is there for (section 3 of the paper)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from eff_guidance.refam.config import DEFAULT_MAGNETS
from eff_guidance.refam.words import bare, choose_magnets, noun_phrase, split_words

TokenRole = Literal["content", "stop", "magnet", "special", "context", "pad"]


@dataclass(frozen=True, slots=True)
class MagnetPrompt:
    """Tokens of an expression with magnets.

    Attributes:
        input_ids: int64 [T].
        attention_mask: 1 where a token is no padding, int64 [T].
        role: What each token is: "content" of the expression, "stop" (stop words, punctuation, words outside of the
            noun phrase), "magnet", "special" (end of text, beginning, a mark of a space alone), "context", "pad".
        tokens: Text of each token.
        text: All as one text, for encoders that take text.
    """

    input_ids: Tensor
    attention_mask: Tensor
    role: tuple[TokenRole, ...]
    tokens: tuple[str, ...]
    text: str


def add_magnets(
    tokenizer: Any,
    expression: str,
    magnets: Sequence[str] = DEFAULT_MAGNETS,
    *,
    separate_eos: bool = True,
    context: str = "",
    only_noun_phrase: bool = False,
    max_length: int | None = None,
    pad: bool = False,
) -> MagnetPrompt:
    """Put magnets behind an expression.

    Args:
        tokenizer: A fast tokenizer of transformers.
        expression: What to look for, such as "the dog on the left".
        magnets: Words that draw attention to themselves; see `RefAMConfig.magnets`.
        separate_eos: Each magnet is tokenised alone, and the ids are laid one behind the other, so that each brings the
            end-of-text token that the tokenizer appends. Otherwise all is one text.
        context: Text before the expression.
        only_noun_phrase: Whether words behind the noun phrase of the target are counted as stop words.
        max_length: Most tokens that the text encoder takes.
        pad: Whether to fill up to ``max_length``.

    Raises:
        ValueError: the expression is empty, all magnets occur in it, there are more than ``max_length`` tokens,
            ``separate_eos`` is asked of a tokenizer that appends none, or ``pad`` lacks a length.
        TypeError: the tokenizer tells no places of its tokens.
    """
    words = split_words(expression)
    if not words:
        raise ValueError(f"the expression {expression!r} has no words")
    if pad and max_length is None:
        raise ValueError("pad=True needs max_length")
    chosen = choose_magnets(expression, tuple(magnets))
    start = len(context.rstrip()) + 1 if context.strip() else 0
    plain = f"{context.rstrip()} {expression}" if start else expression
    text = " ".join((plain, *chosen))
    target = {w.start + start for w in (noun_phrase(words) if only_noun_phrase else words) if w.is_content}
    if not target:  # an expression of stop words alone: all that is no punctuation counts
        target = {w.start + start for w in words if any(c.isalnum() for c in w.text)}

    spans: list[tuple[int, int, TokenRole]] = [(0, start, "context")] if start else []
    for word in words:
        at = word.start + start
        spans.append((at, word.end + start, "content" if at in target else "stop"))
    if separate_eos:
        if chosen and not _ends(tokenizer):
            raise ValueError(
                f"separate_eos=True, but {type(tokenizer).__name__} appends no end-of-text token; use False"
            )
        parts = [_tokens(tokenizer, plain, spans)]
        parts += [_magnet(_tokens(tokenizer, m, [(0, len(m), "magnet")]), tokenizer) for m in chosen]
    else:
        parts = [_tokens(tokenizer, text, [*spans, (len(plain), len(text), "magnet")])]
    found = [token for part in parts for token in part]
    if max_length is not None and len(found) > max_length:
        raise ValueError(f"{len(found)} tokens of {text!r}; the text encoder takes {max_length}")
    count = len(found)
    if pad and max_length is not None:
        filler = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id
        found += [(filler, tokenizer.convert_ids_to_tokens(filler), "pad")] * (max_length - count)
    ids, tokens, roles = zip(*found, strict=True)
    mask = torch.zeros(len(ids), dtype=torch.int64)
    mask[:count] = 1
    return MagnetPrompt(torch.tensor(ids), mask, roles, tokens, text)


def _tokens(tokenizer: Any, text: str, spans: list[tuple[int, int, TokenRole]]) -> list[tuple[int, str, TokenRole]]:
    """Id, text and role of each token of a text with the tokenizer's special tokens."""
    if not getattr(tokenizer, "is_fast", False):
        raise TypeError(f"{type(tokenizer).__name__} does not give the positions of its tokens; use a fast tokenizer")
    found = tokenizer(text, return_offsets_mapping=True, return_special_tokens_mask=True)
    names = tokenizer.convert_ids_to_tokens(found["input_ids"])
    special = found["special_tokens_mask"]
    return [
        (token, name, "special" if mark or not bare(name) else _role_at(text, at[0], at[1], spans))
        for token, name, mark, at in zip(found["input_ids"], names, special, found["offset_mapping"], strict=True)
    ]


def _magnet(part: list[tuple[int, str, TokenRole]], tokenizer: Any) -> list[tuple[int, str, TokenRole]]:
    """A magnet without the token that begins a text: it stands in the middle of one."""
    return part[1:] if part[0][0] == tokenizer.bos_token_id and part[0][0] != tokenizer.eos_token_id else part


def _role_at(text: str, start: int, end: int, spans: list[tuple[int, int, TokenRole]]) -> TokenRole:
    while start < end and text[start].isspace():  # a piece may hold the space before its word
        start += 1
    for first, last, role in spans:
        if start < last and end > first:
            return role
    return "special"


def _ends(tokenizer: Any) -> bool:
    ids = tokenizer("a")["input_ids"]
    return bool(ids) and ids[-1] in (tokenizer.eos_token_id, tokenizer.sep_token_id)
