"""Finding the outlier columns of a model's activations, to choose a threshold or to keep their weights."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from eff_kernels.edit import Where
from torch import Tensor, nn

from eff_quant.linears import find_linears
from eff_quant.llm_int8.layer import Int8Linear

VERSION = 1


@dataclass(frozen=True, slots=True)
class ModuleOutliers:
    """Outlier columns of one linear layer's input.

    Attributes:
        columns: Columns with at least one entry of the threshold or more, rising.
        share: For each, the share of tokens with such an entry.
        largest: For each, the largest absolute value.
        in_features: How many columns there are.
    """

    columns: tuple[int, ...]
    share: tuple[float, ...]
    largest: tuple[float, ...]
    in_features: int


@dataclass(frozen=True, slots=True)
class OutlierReport:
    """What `outlier_report` saw: for each linear layer the columns of its input that reach the threshold.

    Attributes:
        threshold: The size from which an entry counts.
        tokens: How many tokens were seen.
        modules: By module name.
    """

    threshold: float
    tokens: int
    modules: Mapping[str, ModuleOutliers]

    def static_columns(self, *, min_share: float = 0.06, max_columns: int | None = None) -> dict[str, tuple[int, ...]]:
        """Choose columns for ``Int8Config(outlier_weights="original", outlier_columns=...)``.

        Args:
            min_share: Take columns that are outliers for at least this share of tokens; 6 % is the paper's criterion.
            max_columns: Take at most so many of a layer, those with the largest values.

        Returns:
            Columns by module name; modules without any are left out.
        """
        chosen = {}
        for name, m in self.modules.items():
            columns = [i for i, share in enumerate(m.share) if share >= min_share]
            columns = sorted(columns, key=lambda i: -m.largest[i])[:max_columns]
            if columns:
                chosen[name] = tuple(sorted(m.columns[i] for i in columns))
        return chosen

    def save(self, path: str | Path) -> None:
        """Write the report as JSON."""
        Path(path).write_text(json.dumps({"version": VERSION, **asdict(self)}))

    @classmethod
    def load(cls, path: str | Path) -> OutlierReport:
        """Read what `save` wrote.

        Raises:
            ValueError: another version of the format.
        """
        values = json.loads(Path(path).read_text())
        version = values.pop("version", None)
        if version != VERSION:
            raise ValueError(f"{path}: outlier report of version {version!r}; this eff_quant reads version {VERSION}")
        modules = {
            name: ModuleOutliers(tuple(m["columns"]), tuple(m["share"]), tuple(m["largest"]), m["in_features"])
            for name, m in values["modules"].items()
        }
        return cls(values["threshold"], values["tokens"], modules)

    def __str__(self) -> str:
        width = max((len(name) for name in self.modules), default=6)
        lines = [f"inputs of linear layers >= {self.threshold:g}, {self.tokens} tokens"]
        lines += [f"{'module':<{width}}  columns      of  most tokens  largest"]
        for name, m in self.modules.items():
            share, largest = max(m.share, default=0.0), max(m.largest, default=0.0)
            lines.append(f"{name:<{width}}  {len(m.columns):7}  {m.in_features:6}  {share:11.1%}  {largest:7.1f}")
        return "\n".join(lines)


@torch.no_grad()
def outlier_report(
    model: nn.Module, batches: Iterable[Any], *, threshold: float = 6.0, where: Where = "*"
) -> OutlierReport:
    """Run a model on some batches and record which input columns of its linear layers hold outliers.

    Args:
        model: Any module; it is run as it is (set ``eval()`` yourself) and left unchanged.
        batches: Each one a mapping of keyword arguments, a tuple of arguments, or a single argument. Tokens that an
            ``attention_mask`` [B, T] of a mapping marks as padding do not count.
        threshold: The size from which an entry counts.
        where: Layers to look at.

    Returns:
        The columns of each linear layer that received any input.

    Raises:
        ValueError: no batches, or a threshold that is not positive.
    """
    if not threshold > 0:
        raise ValueError(f"threshold={threshold}; use a size above 0, such as 6.0")
    layers = {f.names[0]: f.module for f in find_linears(model, where=where, done=(Int8Linear,)) if not f.wanted}
    layers = {name: module for name, module in layers.items() if hasattr(module, "weight")}
    seen: dict[str, _Columns] = {}
    mask: Tensor | None = None

    def watch(name: str) -> Any:
        def hook(module: nn.Module, args: tuple[Any, ...]) -> None:
            seen.setdefault(name, _Columns()).add(args[0], mask, threshold)

        return hook

    hooks = [module.register_forward_pre_hook(watch(name)) for name, module in layers.items()]
    tokens = 0
    try:
        for batch in batches:
            mask = batch.get("attention_mask") if isinstance(batch, Mapping) else None
            if isinstance(batch, Mapping):
                model(**batch)
            else:
                model(*batch) if isinstance(batch, tuple | list) else model(batch)
            tokens = max((c.tokens for c in seen.values()), default=0)
    finally:
        for hook in hooks:
            hook.remove()
    if not tokens:
        raise ValueError("outlier_report saw no tokens: no batches, or no linear layer that where takes in was run")
    return OutlierReport(float(threshold), tokens, {name: c.result() for name, c in seen.items()})


class _Columns:
    """Running counts of one layer: tokens, and for each column how many reach the threshold and the largest value."""

    def __init__(self) -> None:
        self.tokens = 0
        self.hits: Tensor | None = None
        self.largest: Tensor | None = None

    def add(self, x: Tensor, mask: Tensor | None, threshold: float) -> None:
        rows = x.reshape(-1, x.shape[-1])
        if mask is not None and x.ndim == 3 and mask.shape == x.shape[:2]:
            rows = rows[mask.reshape(-1).bool()]
        if not len(rows):
            return
        size = rows.abs().float()
        hits, largest = (size >= threshold).sum(0), size.amax(0)
        self.tokens += len(rows)
        self.hits = hits if self.hits is None else self.hits + hits
        self.largest = largest if self.largest is None else torch.maximum(self.largest, largest)

    def result(self) -> ModuleOutliers:
        if self.hits is None or self.largest is None:
            return ModuleOutliers((), (), (), 0)
        columns = torch.nonzero(self.hits).flatten()
        share = self.hits[columns].double() / self.tokens
        return ModuleOutliers(
            tuple(columns.tolist()), tuple(share.tolist()), tuple(self.largest[columns].tolist()), len(self.hits)
        )
