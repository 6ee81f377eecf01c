"""A linear layer of QuantVLA: 4-bit weights (or 8) that stay packed, 8-bit activations, integer products."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Self

import torch
from eff_kernels import int4_linear, int4_pack, int4_unpack, int8_linear, int8_static_linear
from torch import Tensor, nn

from eff_quant.layer import QuantizedLinear
from eff_quant.quantvla.config import W4A8Config
from eff_quant.quantvla.rotation import (
    BlockRotation,
    hadamard_rotation,
    rotate,
    svd_rotation,
    transposed,
    zigzag_permutation,
)
from eff_quant.quantvla.rounding import check_finite, round_rows


@dataclass(frozen=True, slots=True)
class LayerCalibration:
    """What `calibrate_activations` found for one layer.

    Attributes:
        input_scale: Step of each input column after permutation and rotation, float32 [K].
        rotation: The rotation of the inputs under which that was measured.
        permutation: The order of the inputs, int64 [K].
    """

    input_scale: Tensor
    rotation: BlockRotation | None
    permutation: Tensor | None


class W4A8Linear(QuantizedLinear):
    """Linear layer y = x @ W.T + bias with W in 4 or 8 bits and x in 8.

    x' = x P R, y = (int product of codes(x') and codes(W')) * scale, rotated back where ``row_rotation`` asks for it.

    It is an `nn.Linear`, so that hooks and accelerate find it, but its weight is a buffer and gets no gradient; the
    input and the bias do. Moving or casting the layer never quantises or rotates anything: codes, scales and rotations
    stay as they are, whatever the dtype.

    State dict: ``weight_packed`` uint8 [N, ceil(K / 2)] (codes from -8 to 7, low half first) or int8 [N, K] for 8 bits,
    ``scale`` float32 [N], ``bias``; with static scales ``input_scale`` float32 [K] (an even K: [K + K mod 2]); with
    rotation ``rotation_in`` float32 [n, B, B] and ``rotation_in_tail`` [r, r], the same with ``_out`` for rows;
    ``permutation`` int64 [K].

    Args:
        in_features: K.
        out_features: N.
        bias: Whether there is a bias.
        config: Settings.
        device, dtype: Of the bias; the rest has its own dtypes.

    A fresh layer holds zeros; `from_linear` or `load_state_dict` fill it.
    """

    config_class = W4A8Config

    weight_packed: Tensor
    scale: Tensor
    input_scale: Tensor | None
    rotation_in: Tensor | None
    rotation_in_tail: Tensor | None
    rotation_out: Tensor | None
    rotation_out_tail: Tensor | None
    permutation: Tensor | None

    def empty_tensors(self, device: torch.device | str | None, **more: Any) -> dict[str, Tensor | None]:
        """Zeros."""
        shapes = _buffers(self.in_features, self.out_features, self.config)
        return {
            name: None if shape is None else torch.zeros(shape, dtype=kind, device=device)
            for name, (shape, kind) in shapes.items()
        }

    @classmethod
    def from_linear(  # type: ignore[override]
        cls, linear: nn.Module, config: W4A8Config | None = None, calibration: LayerCalibration | None = None
    ) -> Self:
        """Quantise an `nn.Linear`; it is left as it was, and the bias is shared with it.

        Args:
            linear: The layer.
            config: Settings of the new layer.
            calibration: Needed for ``activation="static_folded"``.

        Raises:
            TypeError: not an `nn.Linear` with a floating weight.
            ValueError: the weight holds inf or NaN, or static scales are asked for without calibration.
        """
        return super().from_linear(linear, config, calibration=calibration)

    @classmethod
    def quantized_tensors(  # type: ignore[override]
        cls, weight: Tensor, config: W4A8Config | None = None, calibration: LayerCalibration | None = None
    ) -> dict[str, Tensor]:
        """The buffers, by name, that hold ``weight`` [N, K]. ``weight`` is left as it was."""
        if weight.is_meta:
            shapes = _buffers(weight.shape[1], weight.shape[0], config or W4A8Config())
            return {n: torch.empty(s, dtype=d, device="meta") for n, (s, d) in shapes.items() if s is not None}
        check_finite(weight)
        config = config or W4A8Config()
        if calibration is None:
            if config.activation == "static_folded":
                raise ValueError(
                    "activation='static_folded' needs scales of the activations; get them from "
                    "calibrate_activations(model, batches, layout, config), or use activation='dynamic_token'"
                )
            calibration = LayerCalibration(torch.empty(0), *input_rotation(weight, config))
        tensors = {"permutation": calibration.permutation}
        rotated = rotated_weight(weight, calibration.rotation, calibration.permutation)
        tensors |= _named("rotation_in", calibration.rotation)
        if config.row_rotation:
            # S = U^T of each block of rows: W' has rows in falling order of energy, and y' S takes it back.
            out = _rotation(rotated.T, config)
            rotated = rotate(rotated.T, out).T
            tensors |= _named("rotation_out", transposed(out))
        if config.activation == "static_folded":
            rotated = rotated * calibration.input_scale
            tensors["input_scale"] = _even(calibration.input_scale, config.weight_bits, 1.0)
        codes, tensors["scale"] = round_rows(rotated, config.weight_bits, config.candidates)
        tensors["weight_packed"] = int4_pack(_even(codes, 4, 0)) if config.weight_bits == 4 else codes
        return {name: t.to(weight.device).contiguous() for name, t in tensors.items() if t is not None}

    def forward(self, input: Tensor) -> Tensor:
        """Return x @ W.T + bias for an input x [..., K]."""
        if input.shape[-1:] != (self.in_features,):
            raise ValueError(
                f"x has shape {list(input.shape)}; the last dimension must be in_features={self.in_features}"
            )
        if not input.is_floating_point():
            raise TypeError(f"x must be of a float dtype, got {input.dtype}")
        dtype = self.config.out_dtype or input.dtype
        turned = self.rotate_input(input)
        if self.rotation_out is None:
            return self._product(turned, self.bias, dtype)
        y = rotate(self._product(turned, None, turned.dtype), BlockRotation(self.rotation_out, self.rotation_out_tail))
        return (y if self.bias is None else y + self.bias).to(dtype)

    def rotate_input(self, x: Tensor) -> Tensor:
        """X P R: what the integer product gets, before it is rounded."""
        if self.permutation is not None:
            x = x.index_select(-1, self.permutation)
        if self.rotation_in is not None:
            x = rotate(x, BlockRotation(self.rotation_in, self.rotation_in_tail))
        return _even(x, self.config.weight_bits, 0)

    def _product(self, x: Tensor, bias: Tensor | None, dtype: torch.dtype) -> Tensor:
        options: Any = {"out_dtype": dtype, "backend": self.config.backend}
        if self.config.weight_bits == 4:
            return int4_linear(x, self.weight_packed, self.scale, bias, input_scale=self.input_scale, **options)
        if self.input_scale is not None:
            return int8_static_linear(x, self.weight_packed, self.scale, self.input_scale, bias, **options)
        return int8_linear(x, self.weight_packed, self.scale * 127, bias, **options)

    def codes(self) -> Tensor:
        """The weight's codes, int8 [N, K], of the rotated (and folded) weight."""
        packed = self.weight_packed
        return int4_unpack(packed)[:, : self.in_features] if self.config.weight_bits == 4 else packed

    def dequantize(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """Return the weight [N, K] that the layer stands for, in the original coordinates."""
        weight = self.codes() * self.scale[:, None]
        if self.input_scale is not None:
            weight = weight / self.input_scale[: self.in_features]
        if self.rotation_out is not None:
            weight = rotate(weight.T, BlockRotation(self.rotation_out, self.rotation_out_tail)).T
        if self.rotation_in is not None:
            weight = rotate(weight, transposed(BlockRotation(self.rotation_in, self.rotation_in_tail)))
        if self.permutation is not None:
            weight = weight[:, self.permutation.argsort()]
        return weight.to(dtype)

    def requantized_tensors(self, weight: Tensor) -> dict[str, Tensor]:
        """With the same static scales."""
        return self.quantized_tensors(weight, self.config, self.calibration())

    def calibration(self) -> LayerCalibration | None:
        """What a layer with static scales was made with; None with dynamic ones."""
        if self.input_scale is None:
            return None
        rotation = None if self.rotation_in is None else BlockRotation(self.rotation_in, self.rotation_in_tail)
        return LayerCalibration(self.input_scale[: self.in_features], rotation, self.permutation)

    def extra_repr(self) -> str:
        """What ``print(model)`` shows between the brackets."""
        c = self.config
        return (
            f"{super().extra_repr()}, weight_bits={c.weight_bits}, activation={c.activation!r}, rotation={c.rotation!r}"
        )


def input_rotation(
    weight: Tensor, config: W4A8Config, energy: Tensor | None = None
) -> tuple[BlockRotation | None, Tensor | None]:
    """Rotation and order of the input columns for ``weight`` [N, K]; each None where the config asks for none.

    Args:
        weight: The layer's weight.
        config: Settings.
        energy: Energy of each column for the order; by default that of the weight.
    """
    if config.rotation is None:
        return None, None
    permutation = None
    if config.permute:
        energy = weight.detach().double().square().sum(0) if energy is None else energy
        permutation = zigzag_permutation(energy, config.block)
        weight = weight[:, permutation]
    return _rotation(weight, config), permutation


def rotated_weight(weight: Tensor, rotation: BlockRotation | None, permutation: Tensor | None) -> Tensor:
    """W P R in float32; ``weight`` is left as it was."""
    weight = weight.detach().float()
    if permutation is not None:
        weight = weight[:, permutation]
    return weight if rotation is None else rotate(weight, rotation)


def _rotation(weight: Tensor, config: W4A8Config) -> BlockRotation:
    if config.rotation == "hadamard":
        return hadamard_rotation(weight.shape[1], config.block, weight.device)
    return svd_rotation(weight, config.block)


def _named(name: str, rotation: BlockRotation | None) -> dict[str, Tensor | None]:
    return {} if rotation is None else {name: rotation.blocks, name + "_tail": rotation.tail}


def _even(x: Tensor, bits: int, fill: float) -> Tensor:
    """``x`` [..., K], with one more column where 4-bit codes could not be packed in pairs."""
    return nn.functional.pad(x, (0, 1), value=fill) if bits == 4 and x.shape[-1] % 2 else x


def _buffers(k: int, n: int, config: W4A8Config) -> dict[str, tuple[tuple[int, ...] | None, torch.dtype]]:
    """Shapes and dtypes of a layer's buffers; the shape is None for one that the config does not need."""
    four, real = config.weight_bits == 4, torch.float32
    shapes: dict[str, tuple[tuple[int, ...] | None, torch.dtype]] = {
        "weight_packed": ((n, (k + 1) // 2), torch.uint8) if four else ((n, k), torch.int8),
        "scale": ((n,), real),
        "input_scale": (((k + k % 2 if four else k),) if config.activation == "static_folded" else None, real),
        "permutation": ((k,) if config.permute else None, torch.int64),
    }
    for name, size, wanted in (("in", k, config.rotation is not None), ("out", n, config.row_rotation)):
        blocks, rest = divmod(size, config.block)
        count = min(blocks, 1) if config.rotation == "hadamard" else blocks
        shapes[f"rotation_{name}"] = ((count, config.block, config.block) if wanted else None, real)
        shapes[f"rotation_{name}_tail"] = ((rest, rest) if wanted and rest else None, real)
    return shapes
