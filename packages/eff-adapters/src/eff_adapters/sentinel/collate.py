"""Pairs as a batch for a vision-language model: the context stands in the assistant's turn and carries no labels."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from typing import Any

import torch

from eff_adapters.sentinel.pairs import PreferencePair
from eff_adapters.sentinel.sampler import answer_prefix, encoded, joined

Example = tuple[Any, PreferencePair]
"""An image as the processor takes it, and a pair about it."""


class ContextPreferenceCollator:
    """Makes one batch of pairs: all good sentences first, then all bad ones, each behind prompt and context.

    Prompt, context and sentence are tokenised as one text. Labels begin at the first token that is not one of prompt
    and context alone: a token that holds the end of the context and the start of the sentence belongs to the sentence.
    The token that ends an answer is a target only where the model itself ended there.

    Args:
        processor: Of the model.
        max_length: Most tokens of a row, those of the picture included; longer pairs are left out with a warning.
        prompt: As in `SentenceSampler`.
        label_context: Put labels on the context too; that changes neither loss nor gradient.

    Attributes:
        dropped: Number of pairs left out so far.
        merged: Number of rows so far in which a token holds both context and sentence.
    """

    def __init__(
        self,
        processor: Any,
        max_length: int = 2048,
        *,
        prompt: Callable[[str], str] | None = None,
        label_context: bool = False,
    ) -> None:
        if max_length < 2:
            raise ValueError(f"max_length={max_length}; use 2 or more")
        self.processor, self.max_length, self.prompt, self.label_context = processor, max_length, prompt, label_context
        self.dropped = self.merged = 0

    def __call__(self, examples: Sequence[Example]) -> dict[str, Any]:
        """Inputs of the model for 2B rows, padded on the right, with ``labels`` int64 [2B, tokens].

        Raises:
            ValueError: there is no pair, or all of them are too long.
        """
        if not examples:
            raise ValueError("a batch needs at least one pair")
        prefixes = [self._prefix(pair) for _, pair in examples]
        end = self.processor.tokenizer.eos_token or ""
        texts = [
            joined(prefix, pair.context, sentence) + end * ended
            for which in ("win", "lose")
            for prefix, (_, pair) in zip(prefixes, examples, strict=True)
            for sentence, ended in [_side(pair, which)]
        ]
        images = [image for image, _ in examples]
        batch = encoded(self.processor, images * 2, texts, padding=True, padding_side="right")
        lengths = batch["attention_mask"].sum(1)
        count = len(examples)
        long = (lengths > self.max_length).view(2, count).any(0)
        if long.any():
            return self._without(examples, long.tolist())
        starts = [
            joined(p, "" if self.label_context else e[1].context) for p, e in zip(prefixes, examples, strict=True)
        ]
        before = encoded(self.processor, images, starts, padding=True, padding_side="right")
        labels = batch["input_ids"].masked_fill(batch["attention_mask"] == 0, -100)
        for i in range(2 * count):
            known = before["input_ids"][i % count][before["attention_mask"][i % count].bool()]
            shared = _common(known, batch["input_ids"][i])
            self.merged += shared < len(known)
            labels[i, :shared] = -100
        return {**batch, "labels": labels}

    def _prefix(self, pair: PreferencePair) -> str:
        return answer_prefix(self.processor, pair.question) if self.prompt is None else self.prompt(pair.question)

    def _without(self, examples: Sequence[Example], long: list[bool]) -> dict[str, Any]:
        self.dropped += sum(long)
        left = [e for e, too_long in zip(examples, long, strict=True) if not too_long]
        if not left:
            raise ValueError(f"all {len(examples)} pairs are longer than max_length={self.max_length} tokens")
        warnings.warn(f"{sum(long)} pairs longer than {self.max_length} tokens left out", stacklevel=3)
        return self(left)


def _side(pair: PreferencePair, which: str) -> tuple[str, bool]:
    return (pair.y_win, pair.win_ended) if which == "win" else (pair.y_lose, pair.lose_ended)


def _common(first: torch.Tensor, second: torch.Tensor) -> int:
    length = min(len(first), len(second))
    different = (first[:length] != second[:length]).nonzero()
    return int(different[0]) if len(different) else length
