"""Closed forms of the three solids: where a ray enters, the normal there, and coordinates for a texture.

All work in the frame of the solid: centre at the origin, y down along its axis, half lengths ``half`` [3]. Rays share
one origin [3]; directions are [3, N] of any length, and distances along a ray are multiples of its direction.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Literal

import numpy as np

from eff_embedded.scenes.geometry import Array

Shape = Literal["sphere", "box", "cylinder"]


def enter(shape: Shape, half: Array, origin: Array, directions: Array) -> Array:
    """Distance [N] at which each ray enters, infinite where it misses or where the solid is behind the origin."""
    with np.errstate(divide="ignore", invalid="ignore"):
        first, last = _SPANS[shape](half, origin, directions)
        return np.where((first <= last) & (first > 0), first, np.inf)


def contains(shape: Shape, half: Array, point: Array) -> bool:
    """Whether a point [3] is inside or on the surface."""
    scaled = np.abs(point) / half
    if shape == "box":
        return bool(scaled.max() <= 1)
    if shape == "sphere":
        return bool(scaled @ scaled <= 1)
    return bool(scaled[1] <= 1 and scaled[0] ** 2 + scaled[2] ** 2 <= 1)


def _sphere_span(half: Array, origin: Array, directions: Array) -> tuple[Array, Array]:
    return _round_span(origin / half[0], directions / half[0])


def _round_span(origin: Array, directions: Array) -> tuple[Array, Array]:
    """Between which distances a ray is within 1 of the origin; rays that stand still are always or never."""
    a = np.einsum("ij,ij->j", directions, directions)
    b = origin @ directions
    c = float(origin @ origin) - 1.0
    root = np.sqrt(b * b - a * c)  # not a number for rays that miss, which compares as false below
    first, last = (-b - root) / a, (root - b) / a
    still = a == 0
    if still.any():
        first[still], last[still] = (-np.inf, np.inf) if c <= 0 else (np.inf, -np.inf)
    return first, last


def _slab_span(half: float, origin: float, direction: Array) -> tuple[Array, Array]:
    """Between which distances a coordinate is within ``half`` of zero."""
    inverse = 1.0 / direction
    one, two = (-half - origin) * inverse, (half - origin) * inverse
    return np.minimum(one, two), np.maximum(one, two)


def _box_span(half: Array, origin: Array, directions: Array) -> tuple[Array, Array]:
    (x0, x1), (y0, y1), (z0, z1) = (_slab_span(half[i], origin[i], directions[i]) for i in range(3))
    # A ray in the plane of a side gives 0/0 for that side; fmax and fmin leave it out.
    return np.fmax(np.fmax(x0, y0), z0), np.fmin(np.fmin(x1, y1), z1)


def _cylinder_span(half: Array, origin: Array, directions: Array) -> tuple[Array, Array]:
    round_first, round_last = _round_span(origin[[0, 2]] / half[0], directions[[0, 2]] / half[0])
    flat_first, flat_last = _slab_span(half[1], origin[1], directions[1])
    # np.maximum keeps what is not a number: a ray that misses the round part misses.
    return np.maximum(round_first, flat_first), np.minimum(round_last, flat_last)


_SPANS: dict[Shape, Callable[[Array, Array, Array], tuple[Array, Array]]] = {
    "sphere": _sphere_span,
    "box": _box_span,
    "cylinder": _cylinder_span,
}


def surface(shape: Shape, half: Array, points: Array) -> tuple[Array, Array, Array]:
    """Normals and texture coordinates at points of the surface.

    Args:
        shape: Kind of the solid.
        half: Half lengths, [3].
        points: On the surface, [3, N].

    Returns:
        Unit normals [3, N] that point outwards; coordinates [2, N] between 0 and 1, to the right and downwards as
        seen from outside; and the lengths [2, N] in metres that these span.
    """
    return _SURFACES[shape](half, points)


def _sphere_surface(half: Array, points: Array) -> tuple[Array, Array, Array]:
    normals = points / np.sqrt(np.einsum("ij,ij->j", points, points))
    u = np.arctan2(-normals[0], -normals[2]) / (-2 * math.pi) + 0.5
    v = np.arccos(np.clip(-normals[1], -1.0, 1.0)) / math.pi
    lengths = np.array([[2 * math.pi * half[0]], [math.pi * half[0]]])
    return normals, np.stack([u, v]), np.broadcast_to(lengths, (2, points.shape[1]))


def box_side(normal_axis: int, sign: float) -> tuple[tuple[int, float], tuple[int, float]]:
    """Axis and sign of "right" and "down" on a side of a box, for one who looks at it along -normal.

    Pictures on the four walls stand upright; on top and bottom their right is that of the world.
    """
    if normal_axis == 0:
        return (2, sign), (1, 1.0)
    if normal_axis == 2:
        return (0, -sign), (1, 1.0)
    return (0, 1.0), (2, sign)


def _box_surface(half: Array, points: Array) -> tuple[Array, Array, Array]:
    scaled = points / half[:, None]
    axis = np.abs(scaled).argmax(0)
    normals, uv, lengths = np.zeros_like(points), np.empty((2, axis.size)), np.empty((2, axis.size))
    for which in range(3):
        for sign in (-1.0, 1.0):
            chosen = np.flatnonzero((axis == which) & ((scaled[which] > 0) == (sign > 0)))
            if chosen.size:
                normals[which, chosen] = sign
                for row, (along, direction) in enumerate(box_side(which, sign)):
                    uv[row, chosen] = scaled[along, chosen] * (0.5 * direction) + 0.5
                    lengths[row, chosen] = 2 * half[along]
    return normals, uv, lengths


def _cylinder_surface(half: Array, points: Array) -> tuple[Array, Array, Array]:
    radius, height = half[0], half[1]
    scaled = points / half[:, None]
    flat = np.abs(scaled[1]) >= np.hypot(scaled[0], scaled[2])  # on top or bottom
    u = np.arctan2(-points[0], -points[2]) / (-2 * math.pi) + 0.5
    sign = np.sign(scaled[1])
    uv = np.where(flat, np.stack([scaled[0], sign * scaled[2]]) * 0.5 + 0.5, np.stack([u, scaled[1] * 0.5 + 0.5]))
    lengths = np.where(flat, 2 * radius, np.array([[2 * math.pi * radius], [2 * height]]))
    side = np.stack([scaled[0], np.zeros_like(sign), scaled[2]])
    side /= np.maximum(np.hypot(side[0], side[2]), 1e-30)
    normals = np.where(flat, np.stack([np.zeros_like(sign), sign, np.zeros_like(sign)]), side)
    return normals, uv, lengths


_SURFACES: dict[Shape, Callable[[Array, Array], tuple[Array, Array, Array]]] = {
    "sphere": _sphere_surface,
    "box": _box_surface,
    "cylinder": _cylinder_surface,
}
