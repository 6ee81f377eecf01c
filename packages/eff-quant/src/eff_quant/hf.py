"""LLM.int8() as a quantiser of transformers, registered under the name ``eff_int8`` when this module is imported.

After ``import eff_quant.hf``, ``from_pretrained(path, quantization_config=Int8Config(...))`` quantises each weight as
it is read, and ``from_pretrained`` of a folder that such a model was saved to loads it as it was.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from eff_kernels.edit import Report, replace_module
from torch import Tensor, nn

from eff_quant.linears import Found, find_linears
from eff_quant.llm_int8.checkpoint import CheckpointMemory, check_int8_files
from eff_quant.llm_int8.config import Int8Config
from eff_quant.llm_int8.layer import ROW_FORMAT, Int8Linear, is_conv1d
from eff_quant.quantize import check_outlier_columns, dequantize_, report_plan, size_of

try:
    from transformers.core_model_loading import ConversionOps
    from transformers.quantizers.auto import register_quantization_config, register_quantizer
    from transformers.quantizers.base import HfQuantizer
    from transformers.utils.quantization_config import QuantizationConfigMixin
except ImportError as error:
    raise ImportError("eff_quant.hf needs transformers 5: pip install 'eff-quant[transformers]'") from error


@register_quantization_config(Int8Config.quant_method)
class EffInt8Config(QuantizationConfigMixin):
    """`Int8Config` in the form in which transformers keeps it in a model's config and in config.json.

    Args:
        config: The settings, or none and then the same keyword arguments as `Int8Config`.
        **settings: See `Int8Config`.
    """

    def __init__(self, config: Int8Config | None = None, **settings: Any) -> None:
        if config is not None and settings:
            raise TypeError(f"give either an Int8Config or settings, got both: {sorted(settings)}")
        self.quant_method = Int8Config.quant_method  # type: ignore[assignment]
        self.int8 = config if config is not None else Int8Config.from_dict(settings)

    @classmethod
    def from_dict(cls, config_dict: dict[str, Any], return_unused_kwargs: bool = False, **kwargs: Any) -> Any:
        """Rebuild from `to_dict`; keyword arguments are not settings of this method and are handed back."""
        config = cls(Int8Config.from_dict(config_dict))
        return (config, kwargs) if return_unused_kwargs else config

    def to_dict(self) -> dict[str, Any]:
        """The entry ``quantization_config`` of config.json."""
        return self.int8.to_dict()


class _Quantize(ConversionOps):
    """Turns a weight that has just been read into the tensors of an `Int8Linear`."""

    def __init__(self, quantizer: EffInt8HfQuantizer) -> None:
        self.quantizer = quantizer

    def convert(self, input_dict: dict[str, Any], *args: Any, model: nn.Module | None = None, **kwargs: Any) -> Any:
        """Return the tensors by parameter name; those that are not int8 weights pass through."""
        result: dict[str, Tensor] = {}
        for name, value in input_dict.items():
            value = value[0] if isinstance(value, list) else value
            if model is None or not self.quantizer.param_needs_quantization(model, name):
                result[name] = value
                continue
            module = name.removesuffix(".weight")
            weight = value.T if module in self.quantizer.transposed else value
            columns = self.quantizer.config.outlier_columns.get(module, ())
            tensors = Int8Linear.quantized_tensors(weight, columns)
            result.update({f"{module}.{leaf}": tensor for leaf, tensor in tensors.items()})
            self.quantizer.memory.took(value.nbytes)
        return result


@register_quantizer(Int8Config.quant_method)
class EffInt8HfQuantizer(HfQuantizer):
    """Quantises while loading, one weight at a time, or loads what was saved as int8."""

    requires_calibration = False

    def __init__(self, quantization_config: EffInt8Config | Int8Config, **kwargs: Any) -> None:
        if isinstance(quantization_config, Int8Config):
            quantization_config = EffInt8Config(quantization_config)
        super().__init__(quantization_config, **kwargs)
        self.report = Report("from_pretrained with Int8Config")
        self.quantization_config: EffInt8Config
        self.transposed: set[str] = set()
        self.memory = CheckpointMemory([])
        self._old_format: set[str] = set()

    @property
    def config(self) -> Int8Config:
        """The settings."""
        return self.quantization_config.int8

    def validate_environment(self, *args: Any, device_map: Any = None, **kwargs: Any) -> None:
        """Refuse a device map with "disk": the weights are buffers, which are not offloaded."""
        if isinstance(device_map, dict) and "disk" in device_map.values():
            raise ValueError("device_map puts modules on 'disk'; int8 layers can be on 'cpu' or a GPU")

    def _process_model_before_weight_loading(self, model: Any, checkpoint_files: Any = None, **kwargs: Any) -> None:
        files = [f for f in checkpoint_files or () if str(f).endswith(".safetensors")]
        if self.pre_quantized:
            self._old_format = check_int8_files(files)
        else:
            self.memory = CheckpointMemory(files)
        found = find_linears(model, skip=self.config.skip, done=(Int8Linear,), keep=_tied(model))
        if not self.pre_quantized:
            found = [_kept_in_float32(model, f) for f in found]
        check_outlier_columns(self.config, found)
        self.report = report_plan("from_pretrained with Int8Config", found)
        for f in found:
            if f.reason:
                continue
            columns = self.config.outlier_columns.get(f.names[0], ())
            new = Int8Linear.empty_like(f.module, self.config, outlier_columns=columns)
            for name in f.names:
                replace_module(model, name, new)
                if is_conv1d(f.module):
                    self.transposed.add(name)
            if any(_ends_with_any(name, self._old_format) for name in f.names):
                del new.weight_format  # not in the file: put back after loading, else it is reported as missing
            self.report.change(f.names[0], bytes_before=f.size, bytes_after=size_of(new))

    def param_needs_quantization(self, model: Any, param_name: str, **kwargs: Any) -> bool:
        """Whether this is the weight of a layer that becomes int8."""
        module, _, leaf = param_name.rpartition(".")
        return leaf == "weight" and isinstance(model.get_submodule(module), Int8Linear)

    def get_new_dtype(self, converter: Any, param: Any, dtype: torch.dtype | None) -> torch.dtype | None:
        """Cast to nothing that is not floating: a float weight must never be cut down to int8 by a cast."""
        new = super().get_new_dtype(converter, param, dtype)
        if new is not None and not new.is_floating_point:
            where = getattr(converter, "target_patterns", ["a layer"])[0]
            raise ValueError(f"the checkpoint holds {where} in a float dtype, its settings say that it is int8")
        return new

    def get_quantize_ops(self) -> ConversionOps:
        """The conversion of one weight."""
        return _Quantize(self)

    def _process_model_after_weight_loading(self, model: Any, **kwargs: Any) -> Any:
        for name, module in model.named_modules():
            weight = getattr(module, "weight", None)
            if isinstance(weight, Tensor) and weight.dtype == torch.int8 and not isinstance(module, Int8Linear):
                raise ValueError(
                    f"the checkpoint holds {name} in int8, but it is on the skip list {list(self.config.skip)} "
                    f"or is a {type(module).__name__}; correct quantization_config in config.json"
                )
            if isinstance(module, Int8Linear) and "weight_format" not in module._buffers:
                row = torch.tensor(ROW_FORMAT, dtype=torch.uint8, device=module.weight.device)
                module.register_buffer("weight_format", row)
        return model

    @property
    def quantized_element_size(self) -> float:
        """Bytes per weight."""
        return 1

    def is_serializable(self) -> bool:
        """Int8 models can be saved."""
        return True

    @property
    def is_trainable(self) -> bool:
        """Adapters on top can be trained."""
        return True

    @property
    def is_compileable(self) -> bool:
        """Whether no outlier search makes shapes depend on data."""
        return self.config.threshold == 0

    def get_state_dict_and_metadata(self, model: Any) -> tuple[None, dict[str, str]]:
        """Before saving: note which linear layers are float, so that loading exchanges the others only."""
        record_settings(model, the_config(model))
        return None, {}

    def _dequantize(self, model: Any, dtype: torch.dtype | None = None) -> Any:
        dequantize_(model, dtype=dtype)
        return model


def attach(model: Any, config: Int8Config) -> None:
    """Make a transformers model that got `Int8Linear` layers look as if from_pretrained had quantised it."""
    model.hf_quantizer = EffInt8HfQuantizer(EffInt8Config(config), pre_quantized=True)
    model.is_quantized = True
    model.quantization_method = Int8Config.quant_method
    record_settings(model, config)


def detach(model: Any) -> None:
    """Undo `attach`."""
    if getattr(model, "hf_quantizer", None) is not None:
        model.hf_quantizer.remove_quantization_config(model)


def the_config(model: nn.Module) -> Int8Config:
    """The settings that all int8 layers of a model share.

    Raises:
        ValueError: there are none, or layers with different settings, which one entry in config.json cannot hold.
    """
    configs = [m.config for m in model.modules() if isinstance(m, Int8Linear)]
    if not configs:
        raise ValueError("the model has no int8 layers; use quantize_ first")
    for other in configs:
        if replace(other, skip=()) != replace(configs[0], skip=()):
            raise ValueError(
                f"the model has int8 layers of two settings, {configs[0]} and {other}; a checkpoint holds one"
            )
    return configs[0]


def record_settings(model: Any, config: Int8Config) -> None:
    """Put the settings in the model's config, with every layer that could be int8 but is not on the skip list."""
    found = find_linears(model, skip=config.skip, done=(Int8Linear,), keep=_tied(model))
    left = [f.names[0] for f in found if not f.reason]
    settings = EffInt8Config(replace(config, skip=(*config.skip, *left)))
    model.config.quantization_config = settings
    model.hf_quantizer.quantization_config = settings


def _tied(model: Any) -> dict[str, str]:
    tied = getattr(model, "all_tied_weights_keys", None) or {}
    return {name.removesuffix(".weight"): "is tied" for pair in tied.items() for name in pair}


def _kept_in_float32(model: Any, f: Found) -> Found:
    names = set(getattr(model, "_keep_in_fp32_modules", None) or ())
    names |= set(getattr(model, "_keep_in_fp32_modules_strict", None) or ())
    if not f.reason and any(part in names for part in f.names[0].split(".")):
        return replace(f, reason="is kept in float32 by its model class")
    return f


def _ends_with_any(name: str, others: set[str]) -> bool:
    return any(name == o or name.endswith("." + o) or o.endswith("." + name) for o in others)
