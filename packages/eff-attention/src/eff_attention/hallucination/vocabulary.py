"""Objects in text: words and their plurals, double words first."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping

_WORD = re.compile(r"[a-z0-9]+(?:['-][a-z0-9]+)*")
_IRREGULAR = {
    "men": "man", "women": "woman", "children": "child", "people": "person", "mice": "mouse", "geese": "goose",
    "feet": "foot", "teeth": "tooth", "knives": "knife", "leaves": "leaf", "wolves": "wolf", "loaves": "loaf",
    "shelves": "shelf", "scarves": "scarf", "calves": "calf", "buses": "bus", "skis": "ski",
}  # fmt: skip


def singular(word: str) -> tuple[str, ...]:
    """Words that a word may be the plural of, itself first."""
    found = [word]
    if word in _IRREGULAR:
        found.append(_IRREGULAR[word])
    if word.endswith("ies") and len(word) > 4:
        found.append(word[:-3] + "y")
    if word.endswith("es") and len(word) > 3:
        found.append(word[:-2])
    if word.endswith("s") and not word.endswith("ss"):
        found.append(word[:-1])
    return tuple(found)


class Vocabulary:
    """A table from objects to the words that mean them.

    Args:
        synonyms: Words of each object, such as ``{"car": ["automobile"], "hot dog": []}``; an object is a word for
            itself. Words may consist of several.

    Raises:
        ValueError: the table is empty, or one word means two objects.
    """

    def __init__(self, synonyms: Mapping[str, Iterable[str]]) -> None:
        if not synonyms:
            raise ValueError("a vocabulary needs at least one object")
        self._objects: dict[tuple[str, ...], str] = {}
        for name, words in synonyms.items():
            for word in dict.fromkeys((name, *words)):
                key = tuple(_WORD.findall(word.lower()))
                if not key:
                    raise ValueError(f"{word!r} of {name!r} holds no word")
                if (other := self._objects.setdefault(key, name)) != name:
                    raise ValueError(f"{word!r} means both {other!r} and {name!r}")
        self._longest = max(map(len, self._objects))
        self.objects = frozenset(synonyms)

    def mentions(self, text: str) -> list[str]:
        """Objects that a text mentions, in order and with repetition; the longest words count ("hot dog" is no dog)."""
        words = _WORD.findall(text.lower())
        found, i = [], 0
        while i < len(words):
            for length in range(min(self._longest, len(words) - i), 0, -1):
                if (name := self._lookup(words[i : i + length])) is not None:
                    found.append(name)
                    i += length
                    break
            else:
                i += 1
        return found

    def _lookup(self, words: list[str]) -> str | None:
        for last in singular(words[-1]):
            if (name := self._objects.get((*words[:-1], last))) is not None:
                return name
        return None


def count_words(text: str) -> int:
    """Number of words."""
    return len(_WORD.findall(text.lower()))
