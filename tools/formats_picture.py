"""Draw the number formats of eff_quant for docs/numerics.md: ``uv run tools/formats_picture.py``.

For each format the bits of a code, and the values that it has within a block whose largest magnitude is 1.
"""

from __future__ import annotations

from pathlib import Path

import matplotlib as mpl
import torch
from matplotlib import pyplot as plt

PATH = Path(__file__).parents[1] / "docs" / "images" / "formats.svg"
COLOURS = {"sign": "tab:gray", "exponent": "tab:orange", "mantissa": "tab:blue"}
E2M1 = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)


def values_of(dtype: torch.dtype) -> list[float]:
    """The non-negative finite values of an FP8 dtype."""
    codes = torch.arange(128, dtype=torch.uint8).view(dtype).float()
    return codes[codes.isfinite()].tolist()


FORMATS = {  # name: bits of sign, exponent and mantissa; non-negative values
    "int8\none scale a row": ((1, 0, 7), [float(i) for i in range(128)]),
    "int4\none scale a row": ((1, 0, 3), [float(i) for i in range(8)]),
    "FP8 E4M3\none scale a row": ((1, 4, 3), values_of(torch.float8_e4m3fn)),
    "FP8 E5M2\none scale a row": ((1, 5, 2), values_of(torch.float8_e5m2)),
    "FP4 E2M1\nMXFP4: a power of two for 32\nNVFP4: an E4M3 number for 16": ((1, 2, 1), list(E2M1)),
}


def main() -> None:
    """Write the picture."""
    mpl.rcParams["svg.hashsalt"] = "formats"
    figure, (bits, grid) = plt.subplots(1, 2, figsize=(10, 3.8), width_ratios=(1, 2.6), layout="constrained")
    for row, (sizes, values) in enumerate(FORMATS.values()):
        at = 0
        for kind, size in zip(COLOURS, sizes, strict=True):
            for _ in range(size):
                bits.add_patch(plt.Rectangle((at, row - 0.3), 0.9, 0.6, color=COLOURS[kind], alpha=0.75, lw=0))
                at += 1
        shown = [v / values[-1] for v in values]
        grid.vlines([v for v in shown if v > 0], row - 0.3, row + 0.3, lw=0.7, color="black")
        grid.text(1.2, row, f"{len(values)} values\nfrom 0", va="center", fontsize=8)
    bits.set_xlim(-0.2, 8.2)
    bits.set_yticks(range(len(FORMATS)), list(FORMATS), fontsize=8)
    bits.set_xticks([])
    bits.set_title("bits of a code", fontsize=9)
    bits.legend(
        [plt.Rectangle((0, 0), 1, 1, color=c, alpha=0.75) for c in COLOURS.values()],
        ["sign", "exponent", "mantissa or integer"],
        fontsize=7, loc="lower right", bbox_to_anchor=(1.02, -0.2), ncols=3, frameon=False, handlelength=1,
        columnspacing=0.8,
    )  # fmt: skip
    grid.set_xscale("log", base=2)
    grid.set_xlim(2**-18, 1.15)
    grid.set_yticks([])
    grid.set_title("positive values, relative to the largest (logarithmic)", fontsize=9)
    for axes in (bits, grid):
        axes.set_ylim(len(FORMATS) - 0.5, -0.5)
        axes.spines[["top", "right", "left"]].set_visible(False)
    bits.spines["bottom"].set_visible(False)
    figure.savefig(PATH, metadata={"Date": None})


if __name__ == "__main__":
    main()
