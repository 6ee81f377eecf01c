"""LayerBind as blocks of diffusers' modular pipelines. Imports diffusers."""

from __future__ import annotations

import copy
from typing import Any

import torch
from diffusers.guiders import ClassifierFreeGuidance
from diffusers.modular_pipelines.flux.denoise import FluxDenoiseStep
from diffusers.modular_pipelines.flux.encoders import FluxTextEncoderStep
from diffusers.modular_pipelines.modular_pipeline import ModularPipelineBlocks, PipelineState
from diffusers.modular_pipelines.modular_pipeline_utils import InputParam, OutputParam
from diffusers.modular_pipelines.stable_diffusion_3.denoise import StableDiffusion3DenoiseStep
from diffusers.modular_pipelines.stable_diffusion_3.encoders import StableDiffusion3TextEncoderStep
from eff_kernels import Handle

from eff_guidance.layerbind.apply import bind, check_parts, install
from eff_guidance.layerbind.config import LayerBindConfig
from eff_guidance.layerbind.layout import Layout
from eff_guidance.layerbind.prompts import LayoutPrompts, gather_prompts, texts_of
from eff_guidance.layerbind.run import Run, current_run, inner

ORDER = float("inf")  # rules of guiders stand outside of the layout's
_LAYOUT = InputParam("layout", type_hint=Layout, description="What is where; None draws plainly.")
_PROMPTS = InputParam("layout_prompts", type_hint=LayoutPrompts, description="The layout's encoded prompts.")
_CONFIG = InputParam("layout_config", type_hint=LayerBindConfig, description="The settings; None for the paper's.")


def layerbind_blocks(blocks: Any) -> Any:
    """A copy of modular blocks of SD3 or FLUX that draws layouts.

    >>> pipe = layerbind_blocks(StableDiffusion3AutoBlocks()).init_pipeline()
    >>> pipe(prompt="a bee in front of a mouse", layout=layout, layout_config=LayerBindConfig())

    Args:
        blocks: Any tree of blocks with a denoising step in it, such as ``StableDiffusion3AutoBlocks()``.

    Returns:
        The same tree with each denoising step replaced, and a step behind the text encoder that encodes the layout.
        The pipeline takes ``layout``, ``layout_config`` and, instead of text encoders, ``layout_prompts``.

    Raises:
        ValueError: no denoising step of SD3 or FLUX is in it.
    """
    if type(blocks) in _STEPS:
        return _STEPS[type(blocks)]()
    made = copy.deepcopy(blocks)
    if not _replace(made):
        known = ", ".join(step.__name__ for step in _STEPS)
        raise ValueError(f"{type(blocks).__name__} has none of the denoising steps {known}")
    return made


def _replace(blocks: Any) -> int:
    found = 0
    for name, block in list(blocks.sub_blocks.items()):
        if type(block) in _STEPS:
            blocks.sub_blocks[name] = _STEPS[type(block)]()
            found += 1
        elif type(block) in _ENCODERS:
            at = list(blocks.sub_blocks).index(name)
            blocks.sub_blocks.insert("layout_text", _ENCODERS[type(block)](), at + 1)
        elif block.sub_blocks:
            found += _replace(block)
    return found


class _LayoutText:
    """Encodes a layout's prompts as the text encoder's own step encodes a prompt."""

    @property
    def inputs(self) -> list[InputParam]:
        """What the step takes."""
        return [_LAYOUT, *(p for p in super().inputs if p.name == "max_sequence_length")]  # type: ignore[misc]

    @property
    def intermediate_outputs(self) -> list[OutputParam]:
        """What the step gives."""
        return [OutputParam("layout_prompts", type_hint=LayoutPrompts)]

    @torch.no_grad()
    def __call__(self, components: Any, state: PipelineState) -> tuple[Any, PipelineState]:
        """Encode."""
        layout, given = state.get("layout"), state.get("layout_prompts")
        if layout is not None and given is None:
            own = PipelineState()
            own.set("prompt", texts_of(layout))
            own.set("max_sequence_length", state.get("max_sequence_length"))
            _, own = self.encoder()(components, own)  # type: ignore[attr-defined]
            given = gather_prompts(layout, own.get("prompt_embeds"), own.get("pooled_prompt_embeds"))
        state.set("layout_prompts", given)
        return components, state


class LayerBindSD3TextStep(_LayoutText, StableDiffusion3TextEncoderStep):  # type: ignore[misc]
    """Encodes a layout's prompts with the text encoders of SD3."""

    encoder = StableDiffusion3TextEncoderStep


class LayerBindFluxTextStep(_LayoutText, FluxTextEncoderStep):  # type: ignore[misc]
    """Encodes a layout's prompts with the text encoders of FLUX."""

    encoder = FluxTextEncoderStep


class LayerBindAfterStep(ModularPipelineBlocks):  # type: ignore[misc]
    """Takes the layers one step on, after the scheduler has taken the picture there."""

    @property
    def inputs(self) -> list[InputParam]:
        """What the step takes."""
        return [_LAYOUT, _PROMPTS, _CONFIG]

    @property
    def intermediate_outputs(self) -> list[OutputParam]:
        """What the step gives."""
        return [OutputParam("latents", type_hint=torch.Tensor, description="The denoised latents.")]

    def __call__(self, components: Any, block_state: Any, i: int, t: Any) -> tuple[Any, Any]:
        """Take them on."""
        if (run := current_run()) is not None and run.pipe is components:
            block_state.latents = run.finish_step(block_state.latents)
        return components, block_state


class _Denoise:
    """A denoising loop of diffusers with a run of LayerBind around it."""

    def __call__(self, components: Any, state: PipelineState) -> tuple[Any, PipelineState]:
        """Denoise."""
        layout: Layout | None = state.get("layout")
        plain = super().__call__  # type: ignore[misc]
        if layout is None:
            return plain(components, state)
        prompts = state.get("layout_prompts")
        if prompts is None:
            raise ValueError("layout_prompts is missing: add the step that encodes a layout, or give them")
        binding = bind(components, layout, state.get("layout_config"), prompts)
        if not binding.works:
            return plain(components, state)
        check_parts(components, binding)
        _guidance(components)  # refuses before anything is put on
        run = Run(components, binding, lambda: _guidance(components))
        # A guider wraps the transformer outside of the layout's forward each time, and is out before that goes.
        release = getattr(getattr(components, "guider", None), "release", lambda: None)
        release()
        with Handle() as handle:
            install(inner(components.transformer), handle, ORDER)
            try:
                with run.active():
                    return plain(components, state)
            finally:
                release()


class LayerBindSD3DenoiseStep(_Denoise, StableDiffusion3DenoiseStep):  # type: ignore[misc]
    """The denoising loop of SD3 with a layout: ClassifierFreeGuidance and SoftPAGGuidance guide its layers too."""

    block_classes = (*StableDiffusion3DenoiseStep.block_classes, LayerBindAfterStep)
    block_names = (*StableDiffusion3DenoiseStep.block_names, "layers")


class LayerBindFluxDenoiseStep(_Denoise, FluxDenoiseStep):  # type: ignore[misc]
    """The denoising loop of FLUX with a layout."""

    block_classes = (*FluxDenoiseStep.block_classes, LayerBindAfterStep)
    block_names = (*FluxDenoiseStep.block_names, "layers")


_STEPS: dict[type, Any] = {
    StableDiffusion3DenoiseStep: LayerBindSD3DenoiseStep,
    FluxDenoiseStep: LayerBindFluxDenoiseStep,
}
_ENCODERS: dict[type, Any] = {
    StableDiffusion3TextEncoderStep: LayerBindSD3TextStep,
    FluxTextEncoderStep: LayerBindFluxTextStep,
}


def _guidance(components: Any) -> tuple[float, str]:
    """How the guider combines predictions: its passes come one after the other, that with the prompt first.

    Raises:
        TypeError, ValueError: it does so in a way that layers cannot follow.
    """
    guider = getattr(components, "guider", None)
    if guider is None:
        return 1.0, "none"
    if type(guider) is not ClassifierFreeGuidance and not getattr(guider, "tells_extra_passes", False):
        raise TypeError(
            f"layers are guided by ClassifierFreeGuidance or SoftPAGGuidance, the pipeline has {type(guider).__name__}"
        )
    if guider.guidance_rescale:
        raise ValueError(f"guidance_rescale={guider.guidance_rescale} has no meaning for a layer; use 0")
    return guider.guidance_scale + bool(guider.use_original_formulation), "separate"
