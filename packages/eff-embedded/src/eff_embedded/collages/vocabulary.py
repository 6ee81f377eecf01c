"""The objects of the collages: names, synonyms, classes, and which of them go together."""

from __future__ import annotations

import csv
import re
from collections.abc import Iterable
from dataclasses import dataclass
from functools import lru_cache
from importlib.resources import files
from typing import NamedTuple

from eff_embedded.collages.english import plural

CLASS_NOUNS = {
    "instrument": "musical instrument",
    "furniture": "piece of furniture",
    "clothing": "piece of clothing",
}


@dataclass(frozen=True, kw_only=True, slots=True)
class Thing:
    """One kind of object.

    Attributes:
        name: Its name in captions and labels, such as "dog".
        code: Unicode code points of its picture, such as "1f436".
        synonyms: Other names that captions may use; each means this object alone.
        also: Names that are understood when read, but never written ("puppy", "milk").
        classes: What kinds of thing it is, the widest first: ("animal", "bird").
    """

    name: str
    code: str
    synonyms: tuple[str, ...]
    also: tuple[str, ...]
    classes: tuple[str, ...]


class Mention(NamedTuple):
    """A word of the vocabulary found in a text.

    Attributes:
        name: Name of the object, or of the class if ``is_class``.
        is_class: Whether the text names a class ("animal") rather than an object.
        text: The words as they stand in the text.
        start: Index of their first character.
    """

    name: str
    is_class: bool
    text: str
    start: int


def _read(file: str) -> list[dict[str, str]]:
    text = files("eff_embedded.collages").joinpath(file).read_text(encoding="utf-8")
    return list(csv.DictReader(text.splitlines()))


def _split(field: str) -> tuple[str, ...]:
    return tuple(part for part in field.split(";") if part)


@lru_cache(maxsize=1)
def things() -> dict[str, Thing]:
    """All objects by name, in a fixed order."""
    return {
        row["name"]: Thing(
            name=row["name"],
            code=row["code"],
            synonyms=_split(row["synonyms"]),
            also=_split(row["also"]),
            classes=_split(row["classes"]),
        )
        for row in _read("vocabulary.csv")
    }


def thing(name: str) -> Thing:
    """The object of this name.

    Raises:
        ValueError: there is none.
    """
    found = things().get(name)
    if found is None:
        raise ValueError(f"no object is called {name!r}; eff_embedded.collages.things() lists {len(things())} names")
    return found


@lru_cache(maxsize=1)
def classes() -> dict[str, tuple[str, ...]]:
    """Names of the objects in each class: ``classes()["bird"]``."""
    members: dict[str, list[str]] = {}
    for each in things().values():
        for name in each.classes:
            members.setdefault(name, []).append(each.name)
    return {name: tuple(found) for name, found in members.items()}


def class_noun(name: str) -> str:
    """The class as something one can count: "animal", "piece of furniture"."""
    return CLASS_NOUNS.get(name, name)


def everyday_pairs(probability: float = 0.9) -> tuple[tuple[str, str, float], ...]:
    """About sixty pairs of objects that go together, such as dog and bone; no object is in two pairs.

    Args:
        probability: How often one brings the other along, for all pairs alike.
    """
    return tuple((row["first"], row["second"], probability) for row in _read("pairs.csv"))


@lru_cache(maxsize=1)
def _finder() -> tuple[re.Pattern[str], dict[str, tuple[str, bool]]]:
    known: dict[str, tuple[str, bool]] = {}
    for name in classes():
        for noun in {name, class_noun(name)}:
            known[noun] = known[plural(noun)] = (name, True)
    for each in things().values():
        for noun in (each.name, *each.synonyms, *each.also):
            known[noun.lower()] = known[plural(noun).lower()] = (each.name, False)
    longest_first: Iterable[str] = sorted(known, key=lambda noun: (-len(noun), noun))
    return re.compile(rf"(?<!\w)(?:{'|'.join(map(re.escape, longest_first))})(?!\w)", re.IGNORECASE), known


def find(text: str) -> tuple[Mention, ...]:
    """Objects and classes that a text names, in order: names, synonyms, plurals; "fire truck" is no "fire".

    Meant for captions and answers about collages. It does not read grammar: in "I saw a dog" it finds a saw.
    """
    pattern, known = _finder()
    return tuple(Mention(*known[m.group().lower()], m.group(), m.start()) for m in pattern.finditer(text))
