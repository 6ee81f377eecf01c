"""Tasks, and the settings of patches, model and loss."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from eff_kernels.edit import Settings

INVARIANT = ("semseg", "depth", "grad", "edge_distance")
"""Tasks whose values stay what they are when the camera turns."""
VARIANT = ("normals", "point")
"""Tasks whose values turn with the camera."""
MAIN = ("semseg", "depth", "normals")
AUXILIARY = ("grad", "edge_distance", "point")
CHANNELS = {"depth": 1, "normals": 3, "grad": 2, "edge_distance": 1, "point": 3}
IGNORE = 255
"""Class of pixels without a label."""


def stream_of(task: str) -> Literal["invariant", "variant"]:
    """The stream that a task belongs to.

    Raises:
        ValueError: there is no such task.
    """
    if task in INVARIANT:
        return "invariant"
    if task in VARIANT:
        return "variant"
    raise ValueError(f"unknown task {task!r}; tasks are {INVARIANT + VARIANT}")


@dataclass(frozen=True, slots=True, kw_only=True)
class PatchConfig(Settings):
    """Perspective pictures that a panorama is cut into for its teachers.

    Attributes:
        count: Pictures a panorama.
        fov: Range of the horizontal field of view in degrees.
        pitch: Range of the pitch in degrees; the yaw is any.
        height: Rows of a picture.
        width: Columns of a picture.
    """

    count: int = 32
    fov: tuple[float, float] = (80.0, 120.0)
    pitch: tuple[float, float] = (-90.0, 90.0)
    height: int = 480
    width: int = 640

    def check(self) -> None:
        """Angles are possible."""
        if min(self.count, self.height, self.width) < 1:
            raise ValueError(f"count and sizes must be 1 or more, got {self.count}, {self.height} x {self.width}")
        if not 0 < self.fov[0] <= self.fov[1] < 180:
            raise ValueError(f"fov must be a range between 0 and 180 degrees, got {self.fov}")
        if not -90 <= self.pitch[0] <= self.pitch[1] <= 90:
            raise ValueError(f"pitch must be a range within -90 and 90 degrees, got {self.pitch}")


@dataclass(frozen=True, slots=True, kw_only=True)
class PDBridgeConfig(Settings):
    """Settings of `PDBridgeNet`; sizes are the paper's for a ViT-L/16.

    Attributes:
        classes: Of the segmentation.
        channels: Of the backbone's maps.
        dim: Of aggregates, task features, bridge and decoders.
        heads: Of attention in the bridge.
        mlp_ratio: Width of the bridge's feed-forward layer over ``dim``.
        blocks: Blocks of each stream for each map.
        truncate: Cut the gradients that a stream's losses send into the tasks of the other (section 3.3).
        streams: 2, or 1 shared one, as a baseline.
    """

    classes: int
    channels: int = 1024
    dim: int = 256
    heads: int = 4
    mlp_ratio: float = 4.0
    blocks: int = 2
    truncate: bool = True
    streams: Literal[1, 2] = 2

    def check(self) -> None:
        """Sizes fit each other."""
        for name in ("classes", "channels", "dim", "heads", "blocks"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be 1 or more, got {getattr(self, name)}")
        if self.channels % 4:
            raise ValueError(f"channels must be a multiple of 4, got {self.channels}")
        if self.dim % self.heads or self.dim % 4:
            raise ValueError(f"dim={self.dim} must be a multiple of 4 and of heads={self.heads}")
        if self.classes > IGNORE:
            raise ValueError(f"classes must be at most {IGNORE}, got {self.classes}")


@dataclass(frozen=True, slots=True, kw_only=True)
class PanoLossConfig(Settings):
    """Weights of the loss.

    Attributes:
        tasks: Weight of each main task.
        intermediate: Of the predictions in front of the bridge, over those behind it.
        auxiliary: Of auxiliary tasks.
        depth_edge, depth_frequency: Extra terms of depth.
        normals_edge, normals_frequency: Extra terms of normals.
        depth_limit: The depth loss of a batch is cut off here; None does not.
        radius: The frequency term looks outside of this radius of the centred spectrum.
        phase: "angle" compares phases, which jump at half a turn, "complex" the directions of the coefficients.
        area_weighting: Weigh pixels by their share of the sphere, instead of all alike.
    """

    tasks: dict[str, float] = field(default_factory=lambda: dict.fromkeys(MAIN, 1.0))
    intermediate: float = 0.3
    auxiliary: float = 0.003
    depth_edge: float = 0.5
    depth_frequency: float = 5e-3
    normals_edge: float = 0.1
    normals_frequency: float = 1e-4
    depth_limit: float | None = 10.0
    radius: int = 64
    phase: Literal["angle", "complex"] = "angle"
    area_weighting: bool = False

    def check(self) -> None:
        """Tasks are known and weights not negative."""
        if unknown := sorted(set(self.tasks) - set(MAIN)):
            raise ValueError(f"tasks {unknown} are not among {MAIN}")
        numbers = {name: getattr(self, name) for name in ("intermediate", "auxiliary", "depth_edge", "depth_frequency")}
        numbers |= {"normals_edge": self.normals_edge, "normals_frequency": self.normals_frequency} | self.tasks
        for name, value in numbers.items():
            if not value >= 0:
                raise ValueError(f"the weight {name} must be 0 or more, got {value}")
        if self.depth_limit is not None and not self.depth_limit > 0:
            raise ValueError(f"depth_limit must be positive or None, got {self.depth_limit}")
