"""Which pages of the key-value cache are free."""

from __future__ import annotations


class PagePool:
    """Hands out page numbers and takes them back.

    Args:
        num_pages: How many there are.
    """

    def __init__(self, num_pages: int) -> None:
        if num_pages < 1:
            raise ValueError(f"num_pages must be at least 1, got {num_pages}")
        self.num_pages = num_pages
        self._free = list(range(num_pages - 1, -1, -1))

    @property
    def free(self) -> int:
        """Number of pages that nobody holds."""
        return len(self._free)

    def take(self, count: int) -> list[int] | None:
        """Hand out ``count`` pages, or None, and nothing, when fewer are free."""
        if count > len(self._free):
            return None
        taken = self._free[len(self._free) - count :]
        del self._free[len(self._free) - count :]
        return taken

    def give_back(self, pages: list[int]) -> None:
        """Take pages back and empty the caller's list."""
        self._free.extend(pages)
        pages.clear()
