"""What detectors say about objects, and what follows for a sentence (SENTINEL, section 3.2)."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

Verdict = Literal["factual", "hallucinated", "uncertain"]
Detector = Callable[[Any, list[str]], Mapping[str, bool]]
"""``detector(image, names)`` says of each name whether it is in the image."""


def classify_object(votes: Sequence[bool]) -> Verdict:
    """All detectors see it: factual; none does: hallucinated; else uncertain.

    Raises:
        ValueError: there is no vote.
    """
    if not votes:
        raise ValueError("an object needs the vote of at least one detector")
    return "factual" if all(votes) else "uncertain" if any(votes) else "hallucinated"


@dataclass
class Jury:
    """Detectors on one image; each is asked once about each name.

    Attributes:
        image: As the detectors want it.
        detectors: Two or more of different build; agreement of all counts.
        verdicts: What was found so far.
    """

    image: Any
    detectors: Sequence[Detector]
    verdicts: dict[str, Verdict] = field(default_factory=dict)

    def __call__(self, names: Sequence[str]) -> dict[str, Verdict]:
        """The verdict on each name.

        Raises:
            ValueError: a detector leaves a name out.
        """
        new = [n for n in dict.fromkeys(names) if n not in self.verdicts]
        if new:
            answers = [detector(self.image, list(new)) for detector in self.detectors]
            for i, answer in enumerate(answers):
                if missing := [n for n in new if n not in answer]:
                    raise ValueError(f"detector {i} says nothing about {missing}")
            for name in new:
                self.verdicts[name] = classify_object([bool(answer[name]) for answer in answers])
        return {n: self.verdicts[n] for n in names}


@dataclass(frozen=True, slots=True, kw_only=True)
class Judged:
    """A sampled sentence and what is known of it.

    Attributes:
        text: The sentence.
        ended: Whether the model ended its answer behind it.
        objects: What it names.
        factual: How many of them are there.
        hallucinated: How many of them are not.
        coherent: Whether its context names one of them.
    """

    text: str
    ended: bool
    objects: tuple[str, ...]
    factual: int
    hallucinated: int
    coherent: bool

    @property
    def label(self) -> Literal["positive", "negative", "unused"]:
        """Negative with any invented object; else positive with one that is there; uncertain ones do not count."""
        return "negative" if self.hallucinated else "positive" if self.factual else "unused"


def judge_sentence(
    text: str, context: str, extract_objects: Callable[[str], Sequence[str]], jury: Jury, *, ended: bool = False
) -> Judged:
    """Label a sentence behind a context."""
    objects = tuple(dict.fromkeys(extract_objects(text)))
    verdicts = list(jury(objects).values())
    return Judged(
        text=text,
        ended=ended,
        objects=objects,
        factual=verdicts.count("factual"),
        hallucinated=verdicts.count("hallucinated"),
        coherent=bool(set(objects) & set(extract_objects(context))),
    )
