"""Clips with full masks of an object that others hide for a while: rooms whose objects move, and drawings that do."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import torch
from eff_vision.amodal import visible_box_track
from eff_vision.geometry import intrinsics_from_fov
from torch import Tensor

TRIES = 40
FIELD_OF_VIEW = 1.1  # of cameras that nobody knows, radians


class Track(NamedTuple):
    """One object through a clip.

    Attributes:
        frames: Colours, [T, 3, H, W].
        visible: Where it is seen, bool [T, H, W].
        full: Where it would be seen alone, bool [T, H, W].
        intrinsics: Of the frames, [T, 3, 3].
        boxes: Of the crops, int64 [T, 4].
    """

    frames: Tensor
    visible: Tensor
    full: Tensor
    intrinsics: Tensor
    boxes: Tensor


def fitting(visible: Tensor, full: Tensor) -> list[int]:
    """Objects of masks [T, K, H, W] that are hidden by a fifth in some frame and shown by four fifths in some frame."""
    area = full.flatten(2).sum(-1).float()
    share = visible.flatten(2).sum(-1) / area.clamp(min=1)
    seen = visible.flatten(2).sum(-1).amin(0) >= 12
    return ((share.amin(0) <= 0.8) & (share.amax(0) >= 0.8) & seen).nonzero().flatten().tolist()


def room_track(seed: int, frames: int, side: int) -> Track:
    """An object of a room, seen by a camera that moves.

    Raises:
        ValueError: no object of the rooms of this seed fits.
    """
    from eff_embedded.scenes import SceneConfig, make_path, make_scene, render_views

    times = [float(t) for t in np.linspace(0, 1, frames)]
    config = SceneConfig(num_objects=(3, 5), speed=(0.3, 1.0), spin=(0.0, 60.0), spread=0.5, floating=0.4)
    for attempt in range(TRIES):
        at = seed * TRIES + attempt
        scene = make_scene(config, seed=at)
        views = render_views(scene, make_path(scene, frames, seed=at, size=(side, side)), times)
        if found := fitting(views.visible, views.full):
            if views.intrinsics is None:
                raise ValueError("clips are drawn by perspective cameras")
            return _track(views.colour, views.visible[:, found[0]], views.full[:, found[0]], views.intrinsics)
    raise ValueError(f"seed {seed}: no object of {TRIES} scenes is partly hidden")


def collage_track(seed: int, frames: int, side: int, *, held_out: bool) -> Track:
    """A drawing that others pass in front of; their order in depth stays.

    Args:
        seed: Of the clip.
        frames: Pictures.
        side: Rows and columns.
        held_out: Which half of the drawings the clip shows.

    Raises:
        ValueError: no drawing of the clips of this seed fits.
    """
    from eff_embedded.collages import things
    from eff_embedded.collages.dice import Dice
    from eff_embedded.collages.grounds import paint, sample_ground
    from eff_embedded.collages.sprites import sprite

    names = sorted(things())[int(held_out) :: 2]
    for attempt in range(TRIES):
        dice = Dice(seed * TRIES + attempt, "amodal clip")
        ground = paint(sample_ground(dice, ("plain", "graded")), side)
        picture = torch.from_numpy(ground.copy()).movedim(-1, 0).float().div(255).repeat(frames, 1, 1, 1)
        masks = []
        for _ in range(dice.between(3, 5)):
            drawn = sprite(dice.choice(names), dice.between(side * 3 // 10, side * 6 // 10), mirrored=dice.chance(0.5))
            rgba = torch.from_numpy(drawn.rgba.copy()).movedim(-1, 0).float() / 255
            ends = [[dice.uniform(-0.1, 1.1) * (side - n) for n in rgba.shape[1:]] for _ in range(2)]
            rows, columns = (np.linspace(a, b, frames).round().astype(int) for a, b in zip(*ends, strict=True))
            layer = torch.stack([_placed(rgba, int(y), int(x), side) for y, x in zip(rows, columns, strict=True)])
            picture = layer[:, :3] + picture * (1 - layer[:, 3:])
            masks.append(layer[:, 3] >= 0.5)
        full = torch.stack(masks, 1)
        above = torch.cat((full[:, 1:], torch.zeros_like(full[:, :1])), 1).flip(1).cumsum(1).flip(1) > 0
        visible = full & ~above
        if found := fitting(visible, full):
            intrinsics = intrinsics_from_fov(FIELD_OF_VIEW, side, side).expand(frames, 3, 3)
            return _track(picture, visible[:, found[0]], full[:, found[0]], intrinsics)
    raise ValueError(f"seed {seed}: no drawing of {TRIES} clips is partly hidden")


def mirrored(track: Track) -> Track:
    """The clip as a mirror shows it."""
    width = track.frames.size(-1)
    intrinsics = track.intrinsics.clone()
    intrinsics[:, 0, 2] = width - intrinsics[:, 0, 2]
    x0, y0, x1, y1 = track.boxes.unbind(-1)
    boxes = torch.stack((width - x1, y0, width - x0, y1), -1)
    return Track(track.frames.flip(-1), track.visible.flip(-1), track.full.flip(-1), intrinsics, boxes)


def _track(frames: Tensor, visible: Tensor, full: Tensor, intrinsics: Tensor) -> Track:
    boxes, _ = visible_box_track(visible)
    return Track(frames, visible, full, intrinsics, boxes)


def _placed(rgba: Tensor, top: int, left: int, side: int) -> Tensor:
    """A drawing [4, h, w] on a board [4, side, side]; what is beyond the border is cut off."""
    board = torch.zeros(4, side, side)
    y0, x0 = max(top, 0), max(left, 0)
    y1, x1 = min(top + rgba.size(1), side), min(left + rgba.size(2), side)
    if y0 < y1 and x0 < x1:
        board[:, y0:y1, x0:x1] = rgba[:, y0 - top : y1 - top, x0 - left : x1 - left]
    return board
