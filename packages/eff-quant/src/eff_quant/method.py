"""What the verb `quantize_`, transformers' loader and merging of adapters need to know of a quantisation method."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Protocol

import torch
from torch import Tensor, nn

from eff_quant.linears import Found, linear_weight


class MethodConfig(Protocol):
    """Settings of a method: a frozen dataclass that checks itself."""

    quant_method: ClassVar[str]

    @property
    def skip(self) -> tuple[str, ...]:
        """Patterns of layers to leave."""
        ...

    def to_dict(self) -> dict[str, Any]:
        """The settings as JSON types, with ``quant_method`` and ``version``."""
        ...


@dataclass(frozen=True, slots=True, kw_only=True)
class Method:
    """One way to store and run a linear layer.

    Attributes:
        config: Class of its settings, a `MethodConfig`; it has the class method ``from_dict``.
        layer: Class of its layers, which hold their weights in buffers.
        empty: ``empty(name, linear, config, device)`` returns an unfilled layer of the shape of ``linear``.
        tensors: ``tensors(name, weight [N, K], config, shared)`` returns the buffers that hold a weight, by name.
        refuse: ``refuse(linear, config)`` says why a layer of this shape cannot be stored so; "" if it can.
        groups: ``groups(config)``: last parts of the names of layers that share something, such as ``("q_proj",
            "k_proj", "v_proj")``; they count as a group where they have the same parent and the same config.
        share: ``share(weights, config)`` computes what a group shares; ``tensors`` gets it, or None outside of groups.
        check: ``check(config, found)`` raises ValueError if settings name layers that are not there.
        rebuild: ``rebuild(name, linear, old)``, for layers that hold more than their config says, see `again`.
        bytes_per_weight: ``bytes_per_weight(config)``: memory for one weight, scales included.
        compilable: ``compilable(config)``: whether no shape depends on data.
    """

    config: type[Any]
    layer: type[nn.Linear]
    empty: Callable[[str, nn.Module, Any, torch.device | str | None], Any]
    tensors: Callable[[str, Tensor, Any, Any], dict[str, Tensor]]
    refuse: Callable[[nn.Module, Any], str] = lambda linear, config: ""
    groups: Callable[[Any], Sequence[Sequence[str]]] = lambda config: ()
    share: Callable[[Sequence[Tensor], Any], Any] = lambda weights, config: None
    check: Callable[[Any, Sequence[Found]], None] = lambda config, found: None
    rebuild: Callable[[str, nn.Module, Any], nn.Module] | None = None
    bytes_per_weight: Callable[[Any], float]
    compilable: Callable[[Any], bool] = lambda config: True

    def build(self, name: str, linear: nn.Module, config: Any, shared: Any = None) -> nn.Module:
        """Quantise a layer, which is left as it was; the bias is shared with it."""
        new: nn.Module = self.empty(name, linear, config, "meta")
        for leaf, tensor in self.tensors(name, linear_weight(linear), config, shared).items():
            setattr(new, leaf, tensor)
        new.bias = linear.bias
        return new.train(linear.training)

    def again(self, name: str, linear: nn.Module, old: Any) -> nn.Module:
        """Quantise a layer whose weights have changed with all that ``old``, the layer in its place, had."""
        if self.rebuild is not None:
            return self.rebuild(name, linear, old)
        return self.build(name, linear, old.config)
