"""Attention of places to words and of places to places, collected while a model runs, with its graph."""

from __future__ import annotations

from collections.abc import Sequence
from types import TracebackType
from typing import Any, Self

import torch
from eff_kernels.edit import Handle, fits
from eff_kernels.edit.attention import AttentionCall, columns, find_attention, joint_attention, observe_attention, rows
from torch import Tensor, nn

from eff_guidance.denoiser import check_whole


class AttentionStore:
    """Collects maps for as long as it is entered: means over heads and layers, and over calls if there are several.

    Of a UNet those layers count whose picture has the asked size. Of a transformer with joint attention (SD3, FLUX)
    all layers count: the words' columns of the picture's rows, and the picture's part of the picture's rows.

    Under gradient checkpointing the backward pass must happen while it is entered.

    Args:
        model: A UNet or a transformer of diffusers.
        tokens: Columns of the text to collect; None for no cross-attention.
        cross_size: Rows and columns of places of the cross-attention layers to take.
        self_size: The same for self-attention; None for none.
        where: Patterns of the names of attention modules to look at; None for all.
        sample: Which sample of the batch to look at.
        grad: Whether the cross-attention keeps its graph. Self-attention never does.

    Attributes:
        cross: float32 [tokens, h, w], or None if nothing was collected.
        self_attention: float32 [N, N], rows are queries, or None.

    Raises:
        ValueError: nothing is asked for.
    """

    def __init__(
        self,
        model: nn.Module,
        tokens: Sequence[int] | None,
        *,
        cross_size: tuple[int, int],
        self_size: tuple[int, int] | None = None,
        where: Sequence[str] | None = None,
        sample: int = 0,
        grad: bool = True,
    ) -> None:
        if not tokens and self_size is None:
            raise ValueError("neither tokens nor self_size is given; nothing would be collected")
        self.tokens = list(tokens or ())
        self.cross_size, self.self_size = cross_size, self_size
        self._model, self._sample, self._grad = model, sample, grad
        self._where = where
        self._sums: dict[str, tuple[Tensor, int]] = {}
        self._handle: Handle | None = None

    @property
    def cross(self) -> Tensor | None:
        """Attention of places to the asked tokens; see the class."""
        found = self._mean("cross")
        return None if found is None else found.mT.unflatten(1, self.cross_size)

    @property
    def self_attention(self) -> Tensor | None:
        """Attention of places to places; see the class."""
        return self._mean("self")

    def clear(self) -> None:
        """Forget what was collected."""
        self._sums.clear()

    def __enter__(self) -> Self:
        if self._handle is not None:
            raise RuntimeError("this store is entered already")
        names = joint_attention(self._model) or [f.name for f in find_attention(self._model) if f.way]
        if self._where is not None:
            modules = dict(self._model.named_modules())
            names = [n for n in names if fits(self._where, n, modules[n])]
        if not names:
            raise ValueError(f"no attention of {type(self._model).__name__} fits {self._where}")
        self._handle = observe_attention(self._model, self._record, where=names, grad=self._grad, own_thread=True)
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        self.remove()

    def remove(self) -> None:
        """Stop collecting; what was found stays. May be called again."""
        if self._handle is not None:
            self._handle.remove()
            self._handle = None

    def _record(self, call: AttentionCall, output: Any) -> None:
        check_whole(call.module)
        one = slice(self._sample, self._sample + 1)
        mine = call.replace(
            q=call.q[one],
            k=call.k[one],
            v=call.v[one],
            mask=call.mask[one] if isinstance(call.mask, Tensor) and len(call.mask) == len(call.q) else call.mask,
        )
        if call.streams is not None:
            image, text = call.streams["image"], call.streams["text"]
            if self.tokens and _fits(image.stop - image.start, self.cross_size):
                at = [text.start + t for t in self.tokens]
                self._add("cross", columns(mine, at)[0, :, image].mean(0), call.recomputed)
            if self.self_size is not None and _fits(image.stop - image.start, self.self_size):
                with torch.no_grad():
                    self._add("self", rows(mine, image)[0, ..., image].mean(0), call.recomputed)
        elif call.is_cross:
            if self.tokens and _fits(call.num_queries, self.cross_size):
                self._add("cross", columns(mine, self.tokens)[0].mean(0), call.recomputed)
        elif self.self_size is not None and _fits(call.num_queries, self.self_size):
            with torch.no_grad():
                self._add("self", rows(mine, range(call.num_queries))[0].mean(0), call.recomputed)

    def _add(self, kind: str, values: Tensor, recomputed: bool) -> None:
        # Gradient checkpointing runs a layer twice and wants the same tensors both times; the first run counts.
        if recomputed:
            return
        total, count = self._sums.get(kind, (0.0, 0))
        self._sums[kind] = (total + values, count + 1)

    def _mean(self, kind: str) -> Tensor | None:
        total, count = self._sums.get(kind, (None, 0))
        return None if total is None else total / count


def _fits(count: int, size: tuple[int, int]) -> bool:
    return count == size[0] * size[1]


def map_sizes(model: nn.Module, latents: Tensor, cross_share: float, self_share: float) -> list[tuple[int, int]]:
    """Sizes of the cross-attention and self-attention maps for latents [B, C, H, W]: one for joint attention.

    Raises:
        ValueError: sides that a share does not divide evenly.
    """
    height, width = latents.shape[-2:]
    if joint_attention(model):
        # FLUX packs two latents a side into a token, SD3 says how many.
        patch = getattr(model.config, "patch_size", 1)
        patch = 2 if type(model).__name__.startswith("Flux") else patch
        return [(height // patch, width // patch)] * 2
    sizes = []
    for share in (cross_share, self_share):
        size = (height * share, width * share)
        if any(side != int(side) or side < 1 for side in size):
            raise ValueError(f"a share of {share} of latents {height} x {width} does not give whole sides")
        sizes.append((int(size[0]), int(size[1])))
    return sizes
