"""The loss of all tasks (section 3.5)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal

import torch
from torch import Tensor
from torch.nn import functional as F

from eff_vision.geometry import erp_area_weights
from eff_vision.panorama.config import AUXILIARY, IGNORE, PanoLossConfig
from eff_vision.panorama.layers import circular_pad
from eff_vision.panorama.model import PanoOutput
from eff_vision.panorama.targets import sobel

# Sobel gradients of a target, over its largest value, from which on it has an edge.
_EDGE = 0.55


def masked_mean(values: Tensor, mask: Tensor, weights: Tensor | None = None) -> Tensor:
    """Mean of [B, H, W] over the pixels of a mask, weighted by [H, W]; 0 without any."""
    weight = mask.to(values.dtype) if weights is None else mask * weights.to(values)
    return torch.where(mask, values, torch.zeros_like(values)).mul(weight).sum() / weight.sum().clamp(min=1e-12)


def segmentation_loss(logits: Tensor, target: Tensor, weights: Tensor | None = None) -> Tensor:
    """Cross-entropy plus soft Dice over the classes.

    Args:
        logits: [B, C, H, W].
        target: Classes [B, H, W]; `IGNORE` does not count.
        weights: Of pixels, [H, W].
    """
    known = target != IGNORE
    safe = torch.where(known, target, 0)
    if bool((safe >= logits.size(1)).any()) or bool((safe < 0).any()):
        raise ValueError(f"classes go up to {int(safe.max())}; the model has {logits.size(1)}")
    entropy = masked_mean(F.cross_entropy(logits, safe, reduction="none"), known, weights)
    weight = known.to(logits.dtype) if weights is None else known * weights.to(logits)
    p = logits.softmax(1) * weight[:, None]
    truth = F.one_hot(safe, logits.size(1)).movedim(-1, 1).to(logits.dtype) * weight[:, None]
    both = (p * truth).sum((0, 2, 3))
    dice = (2 * both + 1e-6) / (p.sum((0, 2, 3)) + truth.sum((0, 2, 3)) + 1e-6)
    present = truth.sum((0, 2, 3)) > 0
    return entropy + masked_mean(1 - dice, present)


def edge_term(prediction: Tensor, target: Tensor, mask: Tensor) -> Tensor:
    """Mean difference of [B, C, H, W] in a mask [B, H, W]: 0.95 of it near the edges of the target, 0.05 elsewhere."""
    strength = sobel(target.mean(1, keepdim=True)).norm(dim=1)
    near = F.max_pool2d(circular_pad((strength >= _EDGE).to(target.dtype)[:, None], 3, 3), 7, 1)[:, 0] > 0
    apart = (prediction - target).abs().mean(1)
    return 0.95 * masked_mean(apart, mask & near) + 0.05 * masked_mean(apart, mask & ~near)


def frequency_term(
    prediction: Tensor, target: Tensor, mask: Tensor, *, radius: int = 64, phase: Literal["angle", "complex"] = "angle"
) -> Tensor:
    """Differences of the spectra outside of a radius: of magnitudes over 5, and of phases; maps [B, C, H, W]."""
    keep = mask[:, None]
    p, t = (torch.fft.fftshift(torch.fft.fft2((x * keep).float()), dim=(-2, -1)) for x in (prediction, target))
    height, width = prediction.shape[-2:]
    rows = torch.arange(height, device=mask.device) - height // 2
    columns = torch.arange(width, device=mask.device) - width // 2
    high = (rows[:, None] ** 2 + columns**2 > radius**2).expand(p.shape[0] * p.shape[1], height, width)
    magnitude = masked_mean((p.abs() - t.abs()).abs().flatten(0, 1), high) / 5
    if phase == "angle":
        apart = (p.angle() - t.angle()).abs()
    else:
        apart = (p / p.abs().clamp(min=1e-12) - t / t.abs().clamp(min=1e-12)).abs()
    return magnitude + masked_mean(apart.flatten(0, 1), high)


class MultiTaskLoss:
    """The loss of `PDBridgeNet`, and its parts.

    Args:
        config: Weights.
    """

    def __init__(self, config: PanoLossConfig | None = None) -> None:
        self.config = PanoLossConfig() if config is None else config

    def __call__(self, output: PanoOutput, targets: Mapping[str, Tensor]) -> tuple[Tensor, dict[str, Tensor]]:
        """The sum, and each part before weighting.

        Args:
            output: Of the model.
            targets: "semseg" [B, H, W] (`IGNORE` unknown), "depth" [B, 1, H, W] (0 unknown), "normals" [B, 3, H, W] (0
                unknown), and any of "grad", "edge_distance" and "point" as `aux_targets` gives them. Tasks without a
                target do not count.

        Raises:
            ValueError: there is a target of an unknown task, or no pixel of any task is known.
        """
        c = self.config
        if unknown := sorted(set(targets) - set(c.tasks) - set(AUXILIARY)):
            raise ValueError(f"targets of {unknown}: wanted some of {(*c.tasks, *AUXILIARY)}")
        known = {task: known_pixels(task, target) for task, target in targets.items() if task in c.tasks}
        if not any(bool(mask.any()) for mask in known.values()):
            raise ValueError(f"no pixel of any task has a label; targets are for {sorted(targets)}")
        parts, total = {}, next(iter(output.main.values())).new_zeros(())
        for task, mask in known.items():
            for name, prediction, weight in (
                (task, output.main[task], 1.0),
                (f"{task}/intermediate", output.intermediate[task], c.intermediate),
            ):
                if weight:
                    parts[name] = self._main(task, prediction, targets[task], mask)
                    total = total + c.tasks[task] * weight * parts[name]
        if c.auxiliary:
            for task in AUXILIARY:
                if task in targets:
                    target = targets[task]
                    mask = known_pixels(task, target)
                    parts[task] = masked_mean(
                        (output.intermediate[task] - target).abs().mean(1), mask, self._weights(target)
                    )
                    total = total + c.auxiliary * parts[task]
        return total, parts

    def _weights(self, target: Tensor) -> Tensor | None:
        return erp_area_weights(*target.shape[-2:]) if self.config.area_weighting else None

    def _main(self, task: str, prediction: Tensor, target: Tensor, mask: Tensor) -> Tensor:
        c, weights = self.config, self._weights(target)
        if task == "semseg":
            return segmentation_loss(prediction, target, weights)
        if task == "normals":
            prediction = F.normalize(prediction, dim=1)
            loss = masked_mean((prediction - target).abs().sum(1), mask, weights)
            return loss + self._extra(prediction, target, mask, c.normals_edge, c.normals_frequency)
        loss = masked_mean((prediction - target).abs().sum(1), mask, weights)
        largest = target.amax().clamp(min=1e-12)
        loss = loss + self._extra(prediction / largest, target / largest, mask, c.depth_edge, c.depth_frequency)
        return loss if c.depth_limit is None else loss.clamp(max=c.depth_limit)

    def _extra(self, prediction: Tensor, target: Tensor, mask: Tensor, edge: float, frequency: float) -> Tensor:
        found = prediction.new_zeros(())
        if edge:
            found = found + edge * edge_term(prediction, target, mask)
        if frequency:
            c = self.config
            found = found + frequency * frequency_term(prediction, target, mask, radius=c.radius, phase=c.phase)
        return found


def known_pixels(task: str, target: Tensor) -> Tensor:
    """Where a target is known, [B, H, W].

    Raises:
        ValueError: a target holds NaN or infinite numbers.
    """
    if target.is_floating_point() and not bool(torch.isfinite(target).all()):
        raise ValueError(f"the target of {task} has numbers that are not finite; unknown pixels are 0")
    if task == "semseg":
        return target != IGNORE
    if task == "depth":
        return target[:, 0] > 0
    if task in ("normals", "point"):
        return target.abs().sum(1) > 0
    return torch.ones_like(target[:, 0], dtype=torch.bool)
