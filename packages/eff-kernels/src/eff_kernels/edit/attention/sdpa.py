"""Interception of modules whose attention ends in PyTorch's ``scaled_dot_product_attention``.

While such a module runs, and in its thread alone, that function is answered by the module's rules.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from eff_kernels.edit.attention.call import AttentionCall, AttentionOutput
from eff_kernels.edit.attention.diffusers import ROTARY, TEXT, cut, describe, leaves_padding
from eff_kernels.edit.attention.explicit import dense
from eff_kernels.edit.attention.forward import Forward
from eff_kernels.edit.attention.stack import Stack, stack_of


@dataclass(frozen=True)
class Setting:
    """What the arguments of a module tell about its attention.

    Attributes:
        is_cross: Whether it attends to another sequence, unless it joins the two.
        streams: Its streams if it joins two.
        length: How long the two are together.
        rotary: Cosines and sines by which a joint attention has rotated its queries and keys, if it has.
    """

    is_cross: bool
    streams: Mapping[str, slice] | None
    length: int | None
    rotary: Any = None


class Routed(Forward):
    """The forward of a module with rules."""

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Run the module with its attention routed through its stack."""
        module = self.module
        stack = stack_of(module)
        if stack is None:
            return self.plain(*args, **kwargs)
        setting = Setting(*describe(module, stack.name, args, kwargs), kwargs.get(ROTARY))
        kwargs.pop(TEXT, None)
        if not stack.entries:
            return self.plain(*args, **kwargs)
        route = Route(module, stack, setting)
        with route:
            out = self.plain(*args, **kwargs)
        if not route.used:
            raise RuntimeError(
                f"{stack.name} ({type(module).__name__}) did not call scaled_dot_product_attention, so that its "
                "attention could not be reached; choose that implementation in the host (attn_implementation='sdpa', "
                "diffusers' backend 'native'), or leave the module out"
            )
        return out


def attach(module: nn.Module, stack: Stack) -> None:
    """Let a module's forward go through its stack."""
    module.forward = Routed(module)


def detach(module: nn.Module) -> None:
    """Give a module its forward back."""
    Routed.restore(module)


class Route(TorchFunctionMode):
    """Answers ``scaled_dot_product_attention`` by a stack for as long as it is entered."""

    def __init__(self, module: nn.Module, stack: Stack, setting: Setting) -> None:
        super().__init__()
        self.module, self.stack, self.setting, self.used = module, stack, setting, False

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is not F.scaled_dot_product_attention:
            return func(*args, **kwargs)
        self.used = True
        return self._attend(*args, **kwargs)

    def _attend(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attn_mask: Tensor | None = None,
        dropout_p: float = 0.0,
        is_causal: bool = False,
        scale: float | None = None,
        enable_gqa: bool = False,
    ) -> Tensor:
        lead = query.shape[:-3] if query.dim() > 4 else query.shape[:-2]
        q, k, v, mask = _four(self.stack.name, query, key, value, attn_mask)
        # A module may call more than once, such as for the keys of an adapter: its streams are those of the joint call.
        streams = self.setting.streams
        joined = q.shape[2] == k.shape[2] == self.setting.length
        if streams and not joined and q.shape[2] == k.shape[2] and leaves_padding(self.module):
            streams = cut(streams, q.shape[2])
            joined = streams is not None
        call = AttentionCall(
            module=self.module,
            name=self.stack.name,
            layer=self.stack.layer,
            q=q,
            k=k,
            v=v,
            mask=mask,
            scale=q.shape[-1] ** -0.5 if scale is None else scale,
            causal=is_causal,
            dropout=dropout_p,
            is_cross=self.setting.is_cross and not joined,
            streams=streams if joined else None,
            extra={} if self.setting.rotary is None or not joined else {ROTARY: self.setting.rotary},
            recomputed=recomputing(),
        )

        def host(now: AttentionCall) -> AttentionOutput:
            kept = all(getattr(now, n) is getattr(call, n) for n in ("mask", "softcap", "sinks", "bias", "window"))
            if not kept or now.causal != call.causal or now.offset != call.offset or _heads(now) != _heads(call):
                return dense(now)
            # Calls of another rank take other kernels, so what was not changed goes as it came.
            own = now.q is q and now.k is k and now.v is v
            tensors = (query, key, value, attn_mask) if own else (now.q, now.k, now.v, mask)
            factor = scale if now.scale == call.scale else now.scale
            out = F.scaled_dot_product_attention(*tensors, now.dropout, is_causal, scale=factor, enable_gqa=enable_gqa)
            return AttentionOutput(_four_of(out) if own else out)

        out = self.stack.run(call, host).out
        return out if query.dim() == 4 else out.reshape(*lead, *out.shape[-3:] if query.dim() > 4 else out.shape[-2:])


def recomputing() -> bool:
    """Whether this runs inside a backward pass, where gradient checkpointing computes forwards again."""
    return not torch.compiler.is_compiling() and torch._C._current_graph_task_id() != -1


def _heads(call: AttentionCall) -> tuple[int, int]:
    return call.num_heads, call.num_kv_heads


def _four(
    name: str, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None
) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    """Queries, keys, values and mask of any call with four dimensions."""
    if query.dim() == key.dim() == value.dim() == 4:
        while mask is not None and mask.dim() < 4:
            mask = mask[None]
        return query, key, value, mask
    if mask is not None and mask.dim() > 2:
        raise NotImplementedError(f"{name}: a mask {list(mask.shape)} for queries {list(query.shape)} cannot be read")
    return _four_of(query), _four_of(key), _four_of(value), None if mask is None else mask[None, None]


def _four_of(x: Tensor) -> Tensor:
    return x if x.dim() == 4 else x.flatten(0, -4) if x.dim() > 4 else x.reshape(-1, 1, *x.shape[-2:])


@functools.cache
def mentions(cls: type) -> bool:
    """Whether the code of a class names ``scaled_dot_product_attention``."""
    for base in cls.__mro__:
        for member in vars(base).values():
            code = getattr(inspect.unwrap(member), "__code__", None) if callable(member) else None
            if "scaled_dot_product_attention" in getattr(code, "co_names", ()):
                return True
    return False
