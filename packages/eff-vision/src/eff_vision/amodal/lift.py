"""From the picture to a map seen from above: features fill a block of space, whose height is then folded away."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from eff_vision.amodal.config import BEVConfig
from eff_vision.amodal.encoder import convolution
from eff_vision.geometry.cameras import check_intrinsics

# A focal length below this many pixels is one in units of the picture's size.
_LEAST_FOCAL = 2.0


class BEVLift(nn.Module):
    """Lifts maps of features into space and folds them to a bird's-eye view (section 3.2).

    Args:
        channels: Of the maps and of the result.
        config: The block of space.
    """

    centres: Tensor

    def __init__(self, channels: int, config: BEVConfig) -> None:
        super().__init__()
        self.config = config
        axes = [
            low + (torch.arange(n) + 0.5) * (high - low) / n
            for (low, high), n in zip((config.width, config.height, config.depth), config.cells, strict=True)
        ]
        self.register_buffer("centres", torch.stack(torch.meshgrid(*axes, indexing="ij"), -1), persistent=False)
        full, half = channels * config.cells[1], max(1, channels * config.cells[1] // 2)
        self.fold = nn.Sequential(
            convolution(full, half, 1),
            convolution(half, half, 3),
            convolution(half, half, 3, stride=2),
            convolution(half, channels, 1),
            convolution(channels, channels, 3),
            convolution(channels, channels, 3, stride=2),
        )

    def volume(self, features: Tensor, intrinsics: Tensor, size: int, tilt: Tensor | None = None) -> Tensor:
        """Features at the middle of each cell, [N, C, cells x, cells y, cells z]; zero where the camera sees nothing.

        Args:
            features: [N, C, h, w] of square pictures.
            intrinsics: Of these pictures, [N, 3, 3] in pixels.
            size: Rows and columns of the pictures.
            tilt: How far each camera looks down, in radians, [N]; the block of space stays level.

        Raises:
            ValueError: the intrinsics are not in pixels, or have no positive focal length.
        """
        focal = torch.stack((intrinsics[..., 0, 0], intrinsics[..., 1, 1]), -1)
        if not torch.compiler.is_exporting():  # an exporter cannot follow a look at values
            check_intrinsics(intrinsics)
            if bool((focal < _LEAST_FOCAL).any()):
                raise ValueError(
                    f"intrinsics have a focal length of {float(focal.min()):.3g}; they must be in pixels of the crop "
                    "(multiply those in units of the picture by its width and height)"
                )
        points = self.centres.to(intrinsics.dtype).flatten(0, 2).expand(len(features), -1, 3)
        if tilt is not None:
            points = look_down(points, tilt.to(points.dtype))
        z = points[..., 2]
        safe = torch.where(z > 0, z, torch.ones_like(z))
        pixels = points[..., :2] / safe[..., None] * focal[:, None] + intrinsics[:, None, :2, 2]
        places = 2 * pixels / size - 1
        seen = (z > 0) & (places.abs() <= 1).all(-1)
        found = sample_within(features, places.to(features.dtype))
        return (found * seen[:, None]).unflatten(-1, self.config.cells)

    def forward(self, features: Tensor, intrinsics: Tensor, size: int, tilt: Tensor | None = None) -> Tensor:
        """Bird's-eye view [N, C, cells z / 4, cells x / 4]; arguments as `volume`."""
        volume = self.volume(features, intrinsics, size, tilt)
        return self.fold(volume.permute(0, 1, 3, 4, 2).flatten(1, 2))


def sample_within(features: Tensor, places: Tensor) -> Tensor:
    """Bilinear values [N, C, P] of maps [N, C, h, w] at places [N, P, 2] (x, y) from -1 to 1, edge to edge.

    For exporters, whose formats name this differently from version to version, it is written out as four gathers.
    """
    if not torch.compiler.is_exporting():
        return F.grid_sample(features, places[:, None], padding_mode="border", align_corners=False)[:, :, 0]
    height, width = features.shape[-2:]
    x, y = ((((places[..., i] + 1) * n - 1) / 2).clamp(0, n - 1) for i, n in enumerate((width, height)))
    left, top = x.floor(), y.floor()
    found = torch.zeros_like(features[..., :1, 0])
    for column, across in ((left, 1 - x + left), ((left + 1).clamp(max=width - 1), x - left)):
        for row, down in ((top, 1 - y + top), ((top + 1).clamp(max=height - 1), y - top)):
            index = (row * width + column).long()[:, None].expand(-1, features.size(1), -1)
            found = found + features.flatten(2).gather(2, index) * (across * down)[:, None]
    return found


def look_down(points: Tensor, tilt: Tensor) -> Tensor:
    """Points [N, P, 3] of a level frame as cameras see them that look down by ``tilt`` [N] radians."""
    x, y, z = points.unbind(-1)
    cos, sin = tilt.cos()[:, None], tilt.sin()[:, None]
    return torch.stack((x, cos * y - sin * z, sin * y + cos * z), -1)


def tilt_towards_origin(position: Tensor) -> Tensor:
    """How far a camera at ``position`` [..., 3] (z upwards) looks down if it looks at the origin, in radians [...]."""
    return torch.atan2(position[..., 2], position[..., :2].norm(dim=-1))


def kubric_intrinsics(intrinsics: Tensor, height: int, width: int) -> Tensor:
    """Kubric's intrinsics [..., 3, 3] (units of the picture, looking along -z) as ours, in pixels.

    Raises:
        ValueError: their last row is not (0, 0, -1).
    """
    if not torch.equal(intrinsics[..., 2, :], intrinsics.new_tensor([0.0, 0.0, -1.0]).expand_as(intrinsics[..., 2, :])):
        raise ValueError(f"Kubric's intrinsics end in (0, 0, -1), got {intrinsics[..., 2, :].flatten()[:3].tolist()}")
    flip = intrinsics.new_tensor([1.0, -1.0, -1.0])
    return intrinsics * flip * intrinsics.new_tensor([width, height, 1.0])[:, None]
