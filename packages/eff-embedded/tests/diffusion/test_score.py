"""Scores against cases worked out by hand."""

from __future__ import annotations

import math

import pytest
from eff_embedded.collages import find
from eff_embedded.diffusion import Case, pairs, score
from eff_embedded.judge import Find, Reading


def _reading(**centres: tuple[float, float]) -> Reading:
    finds = tuple(Find(name, 0.9, (x - 10, y - 10, x + 10, y + 10)) for name, (x, y) in centres.items())
    return Reading(finds=finds, size=128)


def test_worked_example() -> None:
    """Four pictures: right, wrong way round, one object missing, one too many."""
    case = Case(prompt="a dog left of a cat", objects=("dog", "cat"), place="left of")
    readings = [
        _reading(dog=(30, 60), cat=(90, 60)),
        _reading(dog=(90, 60), cat=(30, 60)),
        _reading(dog=(30, 60)),
        _reading(dog=(30, 60), cat=(90, 60), car=(60, 20)),
    ]
    found = score([case] * 4, readings)
    assert found.pictures == 4
    assert found.present.share == 0.75
    assert found.placed is not None
    assert found.placed.share == 0.5
    assert found.placed_if_present is not None
    assert found.placed_if_present.share == pytest.approx(2 / 3)
    assert found.objects.share == pytest.approx((1 + 1 + 0.5 + 1) / 4)
    assert found.strangers == 0.25
    assert found.present.low <= 0.75 <= found.present.high


def test_interval_is_that_of_the_mean() -> None:
    """With 400 pictures half of which are right the interval is about 1.96 / 40 wide to each side."""
    case = Case(prompt="", objects=("dog",))
    readings = [_reading(dog=(30, 60)) if i % 2 else _reading() for i in range(400)]
    low, high = score([case] * 400, readings).present[1:]
    assert low == pytest.approx(0.5 - 1.96 * 0.025, abs=0.006)
    assert high == pytest.approx(0.5 + 1.96 * 0.025, abs=0.006)


def test_without_relations_and_without_finds() -> None:
    """No relation asked for gives none; none to count gives no number."""
    assert score([Case(prompt="", objects=("dog",))], [_reading()]).placed is None
    nothing = score([Case(prompt="", objects=("dog", "cat"), place="above")], [_reading()])
    assert nothing.placed is not None
    assert nothing.placed.share == 0
    assert nothing.placed_if_present is not None
    assert math.isnan(nothing.placed_if_present.share)


def test_counts_must_agree() -> None:
    """A reading is missing, or all are."""
    with pytest.raises(ValueError, match="1 cases and 0 readings"):
        score([Case(prompt="", objects=("dog",))], [])
    with pytest.raises(ValueError, match="at least one"):
        score([], [])


def test_pairs_are_balanced_and_say_what_they_ask() -> None:
    """All four places come equally often, and the prompt names the objects in order."""
    cases = pairs(40)
    assert [sum(c.place == p for c in cases) for p in ("left of", "right of", "above", "below")] == [10] * 4
    for case in cases:
        assert tuple(m.name for m in find(case.prompt)) == case.objects
        assert case.place is not None
        assert case.place in case.prompt
    assert pairs(40) == cases
    assert pairs(40, seed=1) != cases
