"""A GGUF file as a model of the lean decoder: its shape, and its weights under the names of transformers."""

from __future__ import annotations

import re
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from eff_serve.engine.config import DecoderConfig
from eff_serve.engine.gguf.blocks import GROUPED, dequantized, grouped
from eff_serve.engine.gguf.container import GGUFError, GGUFFile
from eff_serve.engine.groups import GroupLinear, GroupRows
from eff_serve.engine.linear import FloatLinear, Linear

ARCHITECTURES = {"llama": "LlamaForCausalLM", "qwen2": "Qwen2ForCausalLM", "qwen3": "Qwen3ForCausalLM"}
_LAYER = re.compile(r"model\.layers\.(\d+)\.(.+)\.(weight|bias)")
_PARTS = {
    "input_layernorm": "attn_norm", "post_attention_layernorm": "ffn_norm",
    "self_attn.q_proj": "attn_q", "self_attn.k_proj": "attn_k", "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output", "self_attn.q_norm": "attn_q_norm", "self_attn.k_norm": "attn_k_norm",
    "mlp.gate_proj": "ffn_gate", "mlp.up_proj": "ffn_up", "mlp.down_proj": "ffn_down",
}  # fmt: skip
_NAMES = {
    "model.embed_tokens.weight": "token_embd.weight", "model.norm.weight": "output_norm.weight",
    "lm_head.weight": "output.weight",
}  # fmt: skip
_FREQUENCIES = "rope_freqs.weight"  # factors of the rotary frequencies, where they are scaled as in Llama 3
_MOST = 1 << 24
_LONGEST = 1 << 20  # tokens for which rotations are made


class GGUFModel:
    """The weights of a file, for `Decoder`.

    Args:
        path: The file.
        keep_codes: Multiply codes of 4 and 8 bits in groups of 32 as they are; otherwise all weights become floats.

    Raises:
        FileNotFoundError: there is no such file.
        GGUFError: it is damaged, or no model that the lean decoder runs.
    """

    def __init__(self, path: Path, *, keep_codes: bool = True) -> None:
        self.path = path
        self.file = GGUFFile(path)
        self._keep_codes = keep_codes
        self._read: set[str] = set()
        self.config = self._config()

    def __contains__(self, name: str) -> bool:
        return _stored_name(name) in self.file.tensors

    def describe(self) -> str:
        """The types of its matrices, most frequent first."""
        kinds = Counter(t.kind for t in self.file.tensors.values() if len(t.shape) > 1)
        return ", ".join(kind for kind, _ in kinds.most_common())

    def get(self, name: str, shape: tuple[int, ...]) -> Tensor:
        """A tensor as floats: those of 16 bits as stored, matrices of codes in bfloat16, the rest in float32."""
        data, kind = self._data(name, shape)
        values = dequantized(data, kind)
        if kind not in ("F32", "F16", "BF16"):
            values = values.to(torch.bfloat16)
        return values.view(shape)

    def floats(self, name: str, shape: tuple[int, ...]) -> Tensor:
        """The same in float32."""
        data, kind = self._data(name, shape)
        return dequantized(data, kind).to(torch.float32).view(shape)

    def layer(self, name: str, n: int, k: int, bias: Tensor | None = None) -> Linear | None:
        """A projection with its codes as they are, or None where they are to become floats."""
        weight = f"{name}.weight"
        info = self.file.tensors.get(_stored_name(weight))
        if info is None or info.kind not in GROUPED or not self._keep_codes:
            return None
        data, kind = self._data(weight, (n, k))
        return GroupLinear(grouped(data, kind), bias)

    def ends(self, vocab: int, hidden: int, *, tied: bool) -> tuple[Tensor | GroupRows, Linear]:
        """The embedding and the head, which are one where the file has no head of its own."""
        codes = self.layer("model.embed_tokens", vocab, hidden)
        if isinstance(codes, GroupLinear):
            embedding: Tensor | GroupRows = GroupRows(codes.weight)
            own: Linear = codes
        else:
            floats = self.get("model.embed_tokens.weight", (vocab, hidden))
            embedding, own = floats, FloatLinear(floats)
        if tied:
            return embedding, own
        head = self.layer("lm_head", vocab, hidden)
        return embedding, head or FloatLinear(self.get("lm_head.weight", (vocab, hidden)))

    def check_all_read(self, *ignored: str) -> None:
        """Raise `GGUFError` where tensors were left over: the metadata describe a smaller model."""
        if left := sorted(set(self.file.tensors) - self._read - {_FREQUENCIES}):
            raise GGUFError(f"{self.path}: {len(left)} tensors belong to no layer of its metadata, such as {left[0]}")

    def _data(self, name: str, shape: tuple[int, ...]) -> tuple[Any, str]:
        stored = _stored_name(name)
        info = self.file.tensors.get(stored)
        if info is None:
            raise GGUFError(f"{self.path} has no tensor {stored!r}")
        if info.shape != shape:
            raise GGUFError(f"{self.path}: {stored} must have shape {list(shape)}, got {list(info.shape)}")
        self._read.add(stored)
        data = self.file.data(stored)
        part = stored.split(".")[-2]
        if self.config.architecture == "LlamaForCausalLM" and part in ("attn_q", "attn_k"):
            heads = self.config.num_heads if part == "attn_q" else self.config.num_kv_heads
            if len(shape) == 1:
                data = data.reshape(shape[0], -1)
            return data[_halves_apart(data.shape[0], heads)], info.kind
        return data, info.kind

    def _config(self) -> DecoderConfig:
        data = self.file.metadata
        family = data.get("general.architecture")
        if family not in ARCHITECTURES:
            raise GGUFError(f"{self.path} is of the family {family!r}; these run: {', '.join(ARCHITECTURES)}")

        def number(key: str, default: int | None = None) -> int:
            value = data.get(f"{family}.{key}", default)
            if not isinstance(value, int) or isinstance(value, bool) or not 0 < value < _MOST:
                raise GGUFError(f"{self.path}: {family}.{key} must be a positive integer, got {value!r}"[:300])
            return value

        def positive(key: str, default: float | None = None) -> float:
            value = data.get(f"{family}.{key}", default)
            if not isinstance(value, int | float) or not 0 < value < 1e30:
                raise GGUFError(f"{self.path}: {family}.{key} must be a positive number, got {value!r}"[:300])
            return float(value)

        if data.get(f"{family}.expert_count"):
            raise GGUFError(f"{self.path} is a mixture of experts, which the lean decoder does not run")
        hidden, heads = number("embedding_length"), number("attention.head_count")
        head_dim = number("attention.key_length", max(1, hidden // heads))
        if head_dim % 8:
            raise GGUFError(f"{self.path}: heads of {head_dim} numbers; it must be a multiple of 8")
        for key in ("attention.value_length", "rope.dimension_count"):
            if number(key, head_dim) != head_dim:
                raise GGUFError(f"{self.path}: {family}.{key} other than {head_dim}, the head's size, does not run")
        tokens = data.get("tokenizer.ggml.tokens")
        embedding = self.file.tensors.get("token_embd.weight")
        if embedding is None:
            raise GGUFError(f"{self.path} has no tensor 'token_embd.weight'")
        vocab = embedding.shape[0]
        if not isinstance(tokens, list) or len(tokens) != vocab:
            count = len(tokens) if isinstance(tokens, list) else "no"
            raise GGUFError(f"{self.path} has {count} tokens in its tokenizer and {vocab} in its embedding")
        length = min(number("context_length"), _LONGEST)
        window = data.get(f"{family}.attention.sliding_window")
        eos = {data.get(f"tokenizer.ggml.{name}_token_id") for name in ("eos", "eot", "eom")} - {None}
        return DecoderConfig(
            architecture=ARCHITECTURES[family],
            hidden_size=hidden,
            intermediate_size=number("feed_forward_length"),
            num_layers=number("block_count"),
            num_heads=heads,
            num_kv_heads=number("attention.head_count_kv", heads),
            head_dim=head_dim,
            vocab_size=vocab,
            rms_norm_eps=positive("attention.layer_norm_rms_epsilon"),
            max_model_len=min(length, window) if isinstance(window, int) and window > 0 else length,
            tie_word_embeddings="output.weight" not in self.file.tensors,
            qk_norm=family == "qwen3",
            inverse_frequencies=tuple(self._frequencies(positive("rope.freq_base", 10000.0), head_dim, family)),
            attention_factor=1.0,
            eos_token_ids=frozenset(i for i in eos if isinstance(i, int) and 0 <= i < vocab),
        )

    def _frequencies(self, base: float, head_dim: int, family: str) -> list[float]:
        frequencies = 1.0 / base ** (torch.arange(0, head_dim, 2, dtype=torch.int64).float() / head_dim)
        if _FREQUENCIES in self.file.tensors:
            info = self.file.tensors[_FREQUENCIES]
            if info.shape != (head_dim // 2,):
                raise GGUFError(
                    f"{self.path}: {_FREQUENCIES} must have shape {[head_dim // 2]}, got {list(info.shape)}"
                )
            frequencies = frequencies / dequantized(self.file.data(_FREQUENCIES), info.kind).float().flatten()
        data = self.file.metadata
        kind = data.get(f"{family}.rope.scaling.type", "none")
        if kind == "linear":
            factor = data.get(f"{family}.rope.scaling.factor", 1.0)
            if not isinstance(factor, int | float) or not factor > 0:
                raise GGUFError(f"{self.path}: {family}.rope.scaling.factor must be positive, got {factor!r}")
            frequencies = frequencies / factor
        elif kind != "none":
            raise GGUFError(f"{self.path}: rope scaling {kind!r} is not one of 'none', 'linear'")
        return [float(f) for f in frequencies]


def _stored_name(name: str) -> str:
    """The name in a file for one of transformers' Llama."""
    if name in _NAMES:
        return _NAMES[name]
    place = _LAYER.fullmatch(name)
    if place is None or place[2] not in _PARTS:
        return name
    return f"blk.{place[1]}.{_PARTS[place[2]]}.{place[3]}"


def _halves_apart(rows: int, heads: int) -> Any:
    """Order of rows in which rotary pairs lie half a head apart; files of Llama have them side by side."""
    return np.arange(rows).reshape(heads, -1, 2).transpose(0, 2, 1).reshape(-1)
