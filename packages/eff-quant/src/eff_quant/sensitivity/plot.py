"""Pictures of a report; needs matplotlib."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from eff_quant.sensitivity.report import SensitivityReport


def heatmap(report: SensitivityReport, path: str | Path, format: str) -> None:
    """Draw the KL of each component (rows) in each block (columns), with a dot where it was measured by itself.

    Args:
        report: With passes in mode ``"block"`` or ``"grid"``.
        path: File to write; its ending chooses the kind.
        format: Which of the report's.
    """
    try:
        from matplotlib.colors import LogNorm
        from matplotlib.figure import Figure
    except ImportError:
        raise ImportError("heatmap needs matplotlib: pip install 'eff-quant[plots]'") from None
    cost = report.estimates(format)
    blocks = sorted({b for b, _ in cost})
    smallest = min((v for v in cost.values() if v > 0), default=1e-6)
    rows = [[max(cost.get((b, c), 0.0), smallest) for b in blocks] for c in report.components]
    width, height = 0.28 * len(blocks) + 2.6, 0.3 * len(rows) + 1.2
    figure = Figure(figsize=(width, height), layout="constrained")
    axes = figure.add_subplot()
    top = max(map(max, rows))
    image = axes.imshow(rows, aspect="auto", cmap="viridis", norm=LogNorm(smallest, max(top, smallest * 1.01)))
    measured = [(p.block, p.component) for p in report.select("grid", "only", format=format)]
    if measured:
        x = [blocks.index(b) for b, _ in measured if b is not None]
        y = [report.components.index(c) for _, c in measured if c is not None]
        axes.scatter(x, y, s=10, color="white", edgecolors="black", linewidths=0.5)
    axes.set_yticks(range(len(rows)), report.components)
    every = max(1, len(blocks) // 15)
    axes.set_xticks(range(0, len(blocks), every), [str(b) for b in blocks[::every]])
    axes.set_xlabel("block")
    axes.set_title(f"{format}: KL of each layer alone" + (" (dots: measured, others estimated)" if measured else ""))
    figure.colorbar(image, ax=axes, label="nats a token")
    figure.savefig(path, dpi=120)
