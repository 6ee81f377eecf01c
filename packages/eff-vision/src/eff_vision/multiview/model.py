"""A transformer of VGGT's class: pictures of one scene in, cameras and depth out, in one pass."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor, nn

from eff_vision.geometry import decode_pose
from eff_vision.multiview.aggregator import Aggregator
from eff_vision.multiview.config import MultiViewConfig
from eff_vision.multiview.heads import CameraHead, DenseHead


class MultiViewOutput(NamedTuple):
    """What a multi-view model gives. View 0 is the frame of the world; the scale is the model's own.

    Attributes:
        pose_enc: Cameras as nine numbers, [B, S, 9]; see `eff_vision.geometry.encode_pose`.
        pose_enc_list: The same after each refinement, the last included.
        depth: z-depth, [B, S, H, W, 1].
        depth_conf: Confidence >= 1, [B, S, H, W].
        world_points: [B, S, H, W, 3], or None.
        world_points_conf: [B, S, H, W], or None.
        images: As given, [B, S, 3, H, W].
    """

    pose_enc: Tensor
    pose_enc_list: list[Tensor]
    depth: Tensor
    depth_conf: Tensor
    world_points: Tensor | None
    world_points_conf: Tensor | None
    images: Tensor

    def cameras(self) -> tuple[Tensor, Tensor]:
        """Extrinsics [B, S, 3, 4] (world to camera) and intrinsics [B, S, 3, 3] in pixels."""
        height, width = self.images.shape[-2:]
        return decode_pose(self.pose_enc, height, width)


class MultiViewTransformer(nn.Module):
    """VGGT's architecture (arXiv 2503.11651) in any size.

    Args:
        config: Settings.
    """

    def __init__(self, config: MultiViewConfig | None = None) -> None:
        super().__init__()
        self.config = MultiViewConfig() if config is None else config
        self.aggregator = Aggregator(self.config)
        self.camera_head = CameraHead(self.config)
        self.depth_head = DenseHead(self.config, "depth")
        self.point_head = DenseHead(self.config, "points") if self.config.points else None

    def forward(self, images: Tensor, *, frames_at_a_time: int | None = None) -> MultiViewOutput:
        """Cameras and depth of the views of one scene, or of a batch of scenes.

        Args:
            images: Colours from 0 to 1, [S, 3, H, W] or [B, S, 3, H, W]; sides are multiples of the patch size.
            frames_at_a_time: Views that the dense heads work on at once, to bound the memory.

        Raises:
            ValueError: there is no view, or a size is wrong.
            TypeError: the heads' weights are in 16 bits.
        """
        if images.dim() == 4:
            images = images[None]
        p = self.config.patch_size
        if images.dim() != 5 or images.size(2) != 3:
            raise ValueError(f"images must be [S, 3, H, W] or [B, S, 3, H, W], got {list(images.shape)}")
        if images.size(0) == 0 or images.size(1) == 0:
            raise ValueError(f"a scene needs at least one view, got images {list(images.shape)}")
        if images.size(3) % p or images.size(4) % p or not images.size(3) or not images.size(4):
            raise ValueError(f"height and width must be multiples of {p}, got {images.size(3)} x {images.size(4)}")
        if frames_at_a_time is not None and frames_at_a_time < 1:
            raise ValueError(f"frames_at_a_time must be 1 or more, got {frames_at_a_time}")
        if (dtype := next(self.camera_head.parameters()).dtype) in (torch.float16, torch.bfloat16):
            raise TypeError(f"the heads run in float32, their weights are {dtype}; use torch.autocast for the rest")
        tokens = self.aggregator(images)
        special = self.aggregator.special
        with torch.autocast(images.device.type, enabled=False):
            floats = {i: t.float() if t.dtype in (torch.float16, torch.bfloat16) else t for i, t in tokens.items()}
            poses = self.camera_head(floats[self.config.depth - 1][:, :, 0])
            pictures = images.to(next(iter(floats.values())).dtype)
            depth, confidence = self.depth_head(floats, pictures, special, frames_at_a_time)
            points, point_confidence = (
                (None, None)
                if self.point_head is None
                else self.point_head(floats, pictures, special, frames_at_a_time)
            )
        return MultiViewOutput(poses[-1], poses, depth, confidence, points, point_confidence, images)
