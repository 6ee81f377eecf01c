"""From the blocks of GGUF to floats, or to codes with a scale and a minimum for each group of 32."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from eff_kernels import GroupWeight
from torch import Tensor

from eff_serve.engine.gguf.container import BLOCK_BYTES

GROUPED = ("Q4_0", "Q4_1", "Q8_0")
"""Types whose codes are multiplied as they are."""


def grouped(data: Any, kind: str) -> GroupWeight:
    """The codes of a weight in one of the types `GROUPED`, none of them changed.

    Args:
        data: uint8 [rows, bytes], as `GGUFFile.data` gives it.
        kind: Name of the type.
    """
    blocks = data.reshape(data.shape[0], -1, BLOCK_BYTES[kind])
    if kind == "Q8_0":
        codes = blocks[:, :, 2:] ^ 0x80
        return _pack(codes, _halves(blocks[:, :, :2]), None, bits=8, offset=128)
    if kind == "Q4_0":
        return _pack(_nibbles(blocks[:, :, 2:]), _halves(blocks[:, :, :2]), None, bits=4, offset=8)
    return _pack(_nibbles(blocks[:, :, 4:]), _halves(blocks[:, :, :2]), _halves(blocks[:, :, 2:4]), bits=4, offset=0)


def dequantized(data: Any, kind: str) -> Tensor:
    """Floats [rows, columns]: float32, or bfloat16 and float16 where they are stored so."""
    if kind == "BF16":
        return torch.from_numpy(data.view(np.int16).copy()).view(torch.bfloat16)
    if kind in ("F32", "F16"):
        return torch.from_numpy(data.view(np.float32 if kind == "F32" else np.float16).copy())
    values = _READERS[kind](data.reshape(-1, BLOCK_BYTES[kind]))
    return torch.from_numpy(np.ascontiguousarray(values, dtype=np.float32).reshape(data.shape[0], -1))


def _pack(codes: Any, scale: Any, minimum: Any, *, bits: int, offset: int) -> GroupWeight:
    flat = torch.from_numpy(np.ascontiguousarray(codes.reshape(codes.shape[0], -1)))
    factors = [None if f is None else torch.from_numpy(f[..., 0].astype(np.float32)) for f in (scale, minimum)]
    assert factors[0] is not None
    return GroupWeight.pack(flat, factors[0], factors[1], bits=bits, offset=offset)


def _halves(data: Any) -> Any:
    """Float16 in the last two bytes, as float16 [..., 1]."""
    return np.ascontiguousarray(data).view(np.float16)


def _wide(data: Any) -> Any:
    return _halves(data).astype(np.float32)


def _nibbles(data: Any) -> Any:
    """The low halves of all bytes of a block, then the high ones."""
    return np.concatenate([data & 15, data >> 4], -1)


def _q4_0(b: Any) -> Any:
    return _wide(b[:, :2]) * (_nibbles(b[:, 2:]).astype(np.float32) - 8)


def _q4_1(b: Any) -> Any:
    return _wide(b[:, :2]) * _nibbles(b[:, 4:]) + _wide(b[:, 2:4])


def _fifth_bits(data: Any) -> Any:
    bits = np.ascontiguousarray(data).view(np.uint32)
    return ((bits >> np.arange(32, dtype=np.uint32)) & 1).astype(np.uint8) << 4


def _q5_0(b: Any) -> Any:
    return _wide(b[:, :2]) * ((_nibbles(b[:, 6:]) | _fifth_bits(b[:, 2:6])).astype(np.float32) - 16)


def _q5_1(b: Any) -> Any:
    return _wide(b[:, :2]) * (_nibbles(b[:, 8:]) | _fifth_bits(b[:, 4:8])) + _wide(b[:, 2:4])


def _q8_0(b: Any) -> Any:
    return _wide(b[:, :2]) * np.ascontiguousarray(b[:, 2:]).view(np.int8)


def _sixes(data: Any) -> tuple[Any, Any]:
    """Eight scales and eight minima of 6 bits from 12 bytes: four in whole bytes, four put together from two parts."""
    low, middle, high = data[:, :4], data[:, 4:8], data[:, 8:]
    scale = np.concatenate([low & 63, (high & 15) | (low >> 6) << 4], 1)
    minimum = np.concatenate([middle & 63, (high >> 4) | (middle >> 6) << 4], 1)
    return scale.astype(np.float32), minimum.astype(np.float32)


def _k_codes(data: Any) -> Any:
    """Codes [blocks, 8, 32]: each 32 bytes hold two groups, one in the low halves and one in the high."""
    pairs = data.reshape(-1, 4, 32)
    return np.stack([pairs & 15, pairs >> 4], 2).reshape(-1, 8, 32)


def _q4_k(b: Any, codes: Any = None, rest: int = 16) -> Any:
    scale, minimum = _sixes(b[:, 4:16])
    codes = _k_codes(b[:, rest:]) if codes is None else codes
    return (_wide(b[:, :2]) * scale)[..., None] * codes - (_wide(b[:, 2:4]) * minimum)[..., None]


def _q5_k(b: Any) -> Any:
    fifth = (b[:, None, 16:48] >> np.arange(8, dtype=np.uint8)[:, None]) & 1
    return _q4_k(b, _k_codes(b[:, 48:]) | fifth << 4)


def _q6_k(b: Any) -> Any:
    low, high = b[:, :128].reshape(-1, 2, 64), b[:, 128:192].reshape(-1, 2, 32)
    low = np.stack([low & 15, low >> 4], 2).reshape(-1, 2, 4, 32)
    high = np.stack([high >> shift & 3 for shift in (0, 2, 4, 6)], 2)
    codes = (low | high << 4).astype(np.float32).reshape(-1, 16, 16) - 32
    scale = np.ascontiguousarray(b[:, 192:208]).view(np.int8).astype(np.float32)
    return _wide(b[:, 208:])[..., None] * scale[..., None] * codes


_READERS = {
    "Q4_0": _q4_0, "Q4_1": _q4_1, "Q5_0": _q5_0, "Q5_1": _q5_1, "Q8_0": _q8_0, "Q4_K": _q4_k, "Q5_K": _q5_k,
    "Q6_K": _q6_k,
}  # fmt: skip
