"""Draws docs/images/block_map.svg: the block map of queries and keys that lie on a walk through space."""

from __future__ import annotations

from pathlib import Path

import torch
from eff_kernels import block_map

OUT = Path(__file__).parents[1] / "docs" / "images" / "block_map.svg"
BLOCKS, CELL, LEFT, TOP = 24, 14, 40, 40
COLOURS = {1: "#174ea6", 0: "#aecbfa", -1: "#f1f3f4"}
NAMES = {1: "critical: softmax", 0: "marginal: linear", -1: "negligible: skipped"}


def tokens() -> torch.Tensor:
    """Neighbours resemble one another, and the walk comes back to where it was."""
    generator = torch.Generator().manual_seed(1)
    angle = torch.linspace(0, 4 * torch.pi, BLOCKS * 64)
    path = torch.stack([angle.cos(), angle.sin(), (angle / 2).cos(), (angle / 2).sin()], -1)
    return (path + 0.3 * torch.randn(path.shape, generator=generator))[None, None]


def main() -> None:
    """Write the picture."""
    x = tokens()
    mask = block_map(x, x, k_high=0.125, k_low=0.375).mask[0, 0].tolist()
    side = BLOCKS * CELL
    parts = [
        f'<text x="{LEFT + side / 2}" y="{TOP - 12}" text-anchor="middle">blocks of 64 keys</text>',
        f'<text x="{LEFT - 12}" y="{TOP + side / 2}" text-anchor="middle" '
        f'transform="rotate(-90 {LEFT - 12} {TOP + side / 2})">blocks of 64 queries</text>',
    ]
    for i, row in enumerate(mask):
        for j, kind in enumerate(row):
            parts.append(
                f'<rect x="{LEFT + j * CELL}" y="{TOP + i * CELL}" width="{CELL - 1}" height="{CELL - 1}" '
                f'fill="{COLOURS[kind]}"/>'
            )
    for n, (kind, name) in enumerate(NAMES.items()):
        y = TOP + 20 + 24 * n
        parts.append(f'<rect x="{LEFT + side + 24}" y="{y - 11}" width="13" height="13" fill="{COLOURS[kind]}"/>')
        parts.append(f'<text x="{LEFT + side + 44}" y="{y}">{name}</text>')
    width, height = LEFT + side + 190, TOP + side + 16
    OUT.write_text(
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" font-family="sans-serif" '
        f'font-size="12">\n<rect width="{width}" height="{height}" fill="white"/>\n' + "\n".join(parts) + "\n</svg>\n"
    )


if __name__ == "__main__":
    main()
