"""The methods of this package as quantisers of diffusers, registered when this module is imported.

After ``import eff_quant.diffusion``, ``from_pretrained(path, quantization_config=EffDiffusionConfig(config))``
quantises a model once its weights are there, and ``from_pretrained`` of a folder that such a model was saved to loads
it as it was.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from eff_kernels.edit import Report, replace_module
from torch import Tensor, nn

from eff_quant.convert import dequantize_layers, empty_module, quantize_layers
from eff_quant.count import counting_hidden
from eff_quant.hub import headers, quantized_entries
from eff_quant.linears import size_of
from eff_quant.mixed import MixedConfig, as_mixed, settings_from_dict
from eff_quant.plan import QUANTIZED, name_of, plan, report_plan, saved_settings
from eff_quant.registry import method_names, method_of

try:
    from diffusers.models.modeling_utils import ModelMixin
    from diffusers.quantizers.auto import AUTO_QUANTIZATION_CONFIG_MAPPING, AUTO_QUANTIZER_MAPPING
    from diffusers.quantizers.base import DiffusersQuantizer
    from diffusers.quantizers.quantization_config import QuantizationConfigMixin
except ImportError as error:
    raise ImportError("eff_quant.diffusion needs diffusers: pip install 'eff-quant[diffusers]'") from error


class _Name(str):
    """diffusers wants the name of a method to be a member of an enum."""

    @property
    def value(self) -> str:
        return str(self)


class EffDiffusionConfig(QuantizationConfigMixin):  # type: ignore[misc]
    """Settings in the form in which diffusers keeps them in a model's config and in config.json.

    Args:
        config: The config of a method, a `MixedConfig`, or a mapping from patterns to configs.
    """

    def __init__(self, config: Any) -> None:
        self.rules = as_mixed(config)
        self.quant_method = _Name(self.rules.plain.quant_method)

    @classmethod
    def from_dict(cls, config_dict: Mapping[str, Any], return_unused_kwargs: bool = False, **kwargs: Any) -> Any:
        """Rebuild from `to_dict`; keyword arguments are not settings of a method and are handed back."""
        config = cls(settings_from_dict(config_dict))
        return (config, kwargs) if return_unused_kwargs else config

    def to_dict(self) -> dict[str, Any]:
        """The entry ``quantization_config`` of config.json."""
        return self.rules.plain.to_dict()

    def to_diff_dict(self) -> dict[str, Any]:
        """What diffusers prints: all of it."""
        return self.to_dict()


class EffDiffusionQuantizer(DiffusersQuantizer):  # type: ignore[misc]
    """Loads what was saved quantised, or quantises a model that has just been loaded."""

    use_keep_in_fp32_modules = False
    requires_calibration = False

    def __init__(self, quantization_config: EffDiffusionConfig, **kwargs: Any) -> None:
        super().__init__(quantization_config, **kwargs)
        self.report = Report(f"from_pretrained with {name_of(quantization_config.rules)}")
        self._files: list[str] = []

    def maybe_update_loaded_keys(self, loaded_keys: list[str], checkpoint_files: list[str]) -> list[str]:
        """Remember the files, which say what is quantised in them."""
        self._files = [f for f in checkpoint_files or () if str(f).endswith(".safetensors")]
        return loaded_keys

    def _process_model_before_weight_loading(self, model: nn.Module, **kwargs: Any) -> None:
        if not self.pre_quantized:
            return
        if not self._files:
            raise ValueError("a quantised model is loaded from safetensors files; this folder has none")
        entries = quantized_entries(headers(self._files))
        found = plan(model, self.quantization_config.rules, stored=set(entries), loading=True)
        self.report = report_plan(self.report.action, found)
        for f in found:
            if f.reason:
                continue
            new = empty_module(f)
            new.check_entries(f.names[0], next(entries[n] for n in f.names if n in entries))
            for name in f.names:
                replace_module(model, name, new)
            self.report.change(f.names[0], bytes_before=f.size, bytes_after=size_of(new))

    def check_if_quantized_param(
        self, model: nn.Module, param: Any, param_name: str, *args: Any, **kwargs: Any
    ) -> bool:
        """Whether this is a part of a quantised layer that a cast must not touch."""
        module, _, leaf = param_name.rpartition(".")
        layer = model.get_submodule(module)
        return isinstance(layer, QUANTIZED) and leaf not in layer._parameters

    def create_quantized_param(
        self, model: nn.Module, param: Tensor, param_name: str, device: Any, state_dict: Any, *args: Any, **kwargs: Any
    ) -> None:
        """Put codes or scales in place as the file holds them; ``param`` has been cast."""
        module, _, leaf = param_name.rpartition(".")
        setattr(model.get_submodule(module), leaf, state_dict[param_name].to(device))

    def _process_model_after_weight_loading(self, model: nn.Module, **kwargs: Any) -> nn.Module:
        if not self.pre_quantized:
            rules = self.quantization_config.rules
            self.report = quantize_layers(model, rules, where="*", strict=False, progress=None)
            attach(model)
        return model

    def _dequantize(self, model: nn.Module) -> nn.Module:
        dequantize_layers(model)
        detach(model)
        return model

    @property
    def is_serializable(self) -> bool:
        """Quantised models can be saved."""
        return True

    @property
    def is_trainable(self) -> bool:
        """Adapters on top can be trained."""
        return True

    @property
    def is_compileable(self) -> bool:
        """Whether no method makes shapes depend on data."""
        return all(method_of(c).compilable(c) for _, c in self.quantization_config.rules.rules)


for _name in (*method_names(), MixedConfig.quant_method):
    AUTO_QUANTIZATION_CONFIG_MAPPING[_name] = EffDiffusionConfig
    AUTO_QUANTIZER_MAPPING[_name] = EffDiffusionQuantizer

# It counts parameters, and there is no hook; of models without our layers it says what it said.
ModelMixin.num_parameters = counting_hidden(ModelMixin.num_parameters)


def attach(model: Any) -> None:
    """Let a model of diffusers know that it has quantised layers, so that it saves what loads again."""
    config = EffDiffusionConfig(saved_settings(model))
    model.hf_quantizer = EffDiffusionQuantizer(config, pre_quantized=True)
    model.register_to_config(quantization_config=config.to_dict())


def detach(model: Any) -> None:
    """Undo `attach`."""
    if getattr(model, "hf_quantizer", None) is not None:
        model.hf_quantizer = None
        kept = {key: value for key, value in model.config.items() if key != "quantization_config"}
        model._internal_dict = type(model.config)(kept)


def load(path: str | Path, config: Any = None, **kwargs: Any) -> Any:
    """Load a model's folder of diffusers, see `eff_quant.load`."""
    import diffusers

    written = json.loads((Path(path) / "config.json").read_text())
    cls, own = getattr(diffusers, written["_class_name"]), written.get("quantization_config")
    if own is None and config is None:
        raise ValueError(f"{path} holds float weights; give a config to quantise it, such as Int8Config()")
    if own is not None and config is not None:
        raise ValueError(f"{path} is quantised already with its own settings {own}; leave out config")
    settings = {} if config is None else {"quantization_config": EffDiffusionConfig(config)}
    return cls.from_pretrained(path, **settings, **kwargs)
