"""Patterns by worked examples, pictures by brute force."""

import numpy as np
import pytest
import torch
from eff_embedded.scenes import Camera, Light, Pinhole, Scene, SceneObject, Texture, render
from eff_embedded.scenes.images import photograph_pixels, sprite_pixels
from eff_embedded.scenes.noise import value_noise
from eff_embedded.scenes.textures import sample_mirrored

WHITE, BLACK = (1.0, 1.0, 1.0), (0.0, 0.0, 0.0)


def colour(texture, uv, lengths=(1.0, 1.0), *, closed=False):
    uv = np.array(uv, float).T
    side = np.broadcast_to(np.array(lengths)[:, None], uv.shape)
    return texture.colour(uv, side, np.zeros((3, uv.shape[1])), closed=closed)[0].tolist()


def test_checker():
    texture = Texture(kind="checker", colours=(BLACK, WHITE), period=1.0)
    places = [(0.2, 0.2), (0.7, 0.2), (0.2, 0.7), (0.7, 0.7)]
    assert colour(texture, places) == [0, 1, 1, 0]
    assert colour(texture, [(0.2, 0.2), (0.3, 0.2)], (2.0, 1.0)) == [0, 1]  # two periods on two metres
    assert colour(texture, [(0.2, 0.2), (0.3, 0.2)], (1.9, 1.0)) == [0, 1]  # whole periods only
    assert colour(texture, [(0.2, 0.2), (0.3, 0.2)], (0.2, 0.2)) == [0, 0]  # at least one


def test_stripes_and_gradient():
    places = [(0.2, 0.9), (0.7, 0.9), (0.2, 0.4)]
    kinds = {"right": [0, 1, 0], "down": [1, 1, 0], "diagonal": [0, 1, 1]}
    for direction, wanted in kinds.items():
        texture = Texture(kind="stripes", colours=(BLACK, WHITE), period=1.0, direction=direction)
        assert colour(texture, places) == wanted, direction
    assert colour(Texture(kind="gradient", colours=(BLACK, WHITE)), places) == pytest.approx([0.9, 0.9, 0.4])
    assert colour(Texture(kind="plain", colours=(WHITE, BLACK)), places) == [1, 1, 1]


def test_noise_is_smooth_and_spread():
    points = np.random.default_rng(0).uniform(-50, 50, size=(3, 20000))
    values = value_noise(points, 7)
    assert 0 <= values.min() < 0.15
    assert 0.85 < values.max() <= 1
    assert values.mean() == pytest.approx(0.5, abs=0.01)
    step = np.abs(value_noise(points + 1e-5, 7) - values)
    assert step.max() < 2e-4  # continuous, also across the lattice
    lattice = np.round(points)
    assert np.abs(value_noise(lattice + 1e-9, 7) - value_noise(lattice - 1e-9, 7)).max() < 1e-7
    assert np.abs(np.corrcoef(values, value_noise(points, 8))[0, 1]) < 0.03
    assert np.abs(np.corrcoef(values, value_noise(points + 40, 7))[0, 1]) < 0.03
    # On the lattice of the coarsest octave alone: known numbers, so that other machines draw the same.
    np.testing.assert_allclose(value_noise(np.array([[0.0], [1.0], [-2.0]]), 0, octaves=1), GOLDEN_NOISE, atol=1e-12)


GOLDEN_NOISE = 0.9132522940635681


def test_mirrored_samples_by_brute_force():
    pixels = np.random.default_rng(0).random((3, 4, 2))
    rng = np.random.default_rng(1)
    uv = rng.uniform(-3, 3, size=(2, 200))
    tiled = np.pad(pixels, ((15, 15), (20, 20), (0, 0)), mode="symmetric")
    found = sample_mirrored(pixels, uv)
    for (u, v), value in zip(uv.T, found.T, strict=True):
        x, y = u * 4 - 0.5 + 20, v * 3 - 0.5 + 15
        i, j = int(np.floor(y)), int(np.floor(x))
        b, a = y - i, x - j
        upper = tiled[i, j] * (1 - a) + tiled[i, j + 1] * a
        lower = tiled[i + 1, j] * (1 - a) + tiled[i + 1, j + 1] * a
        np.testing.assert_allclose(value, upper * (1 - b) + lower * b, atol=1e-12)
    assert sample_mirrored(np.ones((1, 1, 3)), uv).min() == 1  # a picture of one pixel


def test_closed_sides_have_no_seam():
    for texture in (
        Texture(kind="photograph", image="coffee"),
        Texture(kind="photograph", image="coffee", period=0.4),
        Texture(kind="stripes", period=0.3),
    ):
        first = [colour(texture, [(1e-9, v / 10)], (1.0, 0.5), closed=True) for v in range(10)]
        last = [colour(texture, [(1 - 1e-9, v / 10)], (1.0, 0.5), closed=True) for v in range(10)]
        if texture.kind == "photograph":
            np.testing.assert_allclose(first, last, atol=1e-6)
        else:
            assert first != last  # a pattern ends with its second colour where it starts with the first


def picture_on_a_box(texture, axis_yaw):
    """A box of one metre seen straight on from one of its four sides, [3, 90, 90]."""
    box = SceneObject(name="block", shape="box", size=(1.0, 1.0, 1.0), centre=(0.0, 0.0, 0.0), texture=texture)
    scene = Scene(objects=(box,), room=None, light=Light(position=(0, -9, 0), ambient=1.0))
    yaw = np.radians(axis_yaw)
    place = np.array([-np.sin(yaw), 0.0, -np.cos(yaw)]) * 100
    lens = Pinhole(width=90, height=90, fx=99.5 * 90, fy=99.5 * 90, cx=45.0, cy=45.0)
    return render(scene, Camera.level(lens, place, yaw=axis_yaw)).colour


@pytest.mark.parametrize("yaw", [0, 90, 180, -90])
def test_pictures_stand_upright_and_unmirrored_on_walls_of_boxes(yaw):
    ground = (0.2, 0.4, 0.6)
    texture = Texture(kind="sprite", image="bike", colours=(ground, ground))
    pixels = torch.from_numpy(sprite_pixels("bike").copy()).permute(2, 0, 1)
    wanted = pixels[:3] + torch.tensor(ground)[:, None, None] * (1 - pixels[3:])
    torch.testing.assert_close(picture_on_a_box(texture, yaw), wanted, atol=2e-3, rtol=0)


def test_grey_photographs_blend_two_colours():
    assert photograph_pixels("brick").shape == (128, 128, 1)
    assert photograph_pixels("coffee").shape == (128, 128, 3)
    texture = Texture(kind="photograph", image="brick", colours=((0.5, 0.1, 0.1), (0.9, 0.9, 0.9)))
    places = [(x / 50, y / 50) for x in range(50) for y in range(50)]
    values = colour(texture, places)
    assert min(values) == pytest.approx(0.5, abs=0.01)
    assert max(values) == pytest.approx(0.9, abs=0.01)


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"kind": "marble"}, "kind='marble'"),
        ({"kind": "stripes", "period": 1.0, "direction": "up"}, "direction='up'"),
        ({"kind": "checker"}, "period=0"),
        ({"period": -1.0}, "negative"),
        ({"kind": "sprite"}, "needs the name"),
        ({"colours": ((0, 0, 2.0), (0, 0, 0))}, "between 0 and 1"),
    ],
)
def test_wrong_textures_are_refused(wrong, message):
    with pytest.raises(ValueError, match=message):
        Texture(**wrong)


def test_unknown_photograph_says_what_there_is():
    with pytest.raises(ValueError, match="astronaut"):
        photograph_pixels("mona_lisa")
