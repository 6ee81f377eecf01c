"""SoftPAG in ordinary pipelines of diffusers, which take no guiders."""

from __future__ import annotations

import threading
import weakref
from contextlib import nullcontext
from typing import Any, NamedTuple

import torch
from eff_kernels import Handle
from torch import Tensor, nn

from eff_guidance.denoiser import denoiser_of
from eff_guidance.head_guidance.algebra import in_window
from eff_guidance.head_guidance.config import SoftPAGConfig
from eff_guidance.head_guidance.damage import Damage, install
from eff_guidance.together import ExtraPass, ExtraPasses, Rows, tell_extra, tell_rows

CONTEXT = "head_guidance"  # of diffusers' step caches: the damaged pass must not share what it keeps with the others


class GuidanceHandle(Handle):
    """Undoes `apply_head_guidance`, and turns it while pictures are made, such as from ``callback_on_step_end``.

    Attributes:
        damage: The rule in the denoiser.
        scale: w.
        enabled: Whether it guides; without, the pipeline is bit-identical to the plain one.
    """

    def __init__(self, damage: Damage, inner: Handle, config: SoftPAGConfig) -> None:
        super().__init__(inner.report)
        self.damage, self.scale, self.enabled = damage, config.scale, True
        self.start, self.stop = config.start, config.stop
        self.on_remove(inner.remove)

    def set_strength(self, strength: float | tuple[float, ...]) -> None:
        """Set u of all heads, or of each in the order of the config.

        Raises:
            ValueError: outside of 0..1, or another number of them than heads.
        """
        self.damage.set_strength(strength)

    def set_scale(self, scale: float) -> None:
        """Set w."""
        self.scale = float(scale)

    def enable(self) -> None:
        """Guide again after `disable`."""
        self.enabled = True

    def disable(self) -> None:
        """Do not guide until `enable`."""
        self.enabled = False

    def wants(self, step: int, steps: int) -> bool:
        """Whether a step is guided."""
        some = self.enabled and self.scale != 0 and any(self.damage.strengths)
        return some and in_window(step, steps, self.start, self.stop)


def apply_head_guidance(
    pipe: Any, config: SoftPAGConfig, *, batched: bool = False, order: float | None = None
) -> GuidanceHandle:
    """Guide a pipeline away from damaged heads: ``+ w (cond - damaged)`` on what it does already.

    Works with and without CFG, whatever its scale, with batches, several pictures a prompt, image to image and
    inpainting, and with "true CFG" of FLUX. The pipeline runs one more pass a step of the window, with the prompt.

    Args:
        pipe: A pipeline with ``transformer`` (SD3, SD3.5, FLUX and their relatives) or ``unet`` (SD1.5, SD2, SDXL). To
            compile, set ``pipe.transformer = torch.compile(pipe.transformer)`` or call
            ``pipe.transformer.compile_repeated_blocks()`` before.
        config: Heads, damage, scale and window.
        batched: Run the damaged pass in one batch with the others: faster where small batches leave a GPU idle, more
            memory, and the other predictions may differ by rounding. Steps caches of diffusers need False.
        order: Place among other rules on the same modules, see `eff_kernels.edit.attention.intercept_attention`. With a
            layout of LayerBind, which is put on first, below the layout's order; its layers are guided as the scene is.

    Returns:
        A handle; ``remove()`` gives the pipeline back bit for bit. Copies of the denoiser are not guided.

    Raises:
        TypeError: the pipeline has no such denoiser.
        ValueError: a head does not exist; the pipeline does PAG itself; the denoiser was compiled in place.
    """
    model = denoiser_of(pipe)
    if not hasattr(pipe, "scheduler"):
        raise TypeError(f"{type(pipe).__name__} has no scheduler; pass a pipeline of diffusers")
    if "PAG" in type(pipe).__name__:
        raise ValueError(
            f"{type(pipe).__name__} does perturbed attention guidance itself; use the pipeline without PAG"
        )
    if model._compiled_call_impl is not None:
        raise ValueError(
            "the denoiser was compiled in place; use torch.compile(pipe.transformer) or compile_repeated_blocks()"
        )
    damage, inner = install(model, config, always=False, order=order)
    handle = GuidanceHandle(damage, inner, config)
    forward: Any = GuidedForward(model, Guide(handle, weakref.ref(pipe), batched))
    model.forward = forward
    handle.on_remove(lambda: GuidedForward.restore(model))
    return handle


class Guide(NamedTuple):
    """What a guided forward works with."""

    handle: GuidanceHandle
    pipe: weakref.ref[Any]
    batched: bool


class _Last(threading.local):
    """What this thread added to the prediction with the prompt, for the pass without it that may follow (FLUX)."""

    def __init__(self) -> None:
        self.held: tuple[weakref.ref[Tensor], int, Tensor] | None = None

    def fits(self, timesteps: Tensor, step: int) -> bool:
        """Whether the last pass was in this step of this run."""
        return self.held is not None and self.held[0]() is timesteps and self.held[1] == step

    def keep(self, timesteps: Tensor, step: int, added: Tensor) -> None:
        """Remember what was added."""
        self.held = weakref.ref(timesteps), step, added

    def take(self) -> Tensor:
        """Give what was added, and forget it."""
        held, self.held = self.held, None
        if held is None:
            raise RuntimeError("there is no earlier pass")
        return held[2]


class GuidedForward(ExtraPasses):
    """The forward of a pipeline's denoiser with ``w (cond - damaged)`` added to its predictions.

    Added to the predictions with and without prompt alike it comes through CFG as it is, whatever the scale.
    """

    def __init__(self, module: nn.Module, guide: Guide) -> None:
        super().__init__(module)
        self.guide: Guide | None = guide
        self.last = _Last()

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Run the denoiser."""
        guide, pipe = self.guide, None if self.guide is None else self.guide.pipe()
        if guide is None or pipe is None or kwargs.get("skip_layers") is not None:
            return self.plain(*args, **kwargs)  # skip_layers: a pass of the pipeline's own guidance
        scheduler = pipe.scheduler
        step = _step(scheduler, kwargs["timestep"] if "timestep" in kwargs else args[1])  # UNets get it in that place
        if not guide.handle.wants(step, len(scheduler.timesteps)):
            return self.plain(*args, **kwargs)
        size = len(_first_tensor(args, kwargs))
        if not hasattr(type(pipe), "do_classifier_free_guidance"):
            # CFG's passes come one after the other, that with the prompt first; a new run has new timesteps.
            if self.last.fits(scheduler.timesteps, step):
                out, added = self.plain(*args, **kwargs), self.last.take()
            else:
                out, added = self._guided(guide, args, kwargs, size, 0)
                self.last.keep(scheduler.timesteps, step, added)
            return _with_sample(out, _sample(out) + added)
        # An own loop that has not called the pipeline has no scale of CFG.
        first = size // 2 if getattr(pipe, "do_classifier_free_guidance", False) else 0
        out, added = self._guided(guide, args, kwargs, size, first)
        return _with_sample(out, _sample(out) + (torch.cat([added, added]) if first else added))

    def _guided(self, guide: Guide, args: Any, kwargs: Any, size: int, first: int) -> tuple[Any, Tensor]:
        """The plain output, and ``w (cond - damaged)`` of the samples from ``first`` on, which have the prompt."""
        handle = guide.handle
        if guide.batched:
            more = [_map(value, size, lambda x: torch.cat([x, x[first:]])) for value in (args, kwargs)]
            told = tell_rows(Rows(first)), tell_extra(ExtraPass(handle.scale, joined=True))
            with handle.damage.active(first=size), told[0], told[1]:
                both = self.plain(*more[0], **more[1])
            sample, damaged = _sample(both).split([size, size - first])
            return _with_sample(both, sample), handle.scale * (sample[first:] - damaged)
        out = self.plain(*args, **kwargs)
        part = [_map(value, size, lambda x: x[first:]) for value in (args, kwargs)] if first else [args, kwargs]
        context = self.module.cache_context(CONTEXT) if hasattr(self.module, "cache_context") else nullcontext()  # type: ignore[operator]
        with handle.damage.active(), context, tell_rows(Rows(0)), tell_extra(ExtraPass(handle.scale)):
            damaged = _sample(self.plain(*part[0], **part[1]))
        return out, handle.scale * (_sample(out)[first:] - damaged)

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self.guide, self.last = None, _Last()  # a copy belongs to no pipeline


def _step(scheduler: Any, timestep: Any) -> int:
    """Number of the step that is being made."""
    if hasattr(scheduler, "step_index"):
        index = scheduler.step_index
        return int(index if index is not None else getattr(scheduler, "begin_index", None) or 0)
    now = torch.as_tensor(timestep).flatten()[0].to(scheduler.timesteps)
    return int((scheduler.timesteps - now).abs().argmin())


def _first_tensor(args: Any, kwargs: Any) -> Tensor:
    found: Tensor = args[0] if args else kwargs["hidden_states"] if "hidden_states" in kwargs else kwargs["sample"]
    return found


def _map(value: Any, size: int, change: Any) -> Any:
    """Arguments with each tensor that has one entry a sample changed."""
    if isinstance(value, Tensor):
        return change(value) if value.dim() and value.shape[0] == size else value
    if isinstance(value, dict):
        return {key: _map(item, size, change) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return type(value)(_map(item, size, change) for item in value)
    return value


def _sample(out: Any) -> Tensor:
    found: Tensor = out[0] if isinstance(out, tuple) else out.sample
    return found


def _with_sample(out: Any, sample: Tensor) -> Any:
    return (sample, *out[1:]) if isinstance(out, tuple) else type(out)(sample=sample)
