"""CHAIR: invented objects in captions (Rohrbach and others, 2018)."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass

from eff_attention.hallucination.vocabulary import Vocabulary, count_words


@dataclass(frozen=True, slots=True)
class Caption:
    """What one caption says: objects with repetition, the true ones, and its number of words."""

    mentions: tuple[str, ...]
    truth: frozenset[str]
    words: int

    @property
    def invented(self) -> tuple[str, ...]:
        """Mentions of objects that are not there."""
        return tuple(m for m in self.mentions if m not in self.truth)


@dataclass(frozen=True, slots=True)
class ChairResult:
    """Scores of a set of captions. Rates without anything to divide by are 0.

    Attributes:
        captions: One entry a caption; `bootstrap` them through `ChairResult`.
    """

    captions: tuple[Caption, ...]

    @property
    def chair_i(self) -> float:
        """Share of mentions that are invented."""
        return _ratio(sum(len(c.invented) for c in self.captions), sum(len(c.mentions) for c in self.captions))

    @property
    def chair_s(self) -> float:
        """Share of captions with an invented object."""
        return _ratio(sum(bool(c.invented) for c in self.captions), len(self.captions))

    @property
    def recall(self) -> float:
        """Share of true objects that are mentioned, over all captions."""
        hits = sum(len(c.truth & set(c.mentions)) for c in self.captions)
        return _ratio(hits, sum(len(c.truth) for c in self.captions))

    @property
    def precision(self) -> float:
        """Share of mentioned objects, each counted once a caption, that are true."""
        hits = sum(len(c.truth & set(c.mentions)) for c in self.captions)
        return _ratio(hits, sum(len(set(c.mentions)) for c in self.captions))

    @property
    def f1(self) -> float:
        """Harmonic mean of recall and precision."""
        return _ratio(2 * self.recall * self.precision, self.recall + self.precision)

    @property
    def length(self) -> float:
        """Mean number of words: short captions invent little."""
        return _ratio(sum(c.words for c in self.captions), len(self.captions))


def chair(captions: Sequence[str], truth: Sequence[Collection[str]], vocabulary: Vocabulary) -> ChairResult:
    """Compare captions with the objects of their pictures.

    Raises:
        ValueError: the numbers differ, or an object is not in the vocabulary.
    """
    if len(captions) != len(truth):
        raise ValueError(f"{len(captions)} captions need one set of true objects each, got {len(truth)}")
    entries = []
    for text, objects in zip(captions, truth, strict=True):
        if unknown := sorted(set(objects) - vocabulary.objects):
            raise ValueError(f"objects {unknown} are not in the vocabulary")
        entries.append(Caption(tuple(vocabulary.mentions(text)), frozenset(objects), count_words(text)))
    return ChairResult(tuple(entries))


def distinct_n(texts: Sequence[str], n: int = 2) -> float:
    """Share of n-grams of words that are different, over all texts: low where a model repeats itself."""
    if n < 1:
        raise ValueError(f"n must be 1 or more, got {n}")
    grams: list[tuple[str, ...]] = []
    for text in texts:
        words = text.lower().split()
        grams += [tuple(words[i : i + n]) for i in range(len(words) - n + 1)]
    return _ratio(len(set(grams)), len(grams))


def _ratio(above: float, below: float) -> float:
    return above / below if below else 0.0
