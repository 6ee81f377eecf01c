"""Interception of modules that take their attention from transformers' AttentionInterface.

One name is registered there. A module with rules gets a view of its config that differs in this name alone: the model's
own config, its masks, its checks and its saved files stay those of the implementation that the host has, and that one
still computes the attention. Choosing another one by ``set_attn_implementation`` holds at once.
"""

from __future__ import annotations

import dis
import functools
import inspect
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn

from eff_kernels.edit.attention.call import AttentionCall, AttentionOutput
from eff_kernels.edit.attention.diffusers import named_cross
from eff_kernels.edit.attention.explicit import dense, flash_with_lse
from eff_kernels.edit.attention.masks import is_partial
from eff_kernels.edit.attention.sdpa import recomputing
from eff_kernels.edit.attention.stack import Stack, stack_of

if TYPE_CHECKING:
    from eff_kernels.edit.attention.follow import Step

NAME = "eff_attention"
ROLES = "eff_token_roles"
_REGISTRY = "ALL_ATTENTION_FUNCTIONS"
_HOST = "_eff_host_config"


def goes_through_interface(module: nn.Module) -> bool:
    """Whether a module asks transformers' registry for its attention."""
    return (
        hasattr(getattr(module, "config", None), "_attn_implementation_internal") and _uses(_class(module)) is not None
    )


class Host:
    """Where a class of attention modules finds the functions that the host's implementations are.

    Raises:
        ValueError: the class does not ask the registry.
    """

    def __init__(self, kind: Any) -> None:
        found = _uses(kind)
        if found is None:
            raise ValueError(f"{kind.__name__} does not take its attention from transformers' registry")
        self.kind, self.registry = kind, found.__globals__[_REGISTRY]
        self.eager = found.__globals__.get(_eager_name(found))

    def function(self, chosen: str | None) -> Callable[..., Any]:
        """The attention function of an implementation.

        Raises:
            ValueError: it is "eager", and the file of the class has no such function.
        """
        if chosen is not None and chosen != "eager":
            return self.registry.get_interface(chosen, self.eager)
        if self.eager is None:
            raise ValueError(f"{self.kind.__name__} has no eager attention function to be called in its place")
        return self.eager

    def __reduce__(self) -> tuple[Any, ...]:
        return Host, (self.kind,)


def attach(module: Any, stack: Stack) -> None:
    """Let a module ask for our name.

    Raises:
        ValueError: the host's implementation cannot be called from outside.
    """
    _register()
    stack.host = Host(type(module))
    stack.host.function(module.config._attn_implementation_internal)
    stack.is_cross = named_cross(module, stack.name)
    module.config = view_of(module.config, _branches(_class(module)))


def detach(module: Any) -> None:
    """Give a module its config back."""
    module.config = getattr(module.config, _HOST, module.config)


def attention(
    module: Any, query: Tensor, key: Tensor, value: Tensor, attention_mask: Any = None, *args: Any, **kwargs: Any
) -> tuple[Tensor, Tensor | None]:
    """The registered function: sends the call through the module's stack; [B, H, S, D] in, [B, S, H, D] out."""
    stack = stack_of(module)
    if stack is None:
        raise RuntimeError(f"attn_implementation={NAME!r} is set only by intercept_attention, not by hand")
    if args:
        kwargs = {**dict(zip(("scaling", "dropout"), args, strict=False)), **kwargs}
    if kwargs.get("cache") is not None:
        raise NotImplementedError(f"{stack.name}: rules cannot see keys in a paged cache (continuous batching)")
    step = kwargs.pop(ROLES, None)
    chosen = module.config._attn_implementation_internal
    function = stack.host.function(chosen)
    if not stack.entries:
        return function(module, query, key, value, attention_mask, **kwargs)
    flash = "flash" in str(chosen)
    call = _call(stack, module, query, key, value, attention_mask, kwargs, chosen, step)

    def host(now: AttentionCall) -> AttentionOutput:
        if now.wants_lse and chosen == "sdpa" and (found := flash_with_lse(now)) is not None:
            return found
        if now is call:
            out, weights = function(module, query, key, value, attention_mask, **kwargs)[:2]
            return AttentionOutput(out.transpose(1, 2), weights)
        changed = [n for n in _FIXED if getattr(now, n) is not getattr(call, n) and getattr(now, n) != getattr(call, n)]
        mask, masked = now.mask, now.mask is not call.mask
        if changed or (now.num_heads, now.num_kv_heads) != (call.num_heads, call.num_kv_heads):
            return dense(now)
        if masked:
            if flash or not isinstance(call.mask, Tensor | None):
                return dense(now)
            mask = now.replace(bias=None).additive_mask().to(call.dtype)
        given = {**kwargs, **now.extra}
        for field, name in (("scale", "scaling"), ("dropout", "dropout")):
            if getattr(now, field) != getattr(call, field):
                given[name] = getattr(now, field)
        out, weights = function(module, now.q, now.k, now.v, mask, **given)[:2]
        return AttentionOutput(out.transpose(1, 2), weights)

    result = stack.run(call, host)
    return result.out.transpose(1, 2), result.weights


# What host functions take from the module itself or not at all: a change of these is computed apart.
_FIXED = ("causal", "offset", "softcap", "window", "sinks", "bias")


def _call(
    stack: Stack, module: Any, q: Tensor, k: Tensor, v: Tensor, mask: Any, given: dict[str, Any], chosen: str | None,
    step: Step | None,
) -> AttentionCall:  # fmt: skip
    eager = chosen in (None, "eager")
    causal = given.get("is_causal")
    causal = getattr(module, "is_causal", True) if causal is None else causal
    scale = given.get("scaling")
    sinks = given["s_aux"] if "s_aux" in given else _held(module, "sinks")
    is_cross = stack.is_cross
    return AttentionCall(
        module=module,
        name=stack.name,
        layer=stack.layer,
        q=q,
        k=k,
        v=v,
        mask=mask,
        scale=q.shape[-1] ** -0.5 if scale is None else scale,
        causal=bool(causal) and not eager and is_partial(mask) and q.shape[2] > 1,
        offset=k.shape[2] - q.shape[2] if "flash" in str(chosen) else 0,
        dropout=given.get("dropout") or 0.0,
        softcap=given.get("softcap"),
        window=given["sliding_window"] if "sliding_window" in given else _held(module, "sliding_window"),
        sinks=sinks if isinstance(sinks, Tensor) else None,
        bias=given.get("position_bias"),
        is_cross=is_cross,
        roles=None if step is None or is_cross else step.roles(stack.layer, q, k),
        extra={n: x for n, x in given.items() if n not in _READ},
        recomputed=recomputing(),
        wants_weights=eager,
    )


def _held(module: Any, name: str) -> Any:
    """An attribute that most modules do not have, for which asking in the common way is slow."""
    for held in (module.__dict__, module._parameters, module._buffers):
        if name in held:
            return held[name]
    return getattr(type(module), name, None)


_READ = ("scaling", "dropout", "softcap", "sliding_window", "s_aux", "position_bias", "is_causal")


def _class(thing: object) -> Any:
    return type(thing)


@functools.cache
def _uses(cls: Any) -> Any:
    """The function of a class that asks the registry for its attention, or None."""
    for base in cls.__mro__:
        for member in vars(base).values():
            function = inspect.unwrap(member) if callable(member) else None
            if _REGISTRY in getattr(getattr(function, "__code__", None), "co_names", ()):
                return function
    return None


@functools.cache
def _eager_name(function: Any) -> str:
    names = [n for n in function.__code__.co_names if n.endswith("eager_attention_forward")]
    return names[0] if names else "eager_attention_forward"


@functools.cache
def _branches(cls: Any) -> bool:
    """Whether a class looks at the name for more than to ask the registry."""
    looks = 0
    for base in cls.__mro__:
        for member in vars(base).values():
            code = getattr(inspect.unwrap(member), "__code__", None) if callable(member) else None
            if base is not nn.Module and code is not None:
                looks += sum(
                    i.argval in ("_attn_implementation", "is_flash_attention_requested")
                    for i in dis.get_instructions(code)
                )
    return looks > 1


class _Both(str):
    """The host's name for all who compare it, and ours in the registry.

    Some modules prepare arguments in another way for one implementation or another. They must go on doing so.
    """

    __slots__ = ()

    def __eq__(self, other: object) -> bool:
        return str.__eq__(self, other) is True or other == NAME

    def __ne__(self, other: object) -> bool:
        return not self == other

    def __hash__(self) -> int:
        return hash(NAME)


def view_of(config: Any, both: bool = False) -> Any:
    """A config that is the given one in everything but the name of the attention."""
    _register()
    host = getattr(config, _HOST, config)
    view: Any = object.__new__(_view_class(_class(host), both))
    object.__setattr__(view, "__dict__", host.__dict__)
    object.__setattr__(view, _HOST, host)
    return view


@functools.cache
def _view_class(cls: Any, both: bool) -> Any:
    def name(self: Any) -> str:
        return _Both(self._attn_implementation_internal) if both else NAME

    def reduce(self: Any, protocol: Any = None) -> tuple[Any, ...]:
        return view_of, (getattr(self, _HOST), both)

    setter = cls._attn_implementation.fset
    body = {
        "__slots__": (_HOST,),
        "_attn_implementation": property(name, setter),
        "__reduce_ex__": reduce,
        "__module__": cls.__module__,
        "__doc__": cls.__doc__,
    }
    return type.__new__(type(cls), cls.__name__, (cls,), body)


def _register() -> None:
    from transformers import AttentionInterface, AttentionMaskInterface
    from transformers.masking_utils import sdpa_mask

    if NAME not in AttentionInterface._global_mapping:
        AttentionInterface.register(NAME, attention)
        # Masks are made by the model's own config. This one is for modules that make theirs by the view: never None.
        AttentionMaskInterface.register(NAME, functools.partial(sdpa_mask, allow_is_causal_skip=False))


def tiled_grid(config: Any, size: Sequence[int]) -> tuple[int, int]:
    """Lines and columns of LLaVA-NeXT's large view of a picture of ``size`` (height, width) pixels.

    The view is a grid of tiles, from which the lines or columns that only hold padding are cut.
    """
    from transformers.image_processing_utils import select_best_resolution

    vision = config.vision_config
    side = vision.image_size // vision.patch_size
    best = select_best_resolution(tuple(size), [tuple(p) for p in config.image_grid_pinpoints])
    height, width = (b // vision.image_size * side for b in best)
    if size[1] / size[0] > width / height:
        cut = (height - int(round(size[0] * (width / size[1]), 7))) // 2
        return height - 2 * cut, width
    cut = (width - int(round(size[1] * (height / size[0]), 7))) // 2
    return height, width - 2 * cut
