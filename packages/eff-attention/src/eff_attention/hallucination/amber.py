"""AMBER (Wang and others, 2023) and the sums of MMHal-Bench (Sun and others, 2023)."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import NamedTuple

from eff_attention.hallucination.pope import PopeScores, pope_scores
from eff_attention.hallucination.vocabulary import Vocabulary


class AmberGenerative(NamedTuple):
    """Scores of descriptions, from 0 to 1.

    Attributes:
        chair: Share of mentions that are invented.
        cover: Share of the true objects that are mentioned.
        hal: Share of descriptions with an invented object.
        cog: Share of the objects that people would expect wrongly which the model did mention.
    """

    chair: float
    cover: float
    hal: float
    cog: float


def amber_generative(
    texts: Sequence[str],
    truth: Sequence[Collection[str]],
    tempting: Sequence[Collection[str]],
    vocabulary: Vocabulary,
    *,
    safe: Collection[str] = (),
) -> AmberGenerative:
    """Compare descriptions with true objects and with those that the picture tempts to invent.

    Args:
        texts: Descriptions.
        truth: Objects of each picture.
        tempting: Absent objects that are likely to be invented, of each picture.
        vocabulary: Objects and their words.
        safe: Objects that never count as invented.
    """
    if not len(texts) == len(truth) == len(tempting) or not texts:
        counts = f"{len(texts)}, {len(truth)}, {len(tempting)}"
        raise ValueError(f"wanted equal numbers of texts and of sets of objects, got {counts}")
    mentions = [vocabulary.mentions(t) for t in texts]
    invented = [[m for m in ms if m not in t and m not in safe] for ms, t in zip(mentions, truth, strict=True)]
    covered = sum(len(set(ms) & set(t)) for ms, t in zip(mentions, truth, strict=True))
    hit = sum(len(set(ms) & set(h)) for ms, h in zip(mentions, tempting, strict=True))
    return AmberGenerative(
        _ratio(sum(map(len, invented)), sum(map(len, mentions))),
        _ratio(covered, sum(len(set(t)) for t in truth)),
        sum(map(bool, invented)) / len(texts),
        _ratio(hit, sum(len(set(h)) for h in tempting)),
    )


def amber_discriminative(answers: Sequence[str], truth: Sequence[bool]) -> PopeScores:
    """Scores of answers "Yes" or "No" with **no** as the positive class; other answers count as neither.

    ``yes_ratio`` is the share of answers that are "No".
    """
    if len(answers) != len(truth) or not answers:
        raise ValueError(f"wanted one answer for each question, at least one, got {len(answers)} and {len(truth)}")
    said_no = [a.strip() == "No" for a in answers]
    scores = pope_scores(said_no, [not t for t in truth])
    right = sum(a.strip() == ("Yes" if t else "No") for a, t in zip(answers, truth, strict=True))
    return scores._replace(accuracy=right / len(answers))


def amber_score(generative: AmberGenerative, discriminative: PopeScores) -> float:
    """One number in percent: half of what is not invented, half of the F1 of the questions."""
    return (100 - 100 * generative.chair + 100 * discriminative.f1) / 2


def mmhal(ratings: Sequence[float]) -> tuple[float, float]:
    """Mean rating and share of hallucination (ratings below 3) of a judge's ratings from 0 to 6."""
    if not ratings or not all(0 <= r <= 6 for r in ratings):
        raise ValueError(f"wanted ratings from 0 to 6, at least one, got {list(ratings)[:5]}")
    return sum(ratings) / len(ratings), sum(r < 3 for r in ratings) / len(ratings)


def _ratio(above: float, below: float) -> float:
    return above / below if below else 0.0
