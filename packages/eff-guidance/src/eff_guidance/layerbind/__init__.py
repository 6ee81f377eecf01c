"""LayerBind (arXiv 2603.05769): boxes with prompts, ordered front to back, drawn by SD3 and FLUX without training.

Each layer is begun in a branch of its own that sees its words and the background, the branches are pasted back to
front, and for some steps more each region listens to its own words.

>>> layout = Layout(layers=(Layer(prompt="a bee", box=(0.2, 0.4, 0.6, 0.8)), Layer(prompt="a mouse", box=(0, 0, 1, 1))))
>>> with apply_layerbind(pipe, layout):
...     pipe("a bee in front of a mouse")
"""

from typing import TYPE_CHECKING, Any

from eff_guidance.layerbind.alpha import Foreground, estimate_foreground_alpha, otsu_threshold, screened_poisson
from eff_guidance.layerbind.apply import apply_layerbind
from eff_guidance.layerbind.blend import Blended, blend_branches
from eff_guidance.layerbind.config import LayerBindConfig
from eff_guidance.layerbind.generate import LayerBindResult, LayerBindState, layerbind_generate
from eff_guidance.layerbind.layout import Layer, Layout
from eff_guidance.layerbind.ops import composite_layers, contextual_attention
from eff_guidance.layerbind.prompts import LayoutPrompts, Prompt, encode_layout
from eff_guidance.layerbind.regions import (
    Grid,
    Region,
    boxes_to_token_indices,
    mask_to_token_indices,
    region_of,
    regions_of,
)

if TYPE_CHECKING:
    from eff_guidance.layerbind.modular import layerbind_blocks

__all__ = [
    "Blended",
    "Foreground",
    "Grid",
    "Layer",
    "LayerBindConfig",
    "LayerBindResult",
    "LayerBindState",
    "Layout",
    "LayoutPrompts",
    "Prompt",
    "Region",
    "apply_layerbind",
    "blend_branches",
    "boxes_to_token_indices",
    "composite_layers",
    "contextual_attention",
    "encode_layout",
    "estimate_foreground_alpha",
    "layerbind_blocks",
    "layerbind_generate",
    "mask_to_token_indices",
    "otsu_threshold",
    "region_of",
    "regions_of",
    "screened_poisson",
]


def __getattr__(name: str) -> Any:
    """`layerbind_blocks` imports diffusers, and only when it is asked for."""
    if name == "layerbind_blocks":
        from eff_guidance.layerbind.modular import layerbind_blocks

        return layerbind_blocks
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
