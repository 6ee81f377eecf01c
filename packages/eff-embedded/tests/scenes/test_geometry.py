"""Poses and projection, against worked examples and each other."""

import math

import numpy as np
import pytest
import torch
from eff_embedded.scenes import Camera, Equirectangular, Pinhole, pixel_grid, project_points, unproject_depth
from eff_embedded.scenes.geometry import look_at, rotation_from_angles, rotation_from_vector
from hypothesis import given
from hypothesis import strategies as st

coordinate = st.floats(-3, 3)


@given(st.tuples(coordinate, coordinate, coordinate))
def test_rotation_is_rigid_and_keeps_its_axis(vector):
    rotation = rotation_from_vector(vector)
    np.testing.assert_allclose(rotation @ rotation.T, np.eye(3), atol=1e-12)
    assert np.linalg.det(rotation) == pytest.approx(1)
    np.testing.assert_allclose(rotation @ vector, vector, atol=1e-12)
    assert np.trace(rotation) == pytest.approx(1 + 2 * math.cos(np.linalg.norm(vector)))


def test_angles_turn_right_up_and_clockwise():
    forward, up, right = np.array([0, 0, 1]), np.array([0, -1, 0]), np.array([1, 0, 0])
    np.testing.assert_allclose(rotation_from_angles(90, 0) @ forward, right, atol=1e-12)
    np.testing.assert_allclose(rotation_from_angles(0, 90) @ forward, up, atol=1e-12)
    # A camera rolled clockwise has its right side where down was.
    np.testing.assert_allclose(rotation_from_angles(0, 0, 90) @ right, -up, atol=1e-12)
    # First up, then right: the pitch is about the turned x axis.
    np.testing.assert_allclose(rotation_from_angles(90, 45) @ forward, [0.5**0.5, -(0.5**0.5), 0], atol=1e-12)


def test_look_at_puts_the_target_on_the_axis_and_the_horizon_level():
    eye, target = (1.0, -1.5, -2.0), (0.5, -0.3, 1.0)
    matrix = look_at(eye, target)
    seen = matrix @ [*target, 1.0]
    np.testing.assert_allclose(seen[:3], [0, 0, np.linalg.norm(np.subtract(target, eye))], atol=1e-12)
    np.testing.assert_allclose(matrix @ [*eye, 1.0], [0, 0, 0, 1], atol=1e-12)
    assert matrix[0, 1] == pytest.approx(0)  # the x axis of the picture is level
    assert matrix[1, 1] > 0  # down in the world is down in the picture


def test_look_at_refuses_straight_up():
    with pytest.raises(ValueError, match="straight above or below the eye"):
        look_at((0, -1, 0), (0, -2, 0))


def test_level_camera_agrees_with_look_at():
    lens = Pinhole.from_fov(8, 8, 60)
    level = Camera.level(lens, (0.3, -1.2, -1.0), yaw=30, pitch=10)
    direction = rotation_from_angles(30, 10) @ [0, 0, 1]
    other = Camera.look_at(lens, (0.3, -1.2, -1.0), np.array([0.3, -1.2, -1.0]) + direction)
    np.testing.assert_allclose(level.extrinsics, other.extrinsics, atol=1e-12)
    np.testing.assert_allclose(level.position, (0.3, -1.2, -1.0), atol=1e-12)


def test_pixel_centres_are_at_a_half():
    lens = Pinhole(width=4, height=2, fx=2.0, fy=3.0, cx=2.0, cy=1.0)
    rays = lens.rays().reshape(3, 2, 4)
    assert rays[:, 0, 0].tolist() == [(0.5 - 2) / 2, (0.5 - 1) / 3, 1]
    uv, inside = lens.project(lens.rays() * 7.0)
    np.testing.assert_allclose(uv.reshape(2, 2, 4), pixel_grid(2, 4, like=torch.zeros(1, dtype=torch.float64)))
    assert inside.all()


def test_panorama_rays_worked_out():
    lens = Equirectangular(width=8, height=4)
    rays = lens.rays().reshape(3, 4, 8)
    lon, lat = 2 * math.pi * 5.5 / 8 - math.pi, math.pi / 2 - math.pi * 0.5 / 4
    wanted = [math.cos(lat) * math.sin(lon), -math.sin(lat), math.cos(lat) * math.cos(lon)]
    np.testing.assert_allclose(rays[:, 0, 5], wanted, atol=1e-12)
    np.testing.assert_allclose(np.linalg.norm(rays, axis=0), 1)
    uv, _ = lens.project(lens.rays() * 3)
    np.testing.assert_allclose(uv[0].reshape(4, 8)[2], np.arange(8) + 0.5, atol=1e-9)
    np.testing.assert_allclose(uv[1].reshape(4, 8)[:, 3], np.arange(4) + 0.5, atol=1e-9)


def test_projection_undoes_unprojection_in_batches():
    depth = torch.rand(2, 3, 5, 6, dtype=torch.float64) + 0.5
    lens = Pinhole.from_fov(6, 5, 70)
    cameras = [Camera.level(lens, (0.1 * k, -1.0, 0.0), yaw=20.0 * k, pitch=5.0, roll=3.0) for k in range(6)]
    intrinsics = torch.from_numpy(lens.matrix()).expand(2, 3, 3, 3)
    extrinsics = torch.stack([torch.from_numpy(c.extrinsics) for c in cameras]).view(2, 3, 4, 4)
    points = unproject_depth(depth, intrinsics, extrinsics)
    uv, z = project_points(points, intrinsics, extrinsics)
    assert points.shape == (2, 3, 3, 5, 6)
    torch.testing.assert_close(z, depth)
    torch.testing.assert_close(uv, pixel_grid(5, 6, like=depth).expand(2, 3, 2, 5, 6))
    one = unproject_depth(depth[1, 2], intrinsics[1, 2], extrinsics[1, 2])
    torch.testing.assert_close(one, points[1, 2])
    in_camera = unproject_depth(depth[1, 2], intrinsics[1, 2])
    torch.testing.assert_close(in_camera[2], depth[1, 2])


def test_finer_lens_sees_the_same():
    for lens in (Pinhole.from_fov(5, 3, 80), Equirectangular(width=8, height=4)):
        fine = lens.finer(3).rays().reshape(3, lens.height * 3, lens.width * 3)
        coarse = lens.rays().reshape(3, lens.height, lens.width)
        np.testing.assert_allclose(fine[:, 1::3, 1::3], coarse, atol=1e-12)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Pinhole.from_fov(8, 8, 180), "fov=180"),
        (lambda: Pinhole.from_fov(0, 8, 60), "0x8"),
        (lambda: Pinhole(width=8, height=8, fx=-1, fy=1, cx=4, cy=4), "fx=-1"),
        (lambda: Equirectangular(width=9, height=4), "twice the height"),
        (lambda: Camera.of_matrix(Pinhole.from_fov(8, 8, 60), np.diag([1.0, 1, -1, 1])), "not a rotation"),
        (lambda: Camera.of_matrix(Pinhole.from_fov(8, 8, 60), np.eye(3)), "shape"),
    ],
)
def test_wrong_lenses_and_poses_are_refused(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def test_camera_survives_json():
    for lens in (Pinhole.from_fov(8, 6, 60), Equirectangular(width=8, height=4)):
        camera = Camera.level(lens, (1, -1, 2), yaw=12)
        assert Camera.from_dict(camera.to_dict()) == camera
    with pytest.raises(ValueError, match="kind 'fisheye'"):
        Camera.from_dict({"lens": {"kind": "fisheye"}, "world_to_camera": []})
