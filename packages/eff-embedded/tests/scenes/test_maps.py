"""What must hold between the maps of a picture."""

import numpy as np
import pytest
import torch
from eff_embedded.scenes import (
    CLASSES,
    Camera,
    Light,
    Pinhole,
    Scene,
    SceneObject,
    make_camera,
    make_scene,
    render,
    render_views,
    unproject_depth,
)
from eff_embedded.scenes.shapes import contains


def test_depth_unprojects_to_the_points(moving_scenes, cameras, exact_views):
    for scene, camera, exact in zip(moving_scenes, cameras, exact_views, strict=True):
        view = render(scene, camera, 0.5)
        error = unproject_depth(view.depth, view.intrinsics, view.extrinsics) - view.points
        assert view.depth.dtype == torch.float32
        assert error.abs().max() < 1e-5
        error = unproject_depth(exact.depth, exact.intrinsics, exact.extrinsics) - exact.points
        assert error.abs().max() < 1e-12


def test_distance_is_that_to_the_camera(cameras, exact_views):
    for camera, view in zip(cameras, exact_views, strict=True):
        place = torch.tensor(camera.position)
        torch.testing.assert_close(view.distance, (view.points - place[:, None, None]).norm(dim=0))
        assert (view.distance >= view.depth).all()


def test_normals_are_those_of_the_points(cameras, exact_views):
    """Cross product of the central differences of the points, where the surface is smooth and not seen at a slant."""
    compared = 0
    for camera, view in zip(cameras, exact_views, strict=True):
        right = view.points[:, 1:-1, 2:] - view.points[:, 1:-1, :-2]
        down = view.points[:, 2:, 1:-1] - view.points[:, :-2, 1:-1]
        wanted = torch.nn.functional.normalize(torch.linalg.cross(down, right, dim=0), dim=0)
        normals = view.normals[:, 1:-1, 1:-1]
        patches = torch.nn.functional.unfold(view.normals[None], 3).view(3, 9, *normals.shape[1:])
        same = torch.nn.functional.unfold(view.instances[None, None].double(), 3).view(9, *normals.shape[1:])
        ray = torch.nn.functional.normalize(view.points - torch.tensor(camera.position)[:, None, None], dim=0)
        slant = (ray[:, 1:-1, 1:-1] * normals).sum(0)
        smooth = ((patches * normals[:, None]).sum(0) > 0.95).all(0) & (same == same[4]).all(0) & (slant < -0.4)
        angle = (wanted * normals).sum(0).clamp(-1, 1).acos().rad2deg()[smooth]
        flat = ((patches - normals[:, None]).abs().amax((0, 1)) < 1e-12)[smooth]
        assert angle.max() < 3
        assert angle[flat].max() < 1e-4  # planes have no curvature
        compared += int((~flat).sum())
    assert compared > 500  # there were curved surfaces among them


def test_normals_are_unit_and_face_the_camera(cameras, exact_views):
    for camera, view in zip(cameras, exact_views, strict=True):
        ray = view.points - torch.tensor(camera.position)[:, None, None]
        torch.testing.assert_close(view.normals.norm(dim=0), torch.ones_like(view.depth))
        assert ((ray * view.normals).sum(0) < 0).all()
        turned = torch.einsum("ij,jhw->ihw", view.extrinsics[:3, :3], view.normals)
        torch.testing.assert_close(view.camera_normals, turned)


def test_masks_divide_the_picture(exact_views):
    for view in exact_views:
        assert (view.visible.sum(0) <= 1).all()
        assert torch.equal(view.visible.any(0), view.instances >= 0)
        for k in range(len(view.names)):
            assert torch.equal(view.visible[k], view.instances == k)
            assert (view.full[k] | ~view.visible[k]).all()
            assert (view.classes[view.visible[k]] == CLASSES.index(view.names[k])).all()
        assert (view.classes[view.instances < 0] < 3).all()
        assert view.valid.all()


def test_full_mask_is_each_object_alone(moving_scenes, cameras, exact_views):
    hidden = 0
    for scene, camera, view in zip(moving_scenes, cameras, exact_views, strict=True):
        for k, thing in enumerate(scene.objects):
            alone = Scene(objects=(thing,), room=scene.room, light=scene.light)
            assert torch.equal(view.full[k], render(alone, camera, 0.5).visible[0])
        hidden += int((view.full & ~view.visible).sum())
    assert hidden > 200  # something was hidden


def test_nothing_stands_before_what_is_seen(moving_scenes, cameras, exact_views):
    """Brute force: before the hit the ray is in no object; right behind it is in that object, or out of the room."""
    for scene, camera, view in zip(moving_scenes[:3], cameras, exact_views, strict=False):
        rng, place = np.random.default_rng(0), np.array(camera.position)
        poses = [o.pose(0.5) for o in scene.objects]
        for v, u in zip(rng.integers(0, 80, 60), rng.integers(0, 96, 60), strict=True):
            point, k = view.points[:, v, u].numpy(), int(view.instances[v, u])
            for share in (*np.linspace(0.01, 0.999, 80), 1 + 1e-6):
                on_ray = place + share * (point - place)
                inside = [
                    j
                    for j, (o, (r, c)) in enumerate(zip(scene.objects, poses, strict=True))
                    if contains(o.shape, o.half, r.T @ (on_ray - c))
                ]
                assert inside == ([] if share < 1 or k < 0 else [k])
            if k < 0:
                assert not scene.room.holds(on_ray)


def test_floor_walls_and_ceiling_are_where_they_are(moving_scenes, exact_views):
    for scene, view in zip(moving_scenes, exact_views, strict=True):
        width, height, depth = scene.room.size
        room = view.instances < 0
        x, y, z = view.points
        assert y[room & (view.classes == 0)].abs().max() < 1e-9
        assert (y[room & (view.classes == 2)] + height).abs().sum() < 1e-6
        wall = room & (view.classes == 1)
        off = torch.minimum((x.abs() - width / 2).abs(), (z.abs() - depth / 2).abs())
        assert off[wall].max() < 1e-9
        assert (view.normals[1][room & (view.classes == 0)] == -1).all()


def test_colour_belongs_to_the_surface_not_to_the_camera():
    """A point that two cameras see has one colour: the second looks exactly at points of the first."""
    scene = make_scene(seed=3)
    first = make_camera(scene, seed=3, size=(40, 40))
    view = render(scene, first, dtype=torch.float64)
    compared = 0
    for v, u in ((20, 20), (30, 10), (10, 30), (33, 33), (25, 5), (38, 20)):
        point = view.points[:, v, u].tolist()
        lens = Pinhole.from_fov(1, 1, 1)
        eye = np.add(first.position, (0.2, -0.1, 0.15))
        other = render(scene, Camera.look_at(lens, eye, point), dtype=torch.float64)
        if (other.points[:, 0, 0] - view.points[:, v, u]).abs().max() < 1e-6:
            torch.testing.assert_close(other.colour[:, 0, 0], view.colour[:, v, u], atol=1e-5, rtol=0)
            compared += 1
    assert compared >= 4


def test_light_by_hand():
    """One spot of a floor-like box right below the lamp, one to the side, one in the shadow of a ball."""
    table = SceneObject(name="bench", shape="box", size=(20.0, 1.0, 20.0), centre=(0.0, 0.5, 0.0))
    ball = SceneObject(name="ball", shape="sphere", size=(0.2, 0.2, 0.2), centre=(1.0, -1.0, 0.0))
    lamp = Light(position=(0.0, -2.0, 0.0), ambient=0.3, reach=4.0)
    scene = Scene(objects=(table, ball), room=None, light=lamp)

    def spot(x, z):
        camera = Camera.look_at(Pinhole.from_fov(1, 1, 1), (x, -1.0, z - 3.0), (x, 0.0, z))
        return float(render(scene, camera, dtype=torch.float64).colour[0, 0, 0])

    assert spot(0.0, 0.0) == pytest.approx(0.7 * (0.3 + 0.7 / (1 + 4 / 16)))
    assert spot(0.0, 1.5) == pytest.approx(0.7 * (0.3 + 0.7 * 0.8 / (1 + 6.25 / 16)))
    assert spot(2.0, 0.0) == pytest.approx(0.7 * 0.3)  # the ball is half way
    lamp = Light(position=(0.0, -2.0, 0.0), ambient=0.3, shadows=False)
    scene = Scene(objects=(table, ball), room=None, light=lamp)
    assert spot(2.0, 0.0) == pytest.approx(0.7 * (0.3 + 0.7 * 0.5**0.5))


def test_antialiasing_is_the_mean_of_a_finer_picture():
    scene = make_scene(seed=2)
    camera = make_camera(scene, seed=2, size=(24, 20))
    fine = render(scene, Camera(lens=camera.lens.finer(3), world_to_camera=camera.world_to_camera))
    soft = render(scene, camera, antialias=3)
    torch.testing.assert_close(soft.colour, torch.nn.functional.avg_pool2d(fine.colour, 3), atol=1e-6, rtol=0)
    plain = render(scene, camera)
    for name in ("depth", "points", "normals", "instances", "full"):
        assert torch.equal(getattr(soft, name), getattr(plain, name)), name


def test_colours_are_colours(exact_views):
    for view in exact_views:
        assert view.colour.min() >= 0
        assert view.colour.max() <= 1
        assert view.colour.std() > 0.05


def test_stacked_views_in_the_frame_of_the_first(moving_scenes, cameras):
    scene = moving_scenes[0]
    second = Camera.level(cameras[0].lens, (0.0, -2.3, 0.0), yaw=10)
    views = render_views(scene, [cameras[0], second], dtype=torch.float64)
    moved = views.in_frame_of_first()
    assert torch.equal(moved.extrinsics[0], torch.eye(4, dtype=torch.float64))
    assert moved.intrinsics is views.intrinsics
    again = torch.stack([unproject_depth(moved.depth[k], moved.intrinsics[k], moved.extrinsics[k]) for k in range(2)])
    torch.testing.assert_close(moved.points, again, atol=1e-9, rtol=0)
    torch.testing.assert_close(moved.normals[0], views.camera_normals[0])
    with pytest.raises(ValueError, match="stacked"):
        render(scene, second).in_frame_of_first()


def test_cameras_in_walls_and_objects_are_refused(moving_scenes):
    scene = moving_scenes[0]
    lens = Pinhole.from_fov(8, 8, 60)
    with pytest.raises(ValueError, match="outside of the room"):
        render(scene, Camera.level(lens, (0, 0.5, 0)))
    with pytest.raises(ValueError, match=f"inside object 0, a {scene.objects[0].name}"):
        render(scene, Camera.level(lens, scene.objects[0].centre))
    with pytest.raises(ValueError, match="antialias=0"):
        render(scene, Camera.level(lens, (0, -1, 0)), antialias=0)
    with pytest.raises(ValueError, match="2 cameras and 1 times"):
        render_views(scene, [Camera.level(lens, (0, -1, 0))] * 2, [0.0])
    with pytest.raises(ValueError, match="differ"):
        render_views(scene, [Camera.level(Pinhole.from_fov(8, n, 60), (0, -2.3, 0)) for n in (8, 9)])
