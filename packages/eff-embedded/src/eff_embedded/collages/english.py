"""The little English that captions need: articles, plurals, numbers and lists."""

from __future__ import annotations

from collections.abc import Sequence

_IRREGULAR = {
    "mouse": "mice",
    "sheep": "sheep",
    "deer": "deer",
    "fish": "fish",
    "goldfish": "goldfish",
    "aircraft": "aircraft",
    "wolf": "wolves",
    "leaf": "leaves",
    "loaf": "loaves",
    "scarf": "scarves",
    "die": "dice",
    "snowman": "snowmen",
    "potato": "potatoes",
    "tomato": "tomatoes",
    "buffalo": "buffaloes",
    "cactus": "cacti",
}
_NUMBERS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten", "eleven", "twelve")


def plural(noun: str) -> str:
    """More than one of a noun: "dogs", "mice", "cups of coffee", "pieces of cheese"."""
    head, of, rest = noun.partition(" of ")
    if of:
        return f"{plural(head)} of {rest}"
    front, _, word = noun.rpartition(" ")
    if word in _IRREGULAR:
        word = _IRREGULAR[word]
    elif word.endswith(("s", "x", "ch", "sh")):
        word += "es"
    elif word.endswith("y") and word[-2] not in "aeiou":
        word = word[:-1] + "ies"
    else:
        word += "s"
    return f"{front} {word}" if front else word


def with_article(noun: str) -> str:
    """One of a noun: "a dog", "an owl", "a unicorn"."""
    vowel = noun[0] in "aeiouAEIOU" and not noun.startswith(("uni", "ufo", "eu"))
    return f"{'an' if vowel else 'a'} {noun}"


def number(count: int) -> str:
    """A count in words up to twelve, in digits beyond."""
    return _NUMBERS[count] if count < len(_NUMBERS) else str(count)


def counted(count: int, noun: str) -> str:
    """So many of a noun: "a dog", "two dogs"."""
    return with_article(noun) if count == 1 else f"{number(count)} {plural(noun)}"


def listed(parts: Sequence[str]) -> str:
    """Parts in a row: "a", "a and b", "a, b and c"."""
    return parts[0] if len(parts) == 1 else f"{', '.join(parts[:-1])} and {parts[-1]}"


def sentence(text: str) -> str:
    """Capital letter first, full stop last."""
    return f"{text[0].upper()}{text[1:]}."
