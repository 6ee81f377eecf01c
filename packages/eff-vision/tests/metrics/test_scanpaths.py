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
    assert multimatch(path, path, (100, 100)) == pytest.approx((1, 1, 1, 1))
    shifted = multimatch(path, path + torch.tensor([10.0, 0]), (100, 100))
    assert shifted.position == pytest.approx(1 - 10 / math.hypot(100, 100))
    assert shifted[:3] == pytest.approx((1, 1, 1))
    back = multimatch(path[:2], path[:2].flip(0), (100, 100))
    assert back.direction == pytest.approx(0)
    assert back.length == pytest.approx(1)
    assert back.shape == pytest.approx(1 - 80 / (2 * math.hypot(100, 100)))


def test_points_on_objects():
    boxes = torch.tensor([[0.0, 0, 10, 10], [20, 0, 30, 10], [5, 5, 15, 15]])
    points = torch.tensor([[1.0, 1], [25, 9], [14, 14], [9, 9], [18, 1], [100, 100]])
    assert fixations_to_objects(points, boxes).tolist() == [0, 1, 2, 2, 1, 1]
    with pytest.raises(ValueError, match="boxes must be"):
        fixations_to_objects(points, boxes[:, [2, 1, 0, 3]])
