"""A linear layer with FP8 weights."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from eff_kernels import fp8_linear, fp8_quantize
from torch import Tensor, nn

from eff_quant.buffers import as_integers
from eff_quant.fp8_qat.config import FP8Config
from eff_quant.linears import is_conv1d, linear_weight

_BLOCK = 2**22  # weights that are quantised at a time


class FP8Linear(nn.Linear):
    """Linear layer y = x @ W.T + bias with W in FP8, one scale per output row.

    It is an `nn.Linear`, so that PEFT, accelerate and hooks find it, but its weight is a buffer and gets no gradient;
    the input and the bias do (the gradient to x uses the dequantised weight, straight through the rounding of x).

    The state dict is that of compressed-tensors' format float-quantized: ``weight`` float8 [N, K], ``weight_scale``
    float32 [N, 1], ``bias``. A scale in another float dtype, or one for the whole tensor, is read, too. Moving or
    casting the layer never quantises anything: ``.to(torch.bfloat16)`` leaves codes and scales as they are and casts
    the bias.

    Args:
        in_features: K.
        out_features: N.
        bias: Whether there is a bias.
        config: Settings; activations, dtype, out_dtype and backend act here.
        device: Of all tensors.
        dtype: Of the bias.

    A fresh layer holds zeros; `from_linear` or `load_state_dict` fill it.
    """

    # transformers has nothing to initialise here
    _is_hf_initialized = True

    weight_scale: Tensor

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = True,
        config: FP8Config | None = None,
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        nn.Module.__init__(self)  # not nn.Linear's: it would allocate a float weight
        self.in_features = in_features
        self.out_features = out_features
        self.config = config or FP8Config()
        # Whether the weight came from a Conv1D, which libraries that know only nn.Linear cannot load.
        self.transposed = False
        codes = torch.zeros(out_features, in_features, dtype=torch.uint8, device=device)
        self.register_buffer("weight", codes.view(self.config.torch_dtype))
        self.register_buffer("weight_scale", torch.ones(out_features, 1, dtype=torch.float32, device=device))
        self.register_parameter(
            "bias", nn.Parameter(torch.zeros(out_features, device=device, dtype=dtype)) if bias else None
        )

    @classmethod
    def from_linear(cls, linear: nn.Module, config: FP8Config | None = None) -> FP8Linear:
        """Quantise a layer; it is left as it was, and the bias is shared with it.

        Args:
            linear: An `nn.Linear`, or GPT-2's ``Conv1D``, whose weight is [K, N] and gets transposed.
            config: Settings of the new layer.

        Raises:
            TypeError: neither an `nn.Linear` nor a ``Conv1D``.
            ValueError: the weight holds inf or NaN.
        """
        if isinstance(linear, cls) or not (isinstance(linear, nn.Linear) or is_conv1d(linear)):
            raise TypeError(f"cannot quantise a {type(linear).__name__}; use nn.Linear or transformers' Conv1D")
        new = cls.empty_like(linear, config, device="meta")
        for name, value in cls.quantized_tensors(linear_weight(linear), new.config).items():
            setattr(new, name, value)
        new.bias = linear.bias  # type: ignore[assignment]
        return new.train(linear.training)

    @classmethod
    def empty_like(
        cls, linear: nn.Module, config: FP8Config | None = None, *, device: torch.device | str | None = None
    ) -> FP8Linear:
        """An unfilled layer of the shape of an `nn.Linear` or ``Conv1D``, on the same device unless one is named."""
        weight = linear_weight(linear)
        n, k = weight.shape
        new = cls(k, n, linear.bias is not None, config, device=device or weight.device, dtype=weight.dtype)
        new.transposed = is_conv1d(linear)
        return new

    @staticmethod
    def quantized_tensors(weight: Tensor, config: FP8Config) -> dict[str, Tensor]:
        """The buffers, by their names in the state dict, that hold ``weight`` [N, K].

        Raises:
            ValueError: the weight holds inf or NaN.
        """
        rows = max(1, _BLOCK // max(1, weight.shape[1]))  # few at a time, for the sake of peak memory
        parts = [
            fp8_quantize(part, dtype=config.torch_dtype, power_of_two=config.power_of_two)
            for part in weight.detach().split(rows)
        ]
        scale = torch.cat([p.scale for p in parts])
        if not scale.isfinite().all():
            row = int((~scale.isfinite()).nonzero()[0])
            raise ValueError(f"weight row {row} holds inf or NaN; FP8 cannot represent it")
        codes = torch.cat([p.codes.view(torch.uint8) for p in parts]).view(config.torch_dtype)
        return {"weight": codes, "weight_scale": scale[:, None]}

    def forward(self, x: Tensor) -> Tensor:
        """Return x @ W.T + bias for x [..., K]."""
        config = self.config
        return fp8_linear(
            x,
            self.weight,
            self.weight_scale.view(-1),
            self.bias,
            activations=config.activations,
            out_dtype=config.out_dtype,
            backend=config.backend,
        )

    def dequantize(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """Return the weight [N, K] that the layer stands for: codes * scale."""
        return (self.weight.float() * self.weight_scale).to(dtype)

    def to_linear(self, dtype: torch.dtype = torch.float32) -> nn.Linear:
        """Return an `nn.Linear` with the dequantised weight; the bias is shared."""
        linear = nn.Linear(self.in_features, self.out_features, bias=False, device="meta")
        linear.weight = nn.Parameter(self.dequantize(dtype))
        linear.bias = self.bias
        return linear.train(self.training)

    def extra_repr(self) -> str:
        """What ``print(model)`` shows between the brackets."""
        return f"{super().extra_repr()}, dtype={self.config.dtype!r}, activations={self.config.activations!r}"

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> FP8Linear:
        dtype = fn(torch.empty(0, dtype=torch.uint8, device=self.weight.device)).dtype
        if dtype != torch.uint8:
            raise TypeError(f"FP8 weights cannot be cast to {dtype}; use dequantize_(model) for float weights")
        with as_integers(self):
            super()._apply(fn, recurse)
        return self

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        weight = state_dict.get(prefix + "weight")
        if weight is not None:
            scale = state_dict.get(prefix + "weight_scale")
            shape = (self.out_features, self.in_features)
            state_dict[prefix + "weight_scale"] = check_fp8_tensors(
                prefix.removesuffix("."), weight, scale, self.config.torch_dtype, shape
            )
        super()._load_from_state_dict(state_dict, prefix, *args)


def check_fp8_tensors(
    name: str, weight: Tensor, scale: Tensor | None, dtype: torch.dtype, shape: tuple[int, int]
) -> Tensor:
    """Check what a checkpoint holds of the layer ``name`` and return its scale as float32 [N, 1].

    Raises:
        TypeError: the weight is not of ``dtype``.
        KeyError: there is no scale.
        ValueError: the shapes are not those of a weight and one scale for each row, or one for all.
    """
    name = name or "the layer"
    if weight.dtype != dtype:
        raise TypeError(f"{name}: weight has dtype {weight.dtype}, wanted {dtype}; quantise after loading instead")
    if scale is None:
        raise KeyError(f"{name}: FP8 weight without its scales weight_scale")
    if tuple(weight.shape) != shape:
        raise ValueError(f"{name}: weight has shape {list(weight.shape)}, wanted {list(shape)}")
    if scale.numel() != 1 and scale.shape not in ((shape[0],), (shape[0], 1)):
        raise ValueError(
            f"{name}: weight_scale has shape {list(scale.shape)}, wanted [{shape[0]}, 1] or one scale for the tensor"
        )
    return scale.float().reshape(-1, 1).expand(shape[0], 1).contiguous()
