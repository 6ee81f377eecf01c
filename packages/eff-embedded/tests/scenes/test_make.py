"""Random scenes and cameras: the same for a seed, free of collisions, with the names that they promise."""

import dataclasses
import json

import numpy as np
import pytest
import torch
from eff_embedded.scenes import (
    CLASSES,
    GROUPS,
    SYNONYMS,
    Light,
    Room,
    Scene,
    SceneConfig,
    SceneObject,
    Texture,
    make_camera,
    make_panorama,
    make_path,
    make_scene,
    make_views,
    render,
    render_views,
)
from eff_embedded.scenes.images import sprite_pixels
from eff_embedded.scenes.kinds import KINDS, SPRITES

EVERYTHING = SceneConfig(
    num_objects=(6, 8),
    styles=("procedural", "photographs", "sprites"),
    floating=0.5,
    speed=(0.2, 0.8),
    spin=(20, 120),
    duration=2.0,
)


def test_seed_decides():
    assert make_scene(EVERYTHING, seed=3) == make_scene(EVERYTHING, seed=3)
    assert len({make_scene(EVERYTHING, seed=seed) for seed in range(10)}) == 10
    scene = make_scene(seed=3)
    assert make_camera(scene, seed=1) == make_camera(scene, seed=1)
    assert make_camera(scene, seed=1) != make_camera(scene, seed=2)
    assert torch.equal(
        render(scene, make_camera(scene, seed=1)).colour, render(scene, make_camera(scene, seed=1)).colour
    )


def test_scenes_of_a_seed_stay_what_they_are():
    """A change of the generator changes every data set made with it, and must be meant."""
    scene = make_scene(seed=0)
    assert scene.names == GOLDEN_NAMES
    np.testing.assert_allclose(scene.objects[0].centre, GOLDEN_CENTRE, atol=1e-9)


GOLDEN_NAMES = ("bench", "crate", "bench", "ball", "barrel", "screen")
GOLDEN_CENTRE = (0.6427831207, -0.1766792788, 0.5180717645)


def corners(thing, time):
    """The eight corners of the box around an object, [3, 8]; its solid is within their hull."""
    rotation, centre = thing.pose(time)
    signs = np.array(np.meshgrid([-1, 1], [-1, 1], [-1, 1])).reshape(3, -1)
    return rotation @ (signs * thing.half[:, None]) + centre[:, None]


def samples(thing, time):
    """Points of the surface, [3, N], for checks against other solids."""
    rng = np.random.default_rng(0)
    inside = rng.uniform(-1, 1, size=(3, 600)) * thing.half[:, None]
    if thing.shape == "box":
        axis = rng.integers(3, size=600)
        inside[axis, np.arange(600)] = np.sign(inside[axis, np.arange(600)]) * thing.half[axis]
    elif thing.shape == "sphere":
        inside *= thing.half[0] / np.linalg.norm(inside, axis=0)
    else:
        inside[[0, 2]] *= thing.half[0] / np.maximum(np.hypot(inside[0], inside[2]), thing.half[0] / 2)
    rotation, centre = thing.pose(time)
    return rotation @ inside + centre[:, None]


@pytest.mark.parametrize("seed", range(12))
def test_objects_stay_apart_and_in_the_room(seed):
    scene = make_scene(EVERYTHING, seed=seed)
    assert 6 <= len(scene.objects) <= 8
    for time in (0.0, 0.7, 1.3, 2.0):
        for k, thing in enumerate(scene.objects):
            surface = samples(thing, time)
            width, height, depth = scene.room.size
            assert (np.abs(surface[0]) < width / 2).all()
            assert (np.abs(surface[2]) < depth / 2).all()
            assert (surface[1] < 1e-9).all()
            assert (surface[1] > -height).all()
            for other in scene.objects[:k]:
                assert not any(other.holds(p, time) for p in surface[:, ::5].T), (thing.name, other.name)
            assert not thing.holds(scene.light.position, time)


def test_standing_objects_touch_the_floor():
    scene = make_scene(SceneConfig(floating=0.0, num_objects=(6, 6)), seed=1)
    for thing in scene.objects:
        assert corners(thing, 0.5)[1].max() == pytest.approx(0, abs=1e-12)


def test_cameras_see_objects():
    seen = []
    for seed in range(12):
        scene = make_scene(seed=seed)
        view = render(scene, make_camera(scene, seed=seed, size=(48, 48)))
        seen.append(float((view.visible.sum((1, 2)) > 4).float().mean()))
        pano = render(scene, make_panorama(scene, seed=seed, height=24))
        assert (pano.visible.sum((1, 2)) > 0).float().mean() > 0.5
    assert np.mean(seen) > 0.7
    assert min(seen) > 0


def test_view_sets_overlap():
    scene = make_scene(seed=1)
    views = render_views(scene, make_views(scene, 4, seed=1, size=(48, 48)))
    shared = views.visible.flatten(2).sum(2).gt(4).all(0)
    assert shared.sum() >= 2  # objects that all four see
    centres = [c.position for c in make_views(scene, 4, seed=1)]
    assert len(set(centres)) == 4
    assert len({c.lens for c in make_views(scene, 4, seed=1)}) == 1


def test_paths_move_smoothly():
    scene = make_scene(seed=2)
    path = make_path(scene, 9, seed=2, sweep=30)
    steps = np.linalg.norm(np.diff([c.position for c in path], axis=0), axis=1)
    assert steps.max() < 1.5 * steps.min()
    assert steps.sum() > 0.5
    assert make_path(scene, 1, seed=2)[0] == path[0]


def test_scene_survives_json():
    scene = make_scene(EVERYTHING, seed=5)
    again = Scene.from_dict(json.loads(json.dumps(scene.to_dict())))
    assert again == scene
    empty = Scene(objects=(), room=None, light=Light(position=(0, 0, 0)))
    assert Scene.from_dict(json.loads(json.dumps(empty.to_dict()))) == empty
    with pytest.raises(ValueError, match="format 7"):
        Scene.from_dict({**scene.to_dict(), "format": 7})
    with pytest.raises(TypeError):
        Scene.from_dict({**scene.to_dict(), "fog": 1})


def test_settings_survive_json_and_refuse_nonsense():
    assert SceneConfig.from_dict(json.loads(json.dumps(EVERYTHING.to_dict()))) == EVERYTHING
    with pytest.raises(ValueError, match="no \\['colour'\\]"):
        SceneConfig.from_dict({"colour": 1})
    with pytest.raises(ValueError, match="format 9"):
        SceneConfig.from_dict({"format": 9})


@pytest.mark.parametrize(
    "wrong",
    [
        {"num_objects": (5, 3)},
        {"room_width": (2.0, 4.0)},
        {"styles": ()},
        {"styles": ("oil",)},
        {"floating": 1.5},
        {"ambient": (0.5, 1.2)},
        {"duration": -1.0},
        {"spread": 0.0},
        {"speed": (-1.0, 1.0)},
    ],
)
def test_wrong_settings_are_refused(wrong):
    with pytest.raises(ValueError, match=next(iter(wrong))):
        SceneConfig(**wrong)


def test_full_rooms_say_so():
    with pytest.raises(ValueError, match="could not be placed"):
        make_scene(SceneConfig(num_objects=(200, 200), room_width=(3, 3), room_depth=(3, 3)), seed=0)
    with pytest.raises(ValueError, match="no room to place"):
        make_camera(Scene(objects=(), room=None, light=Light(position=(0, 0, 0))), seed=0)


def test_names():
    assert set(KINDS) == set(CLASSES[3:])
    assert sorted(name for names in GROUPS.values() for name in names) == sorted(CLASSES)
    assert set(SYNONYMS) == set(CLASSES)
    words = [w for name in CLASSES for w in (name, *SYNONYMS[name])]
    assert len(words) == len(set(words))  # no word for two classes
    found = {o.describe() for seed in range(30) for o in make_scene(EVERYTHING, seed=seed).objects}
    assert {"brown crate", "red ball"} <= found
    assert any(d.startswith("block with a picture of") for d in found)


def test_all_sprites_exist():
    for name in SPRITES:
        assert sprite_pixels(name).shape == (90, 90, 4)
    with pytest.raises(ValueError, match="no sprite 'unicycle'"):
        sprite_pixels("unicycle")


def test_wrong_parts_are_refused():
    ball = {"name": "ball", "shape": "sphere", "size": (1.0, 1.0, 1.0), "centre": (0.0, 0.0, 0.0)}
    for wrong, message in (
        ({"name": "dragon"}, "name='dragon'"),
        ({"shape": "cone"}, "shape='cone'"),
        ({"size": (1.0, 0.0, 1.0)}, "positive"),
        ({"size": (1.0, 2.0, 1.0)}, "must agree"),
        ({"shape": "cylinder", "size": (1.0, 2.0, 1.5)}, "must agree"),
    ):
        with pytest.raises(ValueError, match=message):
            SceneObject(**{**ball, **wrong})
    with pytest.raises(ValueError, match="5 textures"):
        Room(size=(4, 3, 4), textures=(Texture(),) * 5)
    with pytest.raises(ValueError, match="ambient=2"):
        Light(position=(0, 0, 0), ambient=2)
    with pytest.raises(ValueError, match="reach=0"):
        Light(position=(0, 0, 0), reach=0)
    with pytest.raises(dataclasses.FrozenInstanceError):
        SceneObject(**ball).name = "globe"
