"""Draws docs/images/neighborhood_windows.svg: which keys a query sees, from the package's own masks."""

from __future__ import annotations

from pathlib import Path

import torch
from eff_kernels.ops.neighborhood_attention import neighborhood_mask

OUT = Path(__file__).parents[1] / "docs" / "images" / "neighborhood_windows.svg"
N, CELL, GAP, TOP = 9, 14, 26, 40
PANELS = (
    ("inside", 3, 1, 1, False, (4, 4)),
    ("at a border: moved, not cut", 3, 1, 1, False, (0, 8)),
    ("even window (4)", 4, 1, 1, False, (4, 4)),
    ("dilation 2", 3, 1, 2, False, (4, 3)),
    ("stride 3: leader's window", 3, 3, 1, False, (3, 5)),
    ("causal on both axes", 3, 1, 1, True, (4, 4)),
)


def panel(left: int, title: str, window: int, stride: int, dilation: int, causal: bool, query: tuple[int, int]) -> str:
    """One map with the query in dark and its keys in blue."""
    settings = ([window] * 2, [stride] * 2, [dilation] * 2, [causal] * 2)
    seen = neighborhood_mask((N, N), *settings)[query[0] * N + query[1]].view(N, N)
    lines = [f'<text x="{left + N * CELL / 2}" y="{TOP - 10}" text-anchor="middle">{title}</text>']
    for x, y in torch.cartesian_prod(torch.arange(N), torch.arange(N)).tolist():
        colour = "#8ab4f8" if seen[x, y] else "#f1f3f4"
        lines.append(
            f'<rect x="{left + y * CELL}" y="{TOP + x * CELL}" width="{CELL - 1}" height="{CELL - 1}" fill="{colour}"/>'
        )
    x, y = query
    lines.append(
        f'<circle cx="{left + (y + 0.5) * CELL - 0.5}" cy="{TOP + (x + 0.5) * CELL - 0.5}" r="4" fill="#174ea6"/>'
    )
    return "\n".join(lines)


def main() -> None:
    """Write the picture."""
    across = N * CELL + GAP + 30
    width, height = len(PANELS) * across + GAP, TOP + N * CELL + 12
    parts = [panel(GAP + i * across, *p) for i, p in enumerate(PANELS)]
    OUT.write_text(
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" font-family="sans-serif" '
        f'font-size="11">\n<rect width="{width}" height="{height}" fill="white"/>\n' + "\n".join(parts) + "\n</svg>\n"
    )


if __name__ == "__main__":
    main()
