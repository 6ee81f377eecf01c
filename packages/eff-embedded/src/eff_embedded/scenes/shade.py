"""From hits to points, normals, colours and light."""

from __future__ import annotations

import numpy as np

from eff_embedded.scenes.cast import Placed, blocked
from eff_embedded.scenes.geometry import Array
from eff_embedded.scenes.shapes import box_side, surface


def surfaces(placed: Placed, points: Array, owner: Array) -> tuple[Array, Array]:
    """Unit normals and colours without light at points of the world.

    Args:
        placed: The scene.
        points: [3, N].
        owner: What each lies on, [N].

    Returns:
        Normals [3, N] in the world, towards the free side, zero for the void; and colours [3, N].
    """
    # Sorted by owner, so that each object and side works on a slice. Radix sort needs few bits.
    order = np.argsort(owner.astype(np.int16), kind="stable")
    starts = np.searchsorted(owner[order], np.arange(placed.void + 2))
    points = np.take(points, order, axis=1)
    normals, colours = np.zeros_like(points), np.empty_like(points)
    for k, thing in enumerate(placed.scene.objects):
        at = slice(starts[k], starts[k + 1])
        if at.start < at.stop:
            rotation = placed.rotations[k]
            local = rotation.T @ (points[:, at] - placed.centres[k][:, None])
            turned, uv, lengths = surface(thing.shape, thing.half, local)
            normals[:, at] = rotation @ turned
            colours[:, at] = thing.texture.colour(uv, lengths, local, closed=thing.shape != "box")
    room, first = placed.scene.room, len(placed.scene.objects)
    for side in range(6):
        at = slice(starts[first + side], starts[first + side + 1])
        if at.start < at.stop and room is not None:
            axis, sign = side // 2, 2.0 * (side % 2) - 1.0
            normals[axis, at] = -sign
            half, local = np.array(room.size) / 2, points[:, at] - room.centre[:, None]
            (right, r), (down, d) = box_side(axis, -sign)
            uv = np.stack([local[right] * (r / (2 * half[right])), local[down] * (d / (2 * half[down]))]) + 0.5
            lengths = np.array([[2 * half[right]], [2 * half[down]]])
            colours[:, at] = room.textures[side].colour(uv, np.broadcast_to(lengths, uv.shape), local, closed=False)
    colours[:, starts[placed.void] :] = np.array(placed.scene.background)[:, None]
    back = np.empty_like(order)
    back[order] = np.arange(order.size)
    return np.take(normals, back, axis=1), np.take(colours, back, axis=1)


def lit(placed: Placed, points: Array, normals: Array, colours: Array, owner: Array) -> Array:
    """Colours [3, N] in the light of the scene; the void keeps its own."""
    light = placed.scene.light
    position = np.array(light.position)
    beams = points - position[:, None]
    square = np.maximum(np.einsum("ij,ij->j", beams, beams), 1e-12)
    direct = np.maximum(-np.einsum("ij,ij->j", beams, normals) / np.sqrt(square), 0.0)
    direct /= 1.0 + square / light.reach**2
    if light.shadows:
        facing = np.flatnonzero(direct > 0)
        direct[facing[blocked(placed, position, beams[:, facing])]] = 0.0
    amount = light.ambient + (1 - light.ambient) * direct
    amount[owner == placed.void] = 1.0
    return colours * amount
