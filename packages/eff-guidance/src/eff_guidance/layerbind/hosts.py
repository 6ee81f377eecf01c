"""What LayerBind must know of the two families of transformers: SD3 and FLUX."""

from __future__ import annotations

import inspect
from typing import Any

import torch
from einops import rearrange
from torch import Tensor, nn

from eff_guidance.layerbind.regions import Grid


class Host:
    """One family.

    Attributes:
        flux: Which of the two it is.
    """

    flux: bool

    @staticmethod
    def of(model: nn.Module) -> Host:
        """The family of a transformer.

        Raises:
            TypeError: it is of neither.
        """
        from diffusers import FluxTransformer2DModel, SD3Transformer2DModel

        if isinstance(model, SD3Transformer2DModel):
            return SD3()
        if isinstance(model, FluxTransformer2DModel):
            return Flux()
        raise TypeError(f"LayerBind knows SD3Transformer2DModel and FluxTransformer2DModel, got {type(model).__name__}")

    @staticmethod
    def blocks(model: Any) -> list[tuple[str, nn.Module]]:
        """All blocks with their names, in the order of their running."""
        kinds = ("transformer_blocks", "single_transformer_blocks")
        return [(f"{kind}.{i}", block) for kind in kinds for i, block in enumerate(getattr(model, kind, ()))]

    def grid(self, model: Any, args: dict[str, Any]) -> Grid:
        """Lines and columns of picture tokens of a call."""
        raise NotImplementedError

    def to_tokens(self, model: Any, latents: Tensor) -> Tensor:
        """The model's latents as one row a token, [B, N, C]."""
        raise NotImplementedError

    def from_tokens(self, model: Any, tokens: Tensor, grid: Grid) -> Tensor:
        """The inverse of `to_tokens`."""
        raise NotImplementedError

    def embed(self, model: Any, latents: Tensor, tokens: Tensor, idx: Tensor, grid: Grid) -> Tensor:
        """What the first block gets of a branch's tokens, with the positions that ``idx`` says, [B, n, D]."""
        raise NotImplementedError

    def modulation(self, model: Any, args: dict[str, Any], pooled: Tensor) -> Tensor:
        """The vector of time and pooled prompt, [B, D]."""
        raise NotImplementedError

    def with_text(self, args: dict[str, Any], text: Tensor, pooled: Tensor) -> dict[str, Any]:
        """The arguments of a call with another prompt."""
        return {**args, "encoder_hidden_states": text, "pooled_projections": pooled}

    def block_arguments(self, model: Any, args: dict[str, Any], text: int, idx: Tensor) -> dict[str, Any]:
        """Further arguments of a block for a branch: its rotary positions."""
        return {}

    def output(self, model: Any, hidden: Tensor, temb: Tensor) -> Tensor:
        """Velocities of tokens, laid out as `to_tokens` does, [B, n, C]."""
        made: Tensor = model.proj_out(model.norm_out(hidden, temb))
        return made


class SD3(Host):
    """SD3 and SD3.5: latents [B, C, H, W], picture tokens before text tokens, positions added at the start."""

    flux = False

    def grid(self, model: Any, args: dict[str, Any]) -> Grid:
        """Lines and columns of picture tokens of a call."""
        high, wide = args["hidden_states"].shape[-2:]
        return Grid(high // model.config.patch_size, wide // model.config.patch_size)

    def to_tokens(self, model: Any, latents: Tensor) -> Tensor:
        """Latents as one row a token."""
        side = model.config.patch_size
        return rearrange(latents, "b c (h p) (w q) -> b (h w) (p q c)", p=side, q=side)

    def from_tokens(self, model: Any, tokens: Tensor, grid: Grid) -> Tensor:
        """The inverse of `to_tokens`."""
        side = model.config.patch_size
        return rearrange(tokens, "b (h w) (p q c) -> b c (h p) (w q)", p=side, q=side, h=grid.high)

    def embed(self, model: Any, latents: Tensor, tokens: Tensor, idx: Tensor, grid: Grid) -> Tensor:
        """What the first block gets of a branch's tokens."""
        canvas = self.to_tokens(model, latents).index_copy(1, idx, tokens.to(latents.dtype))
        made: Tensor = model.pos_embed(self.from_tokens(model, canvas, grid))
        return made.index_select(1, idx)

    def modulation(self, model: Any, args: dict[str, Any], pooled: Tensor) -> Tensor:
        """The vector of time and pooled prompt."""
        made: Tensor = model.time_text_embed(args["timestep"], pooled)
        return made


class Flux(Host):
    """FLUX: packed latents [B, N, C], text tokens before picture tokens, rotary positions."""

    flux = True

    def grid(self, model: Any, args: dict[str, Any]) -> Grid:
        """Lines and columns of picture tokens of a call."""
        ids = _two(args["img_ids"])
        grid = Grid(int(ids[:, 1].max()) + 1, int(ids[:, 2].max()) + 1)
        if grid.high * grid.wide != args["hidden_states"].shape[1]:
            raise ValueError(
                f"{args['hidden_states'].shape[1]} picture tokens do not form a grid of {grid.wide} x {grid.high}; "
                "layers need the plain picture, without reference pictures beside it"
            )
        return grid

    def to_tokens(self, model: Any, latents: Tensor) -> Tensor:
        """Latents as one row a token."""
        return latents

    def from_tokens(self, model: Any, tokens: Tensor, grid: Grid) -> Tensor:
        """The inverse of `to_tokens`."""
        return tokens

    def embed(self, model: Any, latents: Tensor, tokens: Tensor, idx: Tensor, grid: Grid) -> Tensor:
        """What the first block gets of a branch's tokens."""
        made: Tensor = model.x_embedder(tokens.to(latents.dtype))
        return made

    def modulation(self, model: Any, args: dict[str, Any], pooled: Tensor) -> Tensor:
        """The vector of time and pooled prompt."""
        dtype = args["hidden_states"].dtype
        guidance = args.get("guidance")
        more = () if guidance is None else (guidance.to(dtype) * 1000,)
        made: Tensor = model.time_text_embed(args["timestep"].to(dtype) * 1000, *more, pooled)
        return made

    def with_text(self, args: dict[str, Any], text: Tensor, pooled: Tensor) -> dict[str, Any]:
        """The arguments of a call with another prompt."""
        ids = args["txt_ids"].new_zeros(text.shape[1], _two(args["txt_ids"]).shape[-1])
        return {**super().with_text(args, text, pooled), "txt_ids": ids}

    def block_arguments(self, model: Any, args: dict[str, Any], text: int, idx: Tensor) -> dict[str, Any]:
        """Rotary positions of a branch."""
        picture = _two(args["img_ids"]).index_select(0, idx)
        ids = torch.cat([picture.new_zeros(text, picture.shape[-1]), picture])
        return {"image_rotary_emb": model.pos_embed(ids)}


def _two(ids: Tensor) -> Tensor:
    return ids[0] if ids.dim() == 3 else ids


def named_arguments(function: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
    """All arguments of a method's call by name."""
    names = [name for name in inspect.signature(function).parameters if name != "self"]
    return {**dict(zip(names, args, strict=False)), **kwargs}
