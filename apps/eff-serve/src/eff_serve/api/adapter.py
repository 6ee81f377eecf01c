"""The model's tokenizer with what the HTTP layer asks of it on top."""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from typing import Any

from eff_serve.models.tokenizer import IncrementalDecoder, Tokenizer


class ServedTokenizer:
    """A `Tokenizer` for `create_app`: adds the tokens that end a text, and the bytes of single tokens.

    Args:
        tokenizer: The model's tokenizer.
        eos_token_ids: Tokens that end a text.
    """

    def __init__(self, tokenizer: Tokenizer, eos_token_ids: frozenset[int]) -> None:
        self._tokenizer = tokenizer
        self.eos_token_ids = eos_token_ids
        self.vocab_size = tokenizer.vocab_size
        self.dialect = tokenizer.dialect
        self.thinks = tokenizer.thinks

    def encode(self, text: str, *, add_special_tokens: bool = True) -> list[int]:
        """Token ids of a text."""
        return self._tokenizer.encode(text, add_special_tokens)

    def decode(self, ids: Sequence[int], *, skip_special_tokens: bool = False) -> str:
        """Text of token ids."""
        return self._tokenizer.decode(ids, skip_special_tokens)

    def marker(self, text: str) -> tuple[int, bool] | None:
        """See `Tokenizer.marker`."""
        return self._tokenizer.marker(text)

    def token_bytes(self, token: int) -> bytes:
        """The bytes that one token stands for; part of a character for some tokens of a byte-level vocabulary."""
        piece = self._tokenizer.backend.id_to_token(token)
        if piece is None:
            return b""
        bytes_of = _byte_level()
        if token in self._tokenizer.added_tokens or any(c not in bytes_of for c in piece):
            return self._tokenizer.token_text(token).encode()
        return bytes(bytes_of[c] for c in piece)

    def encode_chat(self, messages: Sequence[Mapping[str, Any]], **kwargs: Any) -> list[int]:
        """Token ids of the prompt that the chat template makes of messages."""
        return self._tokenizer.encode_chat(messages, **kwargs)

    def decoder(self, *, skip_special_tokens: bool = True) -> IncrementalDecoder:
        """Fresh incremental decoder."""
        return IncrementalDecoder(self._tokenizer, skip_special_tokens)


@functools.cache
def _byte_level() -> dict[str, int]:
    """Letters by which byte-level vocabularies spell bytes: printable ones are themselves, others from U+0100."""
    printable = [*range(ord("!"), ord("~") + 1), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [b for b in range(256) if b not in printable]
    return {chr(b): b for b in printable} | {chr(0x100 + i): b for i, b in enumerate(others)}
