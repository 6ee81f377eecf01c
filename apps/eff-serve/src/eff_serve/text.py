"""From tokens to the text that a reader sees: whole characters, and nothing of or after a stop string."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import Protocol


class Decoder(Protocol):
    """Turns token ids into text one by one, holding back bytes that do not yet make a whole character."""

    def push(self, token: int) -> str:
        """Text that this token completes."""
        ...

    def flush(self) -> str:
        """What is left at the end; bytes that never made a character become U+FFFD."""
        ...


class TextAssembler:
    """Visible text of one answer, piece by piece, whatever way it was split into tokens.

    Text that may still turn into a stop string is held back until the next token decides. When several stop strings
    fit, the one that ends first wins, and among those the one that starts first; the result is the same for every split
    into tokens.

    Args:
        decoder: Fresh decoder of this answer.
        stop: Stop strings, none of them empty.
        include_stop: Keep the stop string in the text.
        min_tokens: A stop string that ends within the first so many tokens does not count.
        silent: Tokens that end an answer without being shown (end-of-text, ``stop_token_ids``); they are shown with
            ``include_stop``.
    """

    def __init__(
        self,
        decoder: Decoder,
        *,
        stop: Sequence[str] = (),
        include_stop: bool = False,
        min_tokens: int = 0,
        silent: Collection[int] = (),
    ) -> None:
        self._decoder = decoder
        self._stop = tuple(stop)
        self._include_stop = include_stop
        self._min_tokens = min_tokens
        self._silent = silent
        self._held = ""
        self._floor = 0
        self.length = 0
        """Characters decoded so far, shown or held back: where the text of the next token begins."""
        self.tokens = 0
        """Tokens taken in so far."""
        self.stopped = False
        """Whether a stop string was met; nothing may be pushed after it."""

    def push(self, token: int, *, last: bool = False) -> str:
        """Take a token in, return the text that is now certain; ``last`` marks the token that ended it."""
        self.tokens += 1
        if last and token in self._silent and not self._include_stop:
            return ""
        return self._extend(self._decoder.push(token))

    def finish(self) -> str:
        """Return what was held back, once no token follows."""
        if self.stopped:
            return ""
        text = self._extend(self._decoder.flush())
        if not self.stopped:
            text += self._held
            self._held = ""
        return text

    def _extend(self, piece: str) -> str:
        start = self.length - len(self._held)
        self.length += len(piece)
        if not self._stop:
            return piece
        if self.tokens <= self._min_tokens:
            self._floor = self.length
        text = self._held + piece
        match = self._first_match(text, self._floor - start)
        if match is not None:
            self.stopped = True
            self._held = ""
            return text[: match[0] if self._include_stop else match[1]]
        held = max(undecided(text, stop) for stop in self._stop)
        self._held = text[len(text) - held :]
        return text[: len(text) - held]

    def _first_match(self, text: str, floor: int) -> tuple[int, int] | None:
        """(end, start) of the stop string that ends first behind ``floor``."""
        found = []
        for stop in self._stop:
            start = text.find(stop, max(0, floor - len(stop) + 1))
            if start >= 0:
                found.append((start + len(stop), start))
        return min(found, default=None)


def undecided(text: str, marker: str) -> int:
    """Length of the longest end of a text that may still become a marker, because the marker starts with it."""
    return next((n for n in range(min(len(marker) - 1, len(text)), 0, -1) if text.endswith(marker[:n])), 0)
