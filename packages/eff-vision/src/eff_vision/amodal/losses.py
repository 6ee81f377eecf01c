"""Focal loss on full and visible masks (section 3.5)."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from eff_vision.amodal.config import AmodalLossConfig
from eff_vision.amodal.model import AmodalOutput


def focal_loss(logits: Tensor, target: Tensor, *, gamma: float = 2.0, mask: Tensor | None = None) -> Tensor:
    """Mean over pixels of ``(1 - p)^gamma * -log p``, p being the probability of the truth (Lin and others, 2017).

    Args:
        logits: Any shape.
        target: Truth from 0 to 1, of that shape; between the ends both terms count by their share.
        gamma: 0 gives the binary cross-entropy.
        mask: Pixels that count, bool, broadcast; without any, the loss is 0.

    Raises:
        ValueError: the shapes differ.
    """
    if logits.shape != target.shape:
        raise ValueError(f"logits {list(logits.shape)} and target {list(target.shape)} must have one shape")
    target = target.to(logits.dtype)
    yes, no = F.logsigmoid(logits), F.logsigmoid(-logits)
    loss = -(target * no.exp() ** gamma * yes + (1 - target) * yes.exp() ** gamma * no)
    if mask is None:
        return loss.mean()
    keep = mask.expand_as(loss)
    return torch.where(keep, loss, torch.zeros_like(loss)).sum() / keep.sum().clamp(min=1)


def amodal_loss(
    output: AmodalOutput,
    full: Tensor,
    visible: Tensor,
    valid: Tensor | None = None,
    *,
    labelled: Tensor | None = None,
    config: AmodalLossConfig | None = None,
) -> Tensor:
    """The training loss, a scalar.

    Args:
        output: Of `EoRaS`.
        full: Full masks from 0 to 1, [B, T, 1, m, m].
        visible: Visible masks from 0 to 1, [B, T, 1, m, m].
        valid: Frames that are more than padding, [B, T], bool.
        labelled: Frames whose full mask is known, [B, T], bool; all if None.
        config: Weights.
    """
    config = AmodalLossConfig() if config is None else config
    frames = output.full.shape[:2]
    keep = torch.ones(frames, dtype=torch.bool, device=full.device) if valid is None else valid
    known = keep if labelled is None else keep & labelled
    keep, known = keep[:, :, None, None, None], known[:, :, None, None, None]
    loss = focal_loss(output.full, full, gamma=config.gamma, mask=known)
    if config.visible:
        loss = loss + config.visible * focal_loss(output.visible, visible, gamma=config.gamma, mask=keep)
    if config.occluded:
        hidden = known & (full > 0.5) & (visible <= 0.5)
        loss = loss + config.occluded * focal_loss(output.full, full, gamma=config.gamma, mask=hidden)
    return loss
