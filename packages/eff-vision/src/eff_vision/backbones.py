"""Features of frozen backbones: patch tokens, or the query, key or value vectors inside a block."""

from __future__ import annotations

from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn

Kind = Literal["tokens", "query", "key", "value"]


class FeatureGrid(NamedTuple):
    """Patch features of pictures.

    Attributes:
        features: [B, S, D], rows of patches one after the other.
        grid: Rows and columns.
    """

    features: Tensor
    grid: tuple[int, int]


class FrozenFeatureExtractor(nn.Module):
    """Patch features of one block of a vision transformer, of transformers (ViT, DINOv2, CLIP vision) or timm.

    Args:
        backbone: The model; it is put into eval mode, never trained, and not copied.
        layer: Block whose output ("tokens") or inside is read; -1 is the last.
        kind: "tokens", or the query, key or value vectors, all heads side by side.

    Raises:
        TypeError: the blocks of the model, or their projections, were not found.
        IndexError: it has no such block.
    """

    def __init__(self, backbone: nn.Module, *, layer: int = -1, kind: Kind = "tokens") -> None:
        super().__init__()
        if kind not in ("tokens", "query", "key", "value"):
            raise ValueError(f"kind must be 'tokens', 'query', 'key' or 'value', got {kind!r}")
        self.backbone = backbone.eval()
        self.kind: Kind = kind
        block = find_blocks(backbone)[layer]
        self._source, self._part = (block, None) if kind == "tokens" else _projection(block, kind)
        self.patch_size = patch_size(backbone)

    def train(self, mode: bool = True) -> FrozenFeatureExtractor:
        """Stay in eval mode whatever is asked: the backbone is frozen."""
        return super().train(False)

    @torch.no_grad()
    def forward(self, pictures: Tensor) -> FeatureGrid:
        """Features of pictures [B, 3, H, W], normalised as the backbone wants them.

        Raises:
            ValueError: the height or width is not a multiple of the patch size.
        """
        grid = patch_grid(pictures, self.patch_size)
        seen: list[Tensor] = []
        hook = self._source.register_forward_hook(
            lambda module, args, out: seen.append(out if isinstance(out, Tensor) else out[0])
        )
        try:
            run_backbone(self.backbone, pictures)
        finally:
            hook.remove()
        tokens = seen[-1]
        if self._part is not None:  # a projection of query, key and value together
            tokens = tokens.chunk(3, -1)[self._part]
        patches = grid[0] * grid[1]
        if tokens.size(1) < patches:
            raise ValueError(f"the block gave {tokens.size(1)} tokens for a grid of {grid[0]} x {grid[1]}")
        return FeatureGrid(tokens[:, tokens.size(1) - patches :], grid)  # class and register tokens come first


def patch_grid(pictures: Tensor, size: int) -> tuple[int, int]:
    """Rows and columns of patches of ``size`` pixels in pictures [B, 3, H, W].

    Raises:
        ValueError: the height or width is not a multiple of the patch size.
    """
    height, width = pictures.shape[-2:]
    if height % size or width % size:
        raise ValueError(f"pictures of {height} x {width} are not a multiple of the patch size {size}")
    return height // size, width // size


def run_backbone(backbone: Any, pictures: Tensor) -> None:
    """Run a vision transformer of timm or transformers, for the hooks inside of it."""
    if hasattr(backbone, "forward_features"):  # timm
        backbone.forward_features(pictures)
    else:
        backbone(pixel_values=pictures)


def find_blocks(model: nn.Module) -> nn.ModuleList | nn.Sequential:
    """The list of blocks of a vision transformer: the longest list of modules of one class."""
    lists = [m for m in model.modules() if isinstance(m, nn.ModuleList | nn.Sequential) and len(m) > 0]
    alike = [
        m
        for m in lists
        if len({type(c) for c in m}) == 1 and any("ttention" in type(x).__name__ for x in m[0].modules())
    ]
    if not alike:
        raise TypeError(f"no list of transformer blocks was found in {type(model).__name__}")
    return max(alike, key=len)


_NAMES = {"query": ("q_proj", "query", "to_q"), "key": ("k_proj", "key", "to_k"), "value": ("v_proj", "value", "to_v")}


def _projection(block: nn.Module, kind: str) -> tuple[nn.Module, int | None]:
    for name, module in block.named_modules():
        leaf = name.rpartition(".")[2]
        if leaf in _NAMES[kind]:
            return module, None
        if leaf == "qkv":
            return module, ("query", "key", "value").index(kind)
    raise TypeError(f"{type(block).__name__} has no projection called {', '.join(_NAMES[kind])} or qkv")


def patch_size(model: nn.Module) -> int:
    """Pixels a side of the patches of a vision transformer.

    Raises:
        TypeError: it does not say.
    """
    config: Any = getattr(model, "config", None)
    config = getattr(config, "vision_config", config)
    size = getattr(config, "patch_size", None)
    if size is None:
        size = getattr(getattr(model, "patch_embed", None), "patch_size", None)
    if isinstance(size, tuple | list):
        size = size[0]
    if not isinstance(size, int):
        raise TypeError(f"the patch size of {type(model).__name__} was not found")
    return size
