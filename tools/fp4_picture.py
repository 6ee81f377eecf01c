"""Draw ``docs/images/fp4_formats.svg``: the values of E2M1 on a line, and how blocks and scales of both formats lie.

uv run tools/fp4_picture.py
"""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path

OUT = Path(__file__).parents[1] / "docs" / "images" / "fp4_formats.svg"
VALUES = (0, 0.5, 1, 1.5, 2, 3, 4, 6)
INK, FAINT, BLUE, ORANGE, GREEN = "#1f2933", "#9aa5b1", "#cfe3f7", "#fbdcb5", "#cfead6"


def text(x: float, y: float, content: str, size: int = 12, anchor: str = "middle", colour: str = INK) -> str:
    """One line of text."""
    return f'<text x="{x:g}" y="{y:g}" font-size="{size}" text-anchor="{anchor}" fill="{colour}">{content}</text>'


def line(x1: float, y1: float, x2: float, y2: float, colour: str = INK) -> str:
    """A thin line."""
    return f'<line x1="{x1:g}" y1="{y1:g}" x2="{x2:g}" y2="{y2:g}" stroke="{colour}"/>'


def box(x: float, y: float, width: float, height: float, fill: str) -> str:
    """A filled rectangle with an outline."""
    return f'<rect x="{x:g}" y="{y:g}" width="{width:g}" height="{height:g}" fill="{fill}" stroke="{INK}"/>'


def grid(y: float) -> list[str]:
    """The 15 different values of E2M1 between -6 and 6, and what lies half-way between two of them."""
    at = {v: 360 + 52 * v for v in (*(-v for v in VALUES), *VALUES)}
    found = [text(20, y - 48, "E2M1: sign, two bits of exponent, one of mantissa", 14, "start"), line(30, y, 690, y)]
    for v, x in at.items():
        found += [line(x, y - 14, x, y + 4), text(x, y + 20, f"{v:g}", 11)]
    for low, high in pairwise(VALUES):
        for middle in ((low + high) / 2, -(low + high) / 2):
            found.append(line(360 + 52 * middle, y - 5, 360 + 52 * middle, y, FAINT))
    for code, v in enumerate(VALUES):
        found.append(text(at[v], y - 20, str(code), 10, colour=FAINT))
    found.append(
        text(690, y - 36, "grey: codes above, half-way points below (ties go to the even code)", 11, "end", FAINT)
    )
    return found


def blocks(y: float, name: str, block: int, scale: str, bits: str, tensor_scale: str = "") -> list[str]:
    """64 weights of a row in blocks, with the scales under them."""
    found = [text(20, y - 10, f"{name}: {bits}", 14, "start")]
    width = 10.4
    found += [box(25 + width * i, y, width, 20, BLUE if i // block % 2 else "#ffffff") for i in range(64)]
    for b in range(64 // block):
        x = 25 + width * block * b
        found.append(box(x + width, y + 32, width * (block - 2), 22, ORANGE))
        found.append(text(x + width * block / 2, y + 47, scale, 11))
        found += [
            line(x + 1, y + 24, x + width * block - 1, y + 24),
            line(x + width * block / 2, y + 24, x + width * block / 2, y + 32),
        ]
    if tensor_scale:
        found += [box(25, y + 66, 64 * width, 22, GREEN), text(25 + 32 * width, y + 81, tensor_scale, 11)]
    return found


def packing(y: float) -> list[str]:
    """Which half of a byte holds which column."""
    found = [text(20, y - 10, "Packing: two columns in a byte", 14, "start")]
    for byte in range(4):
        x = 60 + 160 * byte
        found += [box(x, y, 60, 24, BLUE), box(x + 60, y, 60, 24, "#ffffff")]
        found += [text(x + 30, y + 16, f"column {2 * byte + 1}", 10), text(x + 90, y + 16, f"column {2 * byte}", 10)]
        found.append(text(x + 60, y + 40, f"byte {byte}: high half, low half", 10, colour=FAINT))
    return found


def main() -> None:
    """Write the picture."""
    shared = "one float32 scale for the whole tensor, and for q, k, v (or gate, up) together"
    nvfp4, mxfp4 = (f"{n} weights share a scale, {bits} bits a weight" for n, bits in ((16, 4.5), (32, 4.25)))
    parts = [
        *grid(80),
        *blocks(150, "NVFP4", 16, "E4M3 scale", nvfp4, shared),
        *blocks(280, "MXFP4", 32, "E8M0 scale: a power of two in one byte", mxfp4),
        *packing(375),
    ]
    head = '<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 720 430" font-family="sans-serif">'
    OUT.write_text("\n".join([head, '<rect width="720" height="430" fill="#ffffff"/>', *parts, "</svg>"]) + "\n")


if __name__ == "__main__":
    main()
