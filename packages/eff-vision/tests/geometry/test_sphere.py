import math

import pytest
import torch
from eff_vision.geometry import (
    erp_angles,
    erp_area_weights,
    erp_rays,
    erp_to_perspective,
    perspective_to_erp,
    rotation_from_yaw_pitch,
)
from eff_vision.geometry.sphere import pad_erp, sample_erp


def smooth(height, seed=0):
    """A panorama that is smooth on the sphere: harmonics of degree one and two."""
    x, y, z = erp_rays(height, 2 * height, dtype=torch.float64).unbind(-1)
    basis = torch.stack((x, y, z, x * y, y * z, x * z, x * x - y * y))
    weights = torch.randn(3, 7, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return torch.einsum("cb,bhw->chw", weights, basis)[None] / 3


def test_directions():
    longitude, latitude = erp_angles(2, 4)
    assert longitude.tolist() == pytest.approx([-0.75 * math.pi, -0.25 * math.pi, 0.25 * math.pi, 0.75 * math.pi])
    assert latitude.tolist() == pytest.approx([math.pi / 4, -math.pi / 4])
    rays = erp_rays(64, 128)
    torch.testing.assert_close(rays.norm(dim=-1), torch.ones(64, 128))
    assert rays[0, 0, 1] < -0.99  # up is -y
    assert rays[32, 64, 2] > 0.99  # the middle is ahead
    assert rays[32, 96, 0] > 0.99  # a quarter further is to the right


def test_area_weights_are_those_of_the_sphere():
    weights = erp_area_weights(16, 32, dtype=torch.float64)
    assert float(weights.sum()) == pytest.approx(1, abs=1e-12)
    assert float(weights[:8].sum()) == pytest.approx(0.5)
    assert weights[7, 0] > 9 * weights[0, 0]


def test_turning_right_and_up():
    right, up = rotation_from_yaw_pitch(math.pi / 2, 0.0), rotation_from_yaw_pitch(0.0, math.pi / 2)
    ahead = torch.tensor([0.0, 0, 1])
    torch.testing.assert_close(right @ ahead, torch.tensor([1.0, 0, 0]), atol=1e-6, rtol=0)
    torch.testing.assert_close(up @ ahead, torch.tensor([0.0, -1, 0]), atol=1e-6, rtol=0)


@pytest.mark.parametrize(
    ("yaw", "pitch", "fov"), [(0, 0, 90), (180, 0, 80), (170, 40, 100), (30, 90, 90), (0, -80, 120)]
)
def test_a_cut_picture_shows_what_lies_in_its_directions(yaw, pitch, fov):
    rotation = rotation_from_yaw_pitch(math.radians(yaw), math.radians(pitch))
    cut = erp_to_perspective(smooth(96), rotation, math.radians(fov), 24, 32)
    focal = 16 / math.tan(math.radians(fov) / 2)
    y, x = torch.meshgrid(torch.arange(24.0) + 0.5, torch.arange(32.0) + 0.5, indexing="ij")
    rays = torch.stack(((x - 16) / focal, (y - 12) / focal, torch.ones_like(x)), -1) @ rotation.T
    rx, ry, rz = torch.nn.functional.normalize(rays.double(), dim=-1).unbind(-1)
    basis = torch.stack((rx, ry, rz, rx * ry, ry * rz, rx * rz, rx * rx - ry * ry))
    weights = torch.randn(3, 7, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    torch.testing.assert_close(cut[0], torch.einsum("cb,bhw->chw", weights, basis) / 3, atol=2e-3, rtol=0)


@pytest.mark.parametrize(("yaw", "pitch", "fov"), [(0, 0, 90), (180, 20, 100), (45, 88, 110), (-120, -60, 80)])
def test_round_trip(yaw, pitch, fov):
    panorama = smooth(64)
    rotation = rotation_from_yaw_pitch(math.radians(yaw), math.radians(pitch))
    back, mask = perspective_to_erp(
        erp_to_perspective(panorama, rotation, math.radians(fov), 96, 128), rotation, math.radians(fov), 64
    )
    assert 0.03 < mask.double().mean() < 0.5
    assert float((back - panorama)[mask[:, None].expand_as(back)].abs().max()) < 0.02
    assert float(back[~mask[:, None].expand_as(back)].abs().max()) == 0


def test_labels_round_trip():
    classes = (smooth(64)[:, :1] > 0).long() * 5
    rotation = rotation_from_yaw_pitch(2.0, 0.4)
    cut = erp_to_perspective(classes, rotation, 1.6, 192, 256, mode="nearest")
    back, mask = perspective_to_erp(cut, rotation, 1.6, 64, mode="nearest")
    assert back.dtype == torch.int64
    assert set(back.unique().tolist()) <= {0, 5}
    assert float((back == classes)[mask[:, None]].double().mean()) >= 0.97


def test_six_square_views_cover_the_sphere_once():
    views = [(0, 0), (90, 0), (180, 0), (270, 0), (0, 90), (0, -90)]
    weights = erp_area_weights(64, 128, dtype=torch.float64)
    covered = torch.zeros(64, 128, dtype=torch.int64)
    for yaw, pitch in views:
        rotation = rotation_from_yaw_pitch(math.radians(yaw), math.radians(pitch))
        _, mask = perspective_to_erp(torch.ones(1, 1, 8, 8), rotation, math.pi / 2, 64)
        assert float((weights * mask[0]).sum()) == pytest.approx(1 / 6, abs=1e-3)
        covered += mask[0].long()
    assert covered.unique().tolist() == [1]


def test_turning_the_camera_rolls_the_panorama():
    panorama = smooth(32)
    for k in (1, 7, 40):
        yaw = 2 * math.pi * k / 64
        a = erp_to_perspective(panorama, rotation_from_yaw_pitch(yaw, 0.3), 1.5, 16, 16)
        b = erp_to_perspective(panorama.roll(-k, -1), rotation_from_yaw_pitch(0.0, 0.3), 1.5, 16, 16)
        torch.testing.assert_close(a, b, atol=1e-6, rtol=0)


def test_padding_wraps_and_crosses_the_poles():
    panorama = torch.arange(8.0).view(1, 1, 2, 4)
    padded = pad_erp(panorama, 1)[0, 0]
    assert padded.tolist() == [
        [1, 2, 3, 0, 1, 2],
        [3, 0, 1, 2, 3, 0],
        [7, 4, 5, 6, 7, 4],
        [5, 6, 7, 4, 5, 6],
    ]
    torch.testing.assert_close(
        sample_erp(smooth(32), erp_rays(32, 64, dtype=torch.float64)[None]), smooth(32), atol=1e-6, rtol=0
    )


def test_gradients_reach_the_panorama():
    panorama = smooth(8)[:, :1].requires_grad_()
    rotation = rotation_from_yaw_pitch(3.0, 1.2)
    assert torch.autograd.gradcheck(lambda p: erp_to_perspective(p, rotation, 1.5, 3, 4), (panorama,))
    picture = torch.rand(1, 1, 4, 4, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda p: perspective_to_erp(p, rotation, 1.5, 4)[0], (picture,))


@pytest.mark.parametrize(
    ("call", "says"),
    [
        (lambda: erp_rays(10, 21), "twice as wide as high, got 10 x 21"),
        (lambda: erp_to_perspective(torch.zeros(1, 3, 8, 15), torch.eye(3), 1.0, 4, 4), "twice as wide"),
        (lambda: erp_to_perspective(torch.zeros(3, 8, 16), torch.eye(3), 1.0, 4, 4), r"\[B, C, H, W\]"),
        (lambda: erp_to_perspective(torch.zeros(1, 3, 8, 16), torch.eye(3), math.pi, 4, 4), "field of view"),
        (lambda: perspective_to_erp(torch.zeros(1, 3, 8, 8), torch.eye(4), 1.0, 4), "rotation must be"),
        (lambda: pad_erp(torch.zeros(1, 1, 2, 4), 3), "from 0 to 2"),
    ],
)
def test_bad_input(call, says):
    with pytest.raises(ValueError, match=says):
        call()
