import math

import numpy as np
import pytest
import torch
from eff_vision.geometry import quaternion_to_matrix, rotation_from_yaw_pitch
from eff_vision.metrics import (
    ConfusionMatrix,
    angle_between,
    depth_metrics,
    normal_metrics,
    point_metrics,
    pose_metrics,
    umeyama,
)


def test_confusion_matrix_beside_scikit_learn():
    metrics = pytest.importorskip("sklearn.metrics")
    rng = np.random.default_rng(0)
    target, prediction = rng.integers(0, 5, 600), rng.integers(0, 5, 600)
    target[rng.random(600) < 0.2] = 255
    seen = ConfusionMatrix(6)
    for part in np.array_split(np.arange(600), 7):
        seen.update(torch.from_numpy(prediction[part]), torch.from_numpy(target[part]))
    t, p = target[target != 255], prediction[target != 255]
    assert seen.counts[:5, :5].tolist() == metrics.confusion_matrix(t, p, labels=range(5)).tolist()
    assert seen.iou[:5].tolist() == pytest.approx(metrics.jaccard_score(t, p, average=None).tolist())
    assert math.isnan(seen.iou[5])  # a class that nobody has does not count
    assert seen.mean_iou == pytest.approx(metrics.jaccard_score(t, p, average="macro"))
    assert seen.accuracy == pytest.approx(metrics.accuracy_score(t, p))
    assert seen.kappa == pytest.approx(metrics.cohen_kappa_score(t, p))


def test_depth_worked_example():
    target = torch.tensor([[1.0, 2.0, 4.0]])
    scores = depth_metrics(1.1 * target, target)
    assert scores.abs_rel == pytest.approx(0.1, abs=1e-6)
    assert scores.rmse == pytest.approx(0.1 * math.sqrt(7), abs=1e-6)
    assert scores.delta1 == 1
    assert depth_metrics(torch.tensor([[1.0, 2.0, 1.0]]), target).delta1 == pytest.approx(2 / 3)


@pytest.mark.parametrize("alignment", ["median", "scale", "scale_shift"])
def test_depth_alignment_takes_the_scale_out(alignment):
    target = torch.rand(3, 20) + 0.5
    prediction = target + 0.05 * torch.rand(3, 20)
    plain, scaled = (depth_metrics(prediction * c, target, alignment=alignment) for c in (1.0, 7.3))
    assert scaled == pytest.approx(plain, rel=1e-4)
    shifted = depth_metrics(3 * target + 2, target, alignment=alignment)
    assert (shifted.abs_rel < 1e-5) == (alignment == "scale_shift")


def test_pixels_without_true_depth_do_not_count():
    target = torch.tensor([[1.0, 0.0, float("nan"), float("inf"), 50.0]])
    prediction = torch.tensor([[1.0, 9.0, 9.0, float("nan"), 9.0]])
    assert depth_metrics(prediction, target, max_depth=10).abs_rel == 0
    with pytest.raises(ValueError, match="no valid pixel"):
        depth_metrics(prediction, target, torch.zeros(1, 5, dtype=torch.bool))
    with pytest.raises(ValueError, match="not finite"):
        depth_metrics(torch.full((1, 5), float("nan")), target)


def test_normals():
    target = torch.tensor([[0.0, 0, -1]]).expand(4, 3)
    angles = torch.tensor([0.0, 10.0, 20.0, 40.0])
    prediction = torch.stack((torch.sin(torch.deg2rad(angles)), torch.zeros(4), -torch.cos(torch.deg2rad(angles))), 1)
    scores = normal_metrics(prediction * 3, target)
    assert scores.mean == pytest.approx(17.5, abs=1e-4)
    assert (scores.within_11, scores.within_22, scores.within_30) == (0.5, 0.75, 0.75)
    assert float(angle_between(target[0], -target[0])) == pytest.approx(math.pi)
    tiny = torch.tensor([1e-9, 0, -1], dtype=torch.float64)
    assert float(angle_between(tiny, target[0].double())) == pytest.approx(1e-9, rel=1e-6)


def poses(n=4):
    g = torch.Generator().manual_seed(1)
    rotation = quaternion_to_matrix(torch.randn(n, 4, generator=g, dtype=torch.float64))
    return torch.cat((rotation, torch.randn(n, 3, 1, generator=g, dtype=torch.float64)), -1)


def test_poses():
    target = poses()
    assert pose_metrics(target, target)[:2] == pytest.approx((0, 0), abs=1e-9)
    # another world frame and another unit are the same cameras
    frame = torch.cat((rotation_from_yaw_pitch(1.0, 0.5).double(), torch.tensor([[1.0], [2], [3]]).double()), -1)
    moved = torch.cat((target[..., :3] @ frame[:, :3], target[..., :3] @ frame[:, 3:] + target[..., 3:]), -1)
    moved[..., 3] *= 2.5
    same = pose_metrics(moved, torch.cat((moved[..., :3], moved[..., 3:] / 2.5), -1))
    assert same.translation == pytest.approx(0, abs=1e-9)
    turned = target.clone()
    turn = rotation_from_yaw_pitch(math.radians(10), 0.0).double()
    turned[1:] = turn @ turned[1:]
    scores = pose_metrics(turned, target)
    assert scores.rotation == pytest.approx(10, abs=1e-4)
    assert scores.rra == 1
    assert 0 < scores.auc < 1


def test_umeyama_finds_a_similarity():
    g = torch.Generator().manual_seed(0)
    source = torch.randn(9, 3, generator=g, dtype=torch.float64)
    rotation = rotation_from_yaw_pitch(2.0, -1.0).double()
    target = 1.7 * source @ rotation.T + torch.tensor([3.0, -1, 2])
    scale, found, shift = umeyama(source, target)
    assert float(scale) == pytest.approx(1.7)
    torch.testing.assert_close(found, rotation, atol=1e-6, rtol=0)
    torch.testing.assert_close(shift, torch.tensor([3.0, -1, 2], dtype=torch.float64), atol=1e-6, rtol=0)
    mirrored = source * torch.tensor([1.0, 1, -1])
    assert float(torch.linalg.det(umeyama(source, mirrored)[1])) == pytest.approx(1)


def test_points():
    a = torch.tensor([[0.0, 0, 0], [1, 0, 0]])
    b = torch.tensor([[0.0, 0, 0.03], [1, 0, 0.1], [5, 0, 0]])
    scores = point_metrics(a, b)
    assert scores.accuracy == pytest.approx((0.03 + 0.1) / 2, abs=1e-6)
    assert scores.completeness == pytest.approx((0.03 + 0.1 + 4) / 3, abs=1e-6)
    assert (scores.precision, scores.recall) == (0.5, pytest.approx(1 / 3))
    assert scores.fscore == pytest.approx(0.4)
    assert point_metrics(a, b, chunk=1) == pytest.approx(scores)


@pytest.mark.parametrize(
    ("call", "says"),
    [
        (lambda: ConfusionMatrix(0), "num_classes"),
        (lambda: ConfusionMatrix(2).update(torch.tensor([2]), torch.tensor([0])), "prediction has classes 2 to 2"),
        (lambda: ConfusionMatrix(2).update(torch.tensor([0, 1]), torch.tensor([0])), "one shape"),
        (lambda: depth_metrics(torch.ones(1, 2), torch.ones(1, 2), alignment="best"), "alignment='best'"),
        (lambda: normal_metrics(torch.ones(2, 3), torch.ones(2, 3), torch.zeros(2, dtype=torch.bool)), "no normal"),
        (lambda: point_metrics(torch.zeros(0, 3), torch.zeros(1, 3)), "prediction must be finite points"),
        (lambda: pose_metrics(torch.eye(3, 4)[None], torch.eye(3, 4)[None]), "S >= 2"),
        (lambda: umeyama(torch.zeros(2, 3), torch.zeros(2, 3)), "three points"),
    ],
)
def test_bad_input(call, says):
    with pytest.raises(ValueError, match=says):
        call()
