"""A frozen vision transformer that tells what features and attention should look like."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from eff_kernels.edit import Handle
from eff_kernels.edit.attention import AttentionCall, AttentionOutput, find_attention, observe_attention
from torch import Tensor, nn

IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


class TeacherTargets(NamedTuple):
    """What a teacher says about pictures, without class and register tokens.

    Attributes:
        features: [B, N, C].
        queries: Of each asked layer, [B, H, N, d].
        keys: Of each asked layer, [B, H, N, d].
        scales: Factors of the logits of each asked layer.
        grid: Rows and columns of the N patches.
    """

    features: Tensor
    queries: tuple[Tensor, ...]
    keys: tuple[Tensor, ...]
    scales: tuple[float, ...]
    grid: tuple[int, int]


class TeacherAdapter:
    """Reads features, queries and keys of a vision transformer of transformers (Dinov2Model and its kin) or timm.

    The model is put into evaluation mode and frozen. Removing the class and register tokens from queries and keys
    before the softmax makes the rows of the attention sum to 1 over the patches.

    Args:
        model: The vision transformer, on the device where it is to run.
        size: Side in points that pictures are scaled to (bicubic); None leaves their size. DINOv2 with SiT at 256: 224.
        feature_layer: Block, from 0, whose output is the features; None: the last one's after the final norm.
        prefix: Tokens before the patches; by default one for the class and those that the config calls registers.
        patch: Side of a patch in points; by default what the model says.
        mean: Of the colours, which are standardised; ImageNet's by default.
        std: Deviation of the colours.

    Raises:
        ValueError: the model does not say its patch size or number of prefix tokens and they are not given, or has no
            such layer.
    """

    def __init__(
        self,
        model: nn.Module,
        *,
        size: int | None = None,
        feature_layer: int | None = None,
        prefix: int | None = None,
        patch: int | None = None,
        mean: Sequence[float] = IMAGENET_MEAN,
        std: Sequence[float] = IMAGENET_STD,
    ) -> None:
        self.model: nn.Module | None = model.eval().requires_grad_(False)
        self.size, self.feature_layer, self.mean, self.std = size, feature_layer, tuple(mean), tuple(std)
        config: Any = getattr(model, "config", None)
        embed: Any = getattr(model, "patch_embed", None)
        self.patch: int = _told("patch", patch, _side(getattr(config or embed, "patch_size", None)))
        own = getattr(model, "num_prefix_tokens", None)  # timm
        if own is None and config is not None:
            own = 1 + getattr(config, "num_register_tokens", 0)
        self.prefix: int = _told("prefix", prefix, own)
        self.layers = tuple(found.name for found in find_attention(model) if found.way)
        """Names of the attention modules of the blocks, in order."""
        if feature_layer is not None and not 0 <= feature_layer < len(self.layers):
            raise ValueError(f"feature_layer={feature_layer}; the teacher has blocks 0 to {len(self.layers) - 1}")

    @property
    def dim(self) -> int:
        """Width of the features."""
        model = self._present()
        config: Any = getattr(model, "config", None)
        return int(config.hidden_size if config is not None else model.embed_dim)  # type: ignore[arg-type]

    @torch.no_grad()
    def __call__(self, pictures: Tensor, layers: Sequence[int] = ()) -> TeacherTargets:
        """Run the teacher.

        Args:
            pictures: Clean pictures, [B, 3, H, W], uint8 or floats from 0 to 1; with the crop and flip of the latents.
            layers: Blocks, from 0, whose queries and keys are wanted.

        Raises:
            ValueError: shapes or layers do not fit.
            RuntimeError: the teacher has been freed.
        """
        model = self._present()
        if wrong := [n for n in layers if not 0 <= n < len(self.layers)]:
            raise ValueError(f"layers {wrong}; the teacher has blocks 0 to {len(self.layers) - 1}")
        pixels = self.pixels(pictures)
        grid = pixels.shape[-2] // self.patch, pixels.shape[-1] // self.patch
        seen: dict[int, tuple[Tensor, Tensor, float]] = {}
        states: list[Tensor] = []

        def record(call: AttentionCall, output: AttentionOutput) -> None:
            group = call.num_heads // call.num_kv_heads
            keys = call.k.repeat_interleave(group, 1) if group > 1 else call.k
            seen[self.layers.index(call.name)] = (call.q[:, :, self.prefix :], keys[:, :, self.prefix :], call.scale)

        handle = Handle()
        try:
            if layers:
                names = [self.layers[n] for n in dict.fromkeys(layers)]
                handle.on_remove(observe_attention(model, record, where=names).remove)
            if self.feature_layer is not None:
                block = model.get_submodule(self.layers[self.feature_layer].rpartition(".")[0])
                handle.hook(block, lambda m, a, k, out: states.append(out[0] if isinstance(out, tuple) else out))
            whole = self._forward(model, pixels)
        finally:
            handle.remove()
        features = (states[0] if states else whole)[:, self.prefix :]
        if features.shape[1] != grid[0] * grid[1]:
            raise ValueError(
                f"{features.shape[1]} tokens beside {self.prefix} of prefix, but pictures have {grid[0]} x {grid[1]} "
                "patches; give prefix= and patch="
            )
        triples = [seen[n] for n in layers]
        return TeacherTargets(
            features, tuple(t[0] for t in triples), tuple(t[1] for t in triples), tuple(t[2] for t in triples), grid
        )

    def pixels(self, pictures: Tensor) -> Tensor:
        """Pictures as the model takes them: 0 to 1, scaled to ``size``, standardised.

        Raises:
            ValueError: shapes do not fit.
        """
        model = self._present()
        if pictures.dim() != 4 or pictures.shape[1] != 3:
            raise ValueError(f"pictures have shape {list(pictures.shape)}; wanted [B, 3, H, W]")
        where = next(model.parameters())
        values = pictures.to(where.device)
        values = values.float() / 255 if values.dtype == torch.uint8 else values.float()
        if self.size is not None and tuple(values.shape[-2:]) != (self.size, self.size):
            values = F.interpolate(values, (self.size, self.size), mode="bicubic", align_corners=False).clamp(0, 1)
        if any(side % self.patch or not side for side in values.shape[-2:]):
            raise ValueError(
                f"pictures of {list(values.shape[-2:])} points are not multiples of {self.patch}; set size="
            )
        mean, std = (values.new_tensor(v)[:, None, None] for v in (self.mean, self.std))
        return ((values - mean) / std).to(where.dtype)

    def free(self) -> None:
        """Let go of the model, so that its memory is free where nobody else holds it."""
        self.model = None

    def _present(self) -> nn.Module:
        if self.model is None:
            raise RuntimeError("the teacher has been freed; its phase is over")
        return self.model

    @staticmethod
    def _forward(model: Any, pixels: Tensor) -> Tensor:
        if hasattr(model, "forward_features"):  # timm
            return model.forward_features(pixels)
        return model(pixels).last_hidden_state


def _side(patch: Any) -> int | None:
    return patch[0] if isinstance(patch, tuple | list) else patch


def _told(name: str, given: int | None, own: int | None) -> int:
    found = own if given is None else given
    if found is None:
        raise ValueError(f"the teacher does not say what its {name} is; give {name}=")
    return int(found)
