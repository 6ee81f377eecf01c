"""What is true of two objects of a collage: beside, above, in front, bigger. Only what is plain to see counts."""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal, NamedTuple, get_args

if TYPE_CHECKING:
    from eff_embedded.collages.render import Collage

RelationKind = Literal["left of", "right of", "above", "below", "in front of", "behind", "bigger than", "smaller than"]
RELATION_KINDS: tuple[RelationKind, ...] = get_args(RelationKind)
OPPOSITE: dict[RelationKind, RelationKind] = {
    "left of": "right of",
    "right of": "left of",
    "above": "below",
    "below": "above",
    "in front of": "behind",
    "behind": "in front of",
    "bigger than": "smaller than",
    "smaller than": "bigger than",
}
_APART = 0.125  # least distance of the centres along the axis, as a fraction of the picture
_BIGGER = 1.35  # least ratio of the longer sides
_COVERED = 0.05  # least overlap, as a fraction of the smaller object
PLACES = ("upper left", "top", "upper right", "left", "middle", "right", "lower left", "bottom", "lower right")


class Relation(NamedTuple):
    """Object ``subject`` is ``kind`` object ``object``; both are indices into the layout's objects."""

    subject: int
    kind: RelationKind
    object: int

    def reversed(self) -> Relation:
        """The same fact told from the other object."""
        return Relation(self.object, OPPOSITE[self.kind], self.subject)


def relations_between(collage: Collage, i: int, j: int) -> tuple[Relation, ...]:
    """All that is plainly true of object i towards object j; each has its opposite towards i.

    Left, right, above and below compare the centres of the full boxes: the distance along the named axis is at least
    an eighth of the picture and at least that along the other axis. In front of needs an overlap of the full masks of
    5 % of the smaller one. Bigger compares the longer sides of the full boxes, at least 1.35 to 1.
    """
    found = []
    size = collage.layout.size
    x0, y0, x1, y1 = (int(v) for v in collage.boxes[i])
    u0, v0, u1, v1 = (int(v) for v in collage.boxes[j])
    across, down = (u0 + u1 - x0 - x1) / 2, (v0 + v1 - y0 - y1) / 2
    if abs(across) >= max(abs(down), _APART * size):
        found.append(Relation(i, "left of" if across > 0 else "right of", j))
    elif abs(down) >= max(abs(across), _APART * size):
        found.append(Relation(i, "above" if down > 0 else "below", j))
    if x0 < u1 and u0 < x1 and y0 < v1 and v0 < y1:
        shared = int((collage.full[i] & collage.full[j]).sum())
        if shared >= _COVERED * min(collage.areas[i], collage.areas[j]):
            found.append(Relation(i, "in front of" if i > j else "behind", j))
    mine, other = max(x1 - x0, y1 - y0), max(u1 - u0, v1 - v0)
    if mine >= _BIGGER * other:
        found.append(Relation(i, "bigger than", j))
    elif other >= _BIGGER * mine:
        found.append(Relation(i, "smaller than", j))
    return tuple(found)


def place_of(collage: Collage, i: int) -> str | None:
    """Which ninth of the picture object i lies in ("upper left", "middle"), or None where it lies near a border."""
    size = collage.layout.size
    x0, y0, x1, y1 = (int(v) for v in collage.boxes[i])
    cells = []
    for centre in ((y0 + y1) / (2 * size), (x0 + x1) / (2 * size)):
        cell, rest = divmod(centre * 3, 1)
        if (rest < 0.12 and cell > 0) or (rest > 0.88 and cell < 2):
            return None
        cells.append(int(cell))
    return PLACES[cells[0] * 3 + cells[1]]
