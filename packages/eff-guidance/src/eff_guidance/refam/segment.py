"""Masks from points by Segment Anything."""

from __future__ import annotations

from typing import Any, Literal

import torch
from torch import Tensor

Choice = Literal["score", "heatmap"]


def sam_segmenter(model: Any, processor: Any, *, choose: Choice = "score") -> Any:
    """A segmenter for `refer` from SAM or SAM 2 of transformers.

    Args:
        model: SamModel or Sam2Model.
        processor: SamProcessor or Sam2Processor.
        choose: Of the masks of one point the one with the highest "score", or the one that the "heatmap" fits best:
            the largest mean inside minus outside, which prefers whole objects to their parts.

    Raises:
        ValueError: ``choose`` is unknown.
    """
    if choose not in ("score", "heatmap"):
        raise ValueError(f"choose={choose!r}; use 'score' or 'heatmap'")

    @torch.no_grad()
    def segment(image: Any, point: tuple[int, int], heatmap: Tensor) -> Tensor:
        if isinstance(image, Tensor):
            image = (image.permute(1, 2, 0) * 255).round().clamp(0, 255).byte().cpu().numpy()
        at = [[[[float(c) for c in point]]]] if "Sam2" in type(model).__name__ else [[[float(c) for c in point]]]
        given = processor(images=image, input_points=at, return_tensors="pt").to(model.device)
        sizes = ("original_sizes", "reshaped_input_sizes")
        # The processor's points are float64.
        out = model(
            **{k: v.to(model.dtype) if v.is_floating_point() else v for k, v in given.items() if k not in sizes}
        )
        more = [given["reshaped_input_sizes"].cpu()] if "reshaped_input_sizes" in given else []
        masks = processor.image_processor.post_process_masks(
            out.pred_masks.cpu(), given["original_sizes"].cpu(), *more
        )[0][0].bool()
        scores = out.iou_scores[0, 0].cpu() if choose == "score" else best_fit(masks, heatmap)
        return masks[int(scores.argmax())]

    return segment


def best_fit(masks: Tensor, heatmap: Tensor) -> Tensor:
    """Mean of a heat map [H, W] inside minus outside of masks [K, H, W]; -inf for empty and full ones."""
    inside = masks.float()
    area = inside.sum((1, 2))
    outside = (1 - inside).sum((1, 2))
    gap = (inside * heatmap).sum((1, 2)) / area.clamp(min=1) - ((1 - inside) * heatmap).sum((1, 2)) / outside.clamp(
        min=1
    )
    return gap.masked_fill((area == 0) | (outside == 0), -torch.inf)
