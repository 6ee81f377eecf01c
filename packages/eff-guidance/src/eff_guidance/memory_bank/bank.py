"""A ring of the newest representations."""

from __future__ import annotations

import torch
from torch import Tensor, nn


class MemoryBank(nn.Module):
    """First in, first out: holds the last ``size`` of the rows that were pushed; row number n lies at n modulo size.

    All of it is in ``state_dict()``. Positions are tensors, so that a compiled graph is not rebuilt at each step.

    Args:
        size: Rows that it holds.
        dim: Entries of a row.
        dtype: Of the stored rows.
        with_ids: Whether each row carries an id.

    Attributes:
        queue: Rows in ring order, [size, dim]; those not yet filled are 0.
        ids: Their ids, int64 [size], or None; -1 where none was given.
        ptr: Where the next row goes, int64 scalar.
        filled: How many rows there are, int64 scalar.

    Raises:
        ValueError: a size is below 1, or ``dtype`` is no floating point type.
    """

    queue: Tensor
    ids: Tensor | None
    ptr: Tensor
    filled: Tensor

    def __init__(self, size: int, dim: int, dtype: torch.dtype = torch.bfloat16, *, with_ids: bool = False) -> None:
        super().__init__()
        if size < 1 or dim < 1:
            raise ValueError(f"size={size}, dim={dim}; use 1 or more")
        if not dtype.is_floating_point:
            raise ValueError(f"dtype={dtype}; use a floating point type")
        self.register_buffer("queue", torch.zeros(size, dim, dtype=dtype))
        self.register_buffer("ids", torch.full((size,), -1) if with_ids else None)
        self.register_buffer("ptr", torch.zeros((), dtype=torch.int64))
        self.register_buffer("filled", torch.zeros((), dtype=torch.int64))

    @property
    def size(self) -> int:
        """Rows that it holds when full."""
        return self.queue.shape[0]

    @torch.no_grad()
    def enqueue(self, keys: Tensor, ids: Tensor | None = None) -> None:
        """Push rows, the oldest leave; of more than ``size`` at once the last stay.

        Args:
            keys: [B, dim], any floating point type; B may be 0.
            ids: int64 [B], not negative; needed if and only if the bank keeps ids.

        Raises:
            ValueError: shapes do not fit, or ids are missing or not wanted.
        """
        if keys.dim() != 2 or keys.shape[1] != self.queue.shape[1]:
            raise ValueError(f"keys have shape {list(keys.shape)}; the bank holds rows of {self.queue.shape[1]}")
        if (ids is None) != (self.ids is None):
            wanted = "keeps ids: give them" if ids is None else "keeps no ids; make it with with_ids=True"
            raise ValueError(f"the bank {wanted}")
        if ids is not None and ids.shape != keys.shape[:1]:
            raise ValueError(f"ids have shape {list(ids.shape)}; wanted [{keys.shape[0]}]")
        count, size = keys.shape[0], self.size
        last = min(count, size)
        at = (self.ptr + torch.arange(count - last, count, device=self.queue.device)) % size
        self.queue.index_copy_(0, at, keys[count - last :].to(self.queue.device, self.queue.dtype))
        if self.ids is not None and ids is not None:
            self.ids.index_copy_(0, at, ids[count - last :].to(self.ids.device, torch.int64))
        self.ptr.copy_((self.ptr + count) % size)
        self.filled.copy_((self.filled + count).clamp(max=size))

    def keys(self) -> Tensor:
        """The filled part, [filled, dim], in ring order: a view."""
        return self.queue[: int(self.filled)]

    def by_age(self) -> Tensor:
        """The filled part from the oldest to the newest row, [filled, dim]: a copy."""
        filled = int(self.filled)
        return self.keys().roll(-int(self.ptr), 0) if filled == self.size else self.keys().clone()

    def valid(self) -> Tensor:
        """Which rows are filled, bool [size]."""
        return torch.arange(self.size, device=self.queue.device) < self.filled

    def extra_repr(self) -> str:
        """Sizes, for ``print``."""
        return f"size={self.size}, dim={self.queue.shape[1]}, dtype={self.queue.dtype}, with_ids={self.ids is not None}"
