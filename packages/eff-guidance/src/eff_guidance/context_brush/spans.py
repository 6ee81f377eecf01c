"""Which picture tokens of a canvas show the subjects, and which the target."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from eff_kernels.edit import Settings

Box = tuple[int, int, int, int]
Index = slice | torch.Tensor


@dataclass(frozen=True, slots=True, kw_only=True)
class CanvasSpans(Settings):
    """Boxes on the grid of a canvas's picture tokens, in raster order; text tokens do not count.

    Attributes:
        grid: Rows and columns of tokens.
        subjects: Box of each demonstration: top, left, bottom, right, the last two outside.
        query: Box of the target.
    """

    grid: tuple[int, int]
    subjects: tuple[Box, ...]
    query: Box

    def check(self) -> None:
        """See `Settings`."""
        rows, columns = self.grid
        covered = torch.zeros(max(rows, 0), max(columns, 0), dtype=torch.int64)
        for top, left, bottom, right in (*self.subjects, self.query):
            if not (0 <= top < bottom <= rows and 0 <= left < right <= columns):
                raise ValueError(
                    f"box {(top, left, bottom, right)} does not lie on a grid of {rows} x {columns} tokens"
                )
            covered[top:bottom, left:right] += 1
        if not self.subjects or not bool((covered == 1).all()):
            raise ValueError(
                f"the boxes of subjects {self.subjects} and target {self.query} must cover each of the {rows} x "
                f"{columns} tokens once; {int((covered == 0).sum())} are left out, {int((covered > 1).sum())} are in "
                "several"
            )

    @property
    def num_tokens(self) -> int:
        """Picture tokens of the canvas."""
        return self.grid[0] * self.grid[1]

    def subject_index(self, offset: int = 0) -> Index:
        """Places of the subjects' tokens, counted from ``offset``: a slice where they follow each other."""
        return self._index(self.subjects, offset)

    def query_index(self, offset: int = 0) -> Index:
        """Places of the target's tokens."""
        return self._index((self.query,), offset)

    def _index(self, boxes: tuple[Box, ...], offset: int) -> Index:
        rows, columns = self.grid
        whole = all(left == 0 and right == columns for _, left, _, right in boxes)
        places = torch.arange(rows * columns).reshape(rows, columns)
        found = torch.cat([places[t:b, le:r].flatten() for t, le, b, r in boxes]).sort().values
        first, last = int(found[0]), int(found[-1])
        if whole and last - first + 1 == len(found):
            return slice(first + offset, last + 1 + offset)
        return found + offset
