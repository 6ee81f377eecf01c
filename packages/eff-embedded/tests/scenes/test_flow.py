"""Optical flow: a still scene against the poses, moving ones against themselves."""

import math

import numpy as np
import pytest
import torch
from eff_embedded.scenes import (
    Camera,
    Equirectangular,
    Light,
    Pinhole,
    Scene,
    SceneConfig,
    SceneObject,
    make_camera,
    make_panorama,
    make_path,
    make_scene,
    optical_flow,
    pixel_grid,
    project_points,
    render,
    render_clip,
)


def test_no_motion_no_flow(moving_scenes, cameras):
    flow, seen = optical_flow(moving_scenes[0], cameras[0], 0.3, cameras[0], 0.3, dtype=torch.float64)
    assert flow.abs().max() < 1e-9
    assert seen.all()


def test_flow_of_a_still_scene_follows_from_depth_and_poses():
    scene = make_scene(seed=1)
    first = make_camera(scene, seed=1, size=(64, 48))
    second = make_camera(scene, seed=9, size=(64, 48))
    view, other = render(scene, first, dtype=torch.float64), render(scene, second, dtype=torch.float64)
    flow, seen = optical_flow(scene, first, 0.0, second, 0.0, dtype=torch.float64)
    target, z = project_points(view.points, other.intrinsics, other.extrinsics)
    wanted = target - pixel_grid(48, 64, like=target)
    assert (z > 0).double().mean() > 0.05
    torch.testing.assert_close(flow[:, z > 0], wanted[:, z > 0], atol=1e-8, rtol=1e-9)
    assert (flow[:, z <= 0] == 0).all()
    assert not seen[z <= 0].any()
    # Seen means: nothing is nearer to the second camera in that direction. Its own depth says so, up to a pixel.
    u, v = target.floor().long()
    inside = (z > 0) & (u >= 0) & (u < 64) & (v >= 0) & (v < 48)
    assert not seen[~inside].any()
    nearest = other.depth[v[inside], u[inside]]
    agrees = ((z[inside] - nearest).abs() < 0.1 * nearest) == seen[inside]
    assert 0.02 < seen.double().mean() < 0.98
    assert agrees.double().mean() > 0.9


def test_flow_of_a_moving_and_turning_object_by_hand():
    """A box that moves right and turns about the axis of the camera, seen straight on."""
    box = SceneObject(
        name="crate",
        shape="box",
        size=(2.0, 2.0, 1.0),
        centre=(0.0, 0.0, 4.5),
        velocity=(0.5, 0.0, 0.0),
        spin=(0.0, 0.0, math.pi / 2),
    )
    scene = Scene(objects=(box,), room=None, light=Light(position=(0, -5, 0)))
    lens = Pinhole.from_fov(41, 41, 40)
    camera = Camera.level(lens, (0, 0, 0))
    flow, seen = optical_flow(scene, camera, 0.0, camera, 1.0, dtype=torch.float64)
    grid = pixel_grid(41, 41, like=flow) - 20.5
    on = render(scene, camera).visible[0]
    # A quarter turn takes (x, y) to (-y, x); the front is 4 m away, so that 0.5 m are fx / 8 pixels.
    wanted = torch.stack([-grid[1] + lens.fx / 8, grid[0]]) - grid
    torch.testing.assert_close(flow[:, on], wanted[:, on], atol=1e-9, rtol=0)
    inside = (grid + flow).abs().amax(0) < 20.5
    assert torch.equal(seen, on & inside)
    assert (flow[:, ~on] == 0).all()


def test_back_again(moving_scenes, cameras):
    """Where the second picture shows the point, it shows the same object, and its flow back leads home."""
    checked = 0
    for scene, camera in zip(moving_scenes, cameras, strict=True):
        eye = np.add(camera.position, (0.1, 0.05, -0.1))
        other = Camera.look_at(camera.lens, eye, (0, -0.8, 0))
        view, later = render(scene, camera, 0.2), render(scene, other, 0.5)
        flow, seen = optical_flow(scene, camera, 0.2, other, 0.5)
        back, _ = optical_flow(scene, other, 0.5, camera, 0.2)
        height, width = seen.shape
        at = pixel_grid(height, width, like=flow) + flow
        u, v = (at - 0.5).round().long()
        inside = seen & (u >= 0) & (u < width) & (v >= 0) & (v < height)
        same = later.instances[v[inside], u[inside]] == view.instances[inside]
        assert same.float().mean() > 0.95
        rounding = (torch.stack([u, v]) + 0.5 - at)[:, inside]
        home = flow[:, inside] + back[:, v[inside], u[inside]] + rounding
        assert home.norm(dim=0)[same].median() < 0.6  # of a pixel: the flow changes over the half that was rounded
        moving = view.instances[inside] >= 0
        checked += int(moving.sum())
    assert checked > 1000


def test_points_move_with_their_object(moving_scenes, cameras):
    """Against a direct computation: each point in the frame of its object, placed again at the later time."""
    scene, camera = moving_scenes[1], cameras[1]
    view = render(scene, camera, 0.1, dtype=torch.float64)
    flow, _ = optical_flow(scene, camera, 0.1, camera, 0.9, dtype=torch.float64)
    for k, thing in enumerate(scene.objects):
        points = view.points[:, view.visible[k]].numpy()
        (r0, c0), (r1, c1) = thing.pose(0.1), thing.pose(0.9)
        later = torch.from_numpy(r1 @ (r0.T @ (points - c0[:, None])) + c1[:, None])
        target, z = project_points(later, view.intrinsics, view.extrinsics)
        wanted = target - pixel_grid(80, 96, like=target)[:, view.visible[k]]
        torch.testing.assert_close(flow[:, view.visible[k]][:, z > 0], wanted[:, z > 0])
        if view.visible[k].any():
            assert flow[:, view.visible[k]].abs().max() > 0.5  # it does move
    room = view.instances < 0
    assert flow[:, room].abs().max() < 1e-9


def test_panorama_flow_takes_the_short_way_round():
    scene = make_scene(seed=2)
    lens = Equirectangular(width=64, height=32)
    place = make_panorama(scene, seed=2).position
    first, second = (Camera.level(lens, place, yaw=yaw) for yaw in (0, 45))
    flow, seen = optical_flow(scene, first, 0.0, second, 0.0, dtype=torch.float64)
    torch.testing.assert_close(flow[0], torch.full((32, 64), -8.0, dtype=torch.float64))
    assert flow[1].abs().max() < 1e-9
    assert seen.all()


def test_clip_holds_pictures_and_their_flow():
    scene = make_scene(SceneConfig(speed=(0.3, 0.5), num_objects=(5, 5), duration=1.0), seed=8)
    times = [0.0, 0.5, 1.0]
    path = make_path(scene, 3, seed=8, size=(40, 32), sweep=10)
    clip = render_clip(scene, path, times)
    assert clip.views.colour.shape == (3, 3, 32, 40)
    assert clip.views.full.shape == (3, 5, 32, 40)
    assert clip.flow.shape == (2, 2, 32, 40)
    assert clip.views.time.tolist() == times
    assert clip.views.names == scene.names
    for k in (0, 1):
        wanted = optical_flow(scene, path[k], times[k], path[k + 1], times[k + 1])
        assert torch.equal(clip.flow[k], wanted.flow)
        assert torch.equal(clip.flow_seen[k], wanted.seen)
    assert torch.equal(clip.views.depth[2], render(scene, path[2], 1.0).depth)
    with pytest.raises(ValueError, match="at least two"):
        render_clip(scene, path[:1], [0.0])
