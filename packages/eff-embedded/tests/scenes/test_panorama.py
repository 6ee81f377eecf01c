"""Panoramas: known rooms, and agreement with perspective pictures from the same place."""

import math

import numpy as np
import pytest
import torch
from eff_embedded.scenes import (
    CLASSES,
    Camera,
    Equirectangular,
    Light,
    Pinhole,
    Room,
    Scene,
    Texture,
    make_panorama,
    make_scene,
    render,
    resized,
)


@pytest.fixture(scope="module")
def cube():
    """An empty room of side 2 with the camera in its middle."""
    room = Room(size=(2.0, 2.0, 2.0), textures=(Texture(),) * 6)
    return Scene(objects=(), room=room, light=Light(position=(0, -1.5, 0)))


def test_empty_cube_seen_from_its_middle(cube):
    lens = Equirectangular(width=512, height=256)
    view = render(cube, Camera.level(lens, (0, -1, 0)), dtype=torch.float64)
    rays = torch.from_numpy(lens.rays().copy()).view(3, 256, 512)
    torch.testing.assert_close(view.distance, 1 / rays.abs().amax(0))
    assert view.distance.min() == pytest.approx(1, abs=1e-4)
    assert view.distance.max() == pytest.approx(math.sqrt(3), abs=0.02)  # the corner is up to a pixel away
    # The longitude of a point is atan2(x, z), its latitude grows upwards.
    middle = view.points[:, 128, 256]
    torch.testing.assert_close(middle, torch.tensor([0.0, -1.0, 1.0], dtype=torch.float64), atol=0.02, rtol=0)
    assert view.points[0, 128, 384] == pytest.approx(1)
    assert view.classes[0, 0] == CLASSES.index("ceiling")
    assert view.classes[-1, 0] == CLASSES.index("floor")
    assert (view.normals * rays).sum(0).max() < 0
    assert view.normals[:, 128, 256].tolist() == [0, 0, -1]
    assert view.intrinsics is None
    # Each of the six sides covers a sixth of the sphere.
    area = torch.cos((0.5 - (torch.arange(256) + 0.5) / 256) * math.pi)[:, None].expand(256, 512)
    for name, share in (("ceiling", 1 / 6), ("floor", 1 / 6), ("wall", 4 / 6)):
        seen = area[view.classes == CLASSES.index(name)].sum() / area.sum()
        assert float(seen) == pytest.approx(share, abs=1e-3)


def test_wall_ahead_has_constant_depth(cube):
    view = render(cube, Camera.level(Pinhole.from_fov(64, 64, 90), (0, -1, 0)), dtype=torch.float64)
    torch.testing.assert_close(view.depth, torch.ones(64, 64, dtype=torch.float64))
    assert (view.classes == CLASSES.index("wall")).all()


def nearest(panorama, lens, directions):
    """The pixels of a panorama in which directions [3, N] of its camera's frame lie."""
    uv, _ = lens.project(directions)
    u, v = np.floor(uv).astype(int)
    return panorama[..., torch.from_numpy(v), torch.from_numpy(u)]


@pytest.mark.parametrize(("yaw", "pitch"), [(0, 0), (100, 20), (-160, -45), (60, 80)])
def test_perspective_agrees_with_a_panorama_of_the_same_place(yaw, pitch):
    """Each pixel of a perspective picture finds its value in the panorama pixel that its ray falls into."""
    scene = make_scene(seed=5)
    panorama = make_panorama(scene, seed=5, height=512)
    wide = render(scene, panorama, dtype=torch.float64)
    camera = Camera.level(Pinhole.from_fov(48, 40, 85), panorama.position, yaw=yaw, pitch=pitch)
    view = render(scene, camera, dtype=torch.float64)
    to_panorama = panorama.extrinsics[:3, :3] @ camera.extrinsics[:3, :3].T
    directions = to_panorama @ camera.lens.rays()
    for name in ("instances", "classes"):
        same = nearest(getattr(wide, name), panorama.lens, directions).view(40, 48) == getattr(view, name)
        assert same.double().mean() > 0.98, name
    full = nearest(wide.full, panorama.lens, directions).view(-1, 40, 48)
    assert (full == view.full).double().mean() > 0.99
    same = (view.instances == nearest(wide.instances, panorama.lens, directions).view(40, 48)) & (
        (view.normals * nearest(wide.normals, panorama.lens, directions).view(3, 40, 48)).sum(0) > 0.99
    )
    assert same.double().mean() > 0.95
    error = (nearest(wide.points, panorama.lens, directions).view(3, 40, 48) - view.points).norm(dim=0)
    # Half a pixel of the panorama is 0.0031 radians; surfaces seen at a slant stretch it.
    assert error[same].median() < 0.0045 * view.distance.median()
    distance = nearest(wide.distance, panorama.lens, directions).view(40, 48)
    assert ((distance - view.distance).abs() / view.distance)[same].median() < 0.003


def test_the_same_ray_gives_the_same_values_through_both_lenses():
    """A pinhole camera of one pixel that looks along the ray of a panorama pixel: exact, for every map."""
    scene = make_scene(seed=4)
    panorama = make_panorama(scene, seed=4, height=32)
    wide = render(scene, panorama, dtype=torch.float64)
    for row, column in ((5, 3), (10, 40), (16, 32), (20, 60), (28, 17)):
        target = wide.points[:, row, column].tolist()
        view = render(scene, Camera.look_at(Pinhole.from_fov(1, 1, 1), panorama.position, target), dtype=torch.float64)
        for name in ("points", "normals", "distance", "instances", "classes", "full", "colour"):
            seen, wanted = getattr(view, name)[..., 0, 0], getattr(wide, name)[..., row, column]
            torch.testing.assert_close(seen, wanted, atol=1e-7, rtol=0, msg=name)


def test_turning_the_camera_rolls_the_panorama():
    scene = make_scene(seed=6)
    lens = Equirectangular(width=64, height=32)
    place = make_panorama(scene, seed=6).position
    ahead = render(scene, Camera.level(lens, place), dtype=torch.float64)
    turned = render(scene, Camera.level(lens, place, yaw=90), dtype=torch.float64)
    for name in ("distance", "points", "normals", "instances", "colour"):
        torch.testing.assert_close(getattr(turned, name), getattr(ahead, name).roll(-16, -1), atol=1e-8, rtol=0)


def test_depth_is_negative_behind(moving_scenes):
    camera = make_panorama(moving_scenes[0], seed=0, height=16)
    view = render(moving_scenes[0], camera)
    assert (view.depth[:, 8:24] > 0).all()
    assert (view.depth[:, 24:] < 0).all()
    small = resized(camera, Pinhole.from_fov(4, 4, 60))
    assert small.position == camera.position
