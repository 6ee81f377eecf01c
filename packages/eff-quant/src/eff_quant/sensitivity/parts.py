"""The blocks of a decoder and the linear layers in them, found by the shape of the model and not by its class."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass

from eff_kernels.edit import Where, select
from torch import nn

from eff_quant.linears import find_linears


@dataclass(frozen=True, slots=True)
class Part:
    """One linear layer: its full name, the number of its block, and its component (such as ``"down_proj"``)."""

    name: str
    block: int
    component: str
    module: nn.Module


@dataclass(frozen=True, slots=True)
class Parts:
    """What a sweep takes apart.

    Attributes:
        blocks: Names of the decoder blocks in the order in which they run.
        components: Kinds of linear layers inside a block, in the model's order.
        linears: The layers.
        skipped: Linear layers inside blocks that are left alone, with the reason.
    """

    blocks: tuple[str, ...]
    components: tuple[str, ...]
    linears: tuple[Part, ...]
    skipped: Mapping[str, str]


def find_parts(model: nn.Module, *, blocks: str | None = None, where: Where = "*") -> Parts:
    """Find the blocks of a decoder, and the linear layers of each by component.

    A component is named by the last part of the layer's name inside its block, or by as many parts as tell it from the
    others (GPT-2: ``"attn.c_proj"``, ``"mlp.c_proj"``). Numbers count as one: all experts of a list are one component.

    Args:
        model: A decoder; its blocks are the list of modules that holds most weights of linear layers.
        blocks: Pattern of the blocks' names, such as ``"model.layers.*"``, if that choice is not the right one.
        where: Layers to consider.

    Raises:
        ValueError: no blocks, or ``blocks`` fits none.
    """
    names = _named_blocks(model, blocks) if blocks else _largest_list(model)
    if not names:
        asked = f"no module fits blocks={blocks!r}" if blocks else "no list of blocks with linear layers was found"
        raise ValueError(f"{asked} in {type(model).__name__}; name them by a pattern such as blocks='model.layers.*'")
    layers, skipped = [], {}
    for f in find_linears(model, where=where):
        block = next((i for i, b in enumerate(names) if f.names[0].startswith(b + ".")), None)
        if block is None:
            continue
        if f.reason:
            skipped[f.names[0]] = f.reason
        else:
            layers.append((f.names[0], block, f.module))
    inside = {name: _starred(name[len(names[block]) + 1 :]) for name, block, _ in layers}
    short = _shortest(tuple(dict.fromkeys(inside.values())))
    linears = tuple(Part(name, block, short[inside[name]], module) for name, block, module in layers)
    return Parts(tuple(names), tuple(dict.fromkeys(p.component for p in linears)), linears, skipped)


def _named_blocks(model: nn.Module, pattern: str) -> list[str]:
    names = [name for name, _ in select(model, pattern)]
    return [n for n in names if not any(n.startswith(other + ".") for other in names)]


def _largest_list(model: nn.Module) -> list[str]:
    sizes = {}
    for name, module in model.named_modules():
        if isinstance(module, nn.ModuleList) and len({type(child) for child in module}) == 1:
            sizes[name] = sum(p.numel() for p in module.parameters() if p.ndim == 2)
    best = max(sizes, key=lambda n: sizes[n], default=None)
    if best is None:
        return []
    children = model.get_submodule(best).named_children()
    return [f"{best}.{leaf}" if best else leaf for leaf, _ in children]


def _starred(name: str) -> str:
    return ".".join("*" if part.isdigit() else part for part in name.split("."))


def _shortest(names: tuple[str, ...]) -> dict[str, str]:
    """The shortest end of each name that no other name ends in."""
    ends = Counter(end for name in names for end in _ends(name))
    return {name: next((end for end in _ends(name) if ends[end] == 1), name) for name in names}


def _ends(name: str) -> list[str]:
    parts = name.split(".")
    return [".".join(parts[-i:]) for i in range(1, len(parts) + 1)]
