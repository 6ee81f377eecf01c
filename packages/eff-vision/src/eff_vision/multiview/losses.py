"""The training loss, and the scale that scenes are brought to."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from eff_vision.geometry import encode_pose
from eff_vision.multiview.config import MultiViewLossConfig
from eff_vision.multiview.model import MultiViewOutput


class MultiViewBatch(NamedTuple):
    """Views with their truth, in the frame of view 0.

    Attributes:
        images: Colours from 0 to 1, [B, S, 3, H, W].
        depth: z-depth, [B, S, H, W].
        valid: Pixels with a known depth, bool [B, S, H, W].
        extrinsics: World to camera, [B, S, 3, 4].
        intrinsics: In pixels, [B, S, 3, 3].
    """

    images: Tensor
    depth: Tensor
    valid: Tensor
    extrinsics: Tensor
    intrinsics: Tensor


def normalize_scene(batch: MultiViewBatch) -> MultiViewBatch:
    """Each scene divided by the larger of its median depth and its longest translation.

    Raises:
        ValueError: a scene has no valid pixel, or a valid one that is not finite and positive.
    """
    depth = torch.where(batch.valid, batch.depth, torch.ones_like(batch.depth))
    if not bool((torch.isfinite(depth) & (depth > 0)).all()):
        raise ValueError("a valid pixel has a depth that is not finite and positive")
    if not bool(batch.valid.flatten(1).any(1).all()):
        raise ValueError(f"scene {int((~batch.valid.flatten(1).any(1)).nonzero()[0])} has no valid pixel")
    median = torch.stack([d[v].median() for d, v in zip(batch.depth, batch.valid, strict=True)])
    longest = batch.extrinsics[..., 3].norm(dim=-1).amax(1)
    scale = torch.maximum(median, longest)
    extrinsics = batch.extrinsics.clone()
    extrinsics[..., 3] = extrinsics[..., 3] / scale[:, None, None]
    scaled = torch.where(batch.valid, batch.depth / scale[:, None, None, None], torch.zeros_like(batch.depth))
    return batch._replace(depth=scaled, extrinsics=extrinsics)


def multiview_loss(
    output: MultiViewOutput, batch: MultiViewBatch, config: MultiViewLossConfig | None = None
) -> tuple[Tensor, dict[str, Tensor]]:
    """Camera plus depth loss, and both apart. Without enough valid pixels they are zero, with a graph.

    Args:
        output: Of the model.
        batch: The truth, at a scale of about 1 (`normalize_scene`).
        config: Weights.
    """
    config = MultiViewLossConfig() if config is None else config
    parts = {"camera": camera_loss(output, batch, config), "depth": depth_loss(output, batch, config)}
    return parts["camera"] + parts["depth"], parts


def camera_loss(output: MultiViewOutput, batch: MultiViewBatch, config: MultiViewLossConfig) -> Tensor:
    """Absolute error of poses after each refinement."""
    height, width = batch.images.shape[-2:]
    target = encode_pose(batch.extrinsics, batch.intrinsics, height, width).to(output.pose_enc.dtype)
    counts = batch.valid[:, 0].flatten(1).sum(1) > config.min_pixels
    total = output.pose_enc.sum() * 0
    if not bool(counts.any()):
        return total
    truth = target[counts]
    scale = _scale(output.pose_enc[counts][..., :3], truth[..., :3], config)[:, None, None]
    stages = output.pose_enc_list
    for s, stage in enumerate(stages):
        error = stage[counts]
        translation = (error[..., :3] * scale - truth[..., :3]).abs().clamp(max=config.translation_limit).mean()
        rotation = (error[..., 3:7] - truth[..., 3:7]).abs().mean()
        fov = (error[..., 7:] - truth[..., 7:]).abs().mean()
        part = config.translation * translation + config.rotation * rotation + config.fov * fov
        total = total + config.gamma ** (len(stages) - 1 - s) * part / len(stages)
    return total


def depth_loss(output: MultiViewOutput, batch: MultiViewBatch, config: MultiViewLossConfig) -> Tensor:
    """Absolute error of depth, with and without the confidences, each without its worst pixels."""
    depth = output.depth[..., 0]
    total = depth.sum() * 0
    if not bool(batch.valid.any()):
        return total
    target = torch.where(batch.valid, batch.depth, torch.zeros_like(batch.depth)).to(depth.dtype)
    keep = batch.valid.to(depth.dtype)
    scale = _scale((depth * keep).flatten(1), target.flatten(1), config)[:, None, None, None]
    error = (scale * depth - target).abs()[batch.valid]
    confidence = output.depth_conf[batch.valid]
    weighted = confidence * error - config.confidence * confidence.log()
    return total + _best(weighted, config.quantile) + _best(error, config.quantile)


def _scale(prediction: Tensor, target: Tensor, config: MultiViewLossConfig) -> Tensor:
    """Least-squares factor from prediction to target for each scene, without gradients, [B]."""
    p, t = prediction.detach().flatten(1), target.flatten(1)
    return ((p * t).sum(1) / p.square().sum(1).clamp(min=1e-12)).clamp(*config.scale_range)


def _best(values: Tensor, quantile: float) -> Tensor:
    """Mean of the values up to a quantile."""
    count = max(1, int(quantile * values.numel()))
    limit = values.detach().flatten().kthvalue(count).values
    return values[values <= limit].mean()
