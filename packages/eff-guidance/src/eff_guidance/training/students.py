"""The blocks of a diffusion transformer and the picture tokens that they put out."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from eff_kernels.edit import Where, select
from torch import Tensor, nn

_KINDS = (nn.ModuleList, nn.Sequential)
_LISTS = ("transformer_blocks", "single_transformer_blocks", "blocks", "layers")
# Blocks of two streams return (text, picture), those of FLUX's second half too.
_TEXT_FIRST = ("JointTransformerBlock", "FluxTransformerBlock", "FluxSingleTransformerBlock")


def unwrapped(model: nn.Module) -> nn.Module:
    """The model inside DistributedDataParallel and torch.compile's wrapper."""
    while True:
        if isinstance(model, nn.parallel.DistributedDataParallel):
            model = model.module
        elif isinstance(inner := getattr(model, "_orig_mod", None), nn.Module):
            model = inner
        else:
            return model


def find_blocks(model: nn.Module, where: Where | None = None) -> list[tuple[str, nn.Module]]:
    """Names and modules of a transformer's blocks, in the order in which they run.

    Without ``where`` these are the items of the lists ``transformer_blocks`` and ``single_transformer_blocks``
    (diffusers: DiT, SD3, FLUX), ``blocks`` (the code of DiT and SiT, timm) or ``layers``.

    Raises:
        ValueError: there are none.
    """
    if where is not None:
        found: list[tuple[str, nn.Module]] = list(select(model, where))
    else:
        lists = [(name, getattr(model, name, None)) for name in _LISTS]
        found = [(f"{n}.{i}", b) for n, blocks in lists if isinstance(blocks, _KINDS) for i, b in enumerate(blocks)]
    if not found:
        none = f"it has no list named {', '.join(_LISTS)}"
        wanted = none if where is None else f"where={where!r} selects no module"
        raise ValueError(f"no transformer blocks in {type(model).__name__}: {wanted}; name them by patterns in blocks=")
    return found


def block_at(blocks: list[tuple[str, nn.Module]], index: int, name: str) -> tuple[str, nn.Module]:
    """A block by its number from 0.

    Raises:
        ValueError: there is none; ``name`` says which setting asked for it.
    """
    if not 0 <= index < len(blocks):
        raise ValueError(f"{name}={index}; the student has blocks 0 to {len(blocks) - 1}")
    return blocks[index]


def picture_tokens(block: nn.Module, output: Any) -> Tensor:
    """The picture's hidden states [B, N, D] in what a block returned.

    Raises:
        TypeError: the block returns something else than a tensor, and is none whose order of streams is known.
    """
    if isinstance(output, Tensor):
        return output
    if isinstance(output, tuple):
        if type(block).__name__.startswith(_TEXT_FIRST) and len(output) > 1:
            return output[1]
        if len(output) == 1:
            return output[0]
    raise TypeError(
        f"{type(block).__name__} returns a {type(output).__name__}; known are tensors and the blocks of SD3 and FLUX"
    )


def block_width(model: nn.Module, block: nn.Module) -> int:
    """Width D of the hidden states that a block puts out."""
    for holder in (model, getattr(model, "config", None)):
        for name in ("inner_dim", "hidden_size", "embed_dim"):
            if isinstance(value := getattr(holder, name, None), int):
                return value
    return max(_norm_widths(block), default=0) or next(block.parameters()).shape[-1]


def _norm_widths(block: nn.Module) -> Iterator[int]:
    for module in block.modules():
        if isinstance(module, nn.LayerNorm):
            yield int(module.normalized_shape[-1])
