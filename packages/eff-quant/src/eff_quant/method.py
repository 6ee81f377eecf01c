"""What the verb `quantize_`, the loaders and the merging of adapters need to know of a quantisation method."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Protocol

import torch
from torch import Tensor, nn

from eff_quant.layer import QuantizedLinear
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
        layer: Class of its layers.
        more: ``more(name, config)``: arguments by name, in addition to the settings, for an unfilled layer of this name
            and for its tensors.
        refuse: ``refuse(linear, config)`` says why a layer of this shape cannot be stored so; "" if it can.
        experts: ``experts(name, config)`` says why experts that are stacked in one parameter cannot be stored so; "" if
            they can. The layer's class then has ``multiply`` and ``decode``.
        groups: ``groups(config)``: last parts of the names of layers that share something, such as ``("q_proj",
            "k_proj", "v_proj")``; they count as a group where they have the same parent and the same config.
        share: ``share(weights, config)``: arguments by name, for the tensors of all members of a group.
        check: ``check(config, found)`` raises ValueError if settings name layers that are not there.
        bytes_per_weight: ``bytes_per_weight(config)``: memory for one weight, scales included.
        compilable: ``compilable(config)``: whether no shape depends on data.
        reads: ``reads(settings)``: whether `read` is for a folder of another library with this ``quantization_config``.
        stored: ``stored(settings)``: the config that such a ``quantization_config`` stands for; ValueError if it does
            not say enough, or names what the method does not do.
        read: ``read(path, config, **kwargs)`` loads such a folder; the config is None or what a user asked for.
    """

    config: type[Any]
    layer: type[QuantizedLinear]
    more: Callable[[str, Any], dict[str, Any]] = lambda name, config: {}
    refuse: Callable[[nn.Module, Any], str] = lambda linear, config: ""
    experts: Callable[[str, Any], str] = lambda name, config: (
        f"holds stacked experts, which {type(config).__name__} has no form for; use Int8Config, FP8Config or FP4Config"
    )
    groups: Callable[[Any], Sequence[Sequence[str]]] = lambda config: ()
    share: Callable[[Sequence[Tensor], Any], dict[str, Any]] = lambda weights, config: {}
    check: Callable[[Any, Sequence[Found]], None] = lambda config, found: None
    bytes_per_weight: Callable[[Any], float]
    compilable: Callable[[Any], bool] = lambda config: True
    reads: Callable[[Mapping[str, Any]], bool] = lambda settings: False
    stored: Callable[[Mapping[str, Any]], Any] = lambda settings: None
    read: Callable[..., Any] | None = None

    def empty(
        self, name: str, linear: nn.Module, config: Any, device: torch.device | str | None = None
    ) -> QuantizedLinear:
        """An unfilled layer for the place of ``linear``."""
        return self.layer.empty_like(linear, config, device=device, **self.more(name, config))

    def tensors(self, name: str, weight: Tensor, config: Any, shared: Mapping[str, Any]) -> dict[str, Tensor]:
        """The buffers that hold a weight [N, K], by name."""
        return self.layer.quantized_tensors(weight, config, **self.more(name, config), **shared)

    def build(self, name: str, linear: nn.Module, config: Any, shared: Mapping[str, Any]) -> QuantizedLinear:
        """Quantise a layer, which is left as it was; the bias is shared with it."""
        new = self.empty(name, linear, config, "meta")
        return new.take_over(linear, self.tensors(name, linear_weight(linear), config, shared))
