"""What the HTTP layer asks of a tokenizer, and how single tokens are spelt in responses."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Protocol

from eff_serve.models.dialects import Dialect
from eff_serve.text import Decoder


class Tokenizer(Protocol):
    """Text to token ids and back."""

    vocab_size: int
    eos_token_ids: frozenset[int]
    dialect: Dialect
    """How the model writes calls of functions."""
    thinks: bool
    """Whether the model writes thoughts between ``<think>`` tags."""

    def encode(self, text: str, *, add_special_tokens: bool = True) -> list[int]:
        """Token ids of a text; names of special tokens in it are read as those tokens."""
        ...

    def decode(self, ids: Sequence[int], *, skip_special_tokens: bool = False) -> str:
        """Text of token ids."""
        ...

    def marker(self, text: str) -> tuple[int, bool] | None:
        """Id of the token that a text is by itself, and whether it is a special one; None for ordinary text."""
        ...

    def token_bytes(self, token: int) -> bytes:
        """The bytes that one token stands for."""
        ...

    def encode_chat(
        self,
        messages: Sequence[Mapping[str, Any]],
        *,
        tools: Sequence[Mapping[str, Any]] | None = None,
        add_special_tokens: bool = False,
        add_generation_prompt: bool = True,
        continue_final_message: bool = False,
        more: Mapping[str, Any] | None = None,
    ) -> list[int]:
        """Token ids of the prompt that the chat template makes of messages; ValueError when it refuses them."""
        ...

    def decoder(self, *, skip_special_tokens: bool = True) -> Decoder:
        """Fresh incremental decoder."""
        ...
