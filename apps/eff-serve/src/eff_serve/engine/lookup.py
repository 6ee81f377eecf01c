"""Guesses of how a text goes on, from what it said before (prompt-lookup decoding, Saxena 2023).

Answers repeat what their prompts say: names, numbers, code, whole sentences. Where the last few tokens stood in the
text before, what followed them then is guessed to follow again. The model reads the guess in one pass and says for each
token what it would have chosen itself, so the answer is the one without guesses.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from eff_serve.engine.sequence import Sequence

_LENGTH = 3
"""Tokens that must agree."""

_LEAST = 2
"""Guesses of one token are not worth a pass over several."""

_LONGEST_PAUSE = 16


class Guesser:
    """Guesses for one sequence.

    Args:
        tokens: The sequence's tokens; the list may grow, and is not copied.
    """

    def __init__(self, tokens: list[int]) -> None:
        self._tokens = tokens
        self._after: dict[tuple[int, ...], int] = {}  # the last tokens of a place -> the place that follows
        self._known = _LENGTH
        self._wait = self._pause = 0

    def guess(self, most: int) -> list[int]:
        """Tokens that may follow, at most ``most``; none where nothing like this was said, or guesses were wrong."""
        tokens = self._tokens
        for end in range(self._known, len(tokens)):
            self._after[tuple(tokens[end - _LENGTH : end])] = end
        self._known = max(self._known, len(tokens))
        if self._wait > 0:
            self._wait -= 1
            return []
        at = self._after.get(tuple(tokens[-_LENGTH:]))
        if at is None or most < _LEAST:
            return []
        period = len(tokens) - at  # beyond the end, a text that repeats itself goes on doing so
        return [tokens[at + i % period] for i in range(most)]

    def came_true(self, count: int) -> None:
        """Say how many tokens of the last guess were right; after a wrong one some steps go without."""
        self._pause = 0 if count else min(_LONGEST_PAUSE, 2 * self._pause + 1)
        self._wait = self._pause


def guess_for(sequence: Sequence, most: int) -> list[int]:
    """Tokens that may follow those of a sequence, at most ``most`` and fewer than it has yet to generate."""
    room = min(most, sequence.sampling.max_tokens - len(sequence.output) - 1)
    if room < 1 or sequence.sampling.ruled:  # rules of attention want an answer token by token
        return []
    if sequence.guesser is None:
        sequence.guesser = Guesser(sequence.tokens)
    return sequence.guesser.guess(room)
