"""Finding the outlier columns of a model's activations, to choose a threshold or to keep their weights."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from eff_kernels.edit import Record, Where, calibrate
from torch import Tensor, nn

from eff_quant.linears import find_linears
from eff_quant.llm_int8.layer import Int8Linear


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
class OutlierReport(Record):
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

    def __str__(self) -> str:
        width = max((len(name) for name in self.modules), default=6)
        lines = [f"inputs of linear layers >= {self.threshold:g}, {self.tokens} tokens"]
        lines += [f"{'module':<{width}}  columns      of  most tokens  largest"]
        for name, m in self.modules.items():
            share, largest = max(m.share, default=0.0), max(m.largest, default=0.0)
            lines.append(f"{name:<{width}}  {len(m.columns):7}  {m.in_features:6}  {share:11.1%}  {largest:7.1f}")
        return "\n".join(lines)


def outlier_report(
    model: nn.Module, batches: Iterable[Any], *, threshold: float = 6.0, where: Where = "*"
) -> OutlierReport:
    """Run a model on some batches and record which input columns of its linear layers hold outliers.

    Args:
        model: Any module; it is run in evaluation mode and left as it was.
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
    seen = {name: _Columns() for name, module in layers.items() if hasattr(module, "weight")}
    calibrate(model, batches, dict.fromkeys(seen, lambda call: seen[call.name].add(call.rows(call.input), threshold)))
    seen = {name: columns for name, columns in seen.items() if columns.tokens}
    if not seen:
        raise ValueError("outlier_report saw no tokens: no linear layer selected by where was run")
    tokens = max(c.tokens for c in seen.values())
    return OutlierReport(float(threshold), tokens, {name: c.result() for name, c in seen.items()})


class _Columns:
    """Running counts of one layer: tokens, and for each column how many reach the threshold and the largest value."""

    def __init__(self) -> None:
        self.tokens = 0
        self.hits: Tensor | None = None
        self.largest: Tensor | None = None

    def add(self, rows: Tensor, threshold: float) -> None:
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
