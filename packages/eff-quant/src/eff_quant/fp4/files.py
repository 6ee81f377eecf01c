"""A folder of safetensors files with FP4 weights, looked into before a model is made."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from eff_quant.fp4.check import check_fp4_tensors
from eff_quant.fp4.config import Activations, Format
from eff_quant.fp4.settings import warn_of_cache
from eff_quant.hub import DTYPES

# ModelOpt's names next to ours. Its tensor scales multiply, ours divide.
_NAMES = {
    "weight": "weight_packed",
    "weight_scale": "weight_scale",
    "weight_scale_2": "weight_global_scale",
    "input_scale": "input_global_scale",
}


class Folder:
    """The safetensors files of a model folder.

    Args:
        path: The folder.

    Raises:
        OSError: there is no such folder, it holds no safetensors files, or one that its index names is missing.
        ValueError: a file is damaged.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        self.modelopt = False
        if not self.path.is_dir():
            raise OSError(f"{path} is not a folder; download the model first (huggingface_hub.snapshot_download)")
        self._files: dict[str, Path] = {}
        self._headers: dict[str, Tensor] = {}
        for file in self._all_files():
            self._look_into(file)

    def _all_files(self) -> list[Path]:
        index = self.path / "model.safetensors.index.json"
        if index.exists():
            files = [self.path / name for name in sorted(set(json.loads(index.read_text())["weight_map"].values()))]
        else:
            files = sorted(self.path.glob("*.safetensors"))
        if not files:
            raise OSError(f"{self.path} holds no safetensors files")
        if missing := [f.name for f in files if not f.exists()]:
            raise OSError(f"{self.path} lacks {missing}, which model.safetensors.index.json names")
        return files

    def _look_into(self, file: Path) -> None:
        from safetensors import SafetensorError, safe_open

        try:
            with safe_open(file, framework="pt") as f:
                for key in f.keys():  # noqa: SIM118 - a safetensors handle is no dict
                    part = f.get_slice(key)
                    # A dtype that no FP4 layer has is as good as any other for the checks
                    dtype = DTYPES.get(part.get_dtype(), torch.float64)
                    self._headers[key] = torch.empty(part.get_shape(), dtype=dtype, device="meta")
                    self._files[key] = file
        except SafetensorError as error:
            raise ValueError(f"{file} is not a complete safetensors file: {error}") from error

    def check_modelopt(self, settings: Mapping[str, Any]) -> Activations | None:
        """Take the folder as one of ModelOpt NVFP4, and return what its activations are.

        Raises:
            ValueError: another algorithm, or input scales for some of the layers only.
        """
        file = self.path / "hf_quant_config.json"
        if file.exists():
            settings = {**settings, **json.loads(file.read_text()).get("quantization", {})}
        if settings.get("quant_algo") != "NVFP4":
            raise ValueError(f"{self.path}: quant_algo={settings.get('quant_algo')!r} of ModelOpt; wanted 'NVFP4'")
        if scheme := settings.get("kv_cache_quant_algo"):
            warn_of_cache(scheme)
        self.modelopt = True
        names = [key.rpartition(".")[0] for key in self._headers if key.endswith(".weight_scale_2")]
        static = [name for name in names if f"{name}.input_scale" in self._headers]
        if static and len(static) < len(names):
            without = next(n for n in names if n not in static)
            raise ValueError(f"{self.path}: {static[0]} has an input_scale, {without} has none")
        return "static" if static else None

    def layers(self, format: Format) -> dict[str, dict[str, Tensor]]:
        """The FP4 layers by name, with their tensors by our names, on the meta device.

        Raises:
            KeyError, TypeError, ValueError: see `check_fp4_tensors`; and ValueError if there are none.
        """
        mark = "weight_scale_2" if self.modelopt else "weight_packed"
        modules: dict[str, dict[str, Tensor]] = {}
        for key, tensor in self._headers.items():
            name, _, leaf = key.rpartition(".")
            modules.setdefault(name, {})[leaf] = tensor
        layers = {}
        for name, found in modules.items():
            if mark not in found:
                continue
            if self.modelopt:
                found = {_NAMES.get(leaf, leaf): tensor for leaf, tensor in found.items()}
            if "weight_packed" not in found:
                raise KeyError(f"{name}: {mark} without weight")
            check_fp4_tensors(name, found, format)
            layers[name] = found
        if not layers:
            raise ValueError(f"{self.path} has no {mark}, so it holds no FP4 weights")
        if lone := sorted(
            k for k in self._headers if k.endswith(".weight_scale") and k.rpartition(".")[0] not in layers
        ):
            raise KeyError(f"{lone[0]} has no FP4 weight: its {mark} is missing")
        return layers

    def as_compressed_tensors(self, layers: Mapping[str, Any]) -> dict[str, Tensor]:
        """All tensors of a folder of ModelOpt, those of its FP4 layers as compressed-tensors holds them."""
        from safetensors import safe_open

        tensors = {}
        for file in dict.fromkeys(self._files.values()):
            with safe_open(file, framework="pt") as f:
                for key in f.keys():  # noqa: SIM118
                    name, _, leaf = key.rpartition(".")
                    tensor = f.get_tensor(key)
                    if name in layers and leaf in _NAMES:
                        key = f"{name}.{_NAMES[leaf]}"
                        tensor = 1 / tensor.reshape(1) if leaf in ("weight_scale_2", "input_scale") else tensor
                    tensors[key] = tensor
        return tensors
