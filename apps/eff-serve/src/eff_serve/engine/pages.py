"""Pages of the key-value cache: their memory, which are free, who holds the others, which are worth keeping."""

from __future__ import annotations

import collections
import math
import mmap
from collections.abc import Callable

import torch
from torch import Tensor


class PagePool:
    """Hands out page numbers, counts their holders, and takes them back.

    A page that its last holder gives back is free at once, unless it was marked by `keep`: then what it holds stays,
    and it is handed out again only when no other page is free, the one that was given back first before the others.

    Args:
        num_pages: How many there are.
        on_evict: Called with a page that was kept and is about to be handed out again.
    """

    def __init__(self, num_pages: int, on_evict: Callable[[int], None] = lambda page: None) -> None:
        if num_pages < 1:
            raise ValueError(f"num_pages must be at least 1, got {num_pages}")
        self.num_pages = num_pages
        self._free = list(range(num_pages - 1, -1, -1))
        self._holders = [0] * num_pages
        self._worth: set[int] = set()
        self._idle: collections.OrderedDict[int, None] = collections.OrderedDict()  # kept and unheld, oldest first
        self._on_evict = on_evict

    @property
    def free(self) -> int:
        """Number of pages that nobody holds, kept ones included."""
        return len(self._free) + len(self._idle)

    @property
    def kept(self) -> int:
        """Number of pages that nobody holds and whose contents are kept."""
        return len(self._idle)

    def holders(self, page: int) -> int:
        """How many hold a page."""
        return self._holders[page]

    def take(self, count: int) -> list[int] | None:
        """Hand out ``count`` pages, or None, and nothing, when fewer are free."""
        if count > self.free:
            return None
        taken = []
        for _ in range(count):
            if self._free:
                page = self._free.pop()
            else:
                page, _ = self._idle.popitem(last=False)
                self._worth.discard(page)
                self._on_evict(page)
            self._holders[page] = 1
            taken.append(page)
        return taken

    def hold(self, page: int) -> None:
        """Add a holder to a page that is kept or held."""
        if not self._holders[page] and page not in self._idle:
            raise ValueError(f"page {page} is neither held nor kept")
        self._idle.pop(page, None)
        self._holders[page] += 1

    def keep(self, page: int) -> None:
        """Mark a held page as worth keeping once it is given back."""
        if not self._holders[page]:
            raise ValueError(f"page {page} has no holder that could mark it")
        self._worth.add(page)

    def give_back(self, pages: list[int]) -> None:
        """Take a holder from each page, from the last to the first, and empty the caller's list.

        So the end of a text is forgotten before its beginning, which more texts share.
        """
        for page in reversed(pages):
            if not self._holders[page]:
                raise ValueError(f"page {page} is given back, but nobody holds it")
            self._holders[page] -= 1
            if self._holders[page]:
                continue
            if page in self._worth:
                self._idle[page] = None
            else:
                self._free.append(page)
        pages.clear()


def untouched(shape: tuple[int, ...]) -> Tensor:
    """Zeros that take memory only where they are written: a large cache costs neither time nor memory in advance.

    From the system itself: an allocator may have memory of its own left, and would write zeros into all of it.
    """
    memory = mmap.mmap(-1, 4 * math.prod(shape))
    return torch.frombuffer(memory, dtype=torch.float32).view(shape)
