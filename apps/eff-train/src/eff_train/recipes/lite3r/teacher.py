"""A small model of VGGT's class learns cameras and depth of rooms from three views."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

import torch
from eff_vision.multiview import MultiViewBatch, MultiViewConfig, MultiViewOutput, MultiViewTransformer, multiview_loss
from torch import Tensor, nn

from eff_train.frame import HELD_OUT
from eff_train.recipes.lite3r.scores import scores
from eff_train.recipes.lite3r.views import ViewsConfig, ViewsRecipe


@dataclass(frozen=True, kw_only=True)
class Config(ViewsConfig):
    """Options of the teacher.

    Attributes:
        dim: Width of tokens.
        depth: Pairs of frame and global blocks.
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


class Teacher(ViewsRecipe[Config]):
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
        return self.scenes([self.config.seed * HELD_OUT + s for s in samples])

    def loss(self, model: nn.Module, batch: MultiViewBatch) -> tuple[Tensor, Mapping[str, Tensor | float]]:
        """Cameras and depth."""
        output: MultiViewOutput = model(batch.images)
        return multiview_loss(output, batch)

    def evaluate(self, model: nn.Module) -> dict[str, float]:
        """Depth and pose errors on scenes that were held out."""
        return scores(model, self.held_out)

    def export(self, model: nn.Module, folder: Path) -> None:
        """Weights and settings, and the cameras and depth of a scene's views as ONNX."""
        from safetensors.torch import save_file

        from eff_train.frame.onnx import Chosen, write_onnx

        save_file({k: v.half().contiguous() for k, v in model.state_dict().items()}, folder / "model.safetensors")
        (folder / "config.json").write_text(json.dumps(self.model_config.to_dict(), indent=2))
        c = self.config
        images = {"images": torch.rand(1, c.views, 3, c.side, c.side)}
        views = Chosen(model, lambda output: (output.pose_enc, output.depth, output.depth_conf))
        write_onnx(views, images, ("cameras", "depth", "confidence"), folder / "views.onnx")


RECIPE = Teacher
