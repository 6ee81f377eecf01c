"""Masks of one object through a whole clip of any length."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from eff_vision.amodal.crops import adapt_intrinsics_to_crop, crop_frames, paste_masks, visible_box_track
from eff_vision.amodal.model import EoRaS


class AmodalTrack(NamedTuple):
    """What `predict_track` gives.

    Attributes:
        full: Probabilities of the full mask, [T, H, W].
        visible: Of the visible mask, [T, H, W].
        boxes: Of the crops, [T, 4].
    """

    full: Tensor
    visible: Tensor
    boxes: Tensor


@torch.no_grad()
def predict_track(
    model: EoRaS,
    frames: Tensor,
    visible: Tensor,
    intrinsics: Tensor | None = None,
    *,
    tilt: Tensor | None = None,
    enlarge: float = 2.0,
    chunk: int = 24,
    lookahead: int = 8,
) -> AmodalTrack:
    """Full masks of an object from its visible ones.

    A clip longer than ``chunk`` frames is read in parts: slots are carried over forwards, and each part is read
    backwards from ``lookahead`` frames behind its end.

    Args:
        model: In evaluation mode.
        frames: Colours from 0 to 1, [T, 3, H, W].
        visible: Visible masks, bool [T, H, W]; frames without any are filled in.
        intrinsics: Of the frames, in pixels, [T, 3, 3] or [3, 3]; needed with a bird's-eye view.
        tilt: How far the cameras look down, radians, [T] or a scalar.
        enlarge: Size of a crop over that of the visible box.
        chunk: Frames at a time.
        lookahead: Frames beyond them for the backward reading.

    Raises:
        ValueError: shapes differ, ``chunk`` or ``lookahead`` is out of range; and as `EoRaS`.
    """
    count = len(frames)
    if frames.dim() != 4 or visible.shape != (count, *frames.shape[-2:]):
        raise ValueError(
            f"frames {list(frames.shape)} and visible {list(visible.shape)}: wanted [T, 3, H, W], [T, H, W]"
        )
    if chunk < 1 or lookahead < 0:
        raise ValueError(f"chunk must be 1 or more and lookahead 0 or more, got {chunk} and {lookahead}")
    boxes, _ = visible_box_track(visible.cpu(), enlarge=enlarge)
    crops = crop_frames(frames, boxes, model.config.crop)[None]
    k = None
    if intrinsics is not None:
        k = adapt_intrinsics_to_crop(intrinsics.expand(count, 3, 3), boxes.to(intrinsics.device), model.config.crop)[
            None
        ]
    turned = None if tilt is None else tilt.expand(count)[None]
    slots: Tensor | None = None
    parts: list[tuple[Tensor, Tensor]] = []
    for start in range(0, count, chunk):
        end = min(start + chunk, count)
        to = min(end + lookahead, count) if model.config.bidirectional else end
        part = slice(start, to)
        out = model(
            crops[:, part],
            None if k is None else k[:, part],
            tilt=None if turned is None else turned[:, part],
            slots=slots,
        )
        slots = out.slots[:, end - start - 1]
        parts.append((out.full[0, : end - start], out.visible[0, : end - start]))
    full, seen = (torch.cat(p).sigmoid() for p in zip(*parts, strict=True))
    size = (frames.size(2), frames.size(3))
    return AmodalTrack(paste_masks(full, boxes, size), paste_masks(seen, boxes, size), boxes)
