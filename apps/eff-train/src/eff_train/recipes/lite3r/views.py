"""Rooms seen by several cameras, with depth and poses, as the multi-view model is trained on them."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from eff_vision.geometry import relative_poses
from eff_vision.multiview import MultiViewBatch, normalize_scene

HELD_OUT = 1 << 40  # seeds from here on are for the evaluation


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
