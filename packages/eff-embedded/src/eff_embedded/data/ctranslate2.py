"""Reader of CTranslate2's model files, and the names of Whisper's weights in transformers."""

from __future__ import annotations

import re
import struct
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

# Numbers of dtypes in the file (ctranslate2, include/ctranslate2/types.h); bfloat16 has none in numpy.
_DTYPES = {0: np.float32, 1: np.int8, 2: np.int16, 3: np.int32, 4: np.float16}
_ATTENTION = {"self_attention": "self_attn", "attention": "encoder_attn"}
_PLAIN = {
    "ffn/layer_norm": "final_layer_norm",
    "ffn/linear_0": "fc1",
    "ffn/linear_1": "fc2",
    "self_attention/layer_norm": "self_attn_layer_norm",
    "attention/layer_norm": "encoder_attn_layer_norm",
}
_PARTS = {"gamma": "weight", "beta": "bias", "weight": "weight", "bias": "bias"}


def read_ctranslate2(path: Path) -> dict[str, Tensor]:
    """All variables of a ``model.bin``, with aliases resolved.

    Raises:
        ValueError: the format is not version 6, or the file ends too early or too late.
    """
    data = path.read_bytes()
    at = 0

    def take(form: str) -> tuple[int, ...]:
        nonlocal at
        size = struct.calcsize(form)
        if at + size > len(data):
            raise ValueError(f"{path.name} has {len(data)} bytes and ends in the middle of a variable")
        values = struct.unpack_from(form, data, at)
        at += size
        return values

    def text() -> str:
        nonlocal at
        (size,) = take("<H")
        at += size
        return data[at - size : at - 1].decode()

    (version,) = take("<I")
    if version != 6:
        raise ValueError(f"{path.name} has format {version}; version 6 of CTranslate2's files can be read")
    text()
    take("<I")
    found: dict[str, Tensor] = {}
    for _ in range(take("<I")[0]):
        name = text()
        shape = take(f"<{take('<B')[0]}I")
        dtype, size = take("<BI")
        if dtype not in _DTYPES or at + size > len(data):
            raise ValueError(f"{path.name}: variable {name} has dtype {dtype} and {size} bytes, which cannot be read")
        values = np.frombuffer(data, _DTYPES[dtype], size // np.dtype(_DTYPES[dtype]).itemsize, at)
        found[name] = torch.from_numpy(values.reshape(shape).copy())
        at += size
    for _ in range(take("<I")[0]):
        alias, target = text(), text()
        found[alias] = found[target]
    if at != len(data):
        raise ValueError(f"{path.name} has {len(data) - at} bytes after its last variable")
    return found


def whisper_state(variables: dict[str, Tensor]) -> dict[str, Tensor]:
    """The state dict of transformers' WhisperForConditionalGeneration, float32, from CTranslate2's variables."""
    state: dict[str, Tensor] = {}
    for name, value in variables.items():
        if not value.is_floating_point() or value.dim() == 0:
            continue  # settings, such as the number of heads
        value = value.float()
        side, rest = name.split("/", 1)
        base = f"model.{side}."
        if rest == "projection/weight":
            state["proj_out.weight"] = value
        elif rest == "embeddings/weight":
            state[base + "embed_tokens.weight"] = value
        elif rest == "position_encodings/encodings":
            state[base + "embed_positions.weight"] = value
        elif layer := re.fullmatch(r"layer_(\d+)/(.+)/(\w+)", rest):
            number, module, part = layer.groups()
            state |= _layer(f"{base}layers.{number}.", module, _PARTS[part], value)
        else:  # conv1, conv2, layer_norm
            module, part = rest.split("/")
            state[f"{base}{module}.{_PARTS[part]}"] = value
    # Whisper's keys have no bias; the fused ones hold zeros for it.
    return {name: value for name, value in state.items() if not name.endswith("k_proj.bias")}


def _layer(base: str, module: str, part: str, value: Tensor) -> dict[str, Tensor]:
    """Weights of a layer: CTranslate2 keeps q, k, v (or k, v of cross-attention) in one matrix."""
    if module in _PLAIN:
        return {f"{base}{_PLAIN[module]}.{part}": value}
    attention, linear = module.split("/")
    own = attention == "self_attention"
    split = {
        ("linear_0", True): ("q_proj", "k_proj", "v_proj"),
        ("linear_1", True): ("out_proj",),
        ("linear_0", False): ("q_proj",),
        ("linear_1", False): ("k_proj", "v_proj"),
        ("linear_2", False): ("out_proj",),
    }[linear, own]
    pieces = value.chunk(len(split))
    return {f"{base}{_ATTENTION[attention]}.{n}.{part}": p.clone() for n, p in zip(split, pieces, strict=True)}
