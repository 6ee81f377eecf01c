"""Training with the noise of FP8: layers that round in the forward, and the handle that takes the rounding away."""

from __future__ import annotations

import weakref
from collections.abc import Iterator, Sequence
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from eff_kernels.edit import Handle, Report, matches
from torch import Tensor, nn

from eff_quant.fp8_qat.config import FP8QATConfig
from eff_quant.fp8_qat.fake import fake_quant_fp8
from eff_quant.layer import QuantizedLinear
from eff_quant.linears import find_linears
from eff_quant.skips import on_skip_list


class FP8QATLinear(nn.Linear):
    """An `nn.Linear` whose weight and input are rounded to FP8 in the forward pass, its parameters being as they were.

    `prepare_qat_` makes it by changing a layer's class, so that parameters keep their names and identity, and
    optimisers, adapters, checkpoints and hooks go on as before.
    """

    fp8_qat: FakeQuant

    def forward(self, x: Tensor) -> Tensor:
        """Return fq(x) @ fq(W).T + bias."""
        return F.linear(self.fp8_qat.input(x), self.fp8_qat.weight(self.weight), self.bias)

    def extra_repr(self) -> str:
        """What ``print(model)`` shows between the brackets."""
        config = self.fp8_qat.config
        activation = None if config.activation is None else config.activation.dtype
        return f"{super().extra_repr()}, weight={config.weight.dtype!r}, activation={activation!r}"


class FakeQuant:
    """The rounding of one layer, and the rounded copy of a frozen weight.

    Attributes:
        config: The settings.
        weights: Whether weights are rounded.
        activations: Whether inputs are rounded.
    """

    def __init__(self, config: FP8QATConfig) -> None:
        self.config = config
        self.weights = True
        self.activations = True
        self._key: tuple[Any, ...] | None = None
        self._rounded: Tensor | None = None

    def input(self, x: Tensor) -> Tensor:
        """The input as the product sees it."""
        spec = self.config.activation
        if spec is None or not self.activations:
            return x
        return fake_quant_fp8(x, spec, scale_grad=self.config.scale_grad)

    def weight(self, weight: Tensor) -> Tensor:
        """The weight as the product sees it; a frozen one is rounded again only after it has changed."""
        if not self.weights:
            return weight
        spec, scale_grad = self.config.weight, self.config.scale_grad
        keep = self.config.cache_frozen_weights and not weight.requires_grad
        if not keep or torch.compiler.is_compiling() or weight.is_inference():
            return fake_quant_fp8(weight, spec, weight=True, scale_grad=scale_grad)
        reference, *place = self._key or (lambda: None,)
        now = [weight.data_ptr(), weight._version, weight.dtype, weight.device]
        if self._rounded is None or reference() is not weight or place != now:
            with torch.inference_mode(False):  # a copy made under it could not be used in training
                self._rounded = fake_quant_fp8(weight.detach(), spec, weight=True)
            self._key = (weakref.ref(weight), *now)
        return self._rounded

    def __getstate__(self) -> dict[str, Any]:
        """Without the copy, which is rebuilt where it is needed."""
        return {**self.__dict__, "_key": None, "_rounded": None}


class QATHandle(Handle):
    """What `prepare_qat_` did to a model; `remove` restores the classes of its layers.

    Attributes:
        report: Every linear layer: prepared, or left and why.
    """

    def __init__(self, model: nn.Module, report: Report) -> None:
        super().__init__()
        self.report = report
        self._model = model

    @property
    def replaced(self) -> list[str]:
        """Names of the layers that were prepared."""
        return [e.name for e in self.report.changed]

    def enable(self, *, weights: bool = True, activations: bool = True) -> None:
        """Round weights, inputs, or both; what is not named stays or becomes as it is without FP8."""
        for _, layer in qat_layers(self._model):
            layer.fp8_qat.weights, layer.fp8_qat.activations = weights, activations

    def disable(self) -> None:
        """Round nothing: outputs are bit for bit those of the model before."""
        self.enable(weights=False, activations=False)

    def trainable_parameters(self) -> list[nn.Parameter]:
        """All parameters of the model that have a gradient."""
        return [p for p in self._model.parameters() if p.requires_grad]


def prepare_qat_(model: nn.Module, config: FP8QATConfig | None = None) -> QATHandle:
    """Make the linear layers of a model compute with the noise of FP8, in place; no parameter is touched.

    Args:
        model: Any module. Layers that are tied, belong to an adapter or are a subclass of `nn.Linear` are left; the
            handle's report says so.
        config: Settings; by default E4M3 with one scale a row for weights and inputs.

    Returns:
        A handle, which switches the rounding off and on and can take it away.

    Raises:
        ValueError: the model has prepared layers already, is itself one linear layer, or holds its weights in few bits.
    """
    config = config or FP8QATConfig()
    if isinstance(model, nn.Linear):
        raise ValueError("the model itself is one linear layer; put it in a module, such as nn.Sequential(layer)")
    if prepared := [name for name, _ in qat_layers(model)]:
        raise ValueError(
            f"the model is prepared already ({prepared[0]} and {len(prepared) - 1} more); remove that first"
        )
    report = Report("prepare_qat_")
    handle = QATHandle(model, report)
    for f in find_linears(model, where=config.where, leave=partial(on_skip_list, model, config.skip)):
        layer = f.module
        reason = f.reason or ("" if type(layer) is nn.Linear else f"is a {type(layer).__name__}, not an nn.Linear")
        if reason:
            report.skip(f.names[0], reason, size=f.size)
            continue
        layer.__class__ = FP8QATLinear
        layer.fp8_qat = FakeQuant(config)  # type: ignore[assignment]
        handle.on_remove(lambda layer=layer: unprepare(layer))  # type: ignore[misc]
        report.change(f.names[0], bytes_before=f.size, bytes_after=f.size)
    handle.on_remove(partial(_unprepare_all, model))
    if not report.changed and any(isinstance(module, QuantizedLinear) for module in model.modules()):
        raise ValueError(
            "the model's layers are stored in few bits already, so that there is no float weight to train under FP8's "
            "noise; prepare_qat_ before quantize_, or dequantize_ first"
        )
    return handle


def qat_layers(model: nn.Module) -> Iterator[tuple[str, FP8QATLinear]]:
    """The prepared layers of a model with their names."""
    for name, module in model.named_modules():
        if isinstance(module, FP8QATLinear):
            yield name, module


def _unprepare_all(model: nn.Module) -> None:
    """Also layers that were copied from prepared ones, as those of a second set of weights."""
    for _, layer in list(qat_layers(model)):
        unprepare(layer)


def unprepare(layer: nn.Module) -> None:
    """Make a prepared layer an `nn.Linear` again; nothing happens to one that is."""
    if isinstance(layer, FP8QATLinear):
        del layer.fp8_qat
        layer.__class__ = nn.Linear  # type: ignore[assignment]


def freeze_except_(model: nn.Module, patterns: Sequence[str]) -> list[str]:
    """Switch gradients off for all parameters except those that a pattern matches, and on for these.

    Args:
        model: Any module.
        patterns: As for `eff_kernels.matches`, for names of parameters or of modules that hold them at any depth:
            ``"proj_lin"`` matches ``"blocks.3.attn.proj_lin.weight"``.

    Returns:
        The names of the parameters that keep a gradient.

    Raises:
        TypeError: ``patterns`` is one string.
        ValueError: a pattern selects nothing.
    """
    if isinstance(patterns, str):
        raise TypeError(f"patterns={patterns!r} is one string; use a list, such as [{patterns!r}]")
    used = dict.fromkeys(patterns, False)
    kept = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        parts = name.split(".")
        names = [".".join(parts[: n + 1]) for n in range(len(parts))]
        for pattern in patterns:
            if any(matches(n, pattern) for n in names):
                used[pattern] = True
                kept[id(parameter)] = name
    if idle := [p for p, hit in used.items() if not hit]:
        raise ValueError(f"patterns {idle} match no parameter of the model")
    for parameter in model.parameters():
        parameter.requires_grad_(id(parameter) in kept)
    return [name for name, parameter in model.named_parameters() if id(parameter) in kept]
