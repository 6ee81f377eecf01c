"""A feature pyramid from the last layer alone (section 4.3)."""

from __future__ import annotations

from torch import Tensor, nn


class LastLayerFPN(nn.Module):
    """Four levels at 1/4, 1/8, 1/16 and 1/32 of the picture for a patch size of 16 from one map of patches.

    Args:
        dim: Features of a patch.
        norm: Norm between the two steps of the finest level; `torch.nn.SyncBatchNorm` in the paper.
    """

    def __init__(self, dim: int, *, norm: type[nn.Module] = nn.BatchNorm2d) -> None:
        super().__init__()
        self.levels = nn.ModuleList((
            nn.Sequential(
                nn.ConvTranspose2d(dim, dim, 2, 2), norm(dim), nn.GELU(), nn.ConvTranspose2d(dim, dim, 2, 2)
            ),
            nn.ConvTranspose2d(dim, dim, 2, 2),
            nn.Identity(),
            nn.MaxPool2d(2, ceil_mode=True),
        ))  # fmt: skip

    def forward(self, maps: Tensor | list[Tensor]) -> list[Tensor]:
        """Levels, finest first, of one map [B, dim, h, w] or of four (the ordinary pyramid of several layers).

        Raises:
            ValueError: a list of another length than four.
        """
        each = [maps] * 4 if isinstance(maps, Tensor) else maps
        if len(each) != 4:
            raise ValueError(f"wanted one map or four, got {len(each)}")
        return [level(x) for level, x in zip(self.levels, each, strict=True)]
