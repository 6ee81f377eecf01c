"""What the layers of all methods share: each stands where an `nn.Linear` was and holds codes for its weight."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Protocol, Self

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map_only

from eff_quant.buffers import as_integers, dtype_after
from eff_quant.linears import carry_hooks, is_conv1d, is_linear, linear_weight


@dataclass(frozen=True, slots=True, kw_only=True)
class StackedCodes:
    """The weights [N, K] of E layers, for a kernel that multiplies by all of them.

    Attributes:
        format: "int8", "e4m3", "e5m2", "nvfp4" or "mxfp4".
        codes: [E, N, K], or [E, N, K / 2] of pairs of 4-bit codes.
        blocks: Scales of blocks, of the 4-bit formats.
        scale: float32 factors of rows [E, N] or, in NVFP4, of whole weights [E].
        rounding: Of x to int8: its "threshold", "per_token" and "group"; None where x stays as it is.
    """

    format: str
    codes: Tensor
    blocks: Tensor | None = None
    scale: Tensor | None = None
    rounding: Mapping[str, Any] | None = None


class QuantizedLinear(nn.Linear):
    """Base of quantised layers: y = x @ W.T + bias, with W in buffers that are no floats.

    It is an `nn.Linear`, so that PEFT, accelerate and hooks find it, but its weight gets no gradient; the input and the
    bias do. Moving or casting it never quantises anything: codes and scales stay as they are, and the bias follows.

    ``layer.weight`` is the float weight that the layer stands for, see `WeightView`: parents that read it compute with
    the right numbers, and a weight that is assigned is quantised.

    Args:
        in_features: K.
        out_features: N.
        bias: Whether there is a bias.
        config: Settings of the method.
        device: Of all tensors.
        dtype: Of the bias, and of `weight`.
        more: What else the buffers depend on, see `empty_tensors`.
    """

    config_class: ClassVar[type[Any]]
    # Names in the state dict of buffers that have another name there.
    stored_as: ClassVar[Mapping[str, str]] = {}
    # Float buffers that follow a cast of the layer; the others keep their dtype.
    follow_casts: ClassVar[frozenset[str]] = frozenset()

    # transformers has nothing to initialise here
    _is_hf_initialized = True

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = True,
        config: Any = None,
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        **more: Any,
    ) -> None:
        nn.Module.__init__(self)  # not nn.Linear's: it would allocate a float weight
        self.in_features = in_features
        self.out_features = out_features
        self.config = config or self.config_class()
        self.dtype = dtype or torch.get_default_dtype()
        # Whether the weight came from a Conv1D, which libraries that know only nn.Linear cannot load.
        self.transposed = False
        for name, tensor in self.empty_tensors(device, **more).items():
            self.register_buffer(name, tensor)
        self.register_parameter(
            "bias", nn.Parameter(torch.zeros(out_features, device=device, dtype=dtype)) if bias else None
        )

    def empty_tensors(self, device: torch.device | str | None, **more: Any) -> dict[str, Tensor | None]:
        """The buffers of a layer that holds nothing, by name; None for those that it does not need."""
        raise NotImplementedError

    @classmethod
    def quantized_tensors(cls, weight: Tensor, config: Any, **more: Any) -> dict[str, Tensor]:
        """The buffers, by name, that hold ``weight`` [N, K], which is left as it was.

        Raises:
            ValueError: the weight holds inf or NaN.
        """
        raise NotImplementedError

    def requantized_tensors(self, weight: Tensor) -> dict[str, Tensor]:
        """The same for another weight of this very layer, with all that it has besides its settings."""
        return self.quantized_tensors(weight, self.config)

    def dequantize(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """Return the weight [N, K] that the layer stands for."""
        raise NotImplementedError

    @staticmethod
    def multiply(x: Tensor, tensors: Mapping[str, Tensor | None], bias: Tensor | None, config: Any) -> Tensor:
        """Return x @ W.T + bias for the weight that these buffers, by name, hold.

        Methods whose ``Method.experts`` refuses nothing have this and `decode`, which need no layer of their own.
        """
        raise NotImplementedError

    @staticmethod
    def stacked(tensors: Mapping[str, Any], config: Any) -> StackedCodes | None:
        """How one kernel reads the tensors of many such layers, each with an axis for them in front.

        None if there is no such kernel for the settings: then they are multiplied one after the other.
        """
        return None

    @staticmethod
    def decode(tensors: Mapping[str, Tensor | None], config: Any, dtype: torch.dtype) -> Tensor:
        """Return the weight [N, K] that these buffers, by name, hold."""
        raise NotImplementedError

    def check_entries(self, name: str, entries: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Check what a checkpoint holds for this layer, and return it in the form in which the layer holds it.

        Args:
            name: Of the layer, for messages.
            entries: By names in the state dict; tensors may be on the meta device.

        Raises:
            KeyError: one is missing.
            TypeError: a wrong dtype.
            ValueError: a wrong shape or value.
        """
        wanted = {self.stored_as.get(n, n): t for n, t in self._buffers.items() if t is not None}
        if "weight" in entries and "weight" not in wanted:
            found = entries["weight"].dtype
            raise TypeError(f"{name}: the checkpoint holds a weight of {found}, wanted codes; quantise after loading")
        for leaf, like in wanted.items():
            check_entry(name, leaf, entries.get(leaf), like)
        return {leaf: entries[leaf] for leaf in wanted}

    def float_shapes(self) -> dict[str, tuple[int, ...]]:
        """The float weights that a checkpoint has for this layer, by the last part of their names."""
        return {"weight": self.weight_shape}

    def after_loading(self) -> None:
        """Put right what a file does not hold."""

    @classmethod
    def from_linear(cls, linear: nn.Module, config: Any = None, **more: Any) -> Self:
        """Quantise a layer; it is left as it was, and bias and hooks are shared with it.

        Args:
            linear: An `nn.Linear`, or GPT-2's ``Conv1D``, whose weight is [K, N] and gets transposed.
            config: Settings of the new layer.
            more: As for `quantized_tensors`.

        Raises:
            TypeError: neither an `nn.Linear` nor a ``Conv1D``, or its weight is not floating.
            ValueError: the weight has a shape that the method cannot hold, or holds inf or NaN.
        """
        if isinstance(linear, QuantizedLinear) or not is_linear(linear):
            raise TypeError(f"cannot quantise a {type(linear).__name__}; use nn.Linear or transformers' Conv1D")
        weight = linear_weight(linear)
        if not weight.is_floating_point():
            raise TypeError(f"cannot quantise a weight of {weight.dtype}; use a floating weight")
        new = cls.empty_like(linear, config, device="meta")
        return new.take_over(linear, cls.quantized_tensors(weight, new.config, **more))

    @classmethod
    def empty_like(
        cls, linear: nn.Module, config: Any = None, *, device: torch.device | str | None = None, **more: Any
    ) -> Self:
        """An unfilled layer of the shape of an `nn.Linear` or ``Conv1D``, on the same device unless one is named."""
        weight = linear_weight(linear)
        (n, k), bias = weight.shape, linear.bias is not None
        new = cls(k, n, bias, config, device=device or weight.device, dtype=weight.dtype, **more)
        new.transposed = is_conv1d(linear)
        return new

    def take_over(self, linear: nn.Module, tensors: Mapping[str, Tensor]) -> Self:
        """Fill this layer, and take the place of ``linear``: its bias, its mode and its hooks."""
        self.fill(tensors)
        self.bias = linear.bias  # type: ignore[assignment]
        carry_hooks(linear, self)
        return self.train(linear.training)

    def fill(self, tensors: Mapping[str, Tensor]) -> None:
        """Put buffers in place."""
        for name, tensor in tensors.items():
            setattr(self, name, tensor)

    def to_linear(self, dtype: torch.dtype | None = None) -> nn.Linear:
        """Return an `nn.Linear` with the dequantised weight, in float32 by default; bias and hooks are shared."""
        linear = nn.Linear(self.in_features, self.out_features, bias=False, device="meta")
        linear.weight = nn.Parameter(self.dequantize(dtype or torch.float32))
        linear.bias = self.bias
        carry_hooks(self, linear)
        return linear.train(self.training)

    @property
    def num_hidden_parameters(self) -> int:
        """How many weights it stands for, see `eff_quant.count_parameters`."""
        return self.out_features * self.in_features

    @property
    def device(self) -> torch.device:
        """Where the codes are."""
        return next(t.device for t in self._buffers.values() if t is not None)

    @property
    def weight_shape(self) -> tuple[int, ...]:
        """Of the float weight: [N, K]."""
        return self.out_features, self.in_features

    @property
    def weight(self) -> Tensor:  # type: ignore[override]
        """The float weight [N, K], dequantised when it is used."""
        return self.dequantize(self.dtype) if torch.compiler.is_compiling() else WeightView(self)

    def set_weight(self, value: Tensor) -> None:
        """Quantise a float weight [N, K] into this layer, or take codes as they are, as a loader gives them.

        Raises:
            TypeError: neither floats nor codes of this layer.
            ValueError: another shape.
        """
        value = value.detach()
        if value.shape != (self.out_features, self.in_features):
            wanted = [self.out_features, self.in_features]
            raise ValueError(f"weight has shape {list(value.shape)}, wanted {wanted}")
        codes = next((n for n, stored in self.stored_as.items() if stored == "weight"), None)
        if value.is_floating_point() and value.dtype.itemsize > 1:
            with torch.no_grad():
                self.fill(self.requantized_tensors(value))
        elif codes is not None and self._buffers[codes].dtype == value.dtype:  # type: ignore[union-attr]
            setattr(self, codes, value)
        else:
            raise TypeError(f"{type(self).__name__} cannot hold a weight of {value.dtype}; use a float weight")

    def __setattr__(self, name: str, value: Any) -> None:
        if name == "weight":
            self.set_weight(value)
        else:
            super().__setattr__(name, value)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        self.dtype = dtype_after(fn, self.dtype, self.device)
        with as_integers(self, [n for n in self._buffers if n not in self.follow_casts]):
            super()._apply(fn, recurse)
        return self

    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        for name, stored in self.stored_as.items():
            if prefix + name in destination:
                destination[prefix + stored] = destination.pop(prefix + name)

    def _load_from_state_dict(
        self, state_dict: Any, prefix: str, metadata: Any, strict: bool, missing: list[str], *more: Any
    ) -> None:
        entries = {k.removeprefix(prefix): t for k, t in state_dict.items() if k.startswith(prefix)}
        if set(entries) - {"bias"}:
            checked = self.check_entries(prefix.removesuffix(".") or "the layer", entries)
            for stored, tensor in checked.items():
                state_dict.pop(prefix + stored, None)
                state_dict[prefix + self._own_name(stored)] = tensor
        absent: list[str] = []
        super()._load_from_state_dict(state_dict, prefix, metadata, strict, absent, *more)
        missing += [prefix + self.stored_as.get(k.removeprefix(prefix), k.removeprefix(prefix)) for k in absent]

    def _own_name(self, stored: str) -> str:
        return next((n for n, s in self.stored_as.items() if s == stored), stored)


class HasWeight(Protocol):
    """What holds a weight as codes: a layer, or one of the stacks of experts."""

    @property
    def dtype(self) -> torch.dtype:
        """Of the float weight."""
        ...

    @property
    def device(self) -> torch.device:
        """Where the codes are."""
        ...

    @property
    def weight_shape(self) -> tuple[int, ...]:
        """Of the float weight."""
        ...

    def dequantize(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """The float weight."""
        ...

    def set_weight(self, value: Tensor) -> None:
        """Quantise another weight."""
        ...


class WeightView(Tensor):
    """The float weight of a quantised layer: it has a shape, a dtype and a device, and its values are made when used.

    Reading the dtype costs nothing; any operation dequantises. It cannot be written in place, but ``view.data = w`` and
    ``view.data += d`` quantise the new weight into the layer, rounding it: so adapters merge.
    """

    _layer: HasWeight
    # transformers fills what is not marked so with random numbers
    _is_hf_initialized = True

    def __new__(cls, layer: HasWeight) -> WeightView:
        """The view of one layer."""
        view: WeightView = Tensor._make_wrapper_subclass(
            cls, layer.weight_shape, dtype=layer.dtype, device=layer.device
        )
        view._layer = layer
        return view

    @property
    def data(self) -> Tensor:
        """The values; assigning quantises."""
        return self._layer.dequantize(self.dtype)

    @data.setter
    def data(self, value: Tensor) -> None:
        self._layer.set_weight(value)

    def __repr__(self, *args: Any, **kwargs: Any) -> str:  # type: ignore[override]
        return f"WeightView of {self._layer}"

    def __deepcopy__(self, memo: Any) -> Tensor:
        return self.data

    def __reduce_ex__(self, protocol: Any) -> Any:
        return self.data.__reduce_ex__(protocol)

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:  # type: ignore[override]
        for argument, value in zip(func._schema.arguments, args, strict=False):
            if argument.alias_info is not None and argument.alias_info.is_write and isinstance(value, cls):
                raise TypeError(f"{func}: a quantised weight cannot be changed in place; assign to its .data")
        plain = tree_map_only(cls, lambda view: view._layer.dequantize(view.dtype), (args, kwargs or {}))
        return func(*plain[0], **plain[1])


def check_entry(name: str, leaf: str, found: Tensor | None, like: Tensor) -> None:
    """Compare an entry of a checkpoint with the buffer that it is for.

    Raises:
        KeyError, TypeError, ValueError: see `QuantizedLinear.check_entries`.
    """
    if found is None:
        raise KeyError(f"{name}: the checkpoint holds it quantised, but has no {leaf}")
    if found.dtype != like.dtype:
        raise TypeError(f"{name}: {leaf} has dtype {found.dtype}, wanted {like.dtype}; quantise after loading instead")
    if found.shape != like.shape:
        raise ValueError(f"{name}: {leaf} has shape {list(found.shape)}, wanted {list(like.shape)}")
