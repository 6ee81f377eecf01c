"""Closed forms of the solids against brute force and against what is known of them."""

import math

import numpy as np
import pytest
import torch
from eff_embedded.scenes import Camera, Light, Pinhole, Scene, SceneObject, render
from eff_embedded.scenes.shapes import contains, enter, surface

SHAPES = {"sphere": (0.7, 0.7, 0.7), "box": (0.4, 0.8, 0.6), "cylinder": (0.5, 0.9, 0.5)}


def signed_distance(shape, half, points):
    """Textbook distance to the surface, negative inside; an independent description of the solids."""
    if shape == "sphere":
        return np.linalg.norm(points, axis=0) - half[0]
    if shape == "box":
        q = np.abs(points) - half[:, None]
    else:
        q = np.stack([np.hypot(points[0], points[2]) - half[0], np.abs(points[1]) - half[1]])
    return np.linalg.norm(np.maximum(q, 0), axis=0) + np.minimum(q.max(0), 0)


@pytest.mark.parametrize("shape", SHAPES)
def test_entry_is_where_sphere_tracing_arrives(shape):
    rng, half = np.random.default_rng(0), np.array(SHAPES[shape])
    origin = np.array([1.1, -1.3, 1.7])
    directions = rng.normal(size=(3, 4000)) * 0.6 - 0.6 * origin[:, None]  # most of them hit
    found = enter(shape, half, origin, directions)
    length = np.linalg.norm(directions, axis=0)
    along = np.zeros(4000)
    for _ in range(400):
        along += np.maximum(signed_distance(shape, half, origin[:, None] + along / length * directions), 0)
    arrived = signed_distance(shape, half, origin[:, None] + along / length * directions) < 1e-6
    hit = np.isfinite(found)
    assert 0.2 < hit.mean() < 0.95
    assert (hit == arrived).mean() > 0.999  # grazing rays may arrive late
    both = hit & arrived
    np.testing.assert_allclose((found * length)[both], along[both], atol=1e-4)
    on_surface = signed_distance(shape, half, origin[:, None] + found[hit] * directions[:, hit])
    assert np.abs(on_surface).max() < 1e-12


@pytest.mark.parametrize("shape", SHAPES)
def test_normals_are_gradients_of_the_distance(shape):
    rng, half = np.random.default_rng(1), np.array(SHAPES[shape])
    origin = np.array([-1.5, 1.2, 1.4])
    directions = rng.normal(size=(3, 2000)) * 0.5 - origin[:, None]
    found = enter(shape, half, origin, directions)
    points = origin[:, None] + found[np.isfinite(found)] * directions[:, np.isfinite(found)]
    normals, uv, lengths = surface(shape, half, points)
    step = 1e-6
    gradient = np.stack(
        [
            signed_distance(shape, half, points + step * axis[:, None])
            - signed_distance(shape, half, points - step * axis[:, None])
            for axis in np.eye(3)
        ]
    ) / (2 * step)
    smooth = np.linalg.norm(gradient, axis=0) > 0.999  # not at an edge
    assert smooth.mean() > 0.99
    np.testing.assert_allclose(normals[:, smooth], gradient[:, smooth], atol=1e-5)
    assert (uv >= 0).all()
    assert (uv <= 1).all()
    assert (lengths > 0).all()


@pytest.mark.parametrize("shape", SHAPES)
def test_inside_is_inside(shape):
    rng, half = np.random.default_rng(2), np.array(SHAPES[shape])
    for point in rng.uniform(-1, 1, size=(500, 3)):
        assert contains(shape, half, point) == (signed_distance(shape, half, point[:, None])[0] <= 0)


@pytest.mark.parametrize(
    ("shape", "origin", "direction", "wanted"),
    [
        ("box", (-3, 0, 0), (1, 0, 0), 2.6),  # parallel to four sides
        ("box", (-3, 0.8, 0), (1, 0, 0), 2.6),  # in the plane of one side
        ("box", (-3, 0.9, 0), (1, 0, 0), math.inf),
        ("box", (3, 0, 0), (1, 0, 0), math.inf),  # behind
        ("box", (-3, 0, 0), (0.5, 0, 0), 5.2),  # in multiples of the direction
        ("cylinder", (0, -3, 0), (0, 1, 0), 2.1),  # along the axis, where the round part has no equation
        ("cylinder", (0.6, -3, 0), (0, 1, 0), math.inf),
        ("cylinder", (0, 0, -2), (0, 0, 1), 1.5),
        ("sphere", (0, 0, -2), (0, 0, 2), 0.65),
        ("sphere", (0, 0.8, -2), (0, 0, 1), math.inf),
    ],
)
def test_special_rays(shape, origin, direction, wanted):
    half = np.array(SHAPES[shape])
    found = enter(shape, half, np.array(origin, float), np.array(direction, float)[:, None])
    assert found[0] == pytest.approx(wanted)


def test_depth_of_a_sphere_by_its_formula():
    """Camera at the origin, sphere of radius r at distance d ahead: the near root of the quadratic, in each pixel."""
    radius, ahead = 0.5, 3.0
    ball = SceneObject(name="ball", shape="sphere", size=(1.0, 1.0, 1.0), centre=(0.0, 0.0, ahead))
    scene = Scene(objects=(ball,), room=None, light=Light(position=(0, -5, 0)))
    lens = Pinhole.from_fov(65, 65, 30)
    view = render(scene, Camera.level(lens, (0, 0, 0)), dtype=torch.float64)
    x = (torch.arange(65, dtype=torch.float64) + 0.5 - 32.5) / lens.fx
    slope = x**2 + x[:, None] ** 2
    root = ahead**2 - (1 + slope) * (ahead**2 - radius**2)
    hit = root >= 0
    assert torch.equal(view.visible[0], hit)
    wanted = (ahead - root.clamp(min=0).sqrt()) / (1 + slope)
    assert (view.depth - wanted)[hit].abs().max() < 1e-9
    assert view.depth[32, 32] == ahead - radius
    assert view.depth[~hit].isinf().all()
    assert (view.classes[~hit] == 255).all()
    assert (view.points[:, ~hit] == 0).all()
    # The outline of a sphere is a circle whose angle is that of the tangent.
    assert hit.sum() == pytest.approx(math.pi * (lens.fx * math.tan(math.asin(radius / ahead))) ** 2, rel=0.02)
