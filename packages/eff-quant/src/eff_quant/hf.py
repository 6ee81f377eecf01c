"""The methods of this package as quantisers of transformers, registered when this module is imported.

After ``import eff_quant.hf``, ``from_pretrained(path, quantization_config=Int8Config(...))``, with the config of any
method or a `MixedConfig`, quantises each weight as it is read, and ``from_pretrained`` of a folder that such a model
was saved to loads it as it was.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from eff_kernels.edit import Report, replace_module
from torch import Tensor, nn

from eff_quant.checkpoint import CheckpointMemory
from eff_quant.convert import dequantize_layers, empty_module
from eff_quant.count import counting_hidden
from eff_quant.experts import QuantizedExperts
from eff_quant.hub import DTYPES, headers, is_code, quantized_entries, with_model_names
from eff_quant.layer import QuantizedLinear
from eff_quant.linears import Found, find_linears, is_conv1d, size_of
from eff_quant.mixed import MixedConfig, as_mixed, settings_from_dict
from eff_quant.plan import QUANTIZED, groups_of, name_of, plan, report_plan, saved_settings
from eff_quant.registry import method_names, method_of
from eff_quant.skips import on_skip_list

try:
    import transformers
    from transformers.core_model_loading import ConversionOps
    from transformers.modeling_utils import PreTrainedModel
    from transformers.quantizers.auto import register_quantization_config, register_quantizer
    from transformers.quantizers.base import HfQuantizer
    from transformers.utils.quantization_config import QuantizationConfigMixin
except ImportError as error:
    raise ImportError("eff_quant.hf needs transformers 5: pip install 'eff-quant[transformers]'") from error


class EffConfig(QuantizationConfigMixin):
    """Settings in the form in which transformers keeps them in a model's config and in config.json.

    Args:
        config: The config of a method, a `MixedConfig`, or a mapping from patterns to configs.
    """

    def __init__(self, config: Any) -> None:
        self.rules = as_mixed(config)
        self.quant_method = self.settings.quant_method

    @property
    def settings(self) -> Any:
        """The config of the one method that all layers have, or the `MixedConfig`."""
        return self.rules.plain

    @classmethod
    def from_dict(cls, config_dict: Mapping[str, Any], return_unused_kwargs: bool = False, **kwargs: Any) -> Any:
        """Rebuild from `to_dict`; keyword arguments are not settings of a method and are handed back."""
        config = cls(settings_from_dict(config_dict))
        return (config, kwargs) if return_unused_kwargs else config

    def to_dict(self) -> dict[str, Any]:
        """The entry ``quantization_config`` of config.json."""
        return self.settings.to_dict()


class _Quantize(ConversionOps):
    """Turns a weight that has just been read into the tensors of a quantised layer."""

    def __init__(self, quantizer: EffHfQuantizer) -> None:
        self.quantizer = quantizer

    def convert(self, input_dict: dict[str, Any], *args: Any, model: nn.Module | None = None, **kwargs: Any) -> Any:
        """Return the tensors by parameter name; those that are no weights to quantise pass through."""
        result: dict[str, Tensor] = {}
        for name, value in input_dict.items():
            value = value[0] if isinstance(value, list) else value
            if model is None or not self.quantizer.param_needs_quantization(model, name):
                result[name] = value
                continue
            result.update(self.quantizer.take(model, name, value))
            if name not in result and kwargs.get("missing_keys") is not None:
                kwargs["missing_keys"].discard(name)
        return result


class EffHfQuantizer(HfQuantizer):
    """Quantises while loading, one weight or group of weights at a time, or loads what was saved quantised."""

    requires_calibration = False

    def __init__(self, quantization_config: Any, **kwargs: Any) -> None:
        if not isinstance(quantization_config, EffConfig):
            quantization_config = EffConfig(quantization_config)
        super().__init__(quantization_config, **kwargs)
        self.quantization_config: EffConfig
        self.report = Report(f"from_pretrained with {name_of(self.rules)}")
        self.memory = CheckpointMemory([])
        self._planned: dict[str, Found] = {}
        self._groups: dict[str, tuple[str, ...]] = {}
        self._waiting: dict[tuple[str, ...], dict[str, Tensor]] = {}
        self._missing: set[str] = set()
        self._incomplete: list[QuantizedLinear] = []
        self.has_experts = False

    @property
    def rules(self) -> MixedConfig:
        """The settings by layer."""
        return self.quantization_config.rules

    def validate_environment(self, *args: Any, device_map: Any = None, **kwargs: Any) -> None:
        """Refuse a device map with "disk": the weights are buffers, which are not offloaded."""
        if isinstance(device_map, dict) and "disk" in device_map.values():
            raise ValueError("device_map puts modules on 'disk'; quantised layers can be on 'cpu' or a GPU")

    def _process_model_before_weight_loading(self, model: Any, checkpoint_files: Any = None, **kwargs: Any) -> None:
        files = [f for f in checkpoint_files or () if str(f).endswith(".safetensors")]
        entries: dict[str, dict[str, Tensor]] = {}
        stored = None
        if not self.pre_quantized:
            self.memory = CheckpointMemory(files)
        elif files:
            entries = with_model_names(model, quantized_entries(headers(files)))
            stored = set(entries)
        else:  # a state dict, whose names are the model's
            (_, config), *_ = self.rules.rules
            linears = find_linears(model, experts=True)
            stored = {n for f in linears for n in f.names if not on_skip_list(model, config.skip, (n,), f.module)}
        found = plan(model, self.rules, stored=stored, loading=True)
        self.report = report_plan(self.report.action, found)
        self._groups = groups_of(found)
        for f in found:
            if f.reason:
                continue
            new = empty_module(f)
            self.has_experts |= isinstance(new, QuantizedExperts)
            size = size_of(new)
            if self.pre_quantized:
                here = [entries[n] for n in f.names if n in entries]
                if here:
                    self._check(f.names[0], new, here[0])
            else:
                for key, shape in new.float_shapes().items():
                    self._missing.add(f"{f.names[0]}.{key}")
                    held = new.state_dict().get(key)
                    if held is None:
                        # transformers takes only entries that the model has; this one goes when its weight arrives
                        new._buffers[key] = torch.empty(shape, device="meta")
                    elif isinstance(new, QuantizedLinear) and is_code(held.dtype):
                        # Early releases of transformers 5 cast what they read to the dtype of the entry
                        own = next(n for n in new._buffers if new.stored_as.get(n, n) == key)
                        new._buffers[own] = torch.empty_like(held, dtype=torch.get_default_dtype())
            for name in f.names:
                replace_module(model, name, new)
                self._planned[name] = f
            self.report.change(f.names[0], bytes_before=f.size, bytes_after=size)

    def _check(self, name: str, layer: QuantizedLinear | QuantizedExperts, entries: Mapping[str, Tensor]) -> None:
        """Check a layer's entries; what the file may lack goes, else it is reported as missing."""
        layer.check_entries(name, entries)
        if isinstance(layer, QuantizedExperts):
            return
        for own in [n for n, t in layer._buffers.items() if t is not None]:
            if layer.stored_as.get(own, own) not in entries:
                del layer._buffers[own]
                self._incomplete.append(layer)

    def param_needs_quantization(self, model: Any, param_name: str, **kwargs: Any) -> bool:
        """Whether this is the weight of a layer, or a stack of experts, that becomes quantised."""
        module, _, leaf = param_name.rpartition(".")
        layer = model.get_submodule(module)
        return isinstance(layer, QUANTIZED) and leaf in layer.float_shapes()

    def take(self, model: nn.Module, param_name: str, weight: Tensor) -> dict[str, Tensor]:
        """Quantise a weight; one of a group waits for the others. Returns tensors by their full names."""
        module, _, leaf = param_name.rpartition(".")
        f = self._planned[module]
        name = f.names[0]
        self.memory.took(weight.nbytes)
        layer = model.get_submodule(module)
        if isinstance(layer, QuantizedExperts):
            layer._buffers.pop(leaf, None)
            self._missing.discard(f"{name}.{leaf}")
            return {f"{module}.{buffer}": t for buffer, t in layer.quantized(leaf, weight).items()}
        members = self._groups.get(name, (name,))
        waiting = self._waiting.setdefault(members, {})
        waiting[name] = weight.T if is_conv1d(f.module) else weight
        return self._quantize(model, members) if len(waiting) == len(members) else {}

    def _quantize(self, model: nn.Module, members: tuple[str, ...]) -> dict[str, Tensor]:
        weights, tensors = self._waiting.pop(members), {}
        config = self._planned[members[0]].config
        method = method_of(config)
        shared = method.share([weights[m] for m in members], config) if len(members) > 1 else {}
        for module in members:
            new = method.tensors(module, weights.pop(module), config, shared)
            tensors.update({f"{module}.{leaf}": tensor for leaf, tensor in new.items()})
            model.get_submodule(module)._buffers.pop("weight", None)
            self._missing.discard(f"{module}.weight")
        return tensors

    def get_new_dtype(self, converter: Any, param: Any, dtype: torch.dtype | None) -> torch.dtype | None:
        """Cast nothing to or from a dtype of codes: a float weight must never be cut down to codes by a cast."""
        new = super().get_new_dtype(converter, param, dtype)
        held = DTYPES.get(param.get_dtype()) if hasattr(param, "get_dtype") else getattr(param, "dtype", None)
        if new is not None and new != held and (is_code(new) or (held is not None and is_code(held))):
            where = getattr(converter, "target_patterns", ["a layer"])[0]
            raise ValueError(
                f"the checkpoint holds {where} in {held or param.get_dtype()}, its settings say that it is {new}; "
                "correct quantization_config in config.json"
            )
        return new

    def get_quantize_ops(self) -> ConversionOps:
        """The conversion of one weight."""
        return _Quantize(self)

    def _process_model_after_weight_loading(self, model: Any, **kwargs: Any) -> Any:
        if self._missing:
            raise ValueError(f"the checkpoint lacks the weights of {', '.join(sorted(self._missing))}")
        for layer in self._incomplete:
            layer.after_loading()
        return model

    @property
    def quantized_element_size(self) -> float:
        """Bytes per weight, of the largest method."""
        return max(method_of(c).bytes_per_weight(c) for _, c in self.rules.rules)

    def is_serializable(self) -> bool:
        """Quantised models can be saved."""
        return True

    @property
    def is_trainable(self) -> bool:
        """Adapters on top can be trained."""
        return True

    @property
    def is_compileable(self) -> bool:
        """Whether no method makes shapes depend on data; how many tokens an expert gets always does."""
        return not self.has_experts and all(method_of(c).compilable(c) for _, c in self.rules.rules)

    def get_state_dict_and_metadata(self, model: Any) -> tuple[None, dict[str, str]]:
        """Before saving: note which linear layers have which settings, so that loading exchanges the same ones.

        Raises:
            NotImplementedError: this transformers takes tensors of stored experts for weights of experts.
        """
        if self.has_experts and not _names_are_whole() and _converts(model):
            raise NotImplementedError(
                f"transformers {transformers.__version__} changes the names of stored experts when it saves them; "
                "use 5.23 or newer, or dequantize_ first"
            )
        record_settings(model)
        return None, {}

    def _dequantize(self, model: Any, dtype: torch.dtype | None = None) -> Any:
        dequantize_layers(model, dtype=dtype)
        detach(model)
        return model


def _names_are_whole() -> bool:
    """Whether a rule of transformers for ``weight`` leaves ``weight_scale`` alone, as it does since 5.23."""
    from transformers.core_model_loading import WeightRenaming

    name, _ = WeightRenaming("a.weight", "b.weight").rename_source_key("a.weight_scale")
    return bool(name == "a.weight_scale")


def _converts(model: Any) -> bool:
    """Whether transformers saves weights of the model's class in another form than it holds them."""
    from transformers.conversion_mapping import get_model_conversion_mapping
    from transformers.core_model_loading import WeightConverter

    found = getattr(model, "_weight_conversions", None) or get_model_conversion_mapping(model, add_legacy=False)
    return any(isinstance(conversion, WeightConverter) for conversion in found)


for _name in (*method_names(), MixedConfig.quant_method):
    register_quantization_config(_name)(EffConfig)
    register_quantizer(_name)(EffHfQuantizer)

# It counts parameters, and there is no hook; of models without our layers it says what it said.
PreTrainedModel.num_parameters = counting_hidden(PreTrainedModel.num_parameters)  # type: ignore[method-assign]


def attach(model: Any) -> None:
    """Make a transformers model that got quantised layers look as if from_pretrained had quantised it."""
    record_settings(model)
    model.hf_quantizer = EffHfQuantizer(model.config.quantization_config, pre_quantized=True)
    model.hf_quantizer.has_experts = any(isinstance(m, QuantizedExperts) for m in model.modules())
    model.is_quantized = True
    model.quantization_method = model.config.quantization_config.quant_method


def detach(model: Any) -> None:
    """Undo `attach`."""
    if getattr(model, "hf_quantizer", None) is not None:
        model.hf_quantizer.remove_quantization_config(model)


def record_settings(model: Any) -> None:
    """Put the settings of all layers in the model's config, such that loading exchanges the same layers.

    Raises:
        ValueError: there are no quantised layers.
    """
    settings = EffConfig(saved_settings(model))
    model.config.quantization_config = settings
    if getattr(model, "hf_quantizer", None) is not None:
        model.hf_quantizer.quantization_config = settings
