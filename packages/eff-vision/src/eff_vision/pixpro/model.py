"""Both branches together."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from eff_vision.pixpro.cells import positive_mask
from eff_vision.pixpro.config import PixProConfig
from eff_vision.pixpro.encoder import CnnCells, PyramidCells, VitCells
from eff_vision.pixpro.losses import pixcontrast_loss, pixpro_loss
from eff_vision.pixpro.momentum import MomentumCopy
from eff_vision.pixpro.propagation import PixelPropagation


class PixProOutput(NamedTuple):
    """The loss of a step and what to watch.

    Attributes:
        loss: To be minimised.
        pixel: Its pixel-level part.
        instance: Its image-level part, 0 without one.
        empty_pairs: Share of pictures whose two crops have no cell in common.
        spread: Mean standard deviation of the unit features over cells; ``dim ** -0.5`` is healthy, 0 a collapse.
    """

    loss: Tensor
    pixel: Tensor
    instance: Tensor
    empty_pairs: Tensor
    spread: Tensor


class PixPro(nn.Module):
    """Pre-training of an encoder on pairs of crops.

    For each step: ``update_momentum()``, then ``forward`` on the two views and ``loss.backward()``. Convert batch norm
    with ``torch.nn.SyncBatchNorm.convert_sync_batchnorm`` for several processes.

    Args:
        encoder: Pictures to cells, or to levels of cells: the loss is then the mean over levels, whose cells have
            sizes of their own; one projector serves them all, and the coarsest has the image-level branch.
        config: Settings.
        total_steps: Steps of the training, for the momentum.
    """

    def __init__(self, encoder: CnnCells | VitCells | PyramidCells, config: PixProConfig, total_steps: int) -> None:
        super().__init__()
        c = config
        self.config = c
        self.online = nn.Sequential(encoder, _projector(encoder.channels, c.hidden, c.dim))
        self.target = MomentumCopy(self.online, total_steps, c.momentum)
        self.propagation = PixelPropagation(c.dim, gamma=c.gamma, layers=c.transform_layers)
        self.instance: nn.Sequential | None = None
        if c.instance_weight:
            self.instance = _projector(encoder.channels, c.hidden, c.dim)
            self.instance_target = MomentumCopy(self.instance, total_steps, c.momentum)
            self.predictor = _projector(c.dim, c.hidden, c.dim)

    @property
    def encoder(self) -> CnnCells | VitCells | PyramidCells:
        """The encoder that is trained: what to keep."""
        encoder = self.online[0]
        assert isinstance(encoder, CnnCells | VitCells | PyramidCells)
        return encoder

    def update_momentum(self) -> float:
        """Move the momentum branch; to be called once for each step of the optimiser, before `forward`."""
        if self.instance is not None:
            self.instance_target.step(self.instance)
        return self.target.step(self.online)

    def forward(self, view_a: Tensor, view_b: Tensor, crops_a: Tensor, crops_b: Tensor) -> PixProOutput:
        """Loss of two views [B, 3, H, W] whose edges in their picture are ``crops`` [B, 4], see `cells`."""
        c = self.config
        crops = (crops_a, crops_b)
        maps = [_levels(self.online[0](v)) for v in (view_a, view_b)]
        with torch.no_grad():
            keys = [_levels(self.target.copy.get_submodule("0")(v)) for v in (view_a, view_b)]
        projector, slow = self.online[1], self.target.copy.get_submodule("1")
        cells = [[projector(m) for m in levels] for levels in maps]
        with torch.no_grad():
            slow_cells = [[slow(m) for m in levels] for levels in keys]
        parts = [
            self._pixel_loss(x, y, crops)
            for x, y in zip(zip(*cells, strict=True), zip(*slow_cells, strict=True), strict=True)
        ]
        pixel = torch.stack([loss for loss, _ in parts]).mean()
        instance = pixel.new_zeros(())
        if self.instance is not None:
            instance = self._instance_loss([levels[-1] for levels in maps], [levels[-1] for levels in keys])
        unit = F.normalize(cells[0][-1].detach().float().flatten(2).mT, dim=-1).flatten(0, 1)
        empty = torch.stack([share for _, share in parts]).mean()
        return PixProOutput(pixel + c.instance_weight * instance, pixel, instance, empty, unit.std(0).mean())

    def _pixel_loss(
        self, cells: Sequence[Tensor], keys: Sequence[Tensor], crops: tuple[Tensor, Tensor]
    ) -> tuple[Tensor, Tensor]:
        """Loss of one level in both directions, and the share of pictures whose crops have no cell in common."""
        c = self.config
        grid = (cells[0].size(2), cells[0].size(3)), (cells[1].size(2), cells[1].size(3))
        mask = positive_mask(*crops, *grid, threshold=c.threshold)
        empty = (~mask.flatten(1).any(1)).float().mean()
        targets = [x.flatten(2).mT for x in keys]
        if c.loss == "pixpro":
            moved = [self.propagation(x).flatten(2).mT for x in cells]
            return pixpro_loss(moved[0], targets[1], mask) + pixpro_loss(moved[1], targets[0], mask.mT), empty
        flat = [x.flatten(2).mT for x in cells]
        both = (
            pixcontrast_loss(flat[0], targets[1], mask, tau=c.tau),
            pixcontrast_loss(flat[1], targets[0], mask.mT, tau=c.tau),
        )
        return (both[0] + both[1]) / 2, empty

    def _instance_loss(self, maps: list[Tensor], keys: list[Tensor]) -> Tensor:
        assert self.instance is not None
        online = [self.predictor(self.instance(m)).mean((2, 3)) for m in maps]
        target = [self.instance_target(k).mean((2, 3)) for k in keys]
        ways = [F.cosine_similarity(online[i], target[1 - i], dim=1).mean() for i in (0, 1)]
        return -2 * (ways[0] + ways[1])


def _levels(maps: Tensor | list[Tensor]) -> list[Tensor]:
    return [maps] if isinstance(maps, Tensor) else maps


def _projector(inside: int, hidden: int, out: int) -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(inside, hidden, 1, bias=False), nn.BatchNorm2d(hidden), nn.ReLU(), nn.Conv2d(hidden, out, 1)
    )
