"""Keeping text and control apart: special tokens that a message spells are read as text."""

from __future__ import annotations

import re
import secrets
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Literal

Kind = Literal["control", "plain", "picture"]
_PICTURE = None


class SpecialTokenGuard:
    """Hides the special tokens in the messages of one conversation, and finds them again in the rendered prompt.

    Args:
        special_tokens: Texts that the tokenizer reads as special tokens.
    """

    def __init__(self, special_tokens: Sequence[str]) -> None:
        longest_first = sorted((t for t in special_tokens if t), key=len, reverse=True)
        self._spelt = re.compile("|".join(map(re.escape, longest_first))) if longest_first else None
        self._nonce = secrets.token_hex(8)  # nobody can write a place-holder of their own
        self._hidden: list[str | None] = []

    def hide(self, messages: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
        """The messages, with a place-holder for each special token in any of their texts, and for each picture.

        A message's ``pictures`` says how many it has; they stand in front of its text, each on a line.
        """
        hidden = []
        for message in messages:
            texts = {k: v if k == "role" else self.hide_value(v) for k, v in message.items() if k != "pictures"}
            places = "".join(f"{self._hold(_PICTURE)}\n" for _ in range(message.get("pictures", 0)))
            hidden.append({**texts, "content": places + texts["content"]} if places else texts)
        return hidden

    def hide_value(self, value: Any) -> Any:
        """Any JSON value, with a place-holder for each special token in its texts and keys."""
        if isinstance(value, str):
            return value if self._spelt is None else self._spelt.sub(self._place_holder, value)
        if isinstance(value, Mapping):
            return {self.hide_value(k): self.hide_value(v) for k, v in value.items()}
        return [self.hide_value(v) for v in value] if isinstance(value, list | tuple) else value

    def _place_holder(self, match: re.Match[str]) -> str:
        return self._hold(match[0])

    def _hold(self, what: str | None) -> str:
        self._hidden.append(what)
        return f"@{self._nonce}:{len(self._hidden) - 1}@"  # unchanged by JSON, which templates make of functions

    def pieces(self, prompt: str) -> Iterator[tuple[str, Kind]]:
        """Yield the prompt in pieces: what may hold special tokens, what is plain text, and places of pictures."""
        if not self._hidden:
            yield prompt, "control"
            return
        parts = re.split(f"@{self._nonce}:(\\d+)@", prompt)
        for i, part in enumerate(parts):
            if i % 2:
                text = self._hidden[int(part)]
                yield ("", "picture") if text is _PICTURE else (text, "plain")
            elif part:
                yield part, "control"
