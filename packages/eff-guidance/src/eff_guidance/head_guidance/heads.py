"""Names of attention heads: the layers of a denoiser in the order in which they run, and their heads."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from typing import Literal, NamedTuple

from torch import nn

Part = Literal["attn", "attn2"]
Written = Sequence[str | int]

_MODELS = ("SD3Transformer2DModel", "FluxTransformer2DModel", "UNet2DConditionModel")
_JOINT = re.compile(r"transformer_blocks\.(\d+)\.(attn2?)")
_SINGLE = re.compile(r"single_transformer_blocks\.(\d+)\.(attn)")
_UNET = re.compile(r"(down_blocks|mid_block|up_blocks)\..*\.attn1")


class Head(NamedTuple):
    """One head of self- or joint attention.

    Attributes:
        layer: Number of the layer in the order in which layers run, from 0. FLUX counts its single blocks on after the
            double ones; a UNet counts down blocks, middle, up blocks. The dotted name of a module works as well.
        head: Number of the head in its layer.
        part: "attn", the block's own attention (joint in SD3 and FLUX, ``attn1`` of a UNet), or "attn2", the second one
            of SD3.5's dual blocks, which sees the image alone.
    """

    layer: int | str
    head: int
    part: str = "attn"


class Layer(NamedTuple):
    """Attention of one layer: dotted name of the module in the model, number, part, and how many heads it has."""

    name: str
    layer: int
    part: str
    num_heads: int


def list_layers(model: nn.Module, *, parts: Iterable[Part] = ("attn",)) -> list[Layer]:
    """The layers of attention of a denoiser in the order in which they run; "attn" before "attn2" of one block.

    Raises:
        TypeError: the model is none of SD3Transformer2DModel, FluxTransformer2DModel, UNet2DConditionModel.
        ValueError: an unknown part.
    """
    wanted = tuple(parts)
    if unknown := sorted(set(wanted) - {"attn", "attn2"}):
        raise ValueError(f"parts={unknown}; use 'attn' or 'attn2'")
    inner = getattr(model, "_orig_mod", model)  # what torch.compile has wrapped
    if not any(base.__name__ in _MODELS for base in type(inner).__mro__):
        raise TypeError(f"heads can be named in {', '.join(_MODELS)}, not in {type(inner).__name__}")
    found = sorted(_found(model), key=lambda place: place[0])
    layers: list[Layer] = []
    number, last = -1, None
    for (group, block, part, _), name, heads in found:
        if (group, block) != last:
            number, last = number + 1, (group, block)
        kind = "attn2" if part else "attn"
        if kind in wanted:
            layers.append(Layer(name, number, kind, heads))
    return layers


def list_heads(model: nn.Module, *, parts: Iterable[Part] = ("attn",)) -> list[Head]:
    """All heads of a denoiser, by layer and head.

    576 for SD3-medium, 1,368 for FLUX.1-dev.

    Args:
        model: Denoiser of diffusers: SD3, SD3.5, FLUX, or the UNet of SD1.5, SD2 and SDXL.
        parts: Add "attn2" for the image-only attention of SD3.5's dual blocks.

    Raises:
        TypeError: another model.
    """
    return [Head(at.layer, h, at.part) for at in list_layers(model, parts=parts) for h in range(at.num_heads)]


def heads_of_layers(model: nn.Module, layers: int | Iterable[int]) -> list[Head]:
    """All heads of some layers, which is what layer-level perturbed attention guidance damages.

    Raises:
        ValueError: a layer does not exist.
    """
    wanted = [layers] if isinstance(layers, int) else list(layers)
    known = {at.layer: at for at in list_layers(model)}
    if missing := [n for n in wanted if n not in known]:
        raise ValueError(f"layers {missing} do not exist; the model has 0..{len(known) - 1}")
    return [Head(n, h) for n in wanted for h in range(known[n].num_heads)]


def read_head(value: Written) -> Head:
    """A head from ``(layer, head)``, ``(layer, head, part)`` or ``(part, layer, head)``.

    Raises:
        ValueError: it is none of these.
    """
    row = tuple(value)
    if len(row) == 3 and row[0] in ("attn", "attn1", "attn2") and isinstance(row[1], int):
        row = (row[1], row[2], row[0])
    part = "attn" if len(row) == 2 else row[2] if len(row) == 3 else None
    part = "attn" if part == "attn1" else part
    if part not in ("attn", "attn2") or not isinstance(row[1], int) or isinstance(row[1], bool):
        raise ValueError(f"{value!r} is not a head; use (layer, head) or (layer, head, 'attn2')")
    return Head(row[0], row[1], part)


def locate(model: nn.Module, heads: Sequence[Head]) -> dict[str, list[int]]:
    """Positions in ``heads`` by name of the module they are in, each list by number of head.

    Raises:
        ValueError: a layer or head does not exist, or a head is there twice.
    """
    layers = list_layers(model, parts=("attn", "attn2"))
    by_number = {(at.layer, at.part): at for at in layers}
    by_name = {plain_name(at.name): at for at in layers}
    found: dict[str, list[int]] = {}
    seen: dict[tuple[str, int], Head] = {}
    for place, head in enumerate(heads):
        by = by_name.get(plain_name(head.layer)) if isinstance(head.layer, str) else None
        at = by_number.get((head.layer, head.part)) if isinstance(head.layer, int) else by
        if at is None:
            raise ValueError(_no_layer(head, layers))
        if not 0 <= head.head < at.num_heads:
            raise ValueError(f"{tuple(head)}: layer {at.layer} ({at.name}) has heads 0..{at.num_heads - 1}")
        if (at.name, head.head) in seen:
            raise ValueError(f"{tuple(head)} is named twice, also as {tuple(seen[at.name, head.head])}")
        seen[at.name, head.head] = head
        found.setdefault(at.name, []).append(place)
    return {name: sorted(places, key=lambda p: heads[p].head) for name, places in found.items()}


def plain_name(name: str) -> str:
    """A module's name without what torch.compile puts into it."""
    return name.replace("_orig_mod.", "")


def _found(model: nn.Module) -> Iterable[tuple[tuple[int, int, int, int], str, int]]:
    """Sort key (group, block, part, place), name and number of heads of each attention."""
    groups = {"down_blocks": 0, "mid_block": 1, "up_blocks": 2}
    for place, (name, module) in enumerate(model.named_modules()):
        short = plain_name(name)
        if match := _JOINT.fullmatch(short):
            yield (0, int(match[1]), int(match[2] == "attn2"), 0), name, module.heads
        elif match := _SINGLE.fullmatch(short):
            yield (1, int(match[1]), 0, 0), name, module.heads
        elif match := _UNET.fullmatch(short):
            yield (groups[match[1]], place, 0, place), name, module.heads


def _no_layer(head: Head, layers: list[Layer]) -> str:
    own = sorted(at.layer for at in layers if at.part == head.part)
    if not own:
        return f"{tuple(head)}: this model has no {head.part!r} (self-attention only, never cross-attention)"
    if isinstance(head.layer, str):
        return f"{head.layer!r} is no attention of this model; such is {layers[0].name!r}"
    span = f"0..{own[-1]}" if own == list(range(len(own))) else str(own)
    return f"{tuple(head)}: layers with {head.part!r} are {span}"
