"""The trained parts: a table of style tokens, their projection, and keys, values and a gate for each layer."""

from __future__ import annotations

import secrets

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from eff_guidance.pokefusion.config import StyleAttentionConfig


class StyleProjection(nn.Module):
    """Style tokens of a mixture of styles: layer norm of an MLP of the mixed table.

    Args:
        num_styles: K.
        tokens: M, tokens a style.
        style_dim: Width of the table.
        width: Width of the tokens, that of the text where keys and values are made of it.
        text_width: Width of the text of the whole model, for tokens that attend to it; None for tokens that do not.

    Attributes:
        table: [K, M, style_dim].
        token_scale: Norm of each token over sqrt(width), which layer norm gives; 1 unless it is fitted to the text's.
    """

    token_scale: Tensor

    def __init__(self, num_styles: int, tokens: int, style_dim: int, width: int, text_width: int | None = None) -> None:
        super().__init__()
        self.table = nn.Parameter(0.02 * torch.randn(num_styles, tokens, style_dim))
        self.proj = nn.Sequential(nn.Linear(style_dim, width), nn.GELU(), nn.Linear(width, width))
        self.norm = nn.LayerNorm(width)
        self.width = width
        self.register_buffer("token_scale", torch.ones(()))
        self.to_text = None
        if text_width is not None:
            self.to_text = nn.ModuleDict(
                {"q": nn.Linear(style_dim, style_dim), "k": nn.Linear(text_width, style_dim),
                 "v": nn.Linear(text_width, style_dim)}
            )  # fmt: skip

    def forward(self, weights: Tensor, text: Tensor | None = None) -> Tensor:
        """Tokens [B, M, width].

        Args:
            weights: Share of each style, [B or 1, K].
            text: Tokens of the text [B, T, text_width], for a projection that reads it.

        Raises:
            ValueError: this projection reads the text, and none is given.
        """
        latents = torch.einsum("bk,kmd->bmd", weights.to(self.table), self.table)
        if self.to_text is not None:
            if text is None:
                raise ValueError("this adapter's tokens depend on the text (text_modulated); none was given")
            text = text.to(self.table)
            latents = latents.expand(text.shape[0], -1, -1)
            to = self.to_text
            latents = latents + F.scaled_dot_product_attention(to["q"](latents), to["k"](text), to["v"](text))
        normed: Tensor = self.norm(self.proj(latents))
        return normed * self.token_scale


class StyleLayer(nn.Module):
    """Keys and values of style for one attention layer, and its gate.

    Args:
        key: Begin of the key weights, [inner, width].
        value: Begin of the value weights.
        gate: Begin of a in tanh(a).
    """

    def __init__(self, key: Tensor, value: Tensor, gate: float) -> None:
        super().__init__()
        inner, width = key.shape
        self.to_k_style = nn.Linear(width, inner, bias=False, device="meta")
        self.to_v_style = nn.Linear(width, inner, bias=False, device="meta")
        self.to_k_style.weight = nn.Parameter(key.detach().float().clone())
        self.to_v_style.weight = nn.Parameter(value.detach().float().clone())
        self.gate = nn.Parameter(torch.tensor(float(gate), device=key.device))


class StyleAdapter(nn.Module):
    """All trained parts of one adapter. Layers are kept under the names of their attention modules.

    Args:
        config: Its form.
        style: The projection.
        layers: One `StyleLayer` for each name of an attention module.
    """

    def __init__(self, config: StyleAttentionConfig, style: StyleProjection, layers: dict[str, StyleLayer]) -> None:
        super().__init__()
        self.config = config
        self.style = style
        self.layers = nn.ModuleDict({_key(name): layer for name, layer in layers.items()})
        # By which a use in some thread finds it; copies answer to the same uses.
        self.uid = secrets.token_hex(8)

    @property
    def names(self) -> tuple[str, ...]:
        """Names of the attention modules."""
        return tuple(key.replace("/", ".") for key in self.layers)

    def layer(self, name: str) -> StyleLayer:
        """The part for one attention module."""
        found = self.layers[_key(name)]
        assert isinstance(found, StyleLayer)
        return found

    def tensors(self) -> dict[str, Tensor]:
        """All parameters and buffers under the names that files use."""
        return {key.replace("/", "."): value for key, value in self.state_dict().items()}

    def load(self, tensors: dict[str, Tensor]) -> None:
        """Take values of `tensors`.

        Raises:
            ValueError: names or shapes differ.
        """
        mine = {key.replace("/", "."): key for key in self.state_dict()}
        if odd := sorted(mine.keys() ^ tensors.keys()):
            raise ValueError(
                f"the adapter's file and this model's layers differ in {odd[:4]} and {len(odd)} names in all"
            )
        held = self.state_dict()
        for name, value in tensors.items():
            if held[mine[name]].shape != value.shape:
                raise ValueError(
                    f"{name} is {list(value.shape)} in the file, {list(held[mine[name]].shape)} for this model: it was "
                    "trained on a model of other widths"
                )
        self.load_state_dict({mine[name]: value for name, value in tensors.items()})


def _key(name: str) -> str:
    return name.replace(".", "/")  # ModuleDict allows no dots
