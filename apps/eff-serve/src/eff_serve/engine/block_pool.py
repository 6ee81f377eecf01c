"""Blocks of the key-value cache: their memory, which are free, who holds the others, which are worth keeping."""

from __future__ import annotations

import collections
import math
import mmap
from collections.abc import Callable

import torch
from torch import Tensor


class BlockPool:
    """Hands out block numbers, counts their holders, and takes them back.

    A block that its last holder gives back is free at once, unless it was marked by `keep`: then what it holds stays,
    and it is handed out again only when no other block is free, the one that was given back first before the others.

    Args:
        num_blocks: How many there are.
        on_evict: Called with a block that was kept and is about to be handed out again.
    """

    def __init__(self, num_blocks: int, on_evict: Callable[[int], None] = lambda block: None) -> None:
        if num_blocks < 1:
            raise ValueError(f"num_blocks must be at least 1, got {num_blocks}")
        self.num_blocks = num_blocks
        self._free = list(range(num_blocks - 1, -1, -1))
        self._holders = [0] * num_blocks
        self._worth: set[int] = set()
        self._idle: collections.OrderedDict[int, None] = collections.OrderedDict()  # kept and unheld, oldest first
        self._on_evict = on_evict

    @property
    def free(self) -> int:
        """Number of blocks that nobody holds, kept ones included."""
        return len(self._free) + len(self._idle)

    @property
    def kept(self) -> int:
        """Number of blocks that nobody holds and whose contents are kept."""
        return len(self._idle)

    def holders(self, block: int) -> int:
        """How many hold a block."""
        return self._holders[block]

    def take(self, count: int) -> list[int] | None:
        """Hand out ``count`` blocks, or None, and nothing, when fewer are free."""
        if count > self.free:
            return None
        taken = []
        for _ in range(count):
            if self._free:
                block = self._free.pop()
            else:
                block, _ = self._idle.popitem(last=False)
                self._worth.discard(block)
                self._on_evict(block)
            self._holders[block] = 1
            taken.append(block)
        return taken

    def hold(self, block: int) -> None:
        """Add a holder to a block that is kept or held."""
        if not self._holders[block] and block not in self._idle:
            raise ValueError(f"block {block} is neither held nor kept")
        self._idle.pop(block, None)
        self._holders[block] += 1

    def keep(self, block: int) -> None:
        """Mark a held block as worth keeping once it is given back."""
        if not self._holders[block]:
            raise ValueError(f"block {block} is not held, so it cannot be marked")
        self._worth.add(block)

    def give_back(self, blocks: list[int]) -> None:
        """Take a holder from each block, from the last to the first, and empty the caller's list.

        So the end of a text is forgotten before its beginning, which more texts share.
        """
        for block in reversed(blocks):
            if not self._holders[block]:
                raise ValueError(f"block {block} is given back, but is not held")
            self._holders[block] -= 1
            if self._holders[block]:
                continue
            if block in self._worth:
                self._idle[block] = None
            else:
                self._free.append(block)
        blocks.clear()


def untouched(shape: tuple[int, ...]) -> Tensor:
    """Zeros that take memory only where they are written: a large cache costs neither time nor memory in advance.

    From the system itself: an allocator may have memory of its own left, and would write zeros into all of it.
    """
    memory = mmap.mmap(-1, 4 * math.prod(shape))
    return torch.frombuffer(memory, dtype=torch.float32).view(shape)
