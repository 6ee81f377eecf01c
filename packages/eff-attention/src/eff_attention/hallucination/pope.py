"""POPE: yes/no questions about objects that are there and objects that are not (Li and others, 2023)."""

from __future__ import annotations

import collections
import itertools
from collections.abc import Collection, Sequence
from typing import Literal, NamedTuple

import numpy as np


class Question(NamedTuple):
    """A question about one picture, by its number, and the right answer."""

    picture: int
    object: str
    text: str
    answer: bool


class PopeScores(NamedTuple):
    """Scores with "yes" as the positive class; rates without anything to divide by are 0."""

    accuracy: float
    precision: float
    recall: float
    f1: float
    yes_ratio: float


def pope_parse(text: str) -> bool:
    """Whether an answer says yes, by the official rule: unless "No", "no" or "not" is a word before the first dot."""
    words = text.split(".")[0].replace(",", "").split(" ")
    return not {"No", "no", "not"} & set(words)


def pope_scores(answers: Sequence[bool], truth: Sequence[bool]) -> PopeScores:
    """Scores of parsed answers.

    Raises:
        ValueError: the numbers differ, or there are none.
    """
    if len(answers) != len(truth) or not answers:
        raise ValueError(f"wanted one answer for each question, at least one, got {len(answers)} and {len(truth)}")
    counts = collections.Counter(zip(map(bool, answers), map(bool, truth), strict=True))
    hits, wrong_yes, wrong_no = counts[True, True], counts[True, False], counts[False, True]
    precision = _ratio(hits, hits + wrong_yes)
    recall = _ratio(hits, hits + wrong_no)
    return PopeScores(
        (hits + counts[False, False]) / len(answers),
        precision,
        recall,
        _ratio(2 * precision * recall, precision + recall),
        (hits + wrong_yes) / len(answers),
    )


def build_pope(
    pictures: Sequence[Collection[str]],
    split: Literal["random", "popular", "adversarial"] = "random",
    *,
    each: int = 3,
    template: str = "Is there {} in the image?",
    seed: int = 0,
) -> list[Question]:
    """Questions with as many yes as no for each picture.

    Args:
        pictures: Objects of each picture.
        split: Absent objects are drawn at random, by how many pictures have them, or by how often they come with the
            object just asked about.
        each: Questions of each kind a picture; pictures with fewer objects, or fewer absent ones, get fewer.
        template: With a place for the object and its article.
        seed: Of the draw.
    """
    if split not in ("random", "popular", "adversarial"):
        raise ValueError(f"split={split!r}; use 'random', 'popular' or 'adversarial'")
    sets = [frozenset(p) for p in pictures]
    names = sorted(frozenset().union(*sets))
    counts = collections.Counter(itertools.chain.from_iterable(sets))
    together = collections.Counter(pair for s in sets for pair in itertools.permutations(s, 2))
    rng = np.random.default_rng(seed)
    questions = []
    for i, present in enumerate(sets):
        absent = [n for n in names if n not in present]
        asked = [str(n) for n in rng.permutation(sorted(present))]
        used: set[str] = set()
        for there in asked[: min(each, len(absent))]:
            left = [n for n in absent if n not in used]
            if split == "random":
                other = str(rng.choice(left))
            elif split == "popular":
                other = min(left, key=lambda n: (-counts[n], n))
            else:
                other = min(left, key=lambda n: (-together[there, n], -counts[n], n))
            used.add(other)
            questions += [Question(i, o, template.format(_article(o)), o == there) for o in (there, other)]
    return questions


def _article(name: str) -> str:
    return f"{'an' if name[0].lower() in 'aeiou' else 'a'} {name}"


def _ratio(above: float, below: float) -> float:
    return above / below if below else 0.0
