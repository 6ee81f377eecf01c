"""Encoders that give a map of cells, from any backbone, and the way back to a plain backbone."""

from __future__ import annotations

from pathlib import Path

from torch import Tensor, nn

from eff_vision.backbones import find_blocks
from eff_vision.pixpro.fpn import FeaturePyramid


class CnnCells(nn.Module):
    """A convolutional backbone as it is: pictures to a map [B, C, H, W].

    Args:
        backbone: Gives a map, or a list of maps (timm's ``features_only``), of which the last counts.
        channels: C.
    """

    def __init__(self, backbone: nn.Module, channels: int) -> None:
        super().__init__()
        self.backbone, self.channels = backbone, channels

    def forward(self, pictures: Tensor) -> Tensor:
        """The map of cells.

        Raises:
            ValueError: the backbone gives no map of ``channels`` channels.
        """
        out = self.backbone(pictures)
        cells = out[-1] if isinstance(out, list | tuple) else out
        if not isinstance(cells, Tensor) or cells.ndim != 4 or cells.size(1) != self.channels:
            seen = list(cells.shape) if isinstance(cells, Tensor) else type(cells).__name__
            raise ValueError(f"the backbone must give [B, {self.channels}, H, W], got {seen}")
        return cells


class VitCells(nn.Module):
    """A vision transformer of transformers or timm whose patches are the cells; class and register tokens are left out.

    Args:
        backbone: The model.
        channels: Features of a token.
        patch_size: Pixels of a patch.
    """

    def __init__(self, backbone: nn.Module, channels: int, patch_size: int) -> None:
        super().__init__()
        self.backbone, self.channels, self.patch_size = backbone, channels, patch_size
        find_blocks(backbone)  # a clear error now, if this is no transformer

    def forward(self, pictures: Tensor) -> Tensor:
        """The map of patches."""
        height, width = (s // self.patch_size for s in pictures.shape[-2:])
        timm = getattr(self.backbone, "forward_features", None)
        tokens = self.backbone(pixel_values=pictures).last_hidden_state if timm is None else timm(pictures)
        if tokens.size(1) < height * width:
            raise ValueError(f"{tokens.size(1)} tokens do not fill a grid of {height} x {width} patches")
        return tokens[:, tokens.size(1) - height * width :].mT.unflatten(-1, (height, width))


class PyramidCells(nn.Module):
    """A backbone with its feature pyramid: pictures to levels of cells, finest first (section 3.4).

    Args:
        backbone: Gives a list of maps, finest first.
        pyramid: On top of these maps; kept for the detector together with the backbone.
    """

    def __init__(self, backbone: nn.Module, pyramid: FeaturePyramid) -> None:
        super().__init__()
        self.backbone, self.pyramid, self.channels = backbone, pyramid, pyramid.dim

    def forward(self, pictures: Tensor) -> list[Tensor]:
        """Levels [B, channels, h, w]."""
        return self.pyramid(self.backbone(pictures))


def export_backbone(encoder: CnnCells | VitCells | PyramidCells, path: str | Path) -> None:
    """Write the backbone's own state_dict, under its own names, to a safetensors file.

    A timm, torchvision or transformers model of the same class loads it with ``load_state_dict``.
    """
    from safetensors.torch import save_file

    state = {k: v.detach().cpu().contiguous().clone() for k, v in encoder.backbone.state_dict().items()}
    save_file(state, path, {"format": "pt"})
