"""One stack of experts' matrices in the form of a method: what its layers hold, with one axis more."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from eff_quant.layer import check_entry
from eff_quant.registry import method_of


class Form:
    """How one matrix [N, K] of a stack is held; the stack has each tensor with an axis for the experts in front.

    All quantisers, kernels and checks are those of the method's layer, for which the tensors of one expert stand.

    Args:
        n: N.
        k: K.
        config: Settings of a method.
        dtype: Of the float weights.
    """

    def __init__(self, n: int, k: int, config: Any, dtype: torch.dtype) -> None:
        self.layer = method_of(config).layer
        self.config = config
        # An unfilled layer, for the shapes of its tensors and its checks of what a file holds.
        self.like = self.layer(k, n, False, config, device="meta", dtype=dtype)
        self.names = {own: self.layer.stored_as.get(own, own) for own, t in self.like._buffers.items() if t is not None}

    def empty(self, experts: int, device: torch.device | str | None) -> dict[str, Tensor]:
        """Unfilled tensors of all experts, by their names in files."""
        return {
            stored: torch.empty((experts, *t.shape), dtype=t.dtype, device=device)
            for own, stored in self.names.items()
            if (t := self.like._buffers[own]) is not None
        }

    def quantize(self, weight: Tensor) -> dict[str, Tensor]:
        """The tensors that hold ``weight`` [E, N, K], by their names in files.

        Raises:
            ValueError: it holds inf or NaN; the message names the expert.
        """
        tensors = self.empty(len(weight), weight.device)
        if weight.is_meta:
            return tensors
        for expert, matrix in enumerate(weight.detach()):
            try:
                new = self.layer.quantized_tensors(matrix.contiguous(), self.config)
            except ValueError as error:
                raise ValueError(f"expert {expert}: {error}") from error
            for own, stored in self.names.items():
                tensors[stored][expert] = new[own]
        return tensors

    def of_expert(self, tensors: Mapping[str, Tensor], expert: int) -> dict[str, Tensor]:
        """Views of what belongs to one expert, by the names that its layer has for them."""
        return {own: tensors[stored][expert] for own, stored in self.names.items()}

    def multiply(self, x: Tensor, tensors: Mapping[str, Tensor], expert: int, bias: Tensor | None) -> Tensor:
        """Return x @ W.T + bias for one expert; nothing of the others is read."""
        return self.layer.multiply(x, self.of_expert(tensors, expert), bias, self.config)

    def decode(self, tensors: Mapping[str, Tensor], dtype: torch.dtype) -> Tensor:
        """The float matrices [E, N, K]."""
        first = next(iter(tensors.values()))
        weight = torch.empty(len(first), *self.like.weight_shape, dtype=dtype, device=first.device)
        for expert in range(len(first)):
            weight[expert] = self.layer.decode(self.of_expert(tensors, expert), self.config, dtype)
        return weight

    def check(self, name: str, found: Mapping[str, Tensor | None], experts: int) -> None:
        """Check what a file holds for the stack ``name``.

        Raises:
            KeyError, TypeError, ValueError: see `QuantizedLinear.check_entries`.
        """
        for stored, like in self.empty(experts, "meta").items():
            check_entry(name, stored, found.get(stored), like)
        held = {stored: t for stored, t in found.items() if t is not None}
        if any(t.is_meta for t in held.values()):
            return
        for expert in range(experts):
            self.like.check_entries(f"{name}[{expert}]", {s: t[expert] for s, t in held.items()})


class Stack:
    """The float weight of one stack for whoever reads or writes it, in the orientation of the model's class."""

    def __init__(self, module: Any, name: str) -> None:
        self.module = module
        self.name = name

    @property
    def dtype(self) -> torch.dtype:
        """Of the float weight."""
        dtype: torch.dtype = self.module.dtype
        return dtype

    @property
    def device(self) -> torch.device:
        """Where the codes are."""
        device: torch.device = self.module.device
        return device

    @property
    def weight_shape(self) -> tuple[int, ...]:
        """[E, N, K], or [E, K, N] in classes that keep it so."""
        n, k = self.module.forms[self.name].like.weight_shape
        return (self.module.num_experts, k, n) if self.module.is_transposed else (self.module.num_experts, n, k)

    def dequantize(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """The float weight of all experts."""
        weight: Tensor = self.module.forms[self.name].decode(self.module.tensors(self.name), dtype)
        return weight.transpose(1, 2).contiguous() if self.module.is_transposed else weight

    def set_weight(self, value: Tensor) -> None:
        """Quantise another float weight of all experts.

        Raises:
            ValueError: another shape, or inf or NaN.
            TypeError: not a float weight.
        """
        if tuple(value.shape) != self.weight_shape:
            raise ValueError(f"{self.name} has shape {list(value.shape)}, wanted {list(self.weight_shape)}")
        if not value.is_floating_point() or value.dtype.itemsize < 2:
            raise TypeError(f"{self.name} cannot take {value.dtype}; use a float weight")
        with torch.no_grad():
            self.module.fill(self.name, value)

    def __str__(self) -> str:
        return f"{self.name} of {type(self.module).__name__}"
