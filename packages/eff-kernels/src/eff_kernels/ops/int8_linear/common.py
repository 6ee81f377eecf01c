"""What the backends of the integer products share."""

from __future__ import annotations

INT32_MAX = 2**31 - 1
LARGEST_PRODUCT = 127 * 127
"""Of two codes of int8_linear."""


def overflow(columns: int, largest_product: int) -> str | None:
    """Why so many products of codes cannot be summed in int32; None if they can, whatever the codes."""
    most = INT32_MAX // largest_product
    if columns <= most:
        return None
    return f"sums up to {most} products of codes exactly in int32, got {columns}"
