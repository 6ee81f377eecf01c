"""What both recipes share: rooms seen by several cameras, their scores, and pictures of what was found."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TypeVar

import torch
from eff_vision.geometry import relative_poses
from eff_vision.multiview import MultiViewBatch, normalize_scene
from torch import nn

from eff_train.frame import HELD_OUT, Recipe, TrainConfig
from eff_train.frame.data import to_device
from eff_train.recipes.lite3r.predict import predict_folder
from eff_train.recipes.lite3r.scores import save_sheet


@dataclass(frozen=True, kw_only=True)
class ViewsConfig(TrainConfig):
    """Options of the scenes.

    Attributes:
        views: Cameras a scene.
        side: Rows and columns of the pictures.
        spread: Degrees round the room in which the cameras stand.
        scenes: Scenes of the evaluation.
    """

    views: int = 3
    side: int = 48
    spread: float = 50.0
    scenes: int = 64


C = TypeVar("C", bound=ViewsConfig)


class ViewsRecipe(Recipe[C]):
    """A recipe on scenes with several views."""

    def scenes(self, seeds: Sequence[int]) -> MultiViewBatch:
        """One scene a seed."""
        c = self.config
        return views_of(seeds, views=c.views, side=c.side, spread=c.spread)

    @cached_property
    def held_out(self) -> list[MultiViewBatch]:
        """Scenes of the evaluation, eight at a time."""
        seeds = range(HELD_OUT, HELD_OUT + self.config.scenes)
        return [to_device(self.scenes(seeds[i : i + 8]), self.device) for i in range(0, len(seeds), 8)]

    def samples(self, model: nn.Module, folder: Path) -> None:
        """Pictures, found depth and true depth."""
        save_sheet(model, self.held_out[0], folder)

    def predict(self, model: nn.Module, file: Path, out: Path) -> str:
        """Depth, cameras and a point cloud of a folder of pictures, the first of which is the world."""
        return predict_folder(model, file, out, self.config.side)


def views_of(seeds: Sequence[int], *, views: int, side: int, spread: float) -> MultiViewBatch:
    """One scene a seed, in the frame of its first view and at the scale of the loss.

    Args:
        seeds: Of the scenes.
        views: Cameras a scene.
        side: Rows and columns of the pictures.
        spread: Degrees round the room in which the cameras stand.
    """
    from eff_embedded.scenes import SceneConfig, make_scene, make_views, render_views

    rows = []
    for seed in seeds:
        scene = make_scene(SceneConfig(num_objects=(3, 6)), seed=seed)
        cameras = make_views(scene, views, seed=seed, size=(side, side), spread=spread)
        rows.append(render_views(scene, cameras, [0.0] * views))
    poses = torch.stack([relative_poses(row.extrinsics[:, :3]) for row in rows])
    return normalize_scene(
        MultiViewBatch(
            images=torch.stack([row.colour for row in rows]),
            depth=torch.stack([row.depth for row in rows]),
            valid=torch.stack([row.valid for row in rows]),
            extrinsics=poses,
            intrinsics=torch.stack([row.intrinsics for row in rows if row.intrinsics is not None]),
        )
    )
