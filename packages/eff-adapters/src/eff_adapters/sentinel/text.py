"""Sentences of a text, and the objects that a text names."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping

_END = re.compile(r"""[.!?]+["')\]]*(?=\s|$)""")
_SHORT = frozenset(("mr", "mrs", "ms", "dr", "st", "vs", "e.g", "i.e", "a.m", "p.m", "approx", "cf"))
_WORD = re.compile(r"[^\W_]+(?:['-][^\W_]+)*")
_PLURALS = {
    "men": "man", "women": "woman", "children": "child", "people": "person", "mice": "mouse", "geese": "goose",
    "feet": "foot", "teeth": "tooth", "knives": "knife", "leaves": "leaf", "wolves": "wolf", "loaves": "loaf",
    "shelves": "shelf", "scarves": "scarf",
}  # fmt: skip


def split_sentences(text: str) -> list[str]:
    """Sentences in order, stripped; what follows the last full stop is one too.

    A full stop ends a sentence before white space or at the end, unless an abbreviation such as "Dr." goes before it.
    """
    found, start = [], 0
    for end in _END.finditer(text):
        word = text[start : end.start()].rsplit(None, 1)[-1:] or [""]
        if end.group() == "." and word[0].lower().lstrip("(\"'") in _SHORT and end.end() < len(text):
            continue
        if sentence := text[start : end.end()].strip():
            found.append(sentence)
        start = end.end()
    if rest := text[start:].strip():
        found.append(rest)
    return found


class ObjectTable:
    """Finds objects in texts by a closed table of their names.

    Args:
        names: Each object with the other words for it, such as ``{"car": ["automobile"], "hot dog": []}``.

    Raises:
        ValueError: the table is empty, a name holds no word, or a word stands for two objects.
    """

    def __init__(self, names: Mapping[str, Iterable[str]]) -> None:
        self._table: dict[tuple[str, ...], str] = {}
        for name, others in names.items():
            for words in (name, *others):
                key = tuple(_words(words))
                if not key:
                    raise ValueError(f"a name of {name!r} holds no word: {words!r}")
                if self._table.setdefault(key, name) != name:
                    raise ValueError(f"{words!r} stands for {self._table[key]!r} and for {name!r}")
        if not self._table:
            raise ValueError("the table of objects is empty")
        self._longest = max(len(key) for key in self._table)

    def __call__(self, text: str) -> tuple[str, ...]:
        """Objects that a text names, in order and once each; the longest name counts ("hot dog" names no dog)."""
        words, found, at = _words(text), [], 0
        while at < len(words):
            for length in range(min(self._longest, len(words) - at), 0, -1):
                name = self._name(words[at : at + length])
                if name is not None:
                    found.append(name)
                    at += length
                    break
            else:
                at += 1
        return tuple(dict.fromkeys(found))

    def _name(self, words: list[str]) -> str | None:
        for last in _singulars(words[-1]):
            name = self._table.get((*words[:-1], last))
            if name is not None:
                return name
        return None


def _words(text: str) -> list[str]:
    return _WORD.findall(text.lower())


def _singulars(word: str) -> list[str]:
    """The word itself and what it may be the plural of."""
    found = [word]
    if word in _PLURALS:
        found.append(_PLURALS[word])
    if word.endswith("ies"):
        found.append(word[:-3] + "y")
    if word.endswith("es"):
        found.append(word[:-2])
    if word.endswith("s"):
        found.append(word[:-1])
    return found
