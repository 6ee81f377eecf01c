"""What to say of ids that name no expert."""

from __future__ import annotations

from torch import Tensor


def wrong_ids(ids: Tensor, num_experts: int) -> str:
    """What to say of ids out of range."""
    return f"ids must be from -1 (none) to {num_experts - 1}, got {int(ids.min())} to {int(ids.max())}"
