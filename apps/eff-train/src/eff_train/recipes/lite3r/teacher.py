"""A small model of VGGT's class learns cameras and depth of rooms from three views."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import ClassVar

import numpy as np
import torch
from eff_vision.multiview import MultiViewBatch, MultiViewConfig, MultiViewOutput, MultiViewTransformer, multiview_loss
from PIL import Image
from torch import Tensor, nn

from eff_train.frame import Recipe, TrainConfig
from eff_train.recipes.lite3r.scores import colours, save_sheet, scores
from eff_train.recipes.lite3r.views import HELD_OUT, views_of


@dataclass(frozen=True, kw_only=True)
class Config(TrainConfig):
    """Options of the teacher.

    Attributes:
        dim: Width of tokens.
        depth: Pairs of frame and global blocks.
        views: Cameras a scene.
        side: Rows and columns of the pictures.
        spread: Degrees round the room in which the cameras stand.
        scenes: Scenes of the evaluation.
    """

    steps: int = 2000
    batch_size: int = 4
    lr: float = 1e-3
    warmup: int = 100
    weight_decay: float = 0.05
    ema: float = 0.99
    eval_every: int = 500
    save_every: int = 250
    log_every: int = 25
    dim: int = 64
    depth: int = 3
    views: int = 3
    side: int = 48
    spread: float = 50.0
    scenes: int = 64


class Teacher(Recipe[Config]):
    """Pictures [batch, views, 3, side, side] to cameras and depth; see `eff_vision.multiview`."""

    best = "-abs_rel"
    thresholds: ClassVar[Mapping[str, tuple[str, float]]] = {"abs_rel": ("<=", 0.2), "delta1": (">=", 0.75)}

    def build(self) -> nn.Module:
        """The model."""
        return MultiViewTransformer(self.model_config)

    @property
    def model_config(self) -> MultiViewConfig:
        """Settings of the model."""
        c = self.config
        return MultiViewConfig(dim=c.dim, heads=c.dim // 32, depth=c.depth, taps=(c.depth - 2, c.depth - 1))

    def batch(self, samples: range) -> MultiViewBatch:
        """Fresh scenes."""
        c = self.config
        return views_of([c.seed * HELD_OUT + s for s in samples], views=c.views, side=c.side, spread=c.spread)

    @cached_property
    def held_out(self) -> list[MultiViewBatch]:
        """Scenes of the evaluation, eight at a time."""
        c, seeds = self.config, range(HELD_OUT, HELD_OUT + self.config.scenes)
        groups = [list(seeds[i : i + 8]) for i in range(0, len(seeds), 8)]
        return [to(views_of(g, views=c.views, side=c.side, spread=c.spread), self.device) for g in groups]

    def loss(self, model: nn.Module, batch: MultiViewBatch) -> tuple[Tensor, Mapping[str, Tensor | float]]:
        """Cameras and depth."""
        batch = to(batch, self.device)
        output: MultiViewOutput = model(batch.images)
        return multiview_loss(output, batch)

    def evaluate(self, model: nn.Module) -> dict[str, float]:
        """Depth and pose errors on scenes that were held out."""
        return scores(model, self.held_out)

    def samples(self, model: nn.Module, folder: Path) -> None:
        """Pictures, found depth and true depth."""
        save_sheet(model, self.held_out[0], folder)

    def predict(self, model: nn.Module, file: Path, out: Path) -> str:
        """Depth, cameras and a point cloud of a folder of pictures, the first of which is the world."""
        return predict_folder(model, file, out, self.config.side)

    def export(self, model: nn.Module, folder: Path) -> None:
        """Weights and settings."""
        from safetensors.torch import save_file

        save_file({k: v.half().contiguous() for k, v in model.state_dict().items()}, folder / "model.safetensors")
        (folder / "config.json").write_text(json.dumps(self.model_config.to_dict(), indent=2))


def to(batch: MultiViewBatch, device: torch.device) -> MultiViewBatch:
    """A batch on a device."""
    return MultiViewBatch(*(t.to(device) for t in batch))


@torch.no_grad()
def predict_folder(model: nn.Module, folder: Path, out: Path, side: int) -> str:
    """Depth in colour, cameras as JSON and points as PLY of a folder of pictures.

    Raises:
        ValueError: the folder has no picture.
    """
    from eff_vision.geometry import unproject
    from eff_vision.geometry.formats import write_ply

    paths = sorted(p for p in folder.iterdir() if p.suffix.lower() in (".png", ".jpg", ".jpeg", ".webp"))
    if not paths:
        raise ValueError(f"{folder} holds no PNG, JPEG or WebP picture")
    device = next(model.parameters()).device
    pictures = [Image.open(p).convert("RGB") for p in paths]
    squares = [p.crop(_square(p.size)).resize((side, side), Image.Resampling.LANCZOS) for p in pictures]
    images = torch.stack([torch.from_numpy(np.array(s)).movedim(-1, 0).float() / 255 for s in squares]).to(device)
    output: MultiViewOutput = model(images)
    extrinsics, intrinsics = output.cameras()
    depth = output.depth[0, ..., 0]
    out.mkdir(parents=True, exist_ok=True)
    shown = (colours(depth / depth.max()).movedim(1, -1) * 255).to(torch.uint8).cpu().numpy()
    for path, picture in zip(paths, shown, strict=True):
        Image.fromarray(picture).resize((4 * side, 4 * side)).save(out / f"{path.stem}-depth.png")
    cameras = [
        {"picture": p.name, "extrinsics": e.tolist(), "intrinsics": k.tolist()}
        for p, e, k in zip(paths, extrinsics[0], intrinsics[0], strict=True)
    ]
    (out / "cameras.json").write_text(json.dumps(cameras, indent=2))
    points = unproject(depth, intrinsics[0], extrinsics[0]).reshape(-1, 3)
    write_ply(out / "points.ply", points, images.movedim(1, -1).reshape(-1, 3))
    return f"{len(paths)} views: depth, cameras.json and points.ply"


def _square(size: tuple[int, int]) -> tuple[int, int, int, int]:
    width, height = size
    side = min(size)
    left, top = (width - side) // 2, (height - side) // 2
    return left, top, left + side, top + side


RECIPE = Teacher
