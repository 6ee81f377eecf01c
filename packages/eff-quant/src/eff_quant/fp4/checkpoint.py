"""Model folders with FP4 weights that serving engines and other libraries read, and theirs for us."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, get_args

import torch
from torch import Tensor, nn

from eff_quant.experts import check_no_experts
from eff_quant.fp4.check import check_fp4_tensors
from eff_quant.fp4.config import Activations, Format, FP4Config
from eff_quant.fp4.files import Folder
from eff_quant.fp4.layer import FP4Linear
from eff_quant.fp4.settings import (
    FileLayout,
    compressed_tensors_settings,
    file_rounding,
    modelopt_settings,
    read_compressed_tensors,
)
from eff_quant.hub import (
    check_transformers_model,
    empty_model,
    model_class,
    quantization_settings,
    save_as,
    with_model_names,
)
from eff_quant.layer import QuantizedLinear
from eff_quant.linears import find_linears, is_linear, linear_weight
from eff_quant.settings import Backend, check_choice


def save_fp4_checkpoint(
    model: Any, path: str | Path, *, layout: FileLayout = "compressed-tensors", **kwargs: Any
) -> None:
    """Save a transformers model with `FP4Linear` layers as a folder that others read.

    Args:
        model: A transformers model, all of whose quantised layers have the same FP4 settings.
        path: Folder to write.
        layout: ``"compressed-tensors"`` (transformers, vLLM, SGLang) in its format nvfp4-pack-quantized or
            mxfp4-pack-quantized, or ``"modelopt"`` (TensorRT-LLM, vLLM, SGLang), which has nvfp4 with static
            activations.
        **kwargs: Passed on to ``save_pretrained`` (such as ``max_shard_size``).

    Raises:
        TypeError: not a transformers model.
        ValueError: no FP4 layers, different settings, a layer that is quantised in another way, input scales that are
            not calibrated, settings that the layout does not have, a layer that came from a ``Conv1D``, experts in one
            3-D parameter, or a group of ``config.fuse_groups`` with different precisions or tensor scales. The message
            names the layers.
    """
    check_transformers_model(model, "save_fp4_checkpoint")
    check_choice("layout", layout, get_args(FileLayout))
    layers = {name: m for name, m in model.named_modules() if isinstance(m, FP4Linear)}
    config = check_exportable(model, layers)
    ignore = [n for n, m in model.named_modules() if isinstance(m, nn.Linear) and not isinstance(m, FP4Linear)]
    more: dict[str, Any] = {}
    if layout == "modelopt":
        settings, more = modelopt_settings(config, ignore)
    else:
        settings = compressed_tensors_settings(config, ignore)
    state = dict(model.state_dict())
    if layout == "modelopt":
        state = _as_modelopt(state, layers)
    save_as(model, path, settings, state=state, **kwargs)
    if more:
        (Path(path) / "hf_quant_config.json").write_text(json.dumps(more, indent=4))


def check_exportable(model: nn.Module, layers: Mapping[str, FP4Linear]) -> FP4Config:
    """Check that other libraries can load and run these layers, and return their settings.

    Raises:
        ValueError: see `save_fp4_checkpoint`.
    """
    if not layers:
        raise ValueError("the model has no FP4 layers; use quantize_(model, FP4Config(...)) first")
    kinds = {(m.config.format, m.config.activations): name for name, m in layers.items()}
    if len(kinds) > 1:
        raise ValueError(f"layers with different settings do not fit in one folder: {kinds}")
    if transposed := [name for name, m in layers.items() if m.transposed]:
        raise ValueError(f"{transposed[0]} was a Conv1D, which other libraries do not load as FP4; use save_pretrained")
    if unknown := [n for n, m in layers.items() if m.input_global_scale is not None and _is_nan(m.input_global_scale)]:
        raise ValueError(
            f"{unknown[0]} has no scale for its input yet; use calibrate_fp4(model, batches).set_input_scales(model)"
        )
    for name, module in model.named_modules():
        if not isinstance(module, nn.Linear):
            continue
        codes = isinstance(module, QuantizedLinear) or module.weight.dtype.itemsize == 1
        if name not in layers and codes:
            raise ValueError(f"{name} is a {type(module).__name__}; layers of a folder must be FP4 or float")
    check_no_experts(model, "a folder of FP4 layers")
    for f in find_linears(model):
        if not is_linear(f.module):
            raise ValueError(f"{f.names[0]} {f.reason}; other libraries expect these in FP4, too. Use save_pretrained")
    config = next(iter(layers.values())).config
    _check_groups(model, layers, config)
    return config


def _check_groups(model: nn.Module, layers: Mapping[str, FP4Linear], config: FP4Config) -> None:
    """Check the groups that serving engines run as one layer."""
    linears = {name: m for name, m in model.named_modules() if isinstance(m, nn.Linear)}
    for group in config.fuse_groups:
        for parent in {n.rpartition(".")[0] for n in layers if n.rpartition(".")[2] in group}:
            names = [f"{parent}.{leaf}" if parent else leaf for leaf in group]
            members = {n.rpartition(".")[2]: linears[n] for n in names if n in linears}
            kinds = {leaf: m.config.format if isinstance(m, FP4Linear) else "float" for leaf, m in members.items()}
            if len(set(kinds.values())) > 1:
                raise ValueError(
                    f"{parent or 'the model'} has {kinds}, which serving engines run as one layer; "
                    "quantise all of them or none, or change fuse_groups"
                )
            if config.format != "nvfp4":
                continue
            scales = {leaf: float(m.weight_global_scale) for leaf, m in members.items()}  # type: ignore[arg-type]
            if len(set(scales.values())) > 1:
                raise ValueError(
                    f"{parent or 'the model'} has the tensor scales {scales}, and serving engines need one; "
                    "quantise these layers together, with quantize_, from float weights"
                )


def _is_nan(scale: Tensor) -> bool:
    return bool(scale.isnan().any())


def _as_modelopt(state: dict[str, Tensor], layers: Mapping[str, FP4Linear]) -> dict[str, Tensor]:
    """Rename the tensors of the layers as ModelOpt calls them, and turn the tensor scales over."""
    for name in layers:
        state[f"{name}.weight"] = state.pop(f"{name}.weight_packed")
        state[f"{name}.weight_scale_2"] = 1 / state.pop(f"{name}.weight_global_scale").reshape(())
        state[f"{name}.input_scale"] = 1 / state.pop(f"{name}.input_global_scale").reshape(())
    return state


def load_fp4_checkpoint(
    path: str | Path,
    *,
    round_activations: bool = True,
    out_dtype: torch.dtype | None = None,
    backend: Backend = "auto",
    **kwargs: Any,
) -> Any:
    """Load a folder with FP4 weights of compressed-tensors or ModelOpt; they stay packed.

    Args:
        path: Folder with config.json and safetensors files.
        round_activations: Round activations to FP4 if the folder says so. False leaves them as they are, which is more
            exact and, where there are no FP4 matrix units, faster.
        out_dtype: As in `FP4Config`.
        backend: As in `FP4Config`.
        **kwargs: Passed on to ``from_pretrained``.

    Returns:
        A transformers model of the class that config.json names, which saves in our own settings; see
        `save_fp4_checkpoint`.

    Raises:
        ImportError: transformers is not installed.
        OSError: no such folder, or a file is missing.
        KeyError: a tensor of a layer is missing; the message names the layer.
        TypeError: a tensor has a wrong dtype.
        ValueError: the folder holds no FP4 weights of these libraries, a setting that FP4 layers do not have, a damaged
            file, a wrong shape, or a scale that is NaN or not positive.
    """
    from eff_quant import hf  # imports transformers

    folder = Folder(path)
    hf_config, cls = model_class(path)
    settings = quantization_settings(hf_config)
    method = settings.get("quant_method")
    if method == FP4Config.quant_method:
        raise ValueError(f"{path} was saved in our own settings; use eff_quant.load")
    if method == "compressed-tensors":
        format, activations = read_compressed_tensors(settings)
    elif method in ("modelopt", "modelopt_fp4") or (folder.path / "hf_quant_config.json").exists():
        format, activations = "nvfp4", folder.check_modelopt(settings)
    else:
        raise ValueError(f"{path}: quant_method={method!r}; wanted 'compressed-tensors' or 'modelopt' with FP4 weights")
    layers = folder.layers(format)
    config = FP4Config(
        format=format,
        activations=activations,
        scale_rounding=file_rounding(format),
        skip=_check_model(cls, hf_config, layers, format, activations),
        out_dtype=out_dtype,
        backend=backend,
    )
    hf_config.quantization_config = hf.EffConfig(config).to_dict()
    if folder.modelopt:
        model = cls.from_pretrained(None, config=hf_config, state_dict=folder.as_compressed_tensors(layers), **kwargs)
        if (folder.path / "generation_config.json").exists():
            model.generation_config = model.generation_config.from_pretrained(path)
    else:
        model = cls.from_pretrained(path, config=hf_config, **kwargs)
    for name, layer in model.named_modules():
        if isinstance(layer, FP4Linear):
            check_fp4_tensors(name, layer.state_dict(), format)
            if not round_activations:
                layer.config = replace(layer.config, activations=None)
                layer.input_global_scale = None
    if not round_activations:
        hf.record_settings(model)
    return model


def _check_model(
    cls: Any,
    hf_config: Any,
    layers: Mapping[str, Mapping[str, Tensor]],
    format: Format,
    activations: Activations | None,
) -> tuple[str, ...]:
    """Check the layers of a folder against the model's, and return patterns of the linear layers that stay float."""
    model = empty_model(cls, hf_config)
    layers = with_model_names(model, layers)
    left, taken = [], set()
    for f in find_linears(model):
        if not is_linear(f.module):
            continue
        stored = [n for n in f.names if n in layers]
        if not stored:
            left.append(f"re:{re.escape(f.names[0])}")
            continue
        taken.update(stored)
        n, k = linear_weight(f.module).shape
        tensors = check_fp4_tensors(stored[0], layers[stored[0]], format, (n, k))
        if activations == "static" and "input_global_scale" not in tensors:
            raise KeyError(f"{stored[0]}: no input_global_scale, which static activations need")
    if others := [name for name in layers if name not in taken]:
        raise ValueError(
            f"{others[0]} is quantised, and {cls.__name__} has no linear layer of that name "
            "(experts that are stacked in one parameter are not supported)"
        )
    return tuple(left)
