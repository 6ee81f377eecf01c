"""Depth, cameras and points of a person's own pictures."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import torch
from eff_vision.multiview import MultiViewOutput
from PIL import Image
from torch import nn

from eff_train.drawing import open_picture
from eff_train.recipes.lite3r.scores import colours


@torch.no_grad()
def predict_folder(model: nn.Module, folder: Path, out: Path, side: int) -> str:
    """Depth in colour, cameras as JSON and points as PLY and GLB of a folder of pictures.

    Raises:
        ValueError: the folder has no picture, or one that cannot be read.
    """
    from eff_vision.geometry import unproject
    from eff_vision.geometry.formats import write_glb, write_ply

    paths = sorted(p for p in folder.iterdir() if p.suffix.lower() in (".png", ".jpg", ".jpeg", ".webp"))
    if not paths:
        raise ValueError(f"{folder} holds no PNG, JPEG or WebP picture")
    device = next(model.parameters()).device
    pictures = [open_picture(p) for p in paths]
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
    shades = images.movedim(1, -1).reshape(-1, 3)
    write_ply(out / "points.ply", points, shades)
    write_glb(out / "points.glb", points, shades)
    return f"{len(paths)} views: depth, cameras.json, points.ply and points.glb"


def _square(size: tuple[int, int]) -> tuple[int, int, int, int]:
    width, height = size
    side = min(size)
    left, top = (width - side) // 2, (height - side) // 2
    return left, top, left + side, top + side
