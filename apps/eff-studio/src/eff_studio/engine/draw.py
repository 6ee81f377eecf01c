"""Doing one piece of work, with progress, live previews and cancelling."""

from __future__ import annotations

import contextlib
import math
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from PIL import Image

from eff_studio.engine.model import StudioModel
from eff_studio.work import Generate, Insert, Segment, Work

# Pictures up to this many points get a preview at every step.
_PREVIEW_POINTS = 256 * 256


class CancelledError(Exception):
    """The work was cancelled."""


@dataclass(frozen=True, kw_only=True)
class Progress:
    """How far it is.

    Attributes:
        step: Steps done.
        steps: Steps in all.
        seconds_left: Estimate from the steps so far; NaN before the first.
        preview: The picture as it is, or None.
    """

    step: int
    steps: int
    seconds_left: float = math.nan
    preview: Image.Image | None = None


@dataclass(frozen=True, kw_only=True)
class Result:
    """What came out.

    Attributes:
        images: The pictures.
        facts: Further results by name, such as the place that a phrase points to.
    """

    images: list[Image.Image]
    facts: dict[str, Any] = field(default_factory=dict)


Report = Callable[[Progress], None]
Open = Callable[[str], Image.Image]


def run_work(
    model: StudioModel,
    work: Work,
    *,
    open_picture: Open,
    report: Report,
    cancelled: Callable[[], bool],
    previews: Callable[[], bool] = lambda: False,
) -> Result:
    """Do a piece of work.

    Args:
        model: The model.
        work: What to do.
        open_picture: Gives a stored picture by its id.
        report: Told after each step.
        cancelled: Asked after each step; True ends the work.
        previews: Asked after each step whether the picture as it is is wanted; small pictures have one.

    Raises:
        CancelledError: ``cancelled`` said so.
        ValueError: the work does not fit the model; a picture is missing.
    """
    if cancelled():
        raise CancelledError
    if isinstance(work, Generate):
        return _generate(model, work, report, cancelled, previews)
    if isinstance(work, Insert):
        return _insert(model, work, open_picture, report, cancelled)
    return _segment(model, work, open_picture, report)


def _generate(
    model: StudioModel, work: Generate, report: Report, cancelled: Callable[[], bool], previews: Callable[[], bool]
) -> Result:
    width, height = work.width or model.width, work.height or model.height
    if (width, height) != (model.width, model.height) and not model.resizable:
        raise ValueError(f"{model.name} draws {model.width} x {model.height} only, not {width} x {height}")
    if width % model.multiple or height % model.multiple:
        raise ValueError(f"sides must be multiples of {model.multiple} for this model, got {width} x {height}")
    if work.negative and not hasattr(type(model.pipe), "do_classifier_free_guidance"):
        raise ValueError(f"{model.name} is guided without a second pass and takes no negative prompt; leave it empty")
    prompt = work.prompt.strip() or ", ".join(layer.prompt for layer in work.layers)
    images = []
    small = width * height <= _PREVIEW_POINTS
    for i in range(work.count):
        # One picture after another: each is bit for bit the one that its seed gives alone.
        follow = _Follow(
            model, work.steps, report, cancelled, done=i, count=work.count, previews=lambda: small and previews()
        )
        with contextlib.ExitStack() as stack:
            _dress(model, work, stack)
            call: dict[str, Any] = {"negative_prompt": work.negative} if work.negative else {}
            if (width, height) != (model.width, model.height):
                call |= {"width": width, "height": height}
            found = model.pipe(
                prompt,
                num_inference_steps=work.steps,
                guidance_scale=work.guidance,
                generator=torch.Generator().manual_seed(work.seed + i),
                callback_on_step_end=follow,
                **call,
            )
        images.extend(found.images)
    return Result(images=images)


def _dress(model: StudioModel, work: Generate, stack: contextlib.ExitStack) -> None:
    """Put the asked methods around the pipeline until ``stack`` closes.

    Heads are put on after the layout, whose layers they guide as well, and see attention outside of it.
    """
    if work.concepts:
        from eff_guidance.attencraft import ConceptAdapter, apply_concepts

        folder = _folder(model.concepts, work.concepts, "concepts")
        stack.enter_context(apply_concepts(model.pipe, ConceptAdapter.load(folder)))
    if work.style.name and work.style.strength:
        from eff_guidance.pokefusion import StyleAttentionHandle

        folder = _folder(model.styles, work.style.name, "styles")
        style = stack.enter_context(StyleAttentionHandle.from_pretrained(model.pipe, folder, order=0))
        stack.enter_context(style.use(strength=work.style.strength))
    if work.layers:
        from eff_guidance.layerbind import Layer, LayerBindConfig, Layout, apply_layerbind

        layers = tuple(Layer(prompt=layer.prompt, box=layer.box) for layer in work.layers)
        config = LayerBindConfig(eta1=0.25, opacity=work.opacity, hard_blocks=model.hard_blocks)
        stack.enter_context(apply_layerbind(model.pipe, Layout(layers=layers), config, order=2))
    if work.heads.acts:
        from eff_guidance.head_guidance import SoftPAGConfig, apply_head_guidance

        heads = SoftPAGConfig(
            heads=tuple((layer, head) for layer, head, _ in work.heads.weights),
            strength=tuple(strength for _, _, strength in work.heads.weights),
            scale=work.heads.scale,
            start=work.heads.window[0],
            stop=work.heads.window[1],
        )
        stack.enter_context(apply_head_guidance(model.pipe, heads, order=1))


def _folder(root: Any, name: str, what: str) -> Any:
    from eff_studio.engine.model import folders

    if name not in folders(root):
        raise ValueError(f"there is no {name!r} among the studio's {what}: {folders(root)}")
    return root / name


def _insert(
    model: StudioModel, work: Insert, open_picture: Open, report: Report, cancelled: Callable[[], bool]
) -> Result:
    from eff_guidance.context_brush import ContextBrushConfig, incontext_insert

    target, mask = open_picture(work.target).convert("RGB"), open_picture(work.mask).convert("L")
    if mask.size != target.size:
        raise ValueError(
            f"the mask is {mask.size[0]} x {mask.size[1]}, the picture {target.size[0]} x {target.size[1]}"
        )
    follow = _Follow(model, work.steps, report, cancelled, done=0, count=1, previews=lambda: False)
    config = ContextBrushConfig(shift_image=work.strength, shift_text=work.strength)
    images = incontext_insert(
        model.pipe,
        open_picture(work.subject),
        target,
        mask,
        work.prompt,
        config=config,
        canvas={"size": (model.height, model.width)},
        generator=torch.Generator().manual_seed(work.seed),
        num_inference_steps=work.steps,
        guidance_scale=work.guidance,
        callback_on_step_end=follow,
    )
    return Result(images=images)


def _segment(model: StudioModel, work: Segment, open_picture: Open, report: Report) -> Result:
    from eff_guidance.refam import overlay, refer

    picture = open_picture(work.picture).convert("RGB")
    found = refer(model.pipe, picture, work.phrase)
    report(Progress(step=1, steps=1, seconds_left=0.0))
    points = torch.from_numpy(np.array(picture)).movedim(-1, 0).float() / 255
    shown = Image.fromarray(overlay(points, found.heatmap))
    mask = Image.fromarray(found.mask.to(torch.uint8).mul(255).cpu().numpy())
    facts = {"point": list(found.point_xy), "box": None if found.box is None else list(found.box)}
    return Result(images=[shown, mask], facts=facts)


class _Follow:
    """Called by the pipeline after each step."""

    def __init__(
        self,
        model: StudioModel,
        steps: int,
        report: Report,
        cancelled: Callable[[], bool],
        *,
        done: int,
        count: int,
        previews: Callable[[], bool],
    ) -> None:
        self.model, self.steps, self.report, self.cancelled = model, steps, report, cancelled
        self.before, self.total, self.previews = done * steps, count * steps, previews
        self.begun = time.monotonic()

    def __call__(self, pipe: Any, step: int, timestep: Any, tensors: dict[str, Any]) -> dict[str, Any]:
        """Report, and stop if asked to."""
        if self.cancelled():
            raise CancelledError
        done = self.before + step + 1
        left = (time.monotonic() - self.begun) / (step + 1) * (self.total - done)
        preview = None
        if done < self.total and "latents" in tensors and self.previews():
            preview = decode(self.model, tensors["latents"])
        self.report(Progress(step=done, steps=self.total, seconds_left=left, preview=preview))
        return tensors


@torch.no_grad()
def decode(model: StudioModel, latents: torch.Tensor) -> Image.Image | None:
    """The first picture of latents as they are in the loop; None for packed ones."""
    if latents.dim() != 4:
        return None
    vae = model.pipe.vae
    points = vae.decode((latents[:1] / vae.config.scaling_factor + vae.config.shift_factor).to(vae.dtype)).sample
    return model.pipe.image_processor.postprocess(points, output_type="pil")[0]
