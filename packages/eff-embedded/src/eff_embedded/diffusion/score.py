"""How well pictures follow their prompts, as the judge sees it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from eff_embedded.collages.dice import Dice
from eff_embedded.collages.english import with_article
from eff_embedded.collages.relations import RelationKind
from eff_embedded.diffusion.world import GROUNDS, OBJECTS

if TYPE_CHECKING:
    from eff_embedded.judge import Reading

PLACES: tuple[RelationKind, ...] = ("left of", "right of", "above", "below")
_PHRASES = {"left of": "to the left of", "right of": "to the right of", "above": "above", "below": "below"}


@dataclass(frozen=True, kw_only=True, slots=True)
class Case:
    """A prompt and what must be on its picture.

    Attributes:
        prompt: The prompt.
        objects: Names of all objects asked for.
        place: How the first lies towards the second, if that is asked for.
    """

    prompt: str
    objects: tuple[str, ...]
    place: RelationKind | None = None


class Estimate(NamedTuple):
    """A share with its 95 % interval by bootstrap over pictures."""

    share: float
    low: float
    high: float


@dataclass(frozen=True, kw_only=True, slots=True)
class Score:
    """How many pictures are as asked.

    Attributes:
        pictures: How many were judged.
        present: All objects asked for are there.
        placed: The relation asked for holds; pictures that lack an object count as wrong. None if none was asked for.
        placed_if_present: The same among pictures with all objects.
        objects: Single objects found, of those asked for.
        strangers: Objects of the vocabulary found but not asked for, a picture.
    """

    pictures: int
    present: Estimate
    placed: Estimate | None
    placed_if_present: Estimate | None
    objects: Estimate
    strangers: float


def pairs(count: int, seed: int = 0) -> tuple[Case, ...]:
    """Prompts about two objects with a relation of place, every second one with a ground."""
    cases = []
    for i in range(count):
        dice = Dice(seed, f"pairs {i}")
        one, two = dice.shuffled(OBJECTS)[:2]
        place = PLACES[i % len(PLACES)]
        prompt = f"{with_article(one)} {_PHRASES[place]} {with_article(two)}"
        if dice.chance(0.5):
            prompt += f" on a {dice.choice(tuple(GROUNDS))} background"
        cases.append(Case(prompt=prompt, objects=(one, two), place=place))
    return tuple(cases)


def score(cases: Sequence[Case], readings: Sequence[Reading], *, resamples: int = 2000) -> Score:
    """Compare what the judge read with what was asked for.

    Args:
        cases: What was asked for.
        readings: What the judge read on the picture of each.
        resamples: Draws of the bootstrap.

    Raises:
        ValueError: there are no cases, or not as many readings.
    """
    if not cases or len(cases) != len(readings):
        raise ValueError(f"{len(cases)} cases and {len(readings)} readings; wanted equal numbers, at least one")
    both = list(zip(cases, readings, strict=True))
    found = [[name in reading.names for name in case.objects] for case, reading in both]
    present = [all(each) for each in found]
    placed = {
        i: reading.holds(case.objects[0], case.place, case.objects[1])
        for i, (case, reading) in enumerate(both)
        if case.place is not None
    }
    strangers = [len(set(reading.names) - set(case.objects)) for case, reading in both]
    return Score(
        pictures=len(cases),
        present=_estimate(present, resamples),
        placed=_estimate(list(placed.values()), resamples) if placed else None,
        placed_if_present=_estimate([placed[i] for i in placed if present[i]], resamples) if placed else None,
        objects=_estimate([float(np.mean(each)) for each in found], resamples),
        strangers=float(np.mean(strangers)),
    )


def judged(pipe: Any, judge: Any, cases: Sequence[Case], *, at_once: int = 16, seed: int = 0, **options: Any) -> Score:
    """Make a picture of each case, picture number i from ``seed + i``, and score them.

    Args:
        pipe: The pipeline.
        judge: The judge.
        cases: What to ask for.
        at_once: Pictures made together.
        seed: Of the first picture.
        options: Passed to the pipeline, such as ``guidance_scale``.
    """
    readings: list[Reading] = []
    for i in range(0, len(cases), at_once):
        prompts = [case.prompt for case in cases[i : i + at_once]]
        readings += judge(pipe(prompts, seed=seed + i, output_type="pt", **options).images)
    return score(cases, readings)


def _estimate(values: Sequence[float], resamples: int) -> Estimate:
    if not values:
        return Estimate(float("nan"), float("nan"), float("nan"))
    data = np.asarray(values, float)
    draws = np.random.default_rng(0).integers(len(data), size=(resamples, len(data)))
    low, high = np.quantile(data[draws].mean(1), (0.025, 0.975))
    return Estimate(float(data.mean()), float(low), float(high))
