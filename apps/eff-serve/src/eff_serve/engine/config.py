"""The shape of a decoder, read from a transformers config.json; whatever our decoder does not do is refused by name."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from eff_quant import MixedConfig
from eff_quant.int4_files import Int4File
from eff_quant.stored import stored_as
from torch import Tensor

from eff_serve.engine.quantization import runnable
from eff_serve.models.files import read_json

ARCHITECTURES = ("LlamaForCausalLM", "MistralForCausalLM", "Qwen2ForCausalLM", "Qwen3ForCausalLM")


class UnsupportedModelError(ValueError):
    """The lean decoder does not run this model; the message says which of its settings is in the way."""


@dataclass(frozen=True, kw_only=True, slots=True)
class DecoderConfig:
    """Sizes and switches of a Llama-like decoder.

    Attributes:
        max_model_len: Most tokens of a sequence; with sliding-window attention the window, inside which it is full
            attention.
        inverse_frequencies: Rotary frequencies, [head_dim / 2], scaling included.
        attention_factor: Factor of cos and sin.
        eos_token_ids: Tokens that end a text.
        quantization: How the folder stores its weights, by layer; None where they are floats, or of 4 bits.
        int4: How the folder stores weights of 4 bits in groups.
    """

    architecture: str
    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    vocab_size: int
    rms_norm_eps: float
    max_model_len: int
    tie_word_embeddings: bool
    qk_norm: bool
    inverse_frequencies: tuple[float, ...]
    attention_factor: float
    eos_token_ids: frozenset[int]
    quantization: MixedConfig | None = None
    int4: Int4File | None = None

    @classmethod
    def from_folder(cls, folder: Path) -> DecoderConfig:
        """Read config.json and generation_config.json of a model folder.

        Raises:
            FileNotFoundError: there is no config.json.
            UnsupportedModelError: the architecture, one of its settings or its quantisation is not supported.
            ValueError: the file is no JSON object, or lacks an entry.
        """
        path = folder / "config.json"
        if not path.is_file():
            raise FileNotFoundError(f"{folder} is not a model folder: it has no config.json")
        config = read_json(path)
        try:
            return cls._from_config(folder, config)
        except KeyError as error:
            raise ValueError(f"{path} lacks {error.args[0]!r}") from error

    @classmethod
    def _from_config(cls, folder: Path, config: dict[str, Any]) -> DecoderConfig:
        architecture = (config.get("architectures") or ["none"])[0]
        if architecture not in ARCHITECTURES:
            raise UnsupportedModelError(f"architecture {architecture} is not one of {', '.join(ARCHITECTURES)}")
        if config.get("hidden_act", "silu") != "silu":
            raise UnsupportedModelError(f"hidden_act must be 'silu', got {config['hidden_act']!r}")
        heads = config["num_attention_heads"]
        head_dim = config.get("head_dim") or config["hidden_size"] // heads
        length = config["max_position_embeddings"]
        windowed = config.get("sliding_window") and config.get("use_sliding_window", architecture.startswith("Mistral"))
        frequencies, factor = _rotary(config, head_dim)
        quantization, int4 = _stored(config.get("quantization_config"))
        return cls(
            architecture=architecture,
            hidden_size=config["hidden_size"],
            intermediate_size=config["intermediate_size"],
            num_layers=config["num_hidden_layers"],
            num_heads=heads,
            num_kv_heads=config.get("num_key_value_heads") or heads,
            head_dim=head_dim,
            vocab_size=config["vocab_size"],
            rms_norm_eps=config.get("rms_norm_eps", 1e-6),
            max_model_len=min(length, config["sliding_window"]) if windowed else length,
            tie_word_embeddings=config.get("tie_word_embeddings", False),
            qk_norm=architecture == "Qwen3ForCausalLM",
            inverse_frequencies=tuple(frequencies.tolist()),
            attention_factor=factor,
            eos_token_ids=_eos(folder, config),
            quantization=quantization,
            int4=int4,
        )

    @property
    def projections(self) -> dict[str, tuple[int, int]]:
        """Outputs and inputs of each projection of a layer, by its name without the layer's."""
        h, wide = self.hidden_size, self.intermediate_size
        q, kv = self.num_heads * self.head_dim, self.num_kv_heads * self.head_dim
        return {
            "q_proj": (q, h), "k_proj": (kv, h), "v_proj": (kv, h), "o_proj": (h, q),
            "gate_proj": (wide, h), "up_proj": (wide, h), "down_proj": (h, wide),
        }  # fmt: skip

    def rotary(self, positions: Tensor) -> tuple[Tensor, Tensor]:
        """Cosine and sine at positions [T], each float32 [T, head_dim / 2]."""
        angles = positions.float()[:, None] * torch.tensor(self.inverse_frequencies)
        return angles.cos() * self.attention_factor, angles.sin() * self.attention_factor


def _stored(entry: dict[str, Any] | None) -> tuple[MixedConfig | None, Int4File | None]:
    try:
        stored = stored_as(entry)
        if isinstance(stored, Int4File):
            return None, stored
        return (None if stored is None else runnable(stored)), None
    except ValueError as error:
        raise UnsupportedModelError(str(error)) from error


def _rotary(config: dict[str, Any], head_dim: int) -> tuple[Tensor, float]:
    scaling = {**(config.get("rope_scaling") or {}), **(config.get("rope_parameters") or {})}
    theta = scaling.get("rope_theta") or config.get("rope_theta") or 10000.0
    if scaling.get("partial_rotary_factor", config.get("partial_rotary_factor", 1.0)) != 1.0:
        raise UnsupportedModelError("partial_rotary_factor other than 1 is not supported")
    frequencies = 1.0 / theta ** (torch.arange(0, head_dim, 2, dtype=torch.int64).float() / head_dim)
    kind = scaling.get("rope_type") or scaling.get("type") or "default"
    if kind == "default":
        return frequencies, 1.0
    if kind == "linear":
        return frequencies / scaling["factor"], 1.0
    if kind == "llama3":
        return _llama3(frequencies, scaling), 1.0
    raise UnsupportedModelError(f"rope scaling {kind!r} is not one of 'default', 'linear', 'llama3'")


def _llama3(frequencies: Tensor, scaling: dict[str, Any]) -> Tensor:
    """Long wavelengths are stretched by ``factor``, short ones kept, those between interpolated."""
    low, high = scaling["low_freq_factor"], scaling["high_freq_factor"]
    wavelength = 2 * math.pi / frequencies
    periods = scaling["original_max_position_embeddings"] / wavelength
    smooth = ((periods - low) / (high - low)).clamp(0, 1)
    return (1 - smooth) * frequencies / scaling["factor"] + smooth * frequencies


def _eos(folder: Path, config: dict[str, Any]) -> frozenset[int]:
    ids: set[int] = set()
    path = folder / "generation_config.json"
    for source in (config, read_json(path)):
        value = source.get("eos_token_id")
        ids.update([value] if isinstance(value, int) else value or [])
    return frozenset(ids)
