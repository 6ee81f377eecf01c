"""Put mixers into a decoder of transformers (Llama, Qwen2, Qwen3), and take stock of it."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from eff_kernels import Handle, Report
from torch import Tensor, nn

from eff_attention.layers import attention_types
from eff_attention.variants import saved_config
from eff_attention.variants.config import AttentionVariantConfig
from eff_attention.variants.context import STREAM, decoder_of, share
from eff_attention.variants.layouts import standard_layers
from eff_attention.variants.mixers import (
    MLPMixer,
    SelfGatedSoftmax,
    StaticEmbAttention,
    StaticMapAttention,
    TaylorAttention,
    VariantMixer,
    inner_width,
)

_MIXERS = {
    "approximate": TaylorAttention,
    "non_approximate": SelfGatedSoftmax,
    "rnd_emb_qk": StaticMapAttention,
    "fixed_seq_qk": StaticMapAttention,
    "static_emb_qk": StaticEmbAttention,
}
_ATTRIBUTE = "attention_variants"  # of the model's config
_TOLERANCE = 0.002  # parameter counts are equal within this


def build_hybrid(
    config: Any,
    variant: str | AttentionVariantConfig,
    layout: str | Iterable[int] = "even",
    *,
    match_params: bool = True,
) -> Any:
    """Make a causal language model with random weights in which some layers keep standard attention.

    Args:
        config: LlamaConfig, Qwen2Config or Qwen3Config.
        variant: Mixer of the other layers, by kind or with all settings.
        layout: One of `LAYOUTS` ("uniform" has no standard layer), or the standard layers counted from 1.
        match_params: Whether the MLP mixer gets as many parameters as attention has.

    Raises:
        ValueError: the layout does not fit the depth, or the parameters cannot be matched within 0.2 %.
    """
    from transformers import AutoModelForCausalLM

    settings = AttentionVariantConfig(kind=variant) if isinstance(variant, str) else variant  # type: ignore[arg-type]
    kept = standard_layers(config.num_hidden_layers, layout)
    model = AutoModelForCausalLM.from_config(copy.deepcopy(config))  # what is noted in it is not for other models
    chosen = {i: settings for i in range(1, config.num_hidden_layers + 1) if i not in kept}
    if settings.kind != "standard":
        swap_layers_(model, chosen, match_params=match_params)
    return model


def swap_layers_(
    model: nn.Module, variants: Mapping[int, AttentionVariantConfig], *, match_params: bool = True
) -> Report:
    """Exchange the attention of layers, counted from 1. Projections keep their weights; those of an MLP mixer are new.

    The settings are noted in the model's config, so that `load_hybrid` finds them in a saved folder.

    Returns:
        A report with sizes in bytes.

    Raises:
        ValueError: a layer does not exist, has a mixer already or a sliding window, two layers want different sequences
            behind their static maps, or the parameters of an MLP mixer cannot be matched within 0.2 %.
    """
    decoder = decoder_of(model)
    layers: Any = decoder.layers
    report = Report("swap_layers_")
    _check_layers(layers, variants, attention_types(decoder.config))
    if {i for i, v in variants.items() if v.kind == "non_approximate"} == set(range(1, len(layers) + 1)):
        first = variants[1]
        if not (first.qk_norm or getattr(layers[0].self_attn, "q_norm", None) is not None):
            warnings.warn(
                "non_approximate in every layer diverges in training without norms on queries and keys: qk_norm=True",
                stacklevel=2,
            )
    mixers = {i: _mixer(layers[i - 1].self_attn, settings, match_params) for i, settings in variants.items()}
    _add_stream(decoder, [v for v in variants.values() if v.stream is not None])
    for i, settings in sorted(variants.items()):
        host, name = layers[i - 1].self_attn, f"layers.{i - 1}.self_attn"
        mixer = mixers[i]
        if mixer is None:
            report.skip(name, "standard attention already", size=_size(host))
            continue
        layers[i - 1].self_attn = mixer.train(host.training)
        report.change(name, bytes_before=_size(host), bytes_after=_size(mixer))
        noted = getattr(model.config, _ATTRIBUTE, {})
        setattr(model.config, _ATTRIBUTE, {**noted, str(i): settings.to_dict()})
    if report.changed:
        share(decoder)
        saved_config.mark(model.config)
    return report


def load_hybrid(path: str | Path, **kwargs: Any) -> Any:
    """Load what ``model.save_pretrained`` wrote of a model with mixers.

    AutoModel does not know such a folder and says so.

    Args:
        path: The folder.
        kwargs: For ``from_config`` of transformers, such as ``dtype`` or ``attn_implementation``.

    Raises:
        ValueError: the folder's config names no variants, or weights are missing or too many.
    """
    from safetensors.torch import load_file
    from transformers import AutoModelForCausalLM, GenerationConfig

    config = saved_config.read(path)
    noted = getattr(config, _ATTRIBUTE, None)
    if not noted:
        raise ValueError(f"the config in {path} names no attention variants; load it with AutoModelForCausalLM")
    kwargs.setdefault("dtype", config.dtype)
    model = AutoModelForCausalLM.from_config(config, **kwargs)
    weights: dict[str, Tensor] = {}
    for file in sorted(Path(path).glob("*.safetensors")):
        weights.update(load_file(file))
    variants = {int(i): AttentionVariantConfig.from_dict(v) for i, v in noted.items()}
    for i, settings in variants.items():
        gate = weights.get(f"model.layers.{i - 1}.self_attn.gate_proj.weight")
        _swap_for_loading(model, i, settings, None if gate is None else gate.size(0))
    found = model.load_state_dict(weights, strict=False)
    tied = set(model.all_tied_weights_keys) if config.tie_word_embeddings else set()
    if found.unexpected_keys or set(found.missing_keys) - tied:
        raise ValueError(
            f"the weights in {path} do not fit: missing {found.missing_keys}, too many {found.unexpected_keys}"
        )
    model.tie_weights()
    if (Path(path) / "generation_config.json").exists():
        model.generation_config = GenerationConfig.from_pretrained(path)
    return model.eval()


def skip_layers(model: nn.Module, layers: Iterable[int]) -> Handle:
    """Leave out whole blocks, counted from 1, until ``remove()``.

    Raises:
        ValueError: a layer does not exist.
    """
    decoder = decoder_of(model)
    chosen, depth = sorted(set(layers)), len(decoder.layers)  # type: ignore[arg-type]
    if any(not 1 <= i <= depth for i in chosen):
        raise ValueError(f"layers={chosen} names layers outside of 1 to {depth}")
    handle = Handle()
    for i in chosen:
        handle.replace(decoder, f"layers.{i - 1}", _Skipped())
    return handle


def variant_layers(model: nn.Module) -> dict[int, AttentionVariantConfig]:
    """The layers, counted from 1, that have a mixer, with its settings."""
    layers: Any = decoder_of(model).layers
    return {
        i: layer.self_attn.settings for i, layer in enumerate(layers, 1) if isinstance(layer.self_attn, VariantMixer)
    }


def parameter_report(model: nn.Module) -> dict[str, int]:
    """Parameters of each layer's token mixer ("1", "2", ...), and of the whole model ("total")."""
    layers: Any = decoder_of(model).layers
    counts = {str(i): sum(p.numel() for p in layer.self_attn.parameters()) for i, layer in enumerate(layers, 1)}
    return {**counts, "total": sum(p.numel() for p in model.parameters())}


class _Skipped(nn.Module):
    """A block that is not there."""

    def __init__(self) -> None:
        super().__init__()
        self.self_attn = nn.Identity()

    def forward(self, hidden_states: Tensor, past_key_values: Any = None, cache: Any = None, **kwargs: Any) -> Tensor:
        cache = past_key_values if cache is None else cache
        if cache is not None and cache.get_seq_length():
            raise ValueError("a model with skipped layers does not decode with a cache; pass use_cache=False")
        return hidden_states


def _check_layers(layers: Any, variants: Mapping[int, AttentionVariantConfig], types: list[str]) -> None:
    outside = sorted(i for i in variants if not 1 <= i <= len(layers))
    if outside:
        raise ValueError(f"layers {outside} are outside of 1 to {len(layers)}; layers are counted from 1")
    for i in variants:
        host = layers[i - 1].self_attn
        if isinstance(host, VariantMixer):
            raise ValueError(f"layer {i} has the mixer {host.settings.kind!r} already")
        if types[i - 1] != "full_attention":
            raise ValueError(f"layer {i} has a window ({types[i - 1]}); the variants see the whole past")


def _mixer(host: Any, settings: AttentionVariantConfig, match_params: bool) -> VariantMixer | None:
    if settings.kind == "standard":
        return None
    if settings.kind != "mlp":
        return _MIXERS[settings.kind](settings, host)
    width, wanted = host.q_proj.in_features, sum(p.numel() for p in host.parameters())
    inner = inner_width(wanted if match_params else 4 * width * width, width)
    off = 3 * width * inner / wanted - 1
    if match_params and abs(off) > _TOLERANCE:
        raise ValueError(
            f"an MLP of width {width} cannot have the {wanted} parameters of attention within 0.2 %: "
            f"inner width {inner} is off by {off:.2%}; use match_params=False, or another width"
        )
    return _new_mlp(host, settings, inner)


def _new_mlp(host: Any, settings: AttentionVariantConfig, inner: int) -> MLPMixer:
    weight = host.q_proj.weight
    mixer = MLPMixer(settings, host.layer_idx, host.q_proj.in_features, inner)
    mixer = mixer.to(weight.device, weight.dtype)
    for linear in mixer.children():
        nn.init.normal_(linear.weight, std=host.config.initializer_range)  # type: ignore[arg-type]
    return mixer


def _swap_for_loading(model: nn.Module, i: int, settings: AttentionVariantConfig, inner: int | None) -> None:
    """As `swap_layers_` for one layer, with the inner width that the weights have."""
    if inner is None:
        swap_layers_(model, {i: settings})
        return
    decoder: Any = decoder_of(model)
    decoder.layers[i - 1].self_attn = _new_mlp(decoder.layers[i - 1].self_attn, settings, inner)
    share(decoder)
    saved_config.mark(decoder.config)


def _add_stream(decoder: Any, settings: list[AttentionVariantConfig]) -> None:
    """Register the sequence behind static maps."""
    present = [m.settings for m in decoder.modules() if isinstance(m, VariantMixer) and m.settings.stream is not None]
    wanted = {s.stream for s in [*present, *settings]}
    if len(wanted) > 1:
        raise ValueError(f"all static maps of a model come from one sequence, got settings for {len(wanted)} of them")
    if not settings or hasattr(decoder, STREAM):
        return
    chosen, embedding = settings[0], decoder.embed_tokens.weight
    if chosen.fixed_ids is not None:
        ids = torch.tensor(chosen.fixed_ids[: chosen.max_len])
        if ids.min() < 0 or ids.max() >= embedding.size(0):
            raise ValueError(f"fixed_ids must be from 0 to {embedding.size(0) - 1}, got {ids.min()} to {ids.max()}")
        sequence = ids
    else:
        generator = torch.Generator().manual_seed(chosen.random_seed)
        sequence = torch.randn(chosen.max_len, embedding.size(1), generator=generator) * chosen.random_std
    decoder.register_buffer(STREAM, sequence.to(embedding.device))


def _size(module: nn.Module) -> int:
    return sum(p.nbytes for p in module.parameters())
