"""Reading a safetensors folder, one file or many shards, tensor by tensor."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from eff_quant.int4_files import Int4File, read_groups
from safetensors import SafetensorError, safe_open
from torch import Tensor

from eff_serve.engine.groups import GroupLinear
from eff_serve.engine.linear import FloatLinear, Linear


class CheckpointError(ValueError):
    """The weights of a folder are missing, damaged or of another model."""


class Checkpoint:
    """The tensors of a model folder by name; files are mapped into memory and read on demand.

    Args:
        folder: The folder.
        int4: How it stores weights of 4 bits, if it does.

    Raises:
        CheckpointError: there are no safetensors files, one is named but missing, or one is damaged.
    """

    def __init__(self, folder: Path, int4: Int4File | None = None) -> None:
        self.folder = folder
        self._int4 = int4
        self._read: set[str] = set()
        index = folder / "model.safetensors.index.json"
        if index.is_file():
            names = sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))
        else:
            names = ["model.safetensors"]
        self._files = {}
        for name in names:
            path = folder / name
            if not path.is_file():
                raise CheckpointError(f"{folder} lacks the weight file {name}")
            try:
                file = safe_open(path, framework="pt")
            except (SafetensorError, OSError) as error:
                raise CheckpointError(f"{path} is damaged: {error}") from error
            self._files.update(dict.fromkeys(file.keys(), file))

    def __contains__(self, name: str) -> bool:
        return name in self._files

    def get(self, name: str, shape: tuple[int, ...]) -> Tensor:
        """The tensor of that name.

        Raises:
            CheckpointError: it is missing or has another shape.
        """
        if name not in self._files:
            raise CheckpointError(f"{self.folder} has no tensor {name}")
        self._read.add(name)
        tensor: Tensor = self._files[name].get_tensor(name)
        if tuple(tensor.shape) != shape:
            raise CheckpointError(f"{name} in {self.folder} must have shape {list(shape)}, got {list(tensor.shape)}")
        return tensor

    def floats(self, name: str, shape: tuple[int, ...]) -> Tensor:
        """The same in float32."""
        return self.get(name, shape).to(torch.float32)

    def layer(self, name: str, n: int, k: int, bias: Tensor | None = None) -> Linear | None:
        """A projection of 4 bits in groups, or None where the layer is stored otherwise."""
        stored = any(f"{name}.{part}" in self for part in ("qweight", "weight_packed"))
        if self._int4 is None or not stored:
            return None
        try:
            weight, order = read_groups(self._int4, self.get, self.__contains__, name, n, k)
        except CheckpointError:
            raise
        except ValueError as error:
            raise CheckpointError(f"{self.folder}: {error}") from error
        return GroupLinear(weight, bias, order)

    def ends(self, vocab: int, hidden: int, *, tied: bool) -> tuple[Tensor, Linear]:
        """The embedding and the head."""
        embedding = self.get("model.embed_tokens.weight", (vocab, hidden))
        return embedding, FloatLinear(embedding if tied else self.get("lm_head.weight", (vocab, hidden)))

    def check_all_read(self, *ignored: str) -> None:
        """Raise where weights were left over: the config describes a smaller model than the file holds.

        Args:
            ignored: Names that may stay unread.

        Raises:
            CheckpointError: naming some of them.
        """
        weights = {n for n in self._files if n.endswith((".weight", ".bias", ".weight_packed", ".qweight"))}
        if left := sorted(weights - self._read - set(ignored)):
            raise CheckpointError(
                f"{self.folder}: {len(left)} tensors belong to no layer of its config.json, such as {left[0]}"
            )
