"""Subclasses of `nn.Linear` that compute what it computes, such as Falcon's, found by trying them."""

from __future__ import annotations

import functools
import inspect
from typing import Any

import torch
from torch import nn


def computes_as_linear(module: nn.Module) -> bool:
    """Whether a layer of a subclass of `nn.Linear` may be exchanged for one that computes x @ W.T + bias.

    A small layer of its class has to give that on inputs of two shapes, in training and in evaluation, and this one may
    differ from it in its sizes and weights alone. Classes of PyTorch itself are not tried: their parents hand the
    weights to fused functions.
    """
    kind: Any = type(module)
    if kind is nn.Linear:
        return True
    if kind.__module__.startswith("torch.") or "forward" in vars(module) or not isinstance(module, nn.Linear):
        return False
    probe: nn.Module | None = _probe(kind, module.bias is not None)
    return probe is not None and _settings(module) == _settings(probe)


@functools.cache
def _probe(kind: Any, bias: bool) -> nn.Module | None:
    """A small layer of a class, if it computes as `nn.Linear` does."""
    if len(inspect.signature(kind.forward).parameters) != 2:  # self, x: others may be given more
        return None
    with torch.random.fork_rng(devices=[]), torch.device("cpu"):
        try:
            layer: Any = kind(6, 4, bias=bias)
            if layer._buffers or layer._modules or layer._parameters.keys() != {"weight", "bias"}:
                return None
            # Whatever the default dtype is, as it is half while a model in half is loaded, sums of float32 agree; and a
            # class that begins with zeros would show nothing.
            layer = layer.float()
            for p in layer.parameters():
                p.data.normal_()
            for shape in ((5, 6), (2, 3, 6)):
                x = torch.randn(shape, dtype=torch.float32)
                wanted = nn.functional.linear(x, layer.weight, layer.bias)
                for training in (True, False):
                    torch.testing.assert_close(layer.train(training)(x), wanted)
        except Exception:  # a class with arguments of its own may raise anything
            return None
    return layer


def _settings(layer: nn.Module) -> dict[str, Any]:
    """What a layer holds besides its weights and its sizes; what libraries note at it begins with an underscore."""
    sizes = ("in_features", "out_features", "training")
    held = {k: v for k, v in vars(layer).items() if not k.startswith("_") and k not in sizes}
    plain = {k: v if isinstance(v, int | float | str | bool | None) else type(v) for k, v in held.items()}
    return {**plain, "tensors": sorted([*layer._parameters, *layer._buffers, *layer._modules])}
