"""Lenses and cameras. Conventions: `eff_embedded.scenes`."""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass
from typing import Any

import numpy as np

from eff_embedded.scenes.geometry import Array, Vec3, Vector, look_at, rotation_from_angles, world_to_camera

Matrix = tuple[tuple[float, float, float, float], ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Pinhole:
    """A perspective lens.

    Attributes:
        width: Pixels in a row.
        height: Rows.
        fx: Focal length in widths of a pixel.
        fy: Focal length in heights of a pixel.
        cx: Principal point, counted from the left border of the picture.
        cy: Principal point, counted from the upper border.
    """

    width: int
    height: int
    fx: float
    fy: float
    cx: float
    cy: float

    def __post_init__(self) -> None:
        _check_size(self.width, self.height)
        if not (self.fx > 0 and self.fy > 0):
            raise ValueError(f"fx={self.fx}, fy={self.fy}; focal lengths must be positive")

    @classmethod
    def from_fov(cls, width: int, height: int, fov: float) -> Pinhole:
        """Square pixels, the principal point in the middle, and a horizontal field of view in degrees.

        Raises:
            ValueError: the field of view is not between 0 and 180.
        """
        if not 0 < fov < 180:
            raise ValueError(f"fov={fov}; a perspective picture sees more than 0 and less than 180 degrees")
        focal = width / (2.0 * math.tan(math.radians(fov) / 2.0))
        return cls(width=width, height=height, fx=focal, fy=focal, cx=width / 2, cy=height / 2)

    def finer(self, factor: int) -> Pinhole:
        """The same view with ``factor`` times as many pixels in each direction."""
        size = {"width": self.width * factor, "height": self.height * factor}
        return Pinhole(**size, fx=self.fx * factor, fy=self.fy * factor, cx=self.cx * factor, cy=self.cy * factor)

    def matrix(self) -> Array:
        """Intrinsics [3, 3]."""
        return np.array([[self.fx, 0.0, self.cx], [0.0, self.fy, self.cy], [0.0, 0.0, 1.0]])

    def rays(self) -> Array:
        """Directions through pixel centres in the frame of the camera, [3, height * width], with z = 1."""
        return _pinhole_rays(self)

    def project(self, points: Array) -> tuple[Array, Array]:
        """Picture coordinates [2, N] of points [3, N] of the camera's frame, and which are in the picture [N]."""
        with np.errstate(divide="ignore", invalid="ignore"):
            u = self.fx * points[0] / points[2] + self.cx
            v = self.fy * points[1] / points[2] + self.cy
        inside = (points[2] > 0) & (u >= 0) & (u < self.width) & (v >= 0) & (v < self.height)
        return np.stack([u, v]), inside


@dataclass(frozen=True, slots=True, kw_only=True)
class Equirectangular:
    """A full panorama: columns are longitudes, rows are latitudes. The middle of the picture looks along z.

    Attributes:
        width: Pixels in a row, an even number.
        height: Rows; half the width.
    """

    width: int
    height: int

    def __post_init__(self) -> None:
        _check_size(self.width, self.height)
        if self.width != 2 * self.height:
            raise ValueError(f"a panorama of {self.width}x{self.height}; the width must be twice the height")

    def finer(self, factor: int) -> Equirectangular:
        """The same view with ``factor`` times as many pixels in each direction."""
        return Equirectangular(width=self.width * factor, height=self.height * factor)

    def rays(self) -> Array:
        """Unit directions through pixel centres in the frame of the camera, [3, height * width]."""
        return _panorama_rays(self)

    def project(self, points: Array) -> tuple[Array, Array]:
        """Picture coordinates [2, N] of points [3, N] of the camera's frame, and which are in the picture: all."""
        longitude = np.arctan2(points[0], points[2])
        latitude = np.arctan2(-points[1], np.hypot(points[0], points[2]))
        u = (longitude / (2 * math.pi) + 0.5) * self.width
        v = (0.5 - latitude / math.pi) * self.height
        return np.stack([u, v]), np.ones(u.shape, dtype=bool)


Lens = Pinhole | Equirectangular


@dataclass(frozen=True, slots=True, kw_only=True)
class Camera:
    """A lens at a place.

    Attributes:
        lens: What it sees.
        world_to_camera: Rows of the matrix [4, 4] that takes world points into the frame of the camera.
    """

    lens: Lens
    world_to_camera: Matrix

    def __post_init__(self) -> None:
        matrix = np.asarray(self.world_to_camera, dtype=np.float64)
        if matrix.shape != (4, 4):
            raise ValueError(f"world_to_camera has shape {matrix.shape}; it must be (4, 4)")
        rotation = matrix[:3, :3]
        rigid = np.abs(rotation @ rotation.T - np.eye(3)).max() < 1e-6 and np.linalg.det(rotation) > 0
        if not rigid or np.abs(matrix[3] - (0, 0, 0, 1)).max() > 0:
            raise ValueError(f"world_to_camera is not a rotation and a translation: {matrix.tolist()}")

    @classmethod
    def of_matrix(cls, lens: Lens, matrix: Array) -> Camera:
        """A camera with the extrinsics of an array [4, 4]."""
        return cls(lens=lens, world_to_camera=tuple(tuple(float(x) for x in row) for row in matrix))  # type: ignore[misc]

    @classmethod
    def look_at(cls, lens: Lens, eye: Vector, target: Vector) -> Camera:
        """A camera at ``eye`` that looks at ``target``, upright."""
        return cls.of_matrix(lens, look_at(eye, target))

    @classmethod
    def level(cls, lens: Lens, position: Vector, *, yaw: float = 0.0, pitch: float = 0.0, roll: float = 0.0) -> Camera:
        """A camera at ``position`` turned to the right by ``yaw``, up by ``pitch``, clockwise by ``roll`` degrees."""
        return cls.of_matrix(lens, world_to_camera(position, rotation_from_angles(yaw, pitch, roll)))

    @property
    def extrinsics(self) -> Array:
        """World to camera, [4, 4]."""
        return np.asarray(self.world_to_camera, dtype=np.float64)

    @property
    def position(self) -> Vec3:
        """Where the camera is, in the world."""
        matrix = self.extrinsics
        x, y, z = (-matrix[:3, :3].T @ matrix[:3, 3]).tolist()
        return (x, y, z)

    def to_dict(self) -> dict[str, Any]:
        """The camera as JSON can hold it."""
        lens = {name: getattr(self.lens, name) for name in self.lens.__slots__}
        return {
            "lens": {"kind": type(self.lens).__name__.lower(), **lens},
            "world_to_camera": [list(r) for r in self.world_to_camera],
        }

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> Camera:
        """The inverse of `to_dict`.

        Raises:
            ValueError: the kind of lens is unknown.
        """
        fields = dict(values["lens"])
        kinds: dict[str, type[Lens]] = {"pinhole": Pinhole, "equirectangular": Equirectangular}
        if (kind := fields.pop("kind")) not in kinds:
            raise ValueError(f"lens of kind {kind!r}; known are {sorted(kinds)}")
        return cls.of_matrix(kinds[kind](**fields), np.asarray(values["world_to_camera"]))


def _check_size(width: int, height: int) -> None:
    if width < 1 or height < 1:
        raise ValueError(f"a picture of {width}x{height} pixels; both must be positive")


@functools.lru_cache(maxsize=16)
def _pinhole_rays(lens: Pinhole) -> Array:
    x = (np.arange(lens.width) + 0.5 - lens.cx) / lens.fx
    y = (np.arange(lens.height) + 0.5 - lens.cy) / lens.fy
    rays = np.ones((3, lens.height, lens.width))
    rays[0], rays[1] = x, y[:, None]
    return _frozen(rays)


@functools.lru_cache(maxsize=16)
def _panorama_rays(lens: Equirectangular) -> Array:
    longitude = ((np.arange(lens.width) + 0.5) / lens.width - 0.5) * 2 * math.pi
    latitude = (0.5 - (np.arange(lens.height) + 0.5) / lens.height)[:, None] * math.pi
    flat = np.cos(latitude)
    rays = np.empty((3, lens.height, lens.width))
    rays[0], rays[1], rays[2] = flat * np.sin(longitude), -np.sin(latitude), flat * np.cos(longitude)
    return _frozen(rays)


def _frozen(rays: Array) -> Array:
    """Flattened and read-only, as all pictures through one lens share it."""
    flat = rays.reshape(3, -1)
    flat.setflags(write=False)
    return flat
