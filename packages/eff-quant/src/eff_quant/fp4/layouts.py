"""The same FP4 weight in the tensor layouts of other libraries, without a change of any code.

All of them keep the even column in the low nibble; they differ in names, in the shape of the blocks, in the order of
the scales and in whether the tensor scale multiplies or divides.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal, get_args

import torch
from eff_kernels import FP4Codes
from torch import Tensor

from eff_quant.fp4.check import check_fp4_tensors
from eff_quant.fp4.config import BLOCK
from eff_quant.settings import check_choice

Layout = Literal["compressed-tensors", "modelopt", "torchao", "torchao-swizzled", "gpt-oss"]

# The tile of scales that tensor cores read in one piece, and its shape when swizzled.
TILE = (128, 4)


def to_layout(codes: FP4Codes, layout: Layout) -> dict[str, Tensor]:
    """The tensors that hold a weight in another library's layout, by their names there.

    Args:
        codes: A weight [N, K]; leading axes (experts) are kept by "gpt-oss" and "torchao".
        layout: ``"compressed-tensors"``: weight_packed, weight_scale, weight_global_scale (reciprocal).
            ``"modelopt"`` (nvfp4): weight, weight_scale, weight_scale_2.
            ``"torchao"``: qdata, scale, per_tensor_scale; ``"torchao-swizzled"`` with the scales in the order of tensor
            cores. ``"gpt-oss"`` (mxfp4): blocks [..., N, K/32, 16], scales.

    Raises:
        ValueError: an unknown layout, or one that does not have the format of the codes.
    """
    check_choice("layout", layout, get_args(Layout))
    format = _format_of(codes)
    _check_format(layout, format)
    packed, scale, global_scale = codes
    if layout == "compressed-tensors":
        tensors = {"weight_packed": packed, "weight_scale": scale}
        return tensors if global_scale is None else {**tensors, "weight_global_scale": 1 / global_scale.reshape(1)}
    if layout == "modelopt" and global_scale is not None:
        return {"weight": packed, "weight_scale": scale, "weight_scale_2": global_scale.reshape(())}
    if layout == "gpt-oss":
        return {"blocks": packed.unflatten(-1, (-1, BLOCK["mxfp4"] // 2)), "scales": scale}
    if layout == "torchao-swizzled":
        scale = swizzle_scales(scale)
    if format == "mxfp4":
        return {"qdata": packed, "scale": scale.view(torch.float8_e8m0fnu)}
    tensors = {"qdata": packed, "scale": scale}
    return tensors if global_scale is None else {**tensors, "per_tensor_scale": global_scale.reshape(())}


def from_layout(tensors: Mapping[str, Tensor], layout: Layout, *, format: str | None = None) -> FP4Codes:
    """Read what `to_layout` writes, and what the libraries themselves write.

    Args:
        tensors: By their names in the layout.
        layout: See `to_layout`.
        format: ``"nvfp4"`` or ``"mxfp4"``; by default told by the dtype of the scales.

    Returns:
        Codes with the tensor scale that multiplies.

    Raises:
        KeyError: a tensor is missing.
        TypeError: a wrong dtype.
        ValueError: a wrong shape or value, an unknown layout, or one that does not have this format.
    """
    check_choice("layout", layout, get_args(Layout))
    names = {
        "compressed-tensors": ("weight_packed", "weight_scale"),
        "modelopt": ("weight", "weight_scale"),
        "gpt-oss": ("blocks", "scales"),
    }.get(layout, ("qdata", "scale"))
    if missing := [n for n in names if n not in tensors]:
        raise KeyError(f"layout {layout!r} needs {list(names)}; {missing} missing, got {sorted(tensors)}")
    packed, scale = (tensors[n] for n in names)
    format = format or ("nvfp4" if scale.dtype == torch.float8_e4m3fn else "mxfp4")
    _check_format(layout, format)
    if layout == "gpt-oss":
        if packed.ndim < 3 or packed.shape[-1] != BLOCK["mxfp4"] // 2:
            raise ValueError(f"blocks have shape {list(packed.shape)}, wanted [..., N, K/32, 16]")
        packed = packed.flatten(-2)
    if layout == "torchao-swizzled":
        columns = 2 * packed.shape[-1] // BLOCK[format]
        scale = unswizzle_scales(scale, (*packed.shape[:-1], columns))
    flat = {"weight_packed": packed.flatten(0, -2), "weight_scale": scale.flatten(0, -2)}
    if format == "nvfp4":
        flat["weight_global_scale"] = _reciprocal(tensors, layout)
    checked = check_fp4_tensors("", flat, format)
    global_scale = 1 / checked["weight_global_scale"].reshape(()) if format == "nvfp4" else None
    return FP4Codes(
        checked["weight_packed"].reshape(packed.shape), checked["weight_scale"].reshape(scale.shape), global_scale
    )


def swizzle_scales(scale: Tensor) -> Tensor:
    """Put block scales [..., N, C] in the order of tensor cores, [..., 32 * ceil(N / 128), 16 * ceil(C / 4)].

    Each tile of 128 rows and 4 columns, padded with zeros, becomes 32 rows of 16: the four groups of 32 rows side by
    side.
    """
    *leading, rows, columns = scale.shape
    tiles = (-(-rows // TILE[0]), -(-columns // TILE[1]))
    padded = torch.zeros(*leading, tiles[0] * TILE[0], tiles[1] * TILE[1], dtype=torch.uint8, device=scale.device)
    padded[..., :rows, :columns] = scale.view(torch.uint8)
    # tile row, group of 32, row in it, tile column, column in it
    parts = padded.unflatten(-1, (tiles[1], 4)).unflatten(-3, (tiles[0], 4, 32))
    order = parts.movedim((-5, -2, -3, -4, -1), (-5, -4, -3, -2, -1))
    return order.reshape(*leading, tiles[0] * 32, tiles[1] * 16).view(scale.dtype)


def unswizzle_scales(scale: Tensor, shape: tuple[int, ...]) -> Tensor:
    """Undo `swizzle_scales`; ``shape`` is that of the scales, [..., N, C].

    Raises:
        ValueError: the swizzled scales have another number of tiles.
    """
    *leading, rows, columns = shape
    tiles = (-(-rows // TILE[0]), -(-columns // TILE[1]))
    wanted = tiles[0] * tiles[1] * TILE[0] * TILE[1]
    for size in leading:
        wanted *= size
    if scale.numel() != wanted:
        raise ValueError(
            f"swizzled scales {list(scale.shape)} do not fit scales {list(shape)}: wanted {wanted} numbers"
        )
    parts = scale.view(torch.uint8).reshape(*leading, tiles[0], tiles[1], 32, 4, 4)
    order = parts.movedim((-5, -4, -3, -2, -1), (-5, -2, -3, -4, -1))
    plain = order.reshape(*leading, tiles[0] * TILE[0], tiles[1] * TILE[1])[..., :rows, :columns]
    return plain.contiguous().view(scale.dtype)


def _reciprocal(tensors: Mapping[str, Tensor], layout: str) -> Tensor:
    """The tensor scale as compressed-tensors holds it."""
    if layout == "compressed-tensors":
        name, multiplies = "weight_global_scale", False
    else:
        name, multiplies = "weight_scale_2" if layout == "modelopt" else "per_tensor_scale", True
    scale = tensors.get(name)
    if scale is None and layout.startswith("torchao"):
        return torch.ones(1)  # torchao also has NVFP4 without a tensor scale
    if scale is None:
        raise KeyError(f"layout {layout!r} needs {name}, got {sorted(tensors)}")
    if scale.numel() != 1:
        raise ValueError(f"{name} has shape {list(scale.shape)}, wanted one number; convert each expert by itself")
    return 1 / scale.reshape(1) if multiplies else scale.reshape(1)


def _format_of(codes: FP4Codes) -> str:
    return "nvfp4" if codes.scale.dtype == torch.float8_e4m3fn else "mxfp4"


def _check_format(layout: str, format: str) -> None:
    only = {"modelopt": "nvfp4", "gpt-oss": "mxfp4"}.get(layout, format)
    if only != format:
        raise ValueError(f"layout {layout!r} holds {only}, got {format}")
