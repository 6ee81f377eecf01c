"""Draws docs/images/scenes_*.png: what `eff_embedded.scenes` makes.

``python tools/scenes_picture.py`` takes about a minute of one core.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from eff_embedded import scenes
from PIL import Image
from torch import Tensor

OUT = Path(__file__).parents[1] / "docs" / "images"
STYLES: tuple[scenes.Style, ...] = ("procedural", "photographs", "sprites")
GAP = 6
# Colours of objects in masks: far apart for neighbours.
_OBJECTS = (
    *((230, 85, 75), (70, 130, 220), (245, 190, 60), (80, 175, 95), (160, 95, 205)),
    *((240, 135, 180), (60, 185, 190), (150, 110, 75), (120, 200, 60), (250, 140, 40)),
)
PALETTE = torch.tensor(_OBJECTS) / 255
CLASS_COLOURS = torch.tensor(
    [[0.45, 0.40, 0.36], [0.72, 0.74, 0.76], [0.90, 0.90, 0.88]] + [c.tolist() for c in PALETTE] + [[0.3, 0.3, 0.7]]
)


def depth_colours(depth: Tensor) -> Tensor:
    """Near is warm and light, far is dark blue; even steps of the inverse depth, [3, H, W]."""
    inverse = 1 / depth
    low, high = inverse.min(), inverse.max()
    stops = torch.tensor(
        [[0.10, 0.10, 0.28], [0.25, 0.28, 0.62], [0.72, 0.35, 0.55], [0.97, 0.62, 0.36], [1.0, 0.95, 0.72]]
    )
    at = (inverse - low) / (high - low) * (len(stops) - 1)
    index = at.long().clamp(max=len(stops) - 2)
    share = (at - index)[..., None]
    return (stops[index] * (1 - share) + stops[index + 1] * share).permute(2, 0, 1)


def normal_colours(normals: Tensor) -> Tensor:
    """Right is red, up is green, towards the camera is blue, [3, H, W]."""
    return (normals * torch.tensor([1.0, -1.0, -1.0])[:, None, None] + 1) / 2


def flow_colours(flow: Tensor) -> Tensor:
    """Direction as hue, speed as strength on white, [3, H, W]."""
    hue = torch.atan2(flow[1], flow[0])
    strength = (flow.norm(dim=0) / flow.norm(dim=0).flatten().quantile(0.98)).clamp(max=1)
    turn = torch.tensor([0.0, 2 * math.pi / 3, -2 * math.pi / 3])[:, None, None]
    return 1 - strength * (0.5 - 0.5 * torch.cos(hue - turn))


def mask_colours(view: scenes.View, masks: Tensor) -> Tensor:
    """Each object in its colour over a pale grey picture; a hidden part shows through, [3, H, W]."""
    picture = (0.75 + 0.2 * view.colour.mean(0, keepdim=True)).expand(3, -1, -1).clone()
    near = [float(view.distance[seen].min()) if seen.any() else math.inf for seen in view.visible]
    far_first = sorted(range(len(masks)), key=lambda k: -near[k])
    for k in far_first:
        colour = PALETTE[k % len(PALETTE)][:, None, None]
        picture = torch.where(masks[k], 0.25 * picture + 0.75 * colour, picture)
    return picture


def class_colours(view: scenes.View) -> Tensor:
    """A colour for each class, [3, H, W]."""
    return CLASS_COLOURS[view.classes].permute(2, 0, 1)


def sheet(rows: Sequence[Sequence[Tensor]], name: str) -> None:
    """Tiles [3, H, W] in rows, saved as PNG."""
    height, width = rows[0][0].shape[-2:]
    columns = max(map(len, rows))
    canvas = torch.ones(3, len(rows) * (height + GAP) - GAP, columns * (width + GAP) - GAP)
    for i, row in enumerate(rows):
        for j, tile in enumerate(row):
            top, left = i * (height + GAP), j * (width + GAP)
            canvas[:, top : top + height, left : left + width] = tile.clamp(0, 1)
    picture = Image.fromarray((canvas.permute(1, 2, 0) * 255).round().byte().numpy())
    picture.save(OUT / f"scenes_{name}.png", optimize=True)


def gallery() -> None:
    """Twelve scenes."""
    tiles = []
    for seed in GALLERY:
        scene = scenes.make_scene(scenes.SceneConfig(num_objects=(6, 8), styles=STYLES), seed=seed)
        tiles.append(scenes.render(scene, scenes.make_camera(scene, seed=seed, size=(160, 160)), antialias=3).colour)
    sheet([tiles[:6], tiles[6:]], "gallery")


def maps() -> None:
    """One scene with its maps."""
    scene = scenes.make_scene(scenes.SceneConfig(num_objects=(8, 8), styles=STYLES, spread=0.45), seed=MAPS)
    view = scenes.render(scene, scenes.make_camera(scene, seed=MAPS, size=(200, 200)), antialias=3)
    top = [view.colour, depth_colours(view.depth), normal_colours(view.camera_normals), class_colours(view)]
    tints = [mask_colours(view, view.visible), mask_colours(view, view.full)]
    hidden = view.full & ~view.visible
    low, high = (f(view.points, (1, 2), keepdim=True) for f in (torch.amin, torch.amax))
    ground = (view.points - low) / (high - low)
    sheet([top, [*tints, mask_colours(view, hidden), ground]], "maps")


def panorama() -> None:
    """A panorama and its maps."""
    scene = scenes.make_scene(scenes.SceneConfig(num_objects=(8, 8), styles=STYLES, spread=0.75), seed=PANORAMA)
    view = scenes.render(scene, scenes.make_panorama(scene, seed=PANORAMA, height=200), antialias=3)
    sheet(
        [[view.colour, depth_colours(view.distance)], [normal_colours(view.normals), class_colours(view)]], "panorama"
    )


def clip() -> None:
    """Pictures of a clip, the flow to the next, and where the next one shows the same point."""
    config = scenes.SceneConfig(num_objects=(6, 6), styles=STYLES, floating=0.6, speed=(0.3, 0.7), spin=(20, 80))
    scene = scenes.make_scene(config, seed=CLIP)
    times = [0.0, 0.25, 0.5, 0.75, 1.0]
    cameras = scenes.make_path(scene, 5, seed=CLIP, size=(160, 160), sweep=24)
    found = scenes.render_clip(scene, cameras, times, antialias=3)
    flows = [flow_colours(f) for f in found.flow]
    seen = [torch.where(s, f, torch.full_like(f, 0.25)) for f, s in zip(flows, found.flow_seen, strict=True)]
    sheet([list(found.views.colour[:4]), seen], "clip")


def views() -> None:
    """Four views of one scene from all sides."""
    scene = scenes.make_scene(scenes.SceneConfig(num_objects=(8, 8), styles=STYLES), seed=VIEWS)
    cameras = scenes.make_views(scene, 4, seed=VIEWS, size=(200, 200), spread=150)
    found = scenes.render_views(scene, cameras, antialias=3)
    sheet([list(found.colour)], "views")


GALLERY = (8, 13, 16, 19, 23, 30, 33, 36, 40, 43, 44, 45)
MAPS, PANORAMA, CLIP, VIEWS = 12, 3, 13, 19
PICTURES: tuple[Callable[[], None], ...] = (gallery, maps, panorama, clip, views)


def main() -> None:
    """Draw all pictures."""
    torch.set_num_threads(1)
    for draw in PICTURES:
        draw()


if __name__ == "__main__":
    main()
