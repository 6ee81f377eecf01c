"""Maps from inside a vision transformer, with gradients."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from contextvars import ContextVar
from typing import Any

from torch import Tensor, nn

from eff_vision.backbones import find_blocks, patch_grid, run_backbone
from eff_vision.backbones import patch_size as size_of_patches

# Where the blocks of a running call leave their outputs. Not on the module: calls of other threads must not meet.
_FOUND: ContextVar[dict[int, Tensor] | None] = ContextVar("eff_vision_backbone_taps", default=None)


class BackboneTaps(nn.Module):
    """Patch tokens of several blocks of a transformer of timm or transformers, as maps.

    Class and register tokens come first and are left out, however many there are.

    Args:
        backbone: The model.
        layers: Indices of blocks, four for `PDBridgeNet`.
    """

    def __init__(self, backbone: nn.Module, layers: Sequence[int]) -> None:
        super().__init__()
        blocks = find_blocks(backbone)
        if not layers or not all(-len(blocks) <= i < len(blocks) for i in layers):
            raise ValueError(f"layers must be indices of {len(blocks)} blocks, got {list(layers)}")
        self.backbone, self.count = backbone, len(layers)
        self.patch_size = size_of_patches(backbone)
        for place, index in enumerate(layers):
            blocks[index].register_forward_hook(functools.partial(_keep, place))

    def forward(self, pictures: Tensor) -> list[Tensor]:
        """Maps [B, C, H / patch, W / patch] of pictures [B, 3, H, W], normalised as the backbone wants them.

        Raises:
            ValueError: the height or width is not a multiple of the patch size.
        """
        grid = patch_grid(pictures, self.patch_size)
        found: dict[int, Tensor] = {}
        token = _FOUND.set(found)
        try:
            run_backbone(self.backbone, pictures)
        finally:
            _FOUND.reset(token)
        patches = grid[0] * grid[1]
        return [found[i][:, found[i].size(1) - patches :].mT.unflatten(-1, grid) for i in range(self.count)]


def _keep(place: int, module: nn.Module, args: Any, output: Any) -> None:
    found = _FOUND.get()
    if found is not None:
        found[place] = output if isinstance(output, Tensor) else output[0]
