"""Put a layout into a pipeline."""

from __future__ import annotations

import functools
import inspect
from typing import Any

import torch
from eff_kernels.edit import Handle, Report, uncompiled
from eff_kernels.edit.attention import intercept_attention
from eff_kernels.edit.attention.forward import Forward

from eff_guidance.layerbind.config import LayerBindConfig
from eff_guidance.layerbind.hosts import Host, named_arguments
from eff_guidance.layerbind.layout import Layout
from eff_guidance.layerbind.passes import BlockHook, rule
from eff_guidance.layerbind.prompts import LayoutPrompts, check_prompts, encode_layout
from eff_guidance.layerbind.run import Binding, Cached, Run, current_run, inner
from eff_guidance.together import ExtraPasses

_ATTRIBUTE = "_eff_layerbind"
_REFUSED = (
    "ip_adapter_image", "ip_adapter_image_embeds", "negative_ip_adapter_image", "negative_ip_adapter_image_embeds",
    "skip_guidance_layers",
)  # fmt: skip


def apply_layerbind(
    pipe: Any,
    layout: Layout,
    config: LayerBindConfig | None = None,
    *,
    prompts: LayoutPrompts | None = None,
    order: float | None = None,
) -> Handle:
    """Have a pipeline draw a layout.

    The prompt of the pipeline's call is that of the whole scene. All that the call offers stays as it is: several
    pictures and prompts, guidance, seeds, callbacks, LoRA.

    >>> with apply_layerbind(pipe, layout):
    ...     pictures = pipe("a bee in front of a mouse in a meadow").images

    Args:
        pipe: StableDiffusion3Pipeline, FluxPipeline, or a subclass, with FlowMatchEulerDiscreteScheduler.
        layout: What is where.
        config: The settings; by default those of the paper for the pipeline's family.
        prompts: The layout's encoded prompts, for pipelines without text encoders.
        order: Place among other rules on the same attention, see `intercept_attention`.

    Returns:
        A handle; `remove` or the end of its ``with`` block gives the pipeline back as it was.

    Raises:
        TypeError: another pipeline or transformer.
        ValueError: prompts do not fit the layout, the pipeline has a layout or is guided by heads already, or a block
            does not exist.
    """
    _check_pipeline(pipe)
    model = inner(pipe.transformer)
    if getattr(pipe, _ATTRIBUTE, None) is not None:
        raise ValueError("this pipeline has a layout already; remove its handle first")
    binding = bind(pipe, layout, config, prompts)
    handle = Handle(Report("apply_layerbind"))
    if not binding.works:
        return handle
    try:
        install(model, handle, order)
        base: Any = type(pipe)
        setattr(pipe, _ATTRIBUTE, binding)
        pipe.__class__ = bound_class(base)
        handle.on_remove(functools.partial(_give_back, pipe, base))
    except Exception:
        handle.remove()
        raise
    return handle


def bind(pipe: Any, layout: Layout, config: LayerBindConfig | None, prompts: LayoutPrompts | None) -> Binding:
    """A layout with the settings for a pipeline's family, checked, and its encoded prompts.

    Raises:
        TypeError, ValueError: as `apply_layerbind`.
    """
    model = inner(pipe.transformer)
    host = Host.of(model)
    _check_forward(model)
    config = config or LayerBindConfig(eta1=0.2 if host.flux else 0.25)
    config.blocks_of(len(host.blocks(model)), flux=host.flux)
    return Binding(layout, config, check_prompts(encode_layout(pipe, layout) if prompts is None else prompts, layout))


def install(model: Any, handle: Handle, order: float | None) -> None:
    """Let runs of this thread answer a transformer's calls, until the handle is removed."""
    inside = intercept_attention(model, rule, where=_blocks_attention, order=order, strict=True)
    handle.on_remove(inside.remove)
    for entry in inside.report.changed:
        handle.report.change(entry.name)
    for i, (_, block) in enumerate(Host.of(model).blocks(model)):
        handle.on_remove(block.register_forward_pre_hook(BlockHook(i, after=False), with_kwargs=True).remove)
        handle.on_remove(block.register_forward_hook(BlockHook(i, after=True), with_kwargs=True).remove)
    model.forward = Evaluate(model)
    handle.on_remove(functools.partial(Evaluate.restore, model))


def _give_back(pipe: Any, base: type) -> None:
    pipe.__class__ = base
    delattr(pipe, _ATTRIBUTE)


def _blocks_attention(name: str, module: Any) -> bool:
    return name.split(".")[0].endswith("transformer_blocks") and name.split(".")[-1] in ("attn", "attn2")


class Evaluate(Forward):
    """The transformer's forward: a run of this thread answers, if there is one."""

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Run the transformer."""
        run = current_run()
        if run is None or run.done or inner(run.pipe.transformer) is not self.module:
            return self.plain(*args, **kwargs)
        return uncompiled(_evaluate)(run, self, args, kwargs)


def _evaluate(run: Run, forward: Evaluate, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """A step with layers, eagerly: its many shapes would each be recompiled."""
    with torch.compiler.set_stance("force_eager"):
        return run.evaluate(forward.module, forward.plain, named_arguments(forward.by_class, args, kwargs))


@functools.cache
def bound_class(base: type) -> type:
    """A pipeline class that draws the layout its objects carry."""

    def call(self: Any, *args: Any, **kwargs: Any) -> Any:
        return draw(self, base, getattr(self, _ATTRIBUTE), args, kwargs)[0]

    def reduce(self: Any, protocol: int) -> Any:
        return _bare, (base,), dict(self.__dict__)

    return type(base.__name__, (base,), {
        "__call__": functools.wraps(base.__call__)(call), "__reduce_ex__": reduce, "__module__": base.__module__,
        "__doc__": base.__doc__, "__qualname__": base.__qualname__,
    })  # fmt: skip


def _bare(base: type) -> Any:
    return object.__new__(bound_class(base))


def draw(
    pipe: Any, base: Any, binding: Binding, args: tuple[Any, ...], kwargs: dict[str, Any], cached: Cached | None = None
) -> tuple[Any, Run]:
    """Call a pipeline with a layout: what it returns, and the run."""
    named = _named_call(base, pipe, args, kwargs)
    if given := [name for name in _REFUSED if named.get(name) is not None]:
        raise ValueError(f"{', '.join(given)}: cannot be combined with a layout")
    check_parts(pipe, binding)
    run = Run(pipe, binding, functools.partial(_guidance, pipe, named), cached)
    own = named.get("callback_on_step_end")
    names = list(getattr(own, "tensor_inputs", None) or named.get("callback_on_step_end_tensor_inputs") or ["latents"])

    def on_step_end(self: Any, step: int, timestep: Any, given: dict[str, Any]) -> dict[str, Any]:
        given["latents"] = run.finish_step(given["latents"])
        found = {} if own is None else own(self, step, timestep, {n: given[n] for n in names}) or {}
        return {"latents": given["latents"], **found}

    kwargs = {
        **kwargs, "callback_on_step_end": on_step_end,
        "callback_on_step_end_tensor_inputs": list(dict.fromkeys([*names, "latents"])),
    }  # fmt: skip
    with run.active():
        return base.__call__(pipe, *args, **kwargs), run


def _named_call(base: Any, pipe: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
    signature = inspect.signature(base.__call__)
    bound = signature.bind(pipe, *args, **kwargs)
    bound.apply_defaults()
    found: dict[str, Any] = {}
    for name, value in bound.arguments.items():
        kind = signature.parameters[name].kind
        found.update(value if kind is inspect.Parameter.VAR_KEYWORD else {name: value})
    return found


def _guidance(pipe: Any, named: dict[str, Any]) -> tuple[float, str]:
    """How a pipeline guides: the scale, and whether both predictions come from one call."""
    if not Host.of(inner(pipe.transformer)).flux:
        return float(pipe.guidance_scale), "batched" if pipe.do_classifier_free_guidance else "none"
    scale = float(named.get("true_cfg_scale") or 1.0)
    both = named.get("negative_prompt_embeds"), named.get("negative_pooled_prompt_embeds")
    negative = named.get("negative_prompt") is not None or all(x is not None for x in both)
    return scale, "separate" if scale > 1 and negative else "none"


def _check_pipeline(pipe: Any) -> None:
    from diffusers import FluxPipeline, StableDiffusion3Pipeline

    if not isinstance(pipe, StableDiffusion3Pipeline | FluxPipeline):
        raise TypeError(
            f"LayerBind draws with StableDiffusion3Pipeline, FluxPipeline and their subclasses, got "
            f"{type(pipe).__name__}"
        )


def _check_forward(model: Any) -> None:
    forward = model.__dict__.get("forward")
    while isinstance(forward, Forward):
        if isinstance(forward, ExtraPasses):
            raise ValueError(
                f"this transformer has {type(forward).__name__} already, which evaluates it more often; put the layout "
                "on first, then the guidance, with an order below the layout's"
            )
        forward = forward.own


def check_parts(pipe: Any, binding: Binding) -> None:
    """Refuse schedulers and caches that branches do not go with.

    Raises:
        TypeError, ValueError: there is one.
    """
    from diffusers import FlowMatchEulerDiscreteScheduler

    if getattr(inner(pipe.transformer), "is_cache_enabled", False):
        raise ValueError("the transformer has a cache (enable_cache); layers need every block: call disable_cache()")
    scheduler = pipe.scheduler
    if binding.config.eta1 > 0 and (
        not isinstance(scheduler, FlowMatchEulerDiscreteScheduler) or scheduler.config.get("stochastic_sampling")
    ):
        raise TypeError(
            f"branches take Euler's steps; the scheduler is {type(scheduler).__name__}"
            f"{' with stochastic_sampling' if scheduler.config.get('stochastic_sampling') else ''}, use "
            "FlowMatchEulerDiscreteScheduler, or eta1=0"
        )
