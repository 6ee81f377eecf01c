"""The largest activation that each linear layer receives, for static FP4 activations."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from eff_kernels.edit import Where, select
from torch import Tensor, nn

from eff_quant.fp4.layer import FP4Linear
from eff_quant.fp4.weight import reciprocal_scale
from eff_quant.linears import is_conv1d

VERSION = 1


@dataclass(frozen=True, slots=True)
class InputRanges:
    """What `calibrate_fp4` saw.

    Attributes:
        tokens: How many tokens were seen, without padding.
        amax: The largest magnitude in the input of each linear layer, by name.
    """

    tokens: int
    amax: Mapping[str, float]

    def set_input_scales(self, model: nn.Module) -> None:
        """Give each FP4 layer with static activations the scale of its input.

        Raises:
            ValueError: no such layer, or one that was not seen; the message names it.
        """
        layers = [(n, m) for n, m in select(model, kind=FP4Linear) if m.config.activations == "static"]
        if not layers:
            raise ValueError(
                "the model has no FP4Linear with activations='static'; quantise it with such a config first"
            )
        if missing := [name for name, _ in layers if name not in self.amax]:
            raise ValueError(f"no calibrated input for {missing}; the ranges hold {sorted(self.amax)}")
        for name, layer in layers:
            amax = torch.tensor(self.amax[name], dtype=torch.float32, device=layer.weight_packed.device)
            layer.input_global_scale = reciprocal_scale(amax)

    def save(self, path: str | Path) -> None:
        """Write the ranges as JSON."""
        Path(path).write_text(json.dumps({"version": VERSION, **asdict(self)}))

    @classmethod
    def load(cls, path: str | Path) -> InputRanges:
        """Read what `save` wrote.

        Raises:
            ValueError: another version of the format, or a range that is no finite number.
        """
        values = json.loads(Path(path).read_text())
        version = values.pop("version", None)
        if version != VERSION:
            raise ValueError(f"{path}: input ranges of version {version!r}; this eff_quant reads version {VERSION}")
        if wrong := [n for n, a in values["amax"].items() if not (math.isfinite(a) and a >= 0)]:
            raise ValueError(f"{path}: the ranges of {wrong} are not finite numbers of 0 or more")
        return cls(values["tokens"], values["amax"])


@torch.no_grad()
def calibrate_fp4(model: nn.Module, batches: Iterable[Any], *, where: Where = "*") -> InputRanges:
    """Run a model on some batches and record the largest magnitude in the input of each linear layer.

    Calibrate the float model before it is quantised, or one with FP4 weights; activations are never rounded meanwhile.

    Args:
        model: Any module; it is run as it is (set ``eval()`` yourself) and left unchanged.
        batches: Each one a mapping of keyword arguments, a tuple of arguments, or a single argument. Tokens that an
            ``attention_mask`` [B, T] of a mapping marks as padding do not count.
        where: Layers to look at.

    Raises:
        ValueError: no tokens, or an input that holds inf or NaN; the message names the layer.
    """
    seen: dict[str, Tensor] = {}
    tokens: dict[str, int] = {}
    mask: Tensor | None = None

    def watch(name: str) -> Any:
        def hook(module: nn.Module, args: tuple[Any, ...]) -> None:
            rows = _rows(args[0], mask)
            tokens[name] = tokens.get(name, 0) + len(rows)
            if len(rows):
                largest = rows.abs().amax().float()
                seen[name] = torch.maximum(seen[name], largest) if name in seen else largest

        return hook

    layers: list[tuple[str, nn.Module]] = [
        (n, m) for n, m in select(model, where, nn.Module) if isinstance(m, nn.Linear) or is_conv1d(m)
    ]
    hooks = [module.register_forward_pre_hook(watch(name)) for name, module in layers]
    try:
        with _float_activations(model):
            for batch in batches:
                mask = batch.get("attention_mask") if isinstance(batch, Mapping) else None
                if isinstance(batch, Mapping):
                    model(**batch)
                else:
                    model(*batch) if isinstance(batch, tuple | list) else model(batch)
    finally:
        for hook in hooks:
            hook.remove()
    if not seen:
        raise ValueError("calibrate_fp4 saw no tokens: no batches, or no linear layer that where takes in was run")
    amax = {name: float(value) for name, value in seen.items()}
    if wrong := [name for name, value in amax.items() if not math.isfinite(value)]:
        raise ValueError(f"the input of {wrong[0]} holds inf or NaN; check the model and the batches")
    return InputRanges(max(tokens.values()), amax)


def _rows(x: Tensor, mask: Tensor | None) -> Tensor:
    rows = x.reshape(-1, x.shape[-1])
    if mask is not None and x.ndim == 3 and mask.shape == x.shape[:2]:
        rows = rows[mask.reshape(-1).bool()]
    return rows


@contextmanager
def _float_activations(model: nn.Module) -> Iterator[None]:
    """Let FP4 layers run with unrounded activations, which need no scale yet."""
    configs = {m: m.config for m in model.modules() if isinstance(m, FP4Linear)}
    for layer, config in configs.items():
        layer.config = replace(config, activations=None)
    try:
        yield
    finally:
        for layer, config in configs.items():
            layer.config = config
