"""Questions about collages with answers that follow from the layout; yes and no come equally often."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal, get_args

from eff_embedded.collages.captions import PHRASES, called
from eff_embedded.collages.dice import Dice
from eff_embedded.collages.english import number, plural, with_article
from eff_embedded.collages.relations import OPPOSITE, Relation
from eff_embedded.collages.vocabulary import class_noun, classes, thing, things

if TYPE_CHECKING:
    from eff_embedded.collages.render import Collage

QuestionKind = Literal["exists", "class", "relation", "which", "where", "count", "count class", "front", "bigger"]
QUESTION_KINDS: tuple[QuestionKind, ...] = get_args(QuestionKind)


@dataclass(frozen=True, kw_only=True, slots=True)
class Question:
    """A question and its answer.

    Attributes:
        kind: "exists" (Is there a dog?), "class" (Is there an animal?), "relation" (Is the dog above the cat?): yes or
            no. "which" (What is above the cat?), "front" and "bigger" (Which is ..., the dog or the cat?): a name.
            "where": a place such as "upper left". "count" and "count class": a number in words.
        text: The question.
        answer: The shortest right answer, in small letters.
        asked: Names of the objects or of the class that it is about.
    """

    kind: QuestionKind
    text: str
    answer: str
    asked: tuple[str, ...]


def questions(
    collage: Collage,
    seed: int | None = None,
    *,
    kinds: Sequence[QuestionKind] = QUESTION_KINDS,
    absent: Sequence[str] | None = None,
    synonyms: float = 0.25,
) -> tuple[Question, ...]:
    """All that can plainly be asked about a collage, in random order.

    Among the yes/no questions of each kind exactly half are answered by yes.

    Args:
        collage: What to ask about.
        seed: Chooses objects and wordings; None takes the layout's.
        kinds: Kinds of question to ask.
        absent: Names to ask about in "exists" questions answered by no, for instance partners of objects that are
            there; names of objects that are there are left out. None draws them from the whole vocabulary.
        synonyms: Chance that a question calls an object by a synonym; answers use names.

    Raises:
        ValueError: a kind is unknown.
    """
    if unknown := set(kinds) - set(QUESTION_KINDS):
        raise ValueError(f"kinds={sorted(unknown)}; use some of {QUESTION_KINDS}")
    asker = _Asker(collage, Dice(collage.layout.seed if seed is None else seed, "questions"), absent, synonyms)
    makers = {
        "exists": asker.exists,
        "class": asker.classes,
        "relation": asker.relation,
        "which": asker.which,
        "where": asker.where,
        "count": asker.count,
        "count class": asker.count_class,
        "front": lambda: asker.choice("front", "in front of", "in front"),
        "bigger": lambda: asker.choice("bigger", "bigger than", "bigger"),
    }
    return tuple(asker.dice.shuffled([q for kind in QUESTION_KINDS if kind in kinds for q in makers[kind]()]))


class _Asker:
    def __init__(self, collage: Collage, dice: Dice, absent: Sequence[str] | None, synonyms: float) -> None:
        self.collage, self.dice, self.synonyms = collage, dice, synonyms
        self.counts = Counter(collage.names)
        self.absent = [n for n in (things() if absent is None else absent) if n not in self.counts]
        self.classes_here = {c for name in self.counts for c in thing(name).classes}
        alone = {i for i, name in enumerate(collage.names) if self.counts[name] == 1}
        self.relations = [r for r in collage.relations if r.subject in alone and r.object in alone]

    def word(self, name: str) -> str:
        return called(name, self.dice, self.synonyms)

    def _is_there(self, kind: QuestionKind, name: str, noun: str, answer: str) -> Question:
        forms = ("Is there {} in the picture?", "Is there {}?", "Can you see {}?", "Does the picture show {}?")
        return Question(
            kind=kind, text=self.dice.choice(forms).format(with_article(noun)), answer=answer, asked=(name,)
        )

    def exists(self) -> Iterator[Question]:
        others = self.dice.shuffled(self.absent)
        for name, other in zip(self.dice.shuffled(sorted(self.counts)), others, strict=False):
            yield self._is_there("exists", name, self.word(name), "yes")
            yield self._is_there("exists", other, self.word(other), "no")

    def classes(self) -> Iterator[Question]:
        others = self.dice.shuffled(sorted(classes().keys() - self.classes_here))
        for here, other in zip(self.dice.shuffled(sorted(self.classes_here)), others, strict=False):
            yield self._is_there("class", here, class_noun(here), "yes")
            yield self._is_there("class", other, class_noun(other), "no")

    def relation(self) -> Iterator[Question]:
        told = self.dice.shuffled(self.relations)
        for r in told[: len(told) // 2]:
            yield self._relation(r, "yes")
            yield self._relation(r._replace(kind=OPPOSITE[r.kind]), "no")

    def _relation(self, r: Relation, answer: str) -> Question:
        subject, other = self.collage.names[r.subject], self.collage.names[r.object]
        text = f"Is the {self.word(subject)} {self.dice.choice(PHRASES[r.kind])} the {self.word(other)}?"
        return Question(kind="relation", text=text, answer=answer, asked=(subject, other))

    def which(self) -> Iterator[Question]:
        """Only where a single object answers: among all objects, not only those that are alone of their kind."""
        for r in self.relations:
            if r.kind not in ("left of", "right of", "above", "below"):
                continue
            if self._toward(r) == 1:
                other = self.collage.names[r.object]
                phrase = self.dice.choice(PHRASES[r.kind])
                answer = self.collage.names[r.subject]
                yield Question(
                    kind="which", text=f"What is {phrase} the {self.word(other)}?", answer=answer, asked=(other,)
                )

    def _toward(self, r: Relation) -> int:
        """Objects that one could call, if loosely, ``r.kind`` the object: their centre lies on that side at all."""
        x, y = self._centre(r.object)
        sides = {"left of": (-1, 0), "right of": (1, 0), "above": (0, -1), "below": (0, 1)}
        right, down = sides[r.kind]
        centres = [self._centre(i) for i in range(len(self.collage.names)) if i != r.object]
        return sum((u - x) * right + (v - y) * down > 0 for u, v in centres)

    def _centre(self, i: int) -> tuple[float, float]:
        x0, y0, x1, y1 = (int(v) for v in self.collage.boxes[i])
        return (x0 + x1) / 2, (y0 + y1) / 2

    def where(self) -> Iterator[Question]:
        for i, name in enumerate(self.collage.names):
            place = self.collage.place(i)
            if place is not None and self.counts[name] == 1:
                yield Question(kind="where", text=f"Where is the {self.word(name)}?", answer=place, asked=(name,))

    def _how_many(self, kind: QuestionKind, name: str, noun: str, count: int) -> Question:
        forms = ("How many {} are there?", "How many {} can you see?", "How many {} does the picture show?")
        return Question(
            kind=kind, text=self.dice.choice(forms).format(plural(noun)), answer=number(count), asked=(name,)
        )

    def count(self) -> Iterator[Question]:
        for name, count in sorted(self.counts.items()):
            yield self._how_many("count", name, self.word(name), count)

    def count_class(self) -> Iterator[Question]:
        for name in sorted(self.classes_here):
            count = sum(c for kind, c in self.counts.items() if name in thing(kind).classes)
            yield self._how_many("count class", name, class_noun(name), count)

    def choice(self, kind: QuestionKind, relation: str, words: str) -> Iterator[Question]:
        for r in self.relations:
            if r.kind == relation:
                right, wrong = self.collage.names[r.subject], self.collage.names[r.object]
                first, second = self.dice.shuffled([right, wrong])
                text = f"Which is {words}, the {self.word(first)} or the {self.word(second)}?"
                yield Question(kind=kind, text=text, answer=right, asked=(first, second))
