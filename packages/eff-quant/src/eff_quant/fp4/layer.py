"""A linear layer with FP4 weights, which stay packed."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from eff_kernels import FP4Codes, fp4_linear
from torch import Tensor, nn

from eff_quant.buffers import as_integers
from eff_quant.fp4.check import check_fp4_tensors
from eff_quant.fp4.config import FP4Config
from eff_quant.fp4.weight import FP4Weight, dequantize_weight, empty_weight, quantize_weight, shape_refusal
from eff_quant.linears import is_conv1d, linear_weight


class FP4Linear(nn.Linear):
    """Linear layer y = x @ W.T + bias with W in NVFP4 or MXFP4, 4.5 or 4.25 bits a weight.

    It is an `nn.Linear`, so that PEFT, accelerate and hooks find it, but its weight is in buffers and gets no gradient;
    the input and the bias do (the gradient to x uses the dequantised weight, straight through the rounding of x).

    The state dict is that of compressed-tensors: ``weight_packed`` uint8 [N, K/2] (low nibble: even column),
    ``weight_scale`` float8_e4m3fn [N, K/16] (nvfp4) or uint8 [N, K/32] (mxfp4), ``weight_global_scale`` float32 [1]
    (nvfp4; the reciprocal of what multiplies the codes), ``input_global_scale`` float32 [1] (static activations, also a
    reciprocal), ``bias``. Moving or casting the layer never quantises anything: ``.to(torch.bfloat16)`` leaves codes
    and scales as they are and casts the bias.

    Args:
        in_features: K, a multiple of the block (16 or 32).
        out_features: N.
        bias: Whether there is a bias.
        config: Settings; format, activations, out_dtype and backend act here.
        device: Of all tensors.
        dtype: Of the bias, and of `weight`.

    A fresh layer holds zeros; `from_linear` or `load_state_dict` fill it.

    Raises:
        ValueError: in_features is not a multiple of the block.
    """

    # transformers has nothing to initialise here; it would dequantise each layer to do so, see `weight`
    _is_hf_initialized = True

    weight_packed: Tensor
    weight_scale: Tensor
    weight_global_scale: Tensor | None
    input_global_scale: Tensor | None

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = True,
        config: FP4Config | None = None,
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        nn.Module.__init__(self)  # not nn.Linear's: it would allocate a float weight
        self.in_features = in_features
        self.out_features = out_features
        self.config = config or FP4Config()
        if reason := shape_refusal(in_features, self.config.format):
            raise ValueError(reason)
        self.dtype = dtype or torch.get_default_dtype()
        # Whether the weight came from a Conv1D, which libraries that know only nn.Linear cannot load.
        self.transposed = False
        self._calibrated = False
        weight = empty_weight(out_features, in_features, self.config.format, device)
        self.register_buffer("weight_packed", weight.packed)
        self.register_buffer("weight_scale", weight.scale)
        self.register_buffer("weight_global_scale", weight.reciprocal)
        static = self.config.activations == "static"
        self.register_buffer(
            "input_global_scale", torch.full((1,), torch.nan, dtype=torch.float32, device=device) if static else None
        )
        self.register_parameter(
            "bias", nn.Parameter(torch.zeros(out_features, device=device, dtype=dtype)) if bias else None
        )

    @classmethod
    def from_linear(
        cls, linear: nn.Module, config: FP4Config | None = None, *, reciprocal: Tensor | None = None
    ) -> FP4Linear:
        """Quantise a layer; it is left as it was, and the bias is shared with it.

        Args:
            linear: An `nn.Linear`, or GPT-2's ``Conv1D``, whose weight is [K, N] and gets transposed.
            config: Settings of the new layer.
            reciprocal: The tensor scale in the convention of files, where a group of layers shares one (see
                `shared_reciprocal_scale`).

        Raises:
            TypeError: neither an `nn.Linear` nor a ``Conv1D``.
            ValueError: in_features is not a multiple of the block, or the weight holds inf or NaN.
        """
        if isinstance(linear, cls) or not (isinstance(linear, nn.Linear) or is_conv1d(linear)):
            raise TypeError(f"cannot quantise a {type(linear).__name__}; use nn.Linear or transformers' Conv1D")
        new = cls.empty_like(linear, config, device="meta")
        new.fill(linear_weight(linear), reciprocal=reciprocal)
        new.bias = linear.bias  # type: ignore[assignment]
        return new.train(linear.training)

    @classmethod
    def empty_like(
        cls, linear: nn.Module, config: FP4Config | None = None, *, device: torch.device | str | None = None
    ) -> FP4Linear:
        """An unfilled layer of the shape of an `nn.Linear` or ``Conv1D``, on the same device unless one is named."""
        weight = linear_weight(linear)
        out_features, in_features = weight.shape
        new = cls(
            in_features,
            out_features,
            linear.bias is not None,
            config,
            device=device or weight.device,
            dtype=weight.dtype,
        )
        new.transposed = is_conv1d(linear)
        return new

    def fill(self, weight: Tensor, *, reciprocal: Tensor | None = None) -> None:
        """Quantise ``weight`` [N, K] into this layer, on the weight's device."""
        for name, value in self.quantized_tensors(weight, self.config, reciprocal=reciprocal).items():
            setattr(self, name, value)

    @staticmethod
    def quantized_tensors(weight: Tensor, config: FP4Config, *, reciprocal: Tensor | None = None) -> dict[str, Tensor]:
        """The buffers, by their names in the state dict, that hold ``weight`` [N, K].

        With static activations the input's scale is NaN until it is calibrated.
        """
        packed, scale, reciprocal = quantize_weight(weight, config, reciprocal=reciprocal)
        tensors = {"weight_packed": packed, "weight_scale": scale}
        if reciprocal is not None:
            tensors["weight_global_scale"] = reciprocal
        if config.activations == "static":
            tensors["input_global_scale"] = torch.full((1,), torch.nan, dtype=torch.float32, device=weight.device)
        return tensors

    @property
    def codes(self) -> FP4Codes:
        """The weight as the ops of eff_kernels take it; its tensor scale multiplies."""
        return FP4Weight(self.weight_packed, self.weight_scale, self.weight_global_scale).codes

    @property
    def weight(self) -> Tensor:  # type: ignore[override]
        """The dequantised weight, for code that looks at it; computed anew each time."""
        return self.dequantize(self.dtype)

    def forward(self, x: Tensor) -> Tensor:
        """Return x @ W.T + bias for x [..., K].

        Raises:
            RuntimeError: static activations without a calibrated scale (compiled: the result is NaN).
        """
        config = self.config
        if config.activations == "static" and not self._calibrated and not torch.compiler.is_compiling():
            self._check_calibrated()
        weight_scale, input_scale = self.weight_global_scale, self.input_global_scale
        rounding: dict[str, Any] = {}
        if config.activations is not None:
            rounding = {
                "activations": "dynamic",
                "input_global_scale": None if input_scale is None else input_scale.reciprocal(),
                "scale_rounding": config.scale_rounding,
            }
        return fp4_linear(
            x,
            self.weight_packed,
            self.weight_scale,
            None if weight_scale is None else weight_scale.reciprocal(),
            self.bias,
            format=config.format,
            out_dtype=config.out_dtype,
            backend=config.backend,
            **rounding,
        )

    def _check_calibrated(self) -> None:
        scale = self.input_global_scale
        if scale is not None and not torch.isfinite(scale).all():
            raise RuntimeError(
                f"FP4Linear({self.extra_repr()}) has no scale for its input yet; "
                "use calibrate_fp4(model, batches).set_input_scales(model)"
            )
        self._calibrated = True

    def dequantize(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """Return the weight [N, K] that the layer stands for."""
        return dequantize_weight(self.codes, self.config.format, dtype)

    def to_linear(self, dtype: torch.dtype = torch.float32) -> nn.Linear:
        """Return an `nn.Linear` with the dequantised weight; the bias is shared."""
        linear = nn.Linear(self.in_features, self.out_features, bias=False, device="meta")
        linear.weight = nn.Parameter(self.dequantize(dtype))
        linear.bias = self.bias
        return linear.train(self.training)

    def extra_repr(self) -> str:
        """What ``print(model)`` shows between the brackets."""
        text = f"{super().extra_repr()}, format={self.config.format!r}"
        return text + (f", activations={self.config.activations!r}" if self.config.activations else "")

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> FP4Linear:
        dtype = fn(torch.empty(0, dtype=torch.uint8, device=self.weight_packed.device)).dtype
        if dtype != torch.uint8:
            raise TypeError(f"FP4 weights cannot be cast to {dtype}; use dequantize_(model) for float weights")
        self.dtype = fn(torch.empty(0, dtype=self.dtype, device=self.weight_packed.device)).dtype
        with as_integers(self):
            super()._apply(fn, recurse)
        return self

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        if prefix + "weight" in state_dict and prefix + "weight_packed" not in state_dict:
            name = prefix.removesuffix(".") or "the layer"
            raise TypeError(f"{name}: the state dict holds a float weight, wanted FP4; quantise after loading instead")
        if prefix + "weight_packed" in state_dict:
            leaves = {n.removeprefix(prefix): t for n, t in state_dict.items() if n.startswith(prefix)}
            shape = (self.out_features, self.in_features)
            checked = check_fp4_tensors(prefix.removesuffix("."), leaves, self.config.format, shape)
            state_dict.update({prefix + leaf: t for leaf, t in checked.items()})
        super()._load_from_state_dict(state_dict, prefix, *args)
