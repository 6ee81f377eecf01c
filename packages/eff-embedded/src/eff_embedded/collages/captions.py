"""Captions of collages in varied English; each says only what the layout holds."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from typing import TYPE_CHECKING

from eff_embedded.collages.dice import Dice
from eff_embedded.collages.english import counted, listed, sentence, with_article
from eff_embedded.collages.relations import Relation, RelationKind
from eff_embedded.collages.vocabulary import thing

if TYPE_CHECKING:
    from eff_embedded.collages.render import Collage

PHRASES: dict[RelationKind, tuple[str, ...]] = {
    "left of": ("to the left of", "left of", "on the left of"),
    "right of": ("to the right of", "right of", "on the right of"),
    "above": ("above", "over"),
    "below": ("below", "under"),
    "in front of": ("in front of",),
    "behind": ("behind",),
    "bigger than": ("bigger than", "larger than"),
    "smaller than": ("smaller than",),
}
_OPENINGS_ONE = ("{}", "there is {}", "a picture of {}", "this picture shows {}", "here is {}", "you can see {}")
_OPENINGS_MORE = ("{}", "there are {}", "a picture of {}", "this picture shows {}", "here are {}", "you can see {}")


@dataclass(frozen=True, kw_only=True, slots=True)
class Caption:
    """A caption and what it says.

    Attributes:
        text: One or two sentences.
        relations: The relations it states, by object number.
        places: (object number, place) it states.
    """

    text: str
    relations: tuple[Relation, ...] = ()
    places: tuple[tuple[int, str], ...] = ()


def caption(
    collage: Collage, seed: int | None = None, *, relation: bool | None = None, synonyms: float = 0.25
) -> Caption:
    """Describe a collage: all its objects, and sometimes how two of them lie or where one lies.

    Args:
        collage: What to describe.
        seed: Chooses among the wordings; None takes the layout's.
        relation: Whether to state a relation or, for a single object, its place. None leaves it to chance (one half).
            A collage on which nothing of the kind is plain gets a caption without.
        synonyms: Chance that an object is called by a synonym, "bunny" for "rabbit".
    """
    dice = Dice(collage.layout.seed if seed is None else seed, "caption")
    words = {name: called(name, dice, synonyms) for name in collage.names}
    wanted = dice.chance(0.5) if relation is None else relation
    counts = Counter(collage.names)
    stated = _relation(collage, counts, dice) if wanted else None
    if stated is not None and len(collage.names) == 2 and dice.chance(0.7):
        return _pair(collage, stated, words, dice)
    text = _list(counts, words, dice)
    if stated is not None:
        subject, other = words[collage.names[stated.subject]], words[collage.names[stated.object]]
        phrase = dice.choice(PHRASES[stated.kind])
        return Caption(text=f"{text} {sentence(f'the {subject} is {phrase} the {other}')}", relations=(stated,))
    place = collage.place(0) if wanted and len(collage.names) == 1 else None
    if place is None:
        return Caption(text=text)
    noun = words[collage.names[0]]
    told = (f"{with_article(noun)} {at(place)}", f"there is {with_article(noun)} {at(place)}")
    return Caption(text=sentence(dice.choice(told)), places=((0, place),))


def called(name: str, dice: Dice, synonyms: float) -> str:
    """The name, or with this chance one of its synonyms."""
    others = thing(name).synonyms
    return dice.choice(others) if others and dice.chance(synonyms) else name


def at(place: str) -> str:
    """Place with its preposition: "in the upper left", "at the top", "on the left"."""
    preposition = {"top": "at", "bottom": "at", "left": "on", "right": "on"}.get(place, "in")
    return f"{preposition} the {place}"


def _list(counts: Counter[str], words: dict[str, str], dice: Dice) -> str:
    parts = [counted(counts[name], words[name]) for name in dice.shuffled(sorted(counts))]
    singular = counts.total() == 1
    return sentence(dice.choice(_OPENINGS_ONE if singular else _OPENINGS_MORE).format(listed(parts)))


def _relation(collage: Collage, counts: Counter[str], dice: Dice) -> Relation | None:
    """One that can be told by names: both objects are the only ones of their kind."""
    alone = [i for i, name in enumerate(collage.names) if counts[name] == 1]
    told = [r for r in collage.relations if r.subject in alone and r.object in alone]
    return dice.choice(told) if told else None


def _pair(collage: Collage, stated: Relation, words: dict[str, str], dice: Dice) -> Caption:
    subject, other = (with_article(words[collage.names[i]]) for i in (stated.subject, stated.object))
    phrase = dice.choice(PHRASES[stated.kind])
    forms = [f"{subject} is {phrase} {other}", f"there is {subject} {phrase} {other}", f"{subject} {phrase} {other}"]
    return Caption(text=sentence(dice.choice(forms)), relations=(stated,))
