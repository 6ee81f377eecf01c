"""Pictures with what is needed to change them: edit one layer or the order without starting over."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from eff_guidance.layerbind.apply import apply_layerbind, draw
from eff_guidance.layerbind.config import LayerBindConfig
from eff_guidance.layerbind.hosts import Host
from eff_guidance.layerbind.layout import Layout
from eff_guidance.layerbind.prompts import LayoutPrompts
from eff_guidance.layerbind.run import Binding, Cached, Run, inner


class LayerBindResult(NamedTuple):
    """Pictures and what made them.

    Attributes:
        images: As the pipeline gives them.
        state: To edit them.
    """

    images: Any
    state: LayerBindState


@dataclass(frozen=True, eq=False)
class LayerBindState:
    """What a run left at the end of its branches.

    `edit` and `reorder` give new pictures: an edited layer's branch is rebuilt against the background as it was, the
    others are taken over, and the second phase runs. With reverse adaptation that is an approximation, since the
    background would have seen the new branch.

    Attributes:
        layout: The layout.
        config: The settings.
        background: Latents of the background at each step of phase 1 and after it.
        branches: Latents of the layers at its end, front to back, [B, n, C] each.
        blended: Latents of all layers in one, as the second phase began with.
        alphas: How much each layer covered there, front to back, [B, n] each.
        masks: What of its region belongs to each layer, bool [B, n] each.
    """

    layout: Layout
    config: LayerBindConfig
    background: list[Tensor]
    branches: list[Tensor]
    blended: Tensor | None
    alphas: list[Tensor]
    masks: list[Tensor]
    _run: Run
    _call: dict[str, Any]

    def edit(self, layer: int, **changes: Any) -> LayerBindResult:
        """New pictures with another prompt or negative prompt of one layer (counted from the front).

        Raises:
            ValueError: something else is changed: another place needs new pictures; or the pipeline has no text
                encoder.
        """
        if unknown := set(changes) - {"prompt", "negative"}:
            raise ValueError(f"edit changes prompt and negative, not {sorted(unknown)}; draw again with the new layout")
        layout = self.layout.edit(layer, **changes)
        branches: list[Tensor | None] = [b if i != layer else None for i, b in enumerate(self.branches)]
        return self._again(layout, None, branches)

    def reorder(self, order: list[int]) -> LayerBindResult:
        """New pictures with the layers in another order: their present places from front to back."""
        prompts = self._run.binding.prompts
        layout = self.layout.reorder(order)
        moved = LayoutPrompts(
            prompts.background, [prompts.layers[i] for i in order], [prompts.negatives[i] for i in order]
        )
        return self._again(layout, moved, [self.branches[i] for i in order])

    def _again(self, layout: Layout, prompts: LayoutPrompts | None, branches: list[Tensor | None]) -> LayerBindResult:
        if not self.branches:
            raise ValueError("there were no branches to keep: draw again with the new layout")
        cached = Cached(self.background, branches[::-1])
        return _generate(self._run.pipe, layout, self.config, prompts, self._call, cached)

    @torch.no_grad()
    def preview(self) -> Any:
        """The latents that the second phase began with as pictures: what goes wrong is mostly seen here already."""
        if self.blended is None:
            raise ValueError("there were no branches")
        pipe, latents = self._run.pipe, self.blended
        if Host.of(inner(pipe.transformer)).flux:
            scale = pipe.vae_scale_factor
            height = self._call.get("height") or pipe.default_sample_size * scale
            width = self._call.get("width") or pipe.default_sample_size * scale
            latents = pipe._unpack_latents(latents, height, width, scale)
        latents = latents / pipe.vae.config.scaling_factor + pipe.vae.config.shift_factor
        return pipe.image_processor.postprocess(pipe.vae.decode(latents, return_dict=False)[0], output_type="pil")


def layerbind_generate(
    pipe: Any,
    layout: Layout,
    config: LayerBindConfig | None = None,
    *,
    prompts: LayoutPrompts | None = None,
    **call: Any,
) -> LayerBindResult:
    """Draw a layout once, and keep what later changes need.

    Args:
        pipe: As for `apply_layerbind`.
        layout: What is where.
        config: The settings.
        prompts: The layout's encoded prompts, for pipelines without text encoders.
        call: Arguments of the pipeline's call; without a prompt the layout's `caption` is taken.

    Returns:
        Pictures and state.

    Raises:
        TypeError, ValueError: as `apply_layerbind`.
    """
    return _generate(pipe, layout, config, prompts, call, None)


def _generate(
    pipe: Any, layout: Layout, config: LayerBindConfig | None, prompts: LayoutPrompts | None, call: dict[str, Any],
    cached: Cached | None,
) -> LayerBindResult:  # fmt: skip
    if call.get("prompt") is None and call.get("prompt_embeds") is None:
        call = {**call, "prompt": layout.caption}
    base = type(pipe)
    with apply_layerbind(pipe, layout, config, prompts=prompts):
        binding: Binding | None = pipe.__dict__.get("_eff_layerbind")
        if binding is None:
            raise ValueError("the layout has no layers, or eta2 is 0: call the pipeline itself")
        output, run = draw(pipe, base, binding, (), call, cached)
    images = output[0] if isinstance(output, tuple) else output.images
    blended = run.blended
    model = inner(pipe.transformer)
    assert run.grid is not None
    return LayerBindResult(images, LayerBindState(
        layout=layout, config=binding.config, background=run.trajectory,
        branches=run.branches[::-1] if blended is not None else [],
        blended=None if blended is None else Host.of(model).from_tokens(model, blended.latents, run.grid),
        alphas=[] if blended is None else blended.alphas[::-1], masks=run.masks[::-1], _run=run, _call=call,
    ))  # fmt: skip
