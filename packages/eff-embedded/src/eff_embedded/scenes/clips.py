"""Clips: pictures in time, with the flow from each to the next."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from eff_embedded.scenes.cameras import Camera
from eff_embedded.scenes.flow import optical_flow
from eff_embedded.scenes.render import render_views
from eff_embedded.scenes.scene import Scene
from eff_embedded.scenes.view import View


@dataclass(frozen=True, slots=True, kw_only=True)
class Clip:
    """Pictures of one scene in time.

    Attributes:
        views: T of them, stacked.
        flow: From each picture to the next, [T - 1, 2, H, W], in pixels.
        flow_seen: Where the next picture shows the same point, [T - 1, H, W], bool.
    """

    views: View
    flow: Tensor
    flow_seen: Tensor


def render_clip(
    scene: Scene,
    cameras: Sequence[Camera],
    times: Sequence[float],
    *,
    antialias: int = 1,
    dtype: torch.dtype = torch.float32,
) -> Clip:
    """Pictures of a scene at several times, with optical flow.

    Args:
        scene: What to look at.
        cameras: One for each picture, with lenses of one size and kind.
        times: Of the pictures, in seconds.
        antialias: See `render`.
        dtype: Of the floating maps.

    Raises:
        ValueError: there are fewer than two pictures; and as `render_views`.
    """
    if len(cameras) < 2:
        raise ValueError(f"{len(cameras)} pictures; a clip has at least two")
    views = render_views(scene, cameras, times, antialias=antialias, dtype=dtype)
    flows = [
        optical_flow(scene, cameras[k], times[k], cameras[k + 1], times[k + 1], dtype=dtype)
        for k in range(len(cameras) - 1)
    ]
    return Clip(views=views, flow=torch.stack([f.flow for f in flows]), flow_seen=torch.stack([f.seen for f in flows]))
