"""Output that follows a grammar: a mask of admissible tokens at each step, from llguidance."""

from __future__ import annotations

import functools
from pathlib import Path

import numpy as np
import torch
from torch import Tensor


class GrammarMatcher:
    """State of one output within its grammar.

    Raises:
        ValueError: the grammar is not valid, or no text satisfies it.
    """

    def __init__(self, grammar: str, tokenizer_file: Path, vocab_size: int, eos: int) -> None:
        import llguidance

        self._vocab_size = vocab_size
        self._matcher = llguidance.LLMatcher(_tokenizer(tokenizer_file, vocab_size, eos), grammar)
        if self._matcher.is_error():
            raise ValueError(f"invalid grammar: {self._matcher.get_error()}")
        self._first: Tensor | None = self._mask()
        if self._matcher.is_error():
            raise ValueError("no text satisfies the grammar")

    def allowed(self) -> Tensor:
        """Tokens that may come next, bool [vocab]."""
        mask, self._first = self._first, None
        return self._mask() if mask is None else mask

    def _mask(self) -> Tensor:
        bits = np.frombuffer(self._matcher.compute_bitmask(), dtype=np.uint8)
        return torch.from_numpy(np.unpackbits(bits, bitorder="little")[: self._vocab_size].astype(bool))

    def accept(self, token: int) -> None:
        """Take note of the chosen token."""
        self._matcher.consume_token(token)

    @property
    def done(self) -> bool:
        """Whether the output is complete and nothing can follow."""
        return bool(self._matcher.is_stopped())


@functools.lru_cache(maxsize=4)
def _tokenizer(file: Path, vocab_size: int, eos: int) -> object:
    import llguidance

    return llguidance.LLTokenizer(file.read_text(encoding="utf-8"), n_vocab=vocab_size, eos_token=eos)
