"""Labels of panoramas from teachers of perspective pictures (section 3.1)."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from eff_vision.geometry import (
    erp_rays,
    erp_to_perspective,
    intrinsics_from_fov,
    perspective_to_erp,
    rotation_from_yaw_pitch,
    z_to_radial,
)
from eff_vision.panorama.config import IGNORE, MAIN, PatchConfig

Teacher = Callable[[Tensor, float], Tensor]
"""Takes pictures [1, 3, h, w] and their horizontal field of view in radians to a prediction: classes [1, h, w], z-depth
[1, 1, h, w], or normals in the camera's frame [1, 3, h, w]."""


class Patch(NamedTuple):
    """Where a perspective picture looks.

    Attributes:
        rotation: Camera to world, [3, 3].
        fov: Horizontal field of view in radians.
    """

    rotation: Tensor
    fov: float


def sample_patches(config: PatchConfig, *, generator: torch.Generator | None = None) -> list[Patch]:
    """Draw patches: field of view and pitch even within their ranges, yaw anywhere."""
    u = torch.rand(3, config.count, generator=generator, dtype=torch.float64)
    fov = torch.deg2rad(config.fov[0] + u[0] * (config.fov[1] - config.fov[0]))
    pitch = torch.deg2rad(config.pitch[0] + u[1] * (config.pitch[1] - config.pitch[0]))
    rotations = rotation_from_yaw_pitch(u[2] * 2 * math.pi, pitch)
    return [Patch(rotation, float(f)) for rotation, f in zip(rotations, fov, strict=True)]


def cube_patches() -> list[Patch]:
    """Six square patches of 90 degrees that cover the sphere once: front, right, back, left, up, down."""
    yaw = torch.tensor([0, 1, 2, 3, 0, 0]) * math.pi / 2
    pitch = torch.tensor([0.0, 0, 0, 0, 1, -1]) * math.pi / 2
    return [Patch(rotation, math.pi / 2) for rotation in rotation_from_yaw_pitch(yaw, pitch)]


class PatchLabels:
    """Labels of one panorama, patch by patch. Depth is the distance along the ray; normals are in the panorama's frame.

    Args:
        labels: By task, one map a patch, [n, C, H, 2H].
        coverage: Where each patch reaches, bool [n, H, 2H].
        weights: How far each pixel of a patch is to be trusted, [n, H, 2H].
    """

    def __init__(self, labels: Mapping[str, Tensor], coverage: Tensor, weights: Tensor) -> None:
        self.labels, self.coverage, self.weights = dict(labels), coverage, weights

    def patch(self, index: int) -> dict[str, Tensor]:
        """Labels of a patch: classes [H, 2H] (`IGNORE` outside), depth [1, H, 2H], normals [3, H, 2H] (0 outside)."""
        return {task: _trim(task, maps[index]) for task, maps in self.labels.items()}

    def merged(self) -> dict[str, Tensor]:
        """Labels of all patches in one map: the class with most weight, the weighted means of depth and normals."""
        found = {}
        for task, maps in self.labels.items():
            if task == "semseg":
                known = self.coverage & (maps[:, 0] != IGNORE)
                votes = torch.zeros(int(maps.max()) + 1, *maps.shape[-2:])
                votes.scatter_add_(0, maps[:, 0], self.weights * known)
                votes[IGNORE:] = 0
                found[task] = torch.where(known.any(0), votes.argmax(0), IGNORE)
                continue
            known = self.coverage & (maps.abs().sum(1) > 0)
            weight = (self.weights * known)[:, None]
            total = (maps * weight).sum(0)
            if task == "normals":
                found[task] = F.normalize(total, dim=0)
            else:
                found[task] = total / weight.sum(0).clamp(min=1e-12)
        return found

    def save(self, path: str) -> None:
        """Write 8-bit classes and normals and 16-bit millimetres of depth to one safetensors file."""
        from safetensors.torch import save_file

        packed = {"coverage": self.coverage.to(torch.uint8), "weights": self.weights.half()}
        for task, maps in self.labels.items():
            if task == "semseg":
                packed[task] = maps.to(torch.uint8)
            elif task == "depth":
                packed[task] = (maps * 1000).round().clamp(0, 65535).to(torch.int32).to(torch.uint16)
            else:
                packed[task] = (maps * 127 + 128).round().to(torch.uint8)
        save_file({k: v.contiguous() for k, v in packed.items()}, path)

    @classmethod
    def load(cls, path: str) -> PatchLabels:
        """Read what `save` wrote.

        Raises:
            ValueError: the file holds something else.
        """
        from safetensors.torch import load_file

        packed = load_file(path)
        if not {"coverage", "weights"} <= set(packed) or not set(packed) - {"coverage", "weights"} <= set(MAIN):
            raise ValueError(f"{path} does not hold labels of patches; it holds {sorted(packed)}")
        coverage, weights = packed.pop("coverage").bool(), packed.pop("weights").float()
        labels: dict[str, Tensor] = {}
        for task, maps in packed.items():
            if task == "semseg":
                labels[task] = maps.long()
            elif task == "depth":
                labels[task] = maps.to(torch.int32).float() / 1000
            else:
                unknown = (maps == 128).all(1, keepdim=True)
                labels[task] = torch.where(unknown, 0.0, F.normalize(maps.float() - 128, dim=1))
        return cls(labels, coverage, weights)


class PseudoLabeler:
    """Labels panoramas by teachers that know perspective pictures only.

    Args:
        teachers: By task: "semseg", "depth", "normals".
        config: How patches are drawn.

    Raises:
        ValueError: a task is unknown, or there is none.
    """

    def __init__(self, teachers: Mapping[str, Teacher], config: PatchConfig | None = None) -> None:
        if not teachers or (unknown := sorted(set(teachers) - set(MAIN))):
            raise ValueError(
                f"teachers must be for some of {MAIN}, got {sorted(teachers) if not teachers else unknown}"
            )
        self.teachers, self.config = dict(teachers), PatchConfig() if config is None else config

    @torch.no_grad()
    def run(
        self,
        panorama: Tensor,
        patches: Sequence[Patch] | None = None,
        *,
        generator: torch.Generator | None = None,
    ) -> PatchLabels:
        """Labels of a panorama [3, H, 2H].

        Args:
            panorama: Colours as the teachers take them.
            patches: Where to look; drawn if None.
            generator: For drawing.
        """
        if panorama.dim() != 3 or panorama.size(0) != 3:
            raise ValueError(f"a panorama must be [3, H, 2H], got {list(panorama.shape)}")
        drawn = sample_patches(self.config, generator=generator) if patches is None else list(patches)
        c, rows = self.config, panorama.size(1)
        labels: dict[str, list[Tensor]] = {task: [] for task in self.teachers}
        coverage, weights = [], []
        rays = erp_rays(rows, 2 * rows)
        for rotation, fov in drawn:
            picture = erp_to_perspective(panorama[None], rotation, fov, c.height, c.width)
            for task, teacher in self.teachers.items():
                values = self._read(task, teacher(picture, fov), rotation, fov)
                nearest = task == "semseg"
                laid, reached = perspective_to_erp(
                    values + 1 if nearest else values, rotation, fov, rows, mode="nearest" if nearest else "bilinear"
                )
                labels[task].append(_finish(task, laid[0], reached[0]))
            _, mask = perspective_to_erp(picture, rotation, fov, rows)
            coverage.append(mask[0])
            # The middle of a picture is to be trusted most.
            weights.append((rays @ rotation[:, 2]).clamp(min=0) ** 2 * mask[0])
        stacked = {task: torch.stack(maps) for task, maps in labels.items()}
        return PatchLabels(stacked, torch.stack(coverage), torch.stack(weights))

    def _read(self, task: str, values: Tensor, rotation: Tensor, fov: float) -> Tensor:
        """A teacher's prediction [1, C, h, w] in the panorama's terms."""
        c = self.config
        if task == "semseg" and values.dim() == 3:
            values = values[:, None]
        channels = 3 if task == "normals" else 1
        if tuple(values.shape) != (1, channels, c.height, c.width):
            raise ValueError(
                f"the teacher of {task} gave {list(values.shape)}; wanted [1, {channels}, {c.height}, {c.width}]"
            )
        if task == "semseg":
            return values.long()
        if task == "depth":
            values = torch.where(torch.isfinite(values) & (values > 0), values, torch.zeros_like(values))
            return z_to_radial(values[:, 0], intrinsics_from_fov(fov, c.height, c.width)[None])[:, None]
        return torch.einsum("ij,bjhw->bihw", rotation.to(values), values)


def _finish(task: str, laid: Tensor, mask: Tensor) -> Tensor:
    if task == "semseg":
        return torch.where(mask, laid - 1, IGNORE)
    if task == "normals":
        return F.normalize(laid, dim=0)
    return laid


def _trim(task: str, maps: Tensor) -> Tensor:
    return maps[0] if task == "semseg" else maps


def turn(maps: Mapping[str, Tensor], columns: int) -> dict[str, Tensor]:
    """Labels as they are after the camera has turned right by ``columns`` columns: maps roll, vectors turn with them.

    Args:
        maps: By task, [..., H, W]; "normals" and "point" are [..., 3, H, W].
        columns: How far; the picture itself rolls by ``-columns``.
    """
    found = {}
    for task, values in maps.items():
        rolled = values.roll(-columns, -1)
        if task in ("normals", "point"):
            rotation = rotation_from_yaw_pitch(2 * math.pi * columns / values.size(-1), 0.0)
            rolled = torch.einsum("ji,...jhw->...ihw", rotation.to(values), rolled)
        found[task] = rolled
    return found
