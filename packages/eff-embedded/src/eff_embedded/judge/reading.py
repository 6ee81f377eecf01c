"""What the judge found on a picture, and whether a relation holds between two finds."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from eff_embedded.collages.relations import RelationKind

APART = 0.125  # least distance of centres along the axis, as a fraction of the picture: as the collages' own rule
SURE = 0.5
_AXES: dict[str, tuple[int, int]] = {"left of": (0, 1), "right of": (0, -1), "above": (1, 1), "below": (1, -1)}


class Find(NamedTuple):
    """An object on a picture.

    Attributes:
        name: Its name in the vocabulary.
        odds: How sure the judge is, 0 to 1.
        box: x0, y0, x1, y1 in points; about four points exact.
    """

    name: str
    odds: float
    box: tuple[float, float, float, float]

    @property
    def centre(self) -> tuple[float, float]:
        """Middle of the box, x and y in points."""
        x0, y0, x1, y1 = self.box
        return (x0 + x1) / 2, (y0 + y1) / 2


@dataclass(frozen=True, kw_only=True, slots=True)
class Reading:
    """All that the judge found on one picture.

    Attributes:
        finds: The objects, surest first.
        size: Side of the picture in points.
    """

    finds: tuple[Find, ...]
    size: int

    @property
    def names(self) -> tuple[str, ...]:
        """Names of the objects found."""
        return tuple(find.name for find in self.finds)

    def find(self, name: str) -> Find | None:
        """The object of this name, or None."""
        return next((find for find in self.finds if find.name == name), None)

    def place(self, subject: str, other: str) -> RelationKind | None:
        """How ``subject`` lies towards ``other``: left of, right of, above or below.

        The rule is that of collages: the centres' distance along the named axis is at least an eighth of the picture
        and at least that along the other axis. None if nothing is plain or one of the two was not found.
        """
        one, two = self.find(subject), self.find(other)
        if one is None or two is None:
            return None
        across, down = (b - a for a, b in zip(one.centre, two.centre, strict=True))
        if abs(across) >= max(abs(down), APART * self.size):
            return "left of" if across > 0 else "right of"
        if abs(down) >= max(abs(across), APART * self.size):
            return "above" if down > 0 else "below"
        return None

    def holds(self, subject: str, kind: RelationKind, other: str, *, slack: float = 8.0) -> bool:
        """Whether ``subject`` is left of, right of, above or below ``other``, within the error of boxes.

        As `place`, but where the two axes differ by at most ``slack`` points both count: left of and above. False
        if one of the two was not found.

        Raises:
            ValueError: another kind of relation.
        """
        if kind not in _AXES:
            raise ValueError(f"kind={kind!r}; the judge knows {', '.join(_AXES)}")
        one, two = self.find(subject), self.find(other)
        if one is None or two is None:
            return False
        axis, sign = _AXES[kind]
        away = [b - a for a, b in zip(one.centre, two.centre, strict=True)]
        return sign * away[axis] + slack >= max(abs(away[1 - axis]), APART * self.size + slack)


def box_of(share: Tensor, cell: int) -> tuple[float, float, float, float]:
    """Box of an object from the share of each cell that it covers, [rows, columns], 0 to 1.

    The outermost cells count as far as they are covered.
    """
    (left, right), (top, bottom) = (_ends(share.amax(d)) for d in (0, 1))
    return cell * left, cell * top, cell * right, cell * bottom


def _ends(line: Tensor) -> tuple[float, float]:
    line = line / line.max().clamp(min=1e-6)
    inside = torch.nonzero(line >= SURE).flatten()
    first, last = int(inside[0]), int(inside[-1])
    before = float(line[first - 1]) if first > 0 else 0.0
    after = float(line[last + 1]) if last + 1 < len(line) else 0.0
    return first - before, last + 1 + after
