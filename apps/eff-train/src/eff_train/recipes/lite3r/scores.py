"""How well a multi-view model finds depth and cameras, and pictures of it."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from eff_vision.metrics import depth_metrics, pose_metrics
from eff_vision.multiview import MultiViewBatch
from PIL import Image
from torch import Tensor, nn


@torch.no_grad()
def scores(model: nn.Module, batches: list[MultiViewBatch]) -> dict[str, float]:
    """Means over scenes; depth after the best single factor a scene, rotations without view 0."""
    found: dict[str, list[float]] = {"abs_rel": [], "delta1": [], "rotation": [], "translation": []}
    for batch in batches:
        out = model(batch.images)
        extrinsics, _ = out.cameras()
        for i in range(len(batch.images)):
            depth = depth_metrics(
                out.depth[i, ..., 0].flatten()[None], batch.depth[i].flatten()[None],
                batch.valid[i].flatten()[None], alignment="scale",
            )  # fmt: skip
            pose = pose_metrics(extrinsics[i].cpu(), batch.extrinsics[i].cpu())
            found["abs_rel"].append(depth.abs_rel)
            found["delta1"].append(depth.delta1)
            found["rotation"].append(pose.rotation)
            found["translation"].append(pose.translation)
    return {name: float(np.mean(values)) for name, values in found.items()}


@torch.no_grad()
def sheet(model: nn.Module, batch: MultiViewBatch) -> Image.Image:
    """The first scene: pictures, found depth and true depth, a row each."""
    out = model(batch.images[:1])
    truth, found = batch.depth[0].cpu(), out.depth[0, ..., 0].cpu()
    found = found * (found * truth).sum() / found.square().sum()
    top = float(truth.max())
    rows = [_row(batch.images[0].cpu())] + [_row(colours(d / top)) for d in (found, truth)]
    return Image.fromarray(np.concatenate(rows)).resize((rows[0].shape[1] * 2, len(rows) * rows[0].shape[0] * 2))


def colours(shares: Tensor) -> Tensor:
    """Values from 0 to 1 [S, H, W] as colours [S, 3, H, W], near ones warm and far ones cool."""
    t = shares.clamp(0, 1)
    return torch.stack((1 - t, (1 - (2 * t - 1).abs()) * 0.85, t), 1)


def _row(pictures: Tensor) -> np.ndarray:
    return (torch.cat(list(pictures), -1).movedim(0, -1).clamp(0, 1) * 255).to(torch.uint8).numpy()


def save_sheet(model: nn.Module, batch: MultiViewBatch, folder: Path) -> None:
    """Write `sheet` as scenes.png."""
    sheet(model, batch).save(folder / "scenes.png")
