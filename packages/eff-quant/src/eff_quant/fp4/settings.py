"""What config.json says of FP4 weights in the words of compressed-tensors and of ModelOpt, and what it means for us."""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from typing import Any, Literal

from eff_quant.fp4.config import BLOCK, Activations, Format, FP4Config

FileLayout = Literal["compressed-tensors", "modelopt"]

# The versions whose words these are.
COMPRESSED_TENSORS = "0.20.0"
MODELOPT = "0.37.0"

PACKED: dict[str, Format] = {"nvfp4-pack-quantized": "nvfp4", "mxfp4-pack-quantized": "mxfp4"}


def compressed_tensors_settings(config: FP4Config, ignore: Sequence[str]) -> dict[str, Any]:
    """The ``quantization_config`` that compressed-tensors writes for its presets NVFP4, NVFP4A16, MXFP4, MXFP4A16.

    Args:
        config: format and activations choose the preset.
        ignore: Names of the linear layers that stay float.

    Raises:
        ValueError: nvfp4 with dynamic activations, whose tensor scale compressed-tensors wants to be calibrated.
    """
    nvfp4 = config.format == "nvfp4"
    if nvfp4 and config.activations == "dynamic":
        raise ValueError(
            "compressed-tensors has no NVFP4 activations without a calibrated scale; use activations='static' and "
            "calibrate_fp4(model, batches).set_input_scales(model), or activations=None"
        )
    args: dict[str, Any] = {
        "dynamic": False,
        "group_size": config.block,
        "num_bits": 4,
        "scale_dtype": "torch.float8_e4m3fn" if nvfp4 else "torch.uint8",
        "strategy": "tensor_group" if nvfp4 else "group",
        "symmetric": True,
        "type": "float",
    }
    inputs = {**args, "dynamic": "local", "observer": "static_minmax"} if nvfp4 else {**args, "dynamic": True}
    format = f"{config.format}-pack-quantized"
    group = {
        "format": format,
        "input_activations": inputs if config.activations else None,
        "output_activations": None,
        "targets": ["Linear"],
        "weights": args,
    }
    return {
        "config_groups": {"group_0": group},
        "format": format,
        "global_compression_ratio": None,
        "ignore": list(ignore),
        "kv_cache_scheme": None,
        "moe_sparsity_config": None,
        "quant_method": "compressed-tensors",
        "quantization_status": "compressed",
        "sparsity_config": {},
        "transform_config": {},
        "version": COMPRESSED_TENSORS,
    }


def modelopt_settings(config: FP4Config, ignore: Sequence[str]) -> tuple[dict[str, Any], dict[str, Any]]:
    """What ModelOpt writes for NVFP4: the ``quantization_config`` of config.json, and all of hf_quant_config.json.

    Raises:
        ValueError: other settings than nvfp4 with static activations, the only ones that its format NVFP4 has.
    """
    if config.format != "nvfp4" or config.activations != "static":
        raise ValueError(
            f"ModelOpt's NVFP4 has nvfp4 weights and static activations, got format={config.format!r} and "
            f"activations={config.activations!r}; use layout='compressed-tensors'"
        )
    producer = {"name": "modelopt", "version": MODELOPT}
    args = {"dynamic": False, "num_bits": 4, "type": "float", "group_size": config.block}
    group = {"input_activations": args, "weights": args, "targets": ["Linear"]}
    ours = {
        "config_groups": {"group_0": group},
        "ignore": list(ignore),
        "producer": producer,
        "quant_algo": "NVFP4",
        "quant_method": "modelopt",
    }
    algorithm = {
        "quant_algo": "NVFP4",
        "kv_cache_quant_algo": None,
        "group_size": config.block,
        "exclude_modules": list(ignore),
    }
    return ours, {"producer": producer, "quantization": algorithm}


def read_compressed_tensors(settings: Mapping[str, Any]) -> tuple[Format, Activations | None]:
    """The format and the activations that a ``quantization_config`` of compressed-tensors names.

    Raises:
        ValueError: it names something that `FP4Linear` is not; the message says what.
    """
    groups = settings.get("config_groups") or {}
    if len(groups) != 1:
        raise ValueError(f"config_groups has {sorted(groups)}; wanted one group of FP4 layers")
    group = next(iter(groups.values()))
    name = group.get("format") or settings.get("format")
    if name not in PACKED:
        raise ValueError(f"format {name!r} is not FP4; wanted one of {sorted(PACKED)}")
    format = PACKED[name]
    _check_args("weights", group.get("weights"), format)
    inputs = group.get("input_activations")
    if group.get("output_activations"):
        raise ValueError("output_activations are quantised; FP4 layers of eff_quant round their inputs only")
    if scheme := settings.get("kv_cache_scheme"):
        warn_of_cache(scheme)
    if settings.get("transform_config"):
        raise ValueError("transform_config is set; eff_quant does not apply transforms")
    if not inputs:
        return format, None
    _check_args("input_activations", inputs, format)
    wanted = "local" if format == "nvfp4" else True
    if inputs.get("dynamic") != wanted:
        raise ValueError(f"input_activations.dynamic={inputs.get('dynamic')!r}, wanted {wanted!r} for {format}")
    return format, "static" if format == "nvfp4" else "dynamic"


def stored_fp4(settings: Mapping[str, Any]) -> FP4Config:
    """The config that a ``quantization_config`` of compressed-tensors stands for; which layers it skips, files say.

    Raises:
        ValueError: as `read_compressed_tensors`, or it is ModelOpt's, whose other file says what it means.
    """
    if settings.get("quant_method") != "compressed-tensors":
        raise ValueError("modelopt keeps its NVFP4 settings in hf_quant_config.json; use load_fp4_checkpoint")
    format, activations = read_compressed_tensors(settings)
    return FP4Config(format=format, activations=activations, scale_rounding=file_rounding(format))


def file_rounding(format: Format) -> Literal["even", "floor"]:
    """How the library that wrote a file rounds the scales of activations."""
    return "even" if format == "mxfp4" else "floor"


def warn_of_cache(scheme: object) -> None:
    """Say that keys and values stay as they are, which is more exact than what the file asks for."""
    warnings.warn(f"the cache of keys and values is not quantised, though the file says {scheme}", stacklevel=4)


def _check_args(name: str, args: Mapping[str, Any] | None, format: str) -> None:
    args = args or {}
    for key, wanted in {"num_bits": 4, "type": "float", "group_size": BLOCK[format]}.items():
        if args.get(key) != wanted:
            raise ValueError(f"{name}.{key}={args.get(key)!r}, wanted {wanted!r} for {format}")
    if not args.get("symmetric", True):
        raise ValueError(f"{name}.symmetric=False, wanted True for {format}")
