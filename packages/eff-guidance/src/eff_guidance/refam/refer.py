"""Point at what an expression names on a picture (RefAM, section 3)."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from eff_guidance.refam.capture import capture_joint_attention
from eff_guidance.refam.config import RefAMConfig
from eff_guidance.refam.encode import (
    EncodedPrompt,
    encode_expression,
    encode_picture,
    kind_of,
    run_transformer,
    size_of,
)
from eff_guidance.refam.heatmap import box_of, grounding_heatmap, peaks, region_at, spatial_bias
from eff_guidance.refam.prompt import TokenRole
from eff_guidance.refam.sinks import find_global_sinks

Segmenter = Callable[[Any, tuple[int, int], Tensor], Tensor]


@dataclass(frozen=True, slots=True)
class ReferOutput:
    """Where an expression's object is.

    Attributes:
        heatmap: float32 [H, W] on the picture's points.
        point_xy: The highest place, x and y in points.
        mask: The object, bool [H, W].
        box: x0, y0, x1, y1 of the mask in points, x1 and y1 outside; None if a segmenter found nothing.
        tokens: Text of each token of the prompt.
        roles: What each token is there for; see `MagnetPrompt`.
        sinks: Which tokens are global sinks, bool [T].
        kept: Which tokens' maps were added, bool [T].
        maps: Attention of patches and tokens, mean over heads, blocks and draws, float32 [N, T].
        grid: Rows and columns of patches.
    """

    heatmap: Tensor
    point_xy: tuple[int, int]
    mask: Tensor
    box: tuple[int, int, int, int] | None
    tokens: tuple[str, ...]
    roles: tuple[TokenRole, ...]
    sinks: Tensor
    kept: Tensor
    maps: Tensor
    grid: tuple[int, int]

    def points(self, count: int) -> list[tuple[int, int]]:
        """The ``count`` highest places, at least a patch apart."""
        patch = max(self.heatmap.shape[0] // self.grid[0], self.heatmap.shape[1] // self.grid[1])
        return peaks(self.heatmap, count, apart=patch)


def keep_tokens(roles: Sequence[TokenRole], tokens: Sequence[str], sinks: Tensor) -> Tensor:
    """Which tokens' maps are added, bool [T]: content words that are no sinks.

    If none is left, all words of the expression that are no punctuation, sinks or not.

    Raises:
        ValueError: there is no such word either.
    """
    sunk = sinks.tolist()
    keep = torch.tensor([role == "content" and not s for role, s in zip(roles, sunk, strict=True)])
    if not bool(keep.any()):
        named = zip(roles, tokens, strict=True)
        keep = torch.tensor([role in ("content", "stop") and any(c.isalnum() for c in t) for role, t in named])
    if not bool(keep.any()):
        raise ValueError("the prompt has no token with the role content or stop")
    return keep


@torch.no_grad()
def refer(
    pipe: Any,
    image: Any,
    expression: str,
    config: RefAMConfig | None = None,
    *,
    segmenter: Segmenter | None = None,
    prompt: EncodedPrompt | None = None,
) -> ReferOutput:
    """Find what an expression names on a picture, by one look of a text-to-image model at it.

    Args:
        pipe: FluxPipeline, StableDiffusion3Pipeline, or another around their transformers.
        image: A PIL picture or a float tensor [3, H, W] from 0 to 1.
        expression: Such as "the dog on the left".
        config: See `RefAMConfig`.
        segmenter: ``segmenter(image, (x, y), heatmap)`` gives a mask, bool [H, W], such as `sam_segmenter`; None takes
            what is high around the point.
        prompt: The expression encoded elsewhere, for pipelines without text encoders.

    Raises:
        ValueError: the expression is empty or too long, the pipeline has no joint attention, or a block is unknown.
    """
    config = config or RefAMConfig()
    kind_of(pipe)
    size = size_of(image)
    prompt = encode_expression(pipe, expression, config) if prompt is None else prompt
    latents, grid = encode_picture(pipe, image, config.size)
    capture = capture_joint_attention(
        pipe.transformer, config.blocks, valid=prompt.valid, normalize=config.normalize, direction=config.direction
    )
    with capture:
        for draw in range(config.draws):
            generator = torch.Generator().manual_seed(config.seed + draw)
            noise = torch.randn(latents.shape, generator=generator).to(latents.device)
            noisy = (1 - config.noise) * latents + config.noise * noise
            run_transformer(pipe, noisy, grid, prompt, config.noise)
    maps, text = (part[0].cpu() for part in capture.mean())
    sinks = find_global_sinks(text, maps, prompt.valid, mass=config.sink_mass, variation=config.sink_variation)
    lost = [t for t, role, s in zip(prompt.tokens, prompt.role, sinks.tolist(), strict=True) if s and role == "content"]
    if lost:
        warnings.warn(f"{lost} of {expression!r} attract all attention; other magnets may help", stacklevel=2)
    kept = keep_tokens(prompt.role, prompt.tokens, sinks)
    heatmap = grounding_heatmap(maps, kept, grid, size, rescale=config.rescale)
    if config.spatial_bias:
        heatmap = heatmap * spatial_bias(expression, size)
    point = peaks(heatmap)[0]
    mask = region_at(heatmap, point) if segmenter is None else segmenter(image, point, heatmap)
    return ReferOutput(heatmap, point, mask, box_of(mask), prompt.tokens, prompt.role, sinks, kept, maps, grid)
