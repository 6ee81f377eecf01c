"""Crops around a track: boxes from visible masks, intrinsics of a crop, masks pasted back."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from eff_vision.geometry.cameras import check_intrinsics


def visible_box_track(masks: Tensor, *, enlarge: float = 2.0) -> tuple[Tensor, Tensor]:
    """Boxes around an object in each frame, from its visible masks.

    Where nothing is visible the box lies between those of the nearest frames before and after, or is the nearest one.

    Args:
        masks: [T, H, W], bool.
        enlarge: Factor on both sides of a box; it is cut at the picture's border.

    Returns:
        Boxes (x0, y0, x1, y1) in whole pixels, the ends outside, int64 [T, 4]; and where the object is visible, [T].

    Raises:
        ValueError: the object is not visible in any frame.
    """
    if masks.dim() != 3 or masks.dtype != torch.bool:
        raise ValueError(f"masks must be bool [T, H, W], got {masks.dtype} {list(masks.shape)}")
    if not enlarge > 0:
        raise ValueError(f"enlarge must be positive, got {enlarge}")
    visible = masks.flatten(1).any(1)
    if not bool(visible.any()):
        raise ValueError("the object is not visible in any frame")
    sides = [_ends(masks.any(1)), _ends(masks.any(2))]
    tight = torch.stack((sides[0][0], sides[1][0], sides[0][1], sides[1][1]), -1).double()
    seen = visible.nonzero()[:, 0]
    for t in (~visible).nonzero()[:, 0].tolist():
        before, after = seen[seen < t], seen[seen > t]
        first = int(before[-1]) if len(before) else int(after[0])
        last = int(after[0]) if len(after) else first
        share = 0.0 if last == first else (t - first) / (last - first)
        tight[t] = torch.lerp(tight[first], tight[last], share)
    middle, half = (tight[:, :2] + tight[:, 2:]) / 2, (tight[:, 2:] - tight[:, :2]) / 2 * enlarge
    limit = torch.tensor([masks.size(2), masks.size(1)], dtype=torch.float64)
    low = (middle - half).floor().clamp(min=0)
    return torch.cat((low, torch.minimum((middle + half).ceil(), limit)), -1).long(), visible


def _ends(lines: Tensor) -> tuple[Tensor, Tensor]:
    """First and one past the last True of each line [T, N]."""
    count = lines.size(1)
    numbers = lines.int()
    return numbers.argmax(1), count - numbers.flip(1).argmax(1)


def adapt_intrinsics_to_crop(intrinsics: Tensor, boxes: Tensor, size: int | tuple[int, int]) -> Tensor:
    """Intrinsics of a part of a picture after its resizing, in pixels of the result.

    Args:
        intrinsics: Of the whole picture, in pixels, [..., 3, 3].
        boxes: (x0, y0, x1, y1), [..., 4].
        size: Rows and columns of the resized crop.
    """
    check_intrinsics(intrinsics)
    rows, columns = (size, size) if isinstance(size, int) else size
    box = boxes.to(intrinsics.dtype)
    _check_order(boxes)
    scale = torch.stack((columns / (box[..., 2] - box[..., 0]), rows / (box[..., 3] - box[..., 1])), -1)
    found = intrinsics.clone()
    found[..., :2, 2] = (intrinsics[..., :2, 2] - box[..., :2]) * scale
    found[..., :2, :2] = intrinsics[..., :2, :2] * scale[..., None]
    return found


def crop_frames(frames: Tensor, boxes: Tensor, size: int) -> Tensor:
    """Parts of frames, resized bilinearly to ``size`` x ``size``.

    Args:
        frames: [T, C, H, W]; masks come out soft.
        boxes: (x0, y0, x1, y1) inside the frames, int64 [T, 4].
        size: Rows and columns of the result.

    Raises:
        ValueError: a box is empty or not inside its frame.
    """
    _check_boxes(boxes, len(frames), tuple(frames.shape[-2:]))
    values = frames if frames.is_floating_point() else frames.float()
    parts = [f[None, :, y0:y1, x0:x1] for f, (x0, y0, x1, y1) in zip(values, boxes.tolist(), strict=True)]
    return torch.cat([_resized(part, (size, size)) for part in parts])


def paste_masks(masks: Tensor, boxes: Tensor, size: tuple[int, int]) -> Tensor:
    """Masks of crops in the whole frame, 0 outside of the boxes; the inverse of `crop_frames`.

    Args:
        masks: Probabilities, [T, 1, m, m].
        boxes: (x0, y0, x1, y1) inside the frame, int64 [T, 4].
        size: Rows and columns of the frame.

    Returns:
        [T, H, W].
    """
    _check_boxes(boxes, len(masks), size)
    whole = masks.new_zeros(len(masks), *size)
    for frame, mask, (x0, y0, x1, y1) in zip(whole, masks, boxes.tolist(), strict=True):
        frame[y0:y1, x0:x1] = _resized(mask[None], (y1 - y0, x1 - x0))[0, 0]
    return whole


def _resized(part: Tensor, size: tuple[int, int]) -> Tensor:
    if tuple(part.shape[-2:]) == size:
        return part
    return F.interpolate(part, size=size, mode="bilinear", align_corners=False)


def _check_order(boxes: Tensor) -> None:
    if bool((boxes[..., 2:] <= boxes[..., :2]).any()):
        raise ValueError(f"a box must be (x0, y0, x1, y1) with x0 < x1 and y0 < y1, got {boxes.tolist()}")


def _check_boxes(boxes: Tensor, count: int, size: tuple[int, ...]) -> None:
    if tuple(boxes.shape) != (count, 4) or boxes.dtype != torch.int64:
        raise ValueError(f"boxes must be int64 [{count}, 4], got {boxes.dtype} {list(boxes.shape)}")
    _check_order(boxes)
    height, width = size
    if bool((boxes[:, :2] < 0).any()) or bool((boxes[:, 2] > width).any()) or bool((boxes[:, 3] > height).any()):
        raise ValueError(f"boxes must lie in the frame of {height} x {width}, got {boxes.tolist()}")
