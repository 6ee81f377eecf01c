"""What a denoiser is called with, known to the rules inside of it: the step of a sampler and the text.

A watched model notes its call in a context variable for as long as it runs, so that threads do not meet.
"""

from __future__ import annotations

import contextvars
import functools
import inspect
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from eff_kernels import Handle
from eff_kernels.edit.attention.forward import Forward
from torch import Tensor, nn


@dataclass(frozen=True)
class DenoiserCall:
    """One call of a denoiser.

    Attributes:
        step: Index of the sampler's step, or None if no scheduler is known.
        num_steps: How many steps the sampler takes, or None.
        text: ``encoder_hidden_states`` [B, T, d], as the denoiser got it.
    """

    step: int | None
    num_steps: int | None
    text: Tensor | None

    def inside(self, start: float, stop: float) -> bool:
        """Whether ``int(start * num_steps) <= step < int(stop * num_steps)``.

        Raises:
            RuntimeError: the step is not known.
        """
        if self.step is None or self.num_steps is None:
            raise RuntimeError(
                "the step is not known: a window of steps needs the pipeline, whose scheduler counts them, and a copy "
                "of a model has none; give the pipeline to the method, or use start=0 and stop=1"
            )
        return int(start * self.num_steps) <= self.step < int(stop * self.num_steps)


_calls: contextvars.ContextVar[tuple[DenoiserCall, ...]] = contextvars.ContextVar("eff_denoiser_calls", default=())


def current_call() -> DenoiserCall | None:
    """The innermost call of a watched denoiser that runs in this context."""
    return _calls.get()[-1] if _calls.get() else None


def denoiser_of(pipe_or_model: Any) -> nn.Module:
    """The transformer or UNet of a pipeline; a module is taken for the denoiser itself.

    Raises:
        TypeError: it is neither a module nor a pipeline with a transformer or UNet.
    """
    if isinstance(pipe_or_model, nn.Module):
        return pipe_or_model
    for name in ("transformer", "unet"):
        if isinstance(found := getattr(pipe_or_model, name, None), nn.Module):
            return found
    raise TypeError(f"wanted a transformer, a UNet, or a pipeline with one; got {type(pipe_or_model).__name__}")


def check_whole(module: Any) -> None:
    """Refuse attention that is split between processes, whose tokens or heads are not all here.

    Raises:
        RuntimeError: diffusers' context parallelism is on.
    """
    if getattr(getattr(module, "processor", None), "_parallel_config", None) is not None:
        raise RuntimeError(
            "the denoiser runs in context parallel (enable_parallelism), so that attention sees a part of its heads "
            "or tokens; use methods that act inside of attention on one device, or with group offload"
        )


def watch_denoiser(model: nn.Module, handle: Handle, scheduler: Any = None) -> None:
    """Have `current_call` tell about calls of ``model`` until ``handle`` is removed."""
    model.forward = Watched(model, scheduler)
    handle.on_remove(functools.partial(Watched.restore, model))


class Watched(Forward):
    """Forward of a denoiser that notes what it is called with. Copies of it know no scheduler."""

    scheduler: Any = None

    def __init__(self, module: nn.Module, scheduler: Any) -> None:
        super().__init__(module)
        self.scheduler = scheduler

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Run the model."""
        names = list(inspect.signature(self.by_class).parameters)[1:]
        given = {**dict(zip(names, args, strict=False)), **kwargs}
        step = step_of(self.scheduler, given.get("timestep"), self.module)
        token = _calls.set((*_calls.get(), DenoiserCall(*step, text_of(given))))
        try:
            return self.plain(*args, **kwargs)
        finally:
            _calls.reset(token)


def step_of(scheduler: Any, timestep: Any, model: nn.Module) -> tuple[int | None, int | None]:
    """Index of a denoiser's timestep among those of a scheduler, and their number; None where there are none."""
    steps = getattr(scheduler, "timesteps", None)
    if steps is None or timestep is None:
        return None, None
    # FLUX is given the fraction of the schedule where the others are given its index.
    factor = 1000 if type(model).__name__.startswith("Flux") else 1
    now = torch.as_tensor(timestep).flatten()[0].double().cpu() * factor
    return int((steps.double().cpu() - now).abs().argmin()), len(steps)


def text_of(given: Mapping[str, Any]) -> Tensor | None:
    """The text among the arguments of a denoiser; adapters for pictures pass a tuple that begins with it."""
    text = given.get("encoder_hidden_states")
    return text[0] if isinstance(text, tuple) else text
