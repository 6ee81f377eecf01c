"""Weights of 4 bits as GPTQ, AWQ and compressed-tensors store them, read into groups of 32 columns.

All three mean scale * (code - zero) with a scale and a zero for each row and group of inputs; they differ in how eight
codes lie in an int32. Nothing is rounded on the way: a zero becomes a minimum of -scale * zero.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from eff_kernels import GroupWeight
from eff_kernels.ops.group_linear import GROUP
from torch import Tensor

_AWQ_COLUMNS = (0, 2, 4, 6, 1, 3, 5, 7)  # where the eight halves of a byte of an int32 belong
_MIDDLE = 8

Get = Callable[[str, tuple[int, ...]], Tensor]


@dataclass(frozen=True, slots=True)
class Int4File:
    """How a folder stores its weights of 4 bits.

    Attributes:
        method: "gptq", "awq" or "compressed-tensors".
        group_size: Inputs that share a scale; 0 is all of a row.
        zeros_are_less: Whether stored zeros are one too small, as in the first format of GPTQ.
        symmetric: Whether compressed-tensors stores no zeros, all of them being 8.
    """

    method: str
    group_size: int
    zeros_are_less: bool = False
    symmetric: bool = False


def int4_settings(entry: Mapping[str, Any] | None) -> Int4File | None:
    """What ``quantization_config`` of a config.json says of weights of 4 bits; None where it says something else.

    Raises:
        ValueError: they are stored in a way that is not read here.
    """
    method = (entry or {}).get("quant_method")
    if entry is None or method not in ("gptq", "awq", "compressed-tensors"):
        return None
    if method == "compressed-tensors":
        return _compressed_tensors(entry)
    if (bits := entry.get("bits")) != 4:
        raise ValueError(f"{method} with {bits} bits is not read, only with 4")
    if method == "awq":
        if (version := str(entry.get("version", "gemm")).lower()) != "gemm":
            raise ValueError(f"awq of version {version!r} is not read, only 'gemm'")
        return Int4File("awq", _group_size(entry.get("group_size")))
    form = entry.get("checkpoint_format", "gptq")
    if form not in ("gptq", "gptq_v2"):
        raise ValueError(f"gptq with checkpoint_format={form!r} is not read, only 'gptq' and 'gptq_v2'")
    return Int4File("gptq", _group_size(entry.get("group_size")), zeros_are_less=form == "gptq")


def _compressed_tensors(entry: Mapping[str, Any]) -> Int4File | None:
    groups = list((entry.get("config_groups") or {}).values())
    if not any((g.get("format") or entry.get("format")) == "pack-quantized" for g in groups):
        return None
    if len(groups) != 1:
        raise ValueError(f"compressed-tensors with {len(groups)} groups of layers, one of them packed, is not read")
    weights = groups[0].get("weights") or {}
    if weights.get("num_bits") != 4 or weights.get("type") != "int" or groups[0].get("input_activations"):
        raise ValueError(f"compressed-tensors 'pack-quantized' is read for 4-bit weights alone, got {groups[0]}"[:300])
    if (strategy := weights.get("strategy")) not in ("group", "channel"):
        raise ValueError(f"compressed-tensors with the strategy {strategy!r} is not read, only 'group' and 'channel'")
    size = weights.get("group_size") if strategy == "group" else -1
    return Int4File("compressed-tensors", _group_size(size), symmetric=weights.get("symmetric", True))


def _group_size(size: Any) -> int:
    if size in (-1, None):
        return 0
    if not isinstance(size, int) or size < GROUP or size % GROUP:
        raise ValueError(f"group_size={size!r}; groups of 32 and its multiples are read")
    return size


def read_groups(
    file: Int4File, get: Get, has: Callable[[str], bool], name: str, n: int, k: int
) -> tuple[GroupWeight, Tensor | None]:
    """The weight [n, k] of a layer, and the order in which it wants its inputs (None: as they are).

    Args:
        file: How it is stored.
        get: Gives the tensor of a name, after a check of its shape.
        has: Whether there is a tensor of a name.
        name: The layer's name.
        n: Outputs.
        k: Inputs.

    Raises:
        ValueError: the layer does not consist of whole groups.
    """
    size = file.group_size or k
    if k % size or k % GROUP or n % 8:
        raise ValueError(f"{name} [{n}, {k}] does not consist of whole groups of {size} inputs and 8 outputs")
    groups, index = k // size, None
    if file.method == "compressed-tensors":
        codes = _eight(get(f"{name}.weight_packed", (n, k // 8))).reshape(n, k)
        scale = get(f"{name}.weight_scale", (n, groups)).float()
        zero = torch.full_like(scale, _MIDDLE)
        if not file.symmetric:
            zero = (
                _eight(get(f"{name}.weight_zero_point", (n // 8, groups))).permute(0, 2, 1).reshape(n, groups).float()
            )
        order_name = f"{name}.weight_g_idx"
    else:
        scale = get(f"{name}.scales", (groups, n)).float().t()
        zero = _eight(get(f"{name}.qzeros", (groups, n // 8)))
        order_name = f"{name}.g_idx"
        if file.method == "awq":
            places = list(_AWQ_COLUMNS)
            codes = _placed(_eight(get(f"{name}.qweight", (k, n // 8))), places).reshape(k, n).t()
            zero = _placed(zero, places)
        else:
            codes = _eight(get(f"{name}.qweight", (k // 8, n))).permute(1, 0, 2).reshape(n, k)
        zero = zero.reshape(groups, n).t().float()
        if file.zeros_are_less:
            zero = (zero + 1) % 16  # 15 is stored for 0
    if has(order_name):
        index = get(order_name, (k,)).long()
    order = None
    if index is not None and not torch.equal(index, torch.arange(k) // size):
        order = index.argsort(stable=True)
        if not torch.equal(index[order], torch.arange(k) // size):
            raise ValueError(f"{order_name} does not give each group {size} inputs")
        codes = codes[:, order]
    scale, zero = (f.repeat_interleave(size // GROUP, 1) for f in (scale, zero))
    codes = codes.contiguous()
    if bool((zero == _MIDDLE).all()):
        return GroupWeight.pack(codes, scale, bits=4, offset=_MIDDLE), order
    return GroupWeight.pack(codes, scale, -scale * zero, bits=4), order


def _eight(packed: Tensor) -> Tensor:
    """The eight codes of each int32, lowest first: uint8 [..., 8]."""
    shifts = torch.arange(0, 32, 4, dtype=torch.int32)
    return ((packed[..., None] >> shifts) & 15).to(torch.uint8)


def _placed(codes: Tensor, places: list[int]) -> Tensor:
    out = torch.empty_like(codes)
    out[..., places] = codes
    return out
