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
from eff_kernels.edit.attention.diffusers import describe
from eff_kernels.edit.attention.explicit import dense
from eff_kernels.edit.attention.stack import Stack, stack_of


@dataclass(frozen=True)
class Setting:
    """What the arguments of a module tell about its attention."""

    is_cross: bool = False
    streams: Mapping[str, slice] | None = None


class Routed:
    """The forward of a module with rules: an object, so that copies and pickles of the module keep to themselves."""

    def __init__(self, module: nn.Module) -> None:
        self.module, self.own = module, module.__dict__.get("forward")

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Run the module with its attention routed through its stack."""
        module = self.module
        forward = self.own if self.own is not None else functools.partial(type(module).forward, module)
        stack = stack_of(module)
        if stack is None or not stack.entries:
            return forward(*args, **kwargs)
        is_cross, streams = describe(module, stack.name, args, kwargs)
        route = Route(module, stack, Setting(is_cross, streams))
        with route:
            out = forward(*args, **kwargs)
        if not route.used:
            raise RuntimeError(
                f"{stack.name} ({type(module).__name__}) did not call scaled_dot_product_attention, so that its "
                "attention could not be reached; choose that implementation in the host (attn_implementation='sdpa', "
                "diffusers' backend 'native'), or leave the module out"
            )
        return out


def attach(module: nn.Module) -> None:
    """Let a module's forward go through its stack."""
    module.forward = Routed(module)


def detach(module: nn.Module) -> None:
    """Give a module its forward back; one that was wrapped again since keeps a forward that passes everything on."""
    routed = module.__dict__.get("forward")
    if isinstance(routed, Routed):
        if routed.own is None:
            del module.forward
        else:
            module.forward = routed.own


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
        lead = query.shape[:-3]
        q, k, v, mask = _four(self.stack.name, query, key, value, attn_mask)
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
            is_cross=self.setting.is_cross,
            streams=self.setting.streams,
            recomputed=recomputing(),
        )

        def host(now: AttentionCall) -> AttentionOutput:
            kept = all(getattr(now, n) is getattr(call, n) for n in ("mask", "softcap", "sinks", "bias", "window"))
            if not kept or now.causal != call.causal or now.offset != call.offset or _heads(now) != _heads(call):
                return dense(now)
            return AttentionOutput(
                F.scaled_dot_product_attention(
                    now.q, now.k, now.v, attn_mask if query.dim() == 4 else mask, now.dropout, is_causal,
                    scale=scale if now.scale == call.scale else now.scale, enable_gqa=enable_gqa,
                )
            )  # fmt: skip

        out = self.stack.run(call, host).out
        if query.dim() == 4:
            return out
        return out[0, 0] if query.dim() == 2 else out[:, 0] if query.dim() == 3 else out.unflatten(0, lead)


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
    if query.dim() < 4:
        q, k, v = (t.reshape(-1, 1, *t.shape[-2:]) for t in (query, key, value))
    else:
        q, k, v = (t.flatten(0, -4) for t in (query, key, value))
    return q, k, v, None if mask is None else mask[None, None]


@functools.cache
def mentions(cls: type) -> bool:
    """Whether the code of a class names ``scaled_dot_product_attention``."""
    for base in cls.__mro__:
        for member in vars(base).values():
            code = getattr(inspect.unwrap(member), "__code__", None) if callable(member) else None
            if "scaled_dot_product_attention" in getattr(code, "co_names", ()):
                return True
    return False
