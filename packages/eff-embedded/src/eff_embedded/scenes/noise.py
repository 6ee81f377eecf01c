"""Solid noise: a smooth random function of space, the same on every machine."""

from __future__ import annotations

import numpy as np

from eff_embedded.scenes.geometry import Array

_STEPS = np.array([0x8DA6B343, 0xD8163841, 0xCB1AB31F], dtype=np.uint32)


def value_noise(points: Array, seed: int, *, octaves: int = 3) -> Array:
    """Random values on the lattice of whole numbers, blended smoothly between them and summed over scales.

    Args:
        points: [3, N]; the coarsest lattice has step 1, each further one half of that and half the weight.
        seed: Other seeds give unrelated functions.
        octaves: Number of scales.

    Returns:
        [N], between 0 and 1.
    """
    total, weights = np.zeros(points.shape[1]), 0.0
    for octave in range(octaves):
        weight = 0.5**octave
        total += weight * _lattice_noise(points * 2.0**octave, (seed * 31 + octave) & 0xFFFFFFFF)
        weights += weight
    return total / weights


def _lattice_noise(points: Array, seed: int) -> Array:
    cell = np.floor(points)
    inside = points - cell
    blend = inside * inside * (3.0 - 2.0 * inside)
    # Lattice coordinates times large odd numbers, modulo 2**32: neighbours differ by one addition.
    low = cell.astype(np.int64).astype(np.uint32) * _STEPS[:, None]
    high = low + _STEPS[:, None]
    (x0, y0, z0), (x1, y1, z1), (u, v, w) = low, high, blend
    x0, x1 = x0 + np.uint32(seed), x1 + np.uint32(seed)

    def row(y: Array, z: Array) -> Array:
        left, right = _scatter(x0 ^ y ^ z), _scatter(x1 ^ y ^ z)
        return left + (right - left) * u

    front = row(y0, z0)
    front += (row(y1, z0) - front) * v
    back = row(y0, z1)
    back += (row(y1, z1) - back) * v
    return front + (back - front) * w


def _scatter(key: Array) -> Array:
    """Numbers between 0 and 1 that look random, from 32-bit keys."""
    key = (key ^ (key >> np.uint32(16))) * np.uint32(0x7FEB352D)
    key = (key ^ (key >> np.uint32(15))) * np.uint32(0x846CA68B)
    return (key >> np.uint32(8)) * 2.0**-24
