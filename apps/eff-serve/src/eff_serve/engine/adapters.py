"""Many LoRA adapters over one decoder; each sequence of a batch has its own or none."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from eff_kernels import grouped_lora
from torch import Tensor
from torch.nn import functional

from eff_serve.pictures.prompt import FUSED, fuse

_MODULE = re.compile(r"model\.layers\.(\d+)\.(?:self_attn|mlp)\.(\w+)")
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")


@dataclass(frozen=True, slots=True, eq=False)
class Stacked:
    """One projection of all adapters: a [E, rank, in] and b [E, out, rank], padded with zeros to the largest rank."""

    a: Tensor
    b: Tensor


class Adapters:
    """Adapters by name, for the decoder's fused projections.

    Args:
        folders: Folders that PEFT wrote, by the names that requests use.
        shapes: For each single projection, such as "q_proj", its outputs and inputs.
        num_layers: Layers of the decoder.

    Raises:
        ValueError: a name is odd, an adapter is no plain LoRA, or fits another model.
        FileNotFoundError: a folder is none of PEFT's.
    """

    def __init__(self, folders: Mapping[str, Path], shapes: Mapping[str, tuple[int, int]], num_layers: int) -> None:
        if odd := [name for name in folders if not _NAME.fullmatch(name)]:
            raise ValueError(f"adapter name {odd[0][:60]!r}; use letters, digits, '.', '_' and '-'")
        self.names = tuple(folders)
        read = [_read(name, folder, shapes, num_layers) for name, folder in folders.items()]
        sizes = {part: out for part, (out, _) in shapes.items()}
        layers: list[dict[str, Stacked]] = []
        for i in range(num_layers):
            layer = {}
            for fused, parts in FUSED.items():
                pairs = [{p: one[i, p] for p in parts if (i, p) in one} for one in read]
                if any(pairs):
                    layer[fused] = _stacked([fuse(p, parts, sizes) for p in pairs], shapes[parts[0]][1])
            layers.append(layer)
        self.layers = tuple(layers)

    @property
    def nbytes(self) -> int:
        """Bytes of all weights."""
        return sum(s.a.nbytes + s.b.nbytes for layer in self.layers for s in layer.values())

    def number(self, name: str | None) -> int:
        """The number of an adapter; -1 for none."""
        return -1 if name is None else self.names.index(name)

    def add(self, layer: int, projection: str, x: Tensor, y: Tensor, numbers: Tensor) -> Tensor:
        """Y with each row's adapter added; ``numbers`` int64 [T], -1 leaves a row bit for bit as it is."""
        found = self.layers[layer].get(projection)
        return y if found is None else grouped_lora(x, found.a, found.b, numbers[:, None], y=y)


def _read(
    name: str, folder: Path, shapes: Mapping[str, tuple[int, int]], num_layers: int
) -> dict[tuple[int, str], tuple[Tensor, Tensor]]:
    """Factors of an adapter by layer and projection, its scale within b."""
    from eff_adapters.lora_mixer.peft_files import read_adapter

    found = {}
    for module, (a, b, scaling) in read_adapter(folder).weights.items():
        place = _MODULE.fullmatch(module)
        part = place[2] if place else ""
        if place is None or part not in shapes or int(place[1]) >= num_layers:
            raise ValueError(f"the adapter {name!r} changes {module}, which this model does not have")
        out, inputs = shapes[part]
        if (b.size(0), a.size(1)) != (out, inputs):
            raise ValueError(
                f"the adapter {name!r} has {module} from {a.size(1)} to {b.size(0)}, the model from {inputs} to {out}; "
                "it was trained on another one"
            )
        if not (torch.isfinite(a).all() and torch.isfinite(b).all()):
            raise ValueError(f"the adapter {name!r} has weights of {module} that are not finite")
        found[int(place[1]), part] = (a.float(), b.float() * scaling)
    return found


def _stacked(pairs: list[tuple[Tensor, Tensor]], inputs: int) -> Stacked:
    rank = max(a.size(0) for a, _ in pairs)
    a = torch.stack([functional.pad(a.view(-1, inputs), (0, 0, 0, rank - a.size(0))) for a, _ in pairs])
    b = torch.stack([functional.pad(b, (0, rank - b.size(1))) for _, b in pairs])
    return Stacked(a.contiguous(), b.contiguous())
