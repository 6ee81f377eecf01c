"""What ``adapter_config.json`` of PEFT says: which adapters are plain LoRA, and by what an update is multiplied."""

from __future__ import annotations

import enum
import math
import re
from collections.abc import Mapping
from typing import Any

# Entries that say nothing of what a loaded adapter computes.
_HARMLESS = {
    "alpha_pattern", "auto_mapping", "base_model_name_or_path", "corda_config", "ensure_weight_tying", "eva_config",
    "exclude_modules", "fan_in_fan_out", "inference_mode", "layers_pattern", "layers_to_transform", "loftq_config",
    "lora_alpha", "lora_dropout", "lora_ga_config", "megatron_config", "megatron_core", "peft_type", "peft_version",
    "qalora_group_size", "r", "rank_pattern", "revision", "runtime_config", "target_modules", "task_type",
    "trainable_token_indices", "use_rslora",
}  # fmt: skip
# These starts also change the base's weights, which the file does not hold.
_CHANGES_BASE = ("pissa", "olora", "corda", "loftq", "lora_ga", "mica")


def checked_settings(settings: Any) -> dict[str, Any]:
    """The settings as JSON types, if they are those of a plain LoRA.

    Entries that are not known are ignored where they are off (None, False, empty), and refused where they are on.

    Raises:
        ValueError: another kind of adapter, or something that this code cannot honour.
        TypeError: no mapping.
    """
    if hasattr(settings, "to_dict"):
        settings = settings.to_dict()
    if not isinstance(settings, Mapping):
        raise TypeError(f"an adapter's settings are a mapping or a LoraConfig, got {type(settings).__name__}")
    plain = {str(k): _plain(v) for k, v in settings.items()}
    kind = plain.get("peft_type", "LORA")
    if kind != "LORA":
        raise ValueError(f"peft_type={kind!r}; only LORA adapters can be experts")
    if plain.get("use_dora"):
        raise ValueError("use_dora is set: DoRA scales whole rows of the base weight and is not supported")
    if plain.get("bias", "none") != "none":
        raise ValueError(f"bias={plain['bias']!r}: the adapter trained biases of the base, which experts cannot share")
    start = str(plain.get("init_lora_weights", "")).lower()
    if start.startswith(_CHANGES_BASE):
        raise ValueError(
            f"init_lora_weights={plain['init_lora_weights']!r} changes the weights of the base; save the adapter with "
            "path_initial_model_for_weight_conversion, which makes it a plain LoRA"
        )
    needed = _HARMLESS | {"bias", "use_dora", "init_lora_weights"}
    if plain.get("trainable_token_indices"):
        raise ValueError("trainable_token_indices: the adapter trained embeddings, which experts cannot share")
    on = {
        k: v for k, v in plain.items() if k not in needed and v not in (None, False, "", "none") and v != {} and v != []
    }
    if on:
        raise ValueError(f"the adapter's settings {on} are not supported; experts are plain LoRA")
    for name in ("r", "lora_alpha"):
        value = plain.get(name)
        if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value < math.inf:
            raise ValueError(f"{name}={value!r} in the adapter's settings; wanted a positive number")
    return plain


def scaling_of(settings: Mapping[str, Any], module: str, rank: int) -> float:
    """Alpha / r of a projection, alpha / sqrt(r) with ``use_rslora``; patterns by name as in PEFT.

    Raises:
        ValueError: the settings ask for another rank than the weights have.
    """
    wanted = _by_pattern(settings.get("rank_pattern"), module, settings["r"])
    if wanted != rank:
        raise ValueError(f"{module}: the weights have rank {rank}, the adapter's settings say {wanted}")
    alpha = float(_by_pattern(settings.get("alpha_pattern"), module, settings["lora_alpha"]))
    return alpha / (math.sqrt(rank) if settings.get("use_rslora") else rank)


def _by_pattern(patterns: Mapping[str, Any] | None, module: str, default: Any) -> Any:
    for pattern, value in (patterns or {}).items():
        if re.match(rf"(.*\.)?({pattern})$", module):
            return value
    return default


def _plain(value: Any) -> Any:
    if isinstance(value, enum.Enum):
        return value.value
    if isinstance(value, set | frozenset):
        return sorted(value)
    if isinstance(value, Mapping):
        return {str(k): _plain(v) for k, v in value.items()}
    return [_plain(v) for v in value] if isinstance(value, list | tuple) else value
