"""What English words do in a referring expression."""

from __future__ import annotations

import re
from typing import NamedTuple

COLOURS = ("pink", "cyan", "purple")

_STOP = """a about above after again against ain all am an and any are aren as at be because been before being below
    between both but by can couldn d did didn do does doesn doing don down during each few for from further had hadn
    has hasn have haven having he her here hers herself him himself his how i if in into is isn it its itself just ll
    m ma me mightn more most mustn my myself needn no nor not now o of off on once only or other our ours ourselves out
    over own re s same shan she should shouldn so some such t than that the their theirs them themselves then there
    these they this those through to too under until up ve very was wasn we were weren what when where which while who
    whom why will with won wouldn y you your yours yourself yourselves"""
STOP_WORDS = frozenset(_STOP.split())

# Where the noun phrase of the target ends: what follows tells where it is, or what it does.
_ENDS = """above at before behind below beside between by from in inside near next of off on onto opposite over under
    underneath who which that whose with without while and"""
_BORDERS = frozenset(_ENDS.split())
_WORD = re.compile(r"\w+(?:['-]\w+)*|[^\w\s]")
_PIECE_MARKS = "\u2581\u0120\u010a"  # spaces and line ends as SentencePiece and byte-level tokenizers write them

DIRECTIONS = {
    "left": "left", "leftmost": "left", "right": "right", "rightmost": "right", "top": "top", "upper": "top",
    "topmost": "top", "bottom": "bottom", "lower": "bottom", "bottommost": "bottom", "middle": "middle",
    "center": "middle", "centre": "middle", "central": "middle",
}  # fmt: skip


class Word(NamedTuple):
    """A word or a sign of punctuation, and where it is in its text."""

    text: str
    start: int
    end: int

    @property
    def is_content(self) -> bool:
        """Whether it is neither a stop word nor punctuation."""
        return self.text.lower() not in STOP_WORDS and any(c.isalnum() for c in self.text)


def split_words(text: str) -> list[Word]:
    """Words and punctuation of a text, in order."""
    return [Word(m.group(), m.start(), m.end()) for m in _WORD.finditer(text)]


def noun_phrase(words: list[Word]) -> list[Word]:
    """The words that name the target: those before the first preposition or relative word behind a content word.

    "the man next to the red car" gives "the man". It is a rule of thumb and no parse: of "left of the car the man"
    it keeps "left".
    """
    named = False
    for i, word in enumerate(words):
        if named and word.text.lower() in _BORDERS:
            return words[:i]
        named = named or word.is_content
    return words


def directions(text: str) -> list[str]:
    """Directions that a text names: left, right, top, bottom, middle; each once."""
    found = [DIRECTIONS[w.text.lower()] for w in split_words(text) if w.text.lower() in DIRECTIONS]
    return list(dict.fromkeys(found))


def choose_magnets(expression: str, magnets: tuple[str, ...]) -> tuple[str, ...]:
    """Magnets for an expression: colours that it uses give way to the next of `COLOURS`.

    Raises:
        ValueError: all magnets occur in the expression.
    """
    used = {w.text.lower() for w in split_words(expression)}
    free = [c for c in COLOURS if c not in used and c not in magnets]
    chosen = []
    for magnet in magnets:
        if magnet.lower() in COLOURS and magnet.lower() in used:
            if not free:
                continue
            magnet = free.pop(0)
        chosen.append(magnet)
    if magnets and all(m.lower() in used for m in chosen):
        raise ValueError(f"magnets={magnets} all occur in {expression!r}; use words that it does not have, or none")
    return tuple(chosen)


def bare(piece: str) -> str:
    """What is left of a piece of a word without the marks of its tokenizer."""
    return piece.removesuffix("</w>").strip(_PIECE_MARKS + " ")
