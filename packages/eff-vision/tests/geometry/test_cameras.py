import math

import pytest
import torch
from eff_vision.geometry import (
    decode_pose,
    encode_pose,
    fov_from_intrinsics,
    intrinsics_from_fov,
    invert_pose,
    matrix_to_quaternion,
    pixel_grid,
    pixel_rays,
    project,
    quaternion_to_matrix,
    radial_to_z,
    relative_poses,
    rotation_angle,
    transform_points,
    unproject,
    z_to_radial,
)
from hypothesis import given
from hypothesis import strategies as st


def random_poses(*shape, seed=0):
    g = torch.Generator().manual_seed(seed)
    rotation = quaternion_to_matrix(torch.randn(*shape, 4, generator=g, dtype=torch.float64))
    return torch.cat((rotation, torch.randn(*shape, 3, 1, generator=g, dtype=torch.float64)), -1)


def test_pixel_centres():
    assert pixel_grid(2, 3)[1, 2].tolist() == [2.5, 1.5]
    k = torch.tensor([[10.0, 0, 1.5], [0, 20, 1], [0, 0, 1]])
    assert pixel_rays(k, 2, 3)[0, 0].tolist() == pytest.approx([-0.1, -0.025, 1.0])


def test_unprojected_points_project_back():
    k = intrinsics_from_fov(torch.tensor([0.9, 1.3], dtype=torch.float64), 6, 8)
    poses = random_poses(2)
    depth = torch.rand(2, 6, 8, dtype=torch.float64) + 0.5
    points = unproject(depth, k, poses)
    pixels, z = project(points.flatten(1, 2), k, poses)
    torch.testing.assert_close(pixels, pixel_grid(6, 8, dtype=torch.float64).flatten(0, 1).expand(2, -1, -1))
    torch.testing.assert_close(z, depth.flatten(1))


def test_radial_depth_is_the_distance():
    k = intrinsics_from_fov(1.2, 5, 7)
    depth = torch.rand(5, 7) + 1
    torch.testing.assert_close(z_to_radial(depth, k), unproject(depth, k).norm(dim=-1))
    torch.testing.assert_close(radial_to_z(z_to_radial(depth, k), k), depth)


def test_inverse_and_relative_poses():
    poses = random_poses(3)
    points = torch.randn(3, 4, 3, dtype=torch.float64)
    torch.testing.assert_close(transform_points(invert_pose(poses), transform_points(poses, points)), points)
    relative = relative_poses(poses, 1)
    torch.testing.assert_close(relative[1], torch.eye(3, 4, dtype=torch.float64))
    world = torch.randn(1, 4, 3, dtype=torch.float64)
    seen = transform_points(poses[1:2], world)
    torch.testing.assert_close(transform_points(relative[2:3], seen), transform_points(poses[2:3], world))
    square = torch.cat((poses, torch.tensor([[[0.0, 0, 0, 1]]], dtype=torch.float64).expand(3, 1, 4)), -2)
    torch.testing.assert_close(invert_pose(square) @ square, torch.eye(4, dtype=torch.float64).expand(3, 4, 4))


@given(
    st.lists(st.floats(-1, 1, allow_subnormal=False), min_size=4, max_size=4).filter(
        lambda q: sum(x * x for x in q) > 0.01
    )
)
def test_quaternions_round_trip(values):
    q = torch.nn.functional.normalize(torch.tensor(values, dtype=torch.float64), dim=-1)
    matrix = quaternion_to_matrix(q)
    torch.testing.assert_close(matrix @ matrix.T, torch.eye(3, dtype=torch.float64), atol=1e-12, rtol=0)
    assert float(torch.linalg.det(matrix)) == pytest.approx(1)
    back = matrix_to_quaternion(matrix)
    assert float(back[3]) >= 0
    torch.testing.assert_close(quaternion_to_matrix(back), matrix, atol=1e-9, rtol=0)
    torch.testing.assert_close(quaternion_to_matrix(-q), matrix)


def test_known_rotation():
    quarter = quaternion_to_matrix(torch.tensor([0.0, 0.0, math.sin(math.pi / 4), math.cos(math.pi / 4)]))
    torch.testing.assert_close(quarter @ torch.tensor([1.0, 0, 0]), torch.tensor([0.0, 1, 0]), atol=1e-6, rtol=0)
    assert math.degrees(rotation_angle(quarter, torch.eye(3))) == pytest.approx(90, abs=1e-4)


@pytest.mark.parametrize("degrees", [1e-6, 0.01, 10.0, 179.999])
def test_rotation_angles_are_exact_also_when_small(degrees):
    half = math.radians(degrees) / 2
    turned = quaternion_to_matrix(torch.tensor([math.sin(half), 0, 0, math.cos(half)], dtype=torch.float64))
    angle = math.degrees(rotation_angle(turned, torch.eye(3, dtype=torch.float64)))
    assert angle == pytest.approx(degrees, rel=1e-6)


def test_pose_codes_round_trip():
    poses = random_poses(2, 5, seed=3)
    k = intrinsics_from_fov(torch.linspace(0.3, 2.5, 10, dtype=torch.float64).view(2, 5), 40, 64)
    code = encode_pose(poses, k, 40, 64)
    assert code.shape == (2, 5, 9)
    for sign in (1, -1):
        code[..., 3:7] *= sign
        extrinsics, intrinsics = decode_pose(code, 40, 64)
        torch.testing.assert_close(extrinsics, poses, atol=1e-9, rtol=0)
        torch.testing.assert_close(intrinsics, k)


def test_fields_of_view():
    k = intrinsics_from_fov(math.pi / 2, 10, 20)
    vertical, horizontal = fov_from_intrinsics(k, 10, 20)
    assert float(horizontal) == pytest.approx(math.pi / 2)
    assert float(vertical) == pytest.approx(2 * math.atan(0.5))


@pytest.mark.parametrize(
    ("call", "says"),
    [
        (lambda: intrinsics_from_fov(0.0, 4, 4), "between 0 and pi"),
        (lambda: intrinsics_from_fov(float("nan"), 4, 4), "between 0 and pi"),
        (lambda: pixel_rays(torch.zeros(3, 3), 4, 4), "focal lengths must be positive"),
        (lambda: pixel_rays(torch.eye(4), 4, 4), r"\[\.\.\., 3, 3\]"),
        (lambda: pixel_grid(0, 4), "at least one pixel"),
        (lambda: invert_pose(torch.full((3, 4), float("nan"))), "not finite"),
        (lambda: invert_pose(torch.eye(3)), r"\[\.\.\., 3, 4\]"),
        (lambda: decode_pose(torch.zeros(7), 4, 4), "9 numbers"),
    ],
)
def test_bad_input(call, says):
    with pytest.raises(ValueError, match=says):
        call()
