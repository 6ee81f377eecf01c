import math

import pytest
import torch
from eff_vision.metrics import (
    BehaviorStats,
    behavior_stats,
    behavioral_delta,
    fixations_to_objects,
    mean_stats,
    multimatch,
    scanmatch,
    scanpath_edit_distance,
    sequence_score,
)
from hypothesis import given
from hypothesis import strategies as st

PATHS = st.lists(st.integers(0, 4), min_size=1, max_size=8)


def test_behavior_by_hand():
    assert behavior_stats((3, 3, 5, 3, 7, 7, 7), 7) == pytest.approx((1, 7, 3 / 7, 3 / 7, 1 / 7))
    assert behavior_stats((2,), 1) == (0, 1, 1, 0, 0)
    with pytest.raises(ValueError, match="at least one"):
        behavior_stats((), 1)


@given(PATHS)
def test_shares_add_up(path):
    stats = behavior_stats(path, 0)
    assert stats.search + stats.refix + stats.revisit == pytest.approx(1)
    assert stats.length * stats.search == pytest.approx(len(set(path)))


def test_delta():
    human = BehaviorStats(0.8, 6.0, 0.5, 0.3, 0.2)
    assert behavioral_delta(human, human) == (0, ())
    assert behavioral_delta(human._replace(found=0.9), human)[0] == pytest.approx(0.025)
    assert behavioral_delta(human, human._replace(refix=0.0)) == (0, ("refix",))
    assert mean_stats([human, human._replace(length=8.0)]).length == 7


def test_alignments_by_hand():
    assert sequence_score((1, 2, 3), (1, 3)) == pytest.approx(2 / 3)
    assert scanpath_edit_distance((1, 2, 3), (1, 3)) == 1


@given(PATHS, PATHS)
def test_alignments_are_symmetric_and_exact(a, b):
    def longest(x, y):
        if not x or not y:
            return 0
        return longest(x[1:], y[1:]) + 1 if x[0] == y[0] else max(longest(x[1:], y), longest(x, y[1:]))

    assert sequence_score(a, b) == sequence_score(b, a) == pytest.approx(longest(a, b) / max(len(a), len(b)))
    assert scanpath_edit_distance(a, b) == scanpath_edit_distance(b, a)
    assert sequence_score(a, a) == 1
    assert (scanpath_edit_distance(a, b) == 0) == (a == b)
    assert scanmatch(a, b, torch.eye(5)) == pytest.approx(sequence_score(a, b))


def test_multimatch():
    path = torch.tensor([[10.0, 10], [50, 10], [50, 60], [90, 60]])
    assert multimatch(path, path, (100, 100))[:4] == pytest.approx((1, 1, 1, 1))
    assert multimatch(path, path, (100, 100)).duration is None
    shifted = multimatch(path, path + torch.tensor([10.0, 0]), (100, 100))
    assert shifted.position == pytest.approx(1 - 10 / math.hypot(100, 100))
    assert shifted[:3] == pytest.approx((1, 1, 1))
    back = multimatch(path[:2], path[:2].flip(0), (100, 100))
    assert back.direction == pytest.approx(0)
    assert back.length == pytest.approx(1)
    assert back.shape == pytest.approx(1 - 80 / (2 * math.hypot(100, 100)))


# Points (x, y), durations, and the five similarities of multimatch-gaze 0.1.3 on 600 x 400 without simplification. Of
# the four pairs on a grid each has several cheapest alignments, between which the choice matters.
PAIRS = (
    (
        [[307, 329, 0.31], [453, 379, 0.23], [570, 99, 0.51], [20, 124, 0.22], [86, 347, 0.3]],
        [[329, 335, 0.49], [51, 215, 0.16], [16, 327, 0.25], [519, 131, 0.16], [452, 181, 0.32]],
        (0.726093, 0.612478, 0.793427, 0.611383, 0.632653),
    ),
    (
        [[80, 104, 0.34], [229, 7, 0.15], [241, 300, 0.59], [542, 24, 0.47], [122, 112, 0.58], [301, 199, 0.14]],
        [[175, 129, 0.31], [324, 387, 0.41], [554, 168, 0.32], [166, 206, 0.48], [435, 117, 0.28], [96, 46, 0.4]],
        (0.882446, 0.800305, 0.878579, 0.82412, 0.687883),
    ),
    (
        [[550, 250, 0.57], [550, 250, 0.25], [550, 250, 0.17], [550, 50, 0.47], [250, 50, 0.37], [250, 150, 0.39]],
        [[450, 150, 0.5], [450, 350, 0.52], [350, 350, 0.37], [350, 250, 0.13], [550, 150, 0.35], [350, 250, 0.35]],
        (0.881633, 0.647584, 0.861325, 0.763267, 0.754693),
    ),
    (
        [[450, 250, 0.42], [50, 350, 0.22], [350, 50, 0.28], [450, 250, 0.36], [150, 50, 0.19], [150, 150, 0.53]],
        [[50, 50, 0.46], [250, 350, 0.35], [350, 350, 0.12], [50, 250, 0.3], [50, 50, 0.35], [50, 350, 0.15]],
        (0.826656, 0.698792, 0.844957, 0.706282, 0.630952),
    ),
    (
        [[150, 350, 0.52], [150, 250, 0.19], [350, 150, 0.46], [450, 50, 0.58], [350, 350, 0.19]],
        [[50, 50, 0.11], [350, 50, 0.34], [150, 250, 0.32], [350, 50, 0.36], [550, 50, 0.31]],
        (0.780735, 0.5, 0.838821, 0.861325, 0.62069),
    ),
    (
        [[450, 50, 0.12], [350, 250, 0.55], [250, 50, 0.45], [250, 50, 0.52]],
        [[50, 50, 0.38], [450, 350, 0.53], [350, 350, 0.41], [450, 150, 0.31], [150, 350, 0.53], [550, 350, 0.46]],
        (0.75, 0.647584, 0.616712, 0.689913, 0.745455),
    ),
)


@pytest.mark.parametrize(("a", "b", "wanted"), PAIRS)
def test_multimatch_is_that_of_the_reference(a, b, wanted):
    a, b = torch.tensor(a, dtype=torch.float64), torch.tensor(b, dtype=torch.float64)
    found = multimatch(a[:, :2], b[:, :2], (600, 400), durations=(a[:, 2], b[:, 2]))
    assert found == pytest.approx(wanted, abs=2e-6)
    with pytest.raises(ValueError, match="durations must be"):
        multimatch(a[:, :2], b[:, :2], (600, 400), durations=(a[1:, 2], b[:, 2]))
    with pytest.raises(ValueError, match="durations must be"):
        multimatch(a[:, :2], b[:, :2], (600, 400), durations=(a[:, 2] - 1, b[:, 2]))


def test_points_on_objects():
    boxes = torch.tensor([[0.0, 0, 10, 10], [20, 0, 30, 10], [5, 5, 15, 15]])
    points = torch.tensor([[1.0, 1], [25, 9], [14, 14], [9, 9], [18, 1], [100, 100]])
    assert fixations_to_objects(points, boxes).tolist() == [0, 1, 2, 2, 1, 1]
    with pytest.raises(ValueError, match="boxes must be"):
        fixations_to_objects(points, boxes[:, [2, 1, 0, 3]])
