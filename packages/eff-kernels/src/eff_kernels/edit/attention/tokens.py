"""What the tokens of a call are: system text, pictures with their grids, text, generated text."""

from __future__ import annotations

from dataclasses import dataclass, fields
from enum import IntEnum

import torch
import torch.nn.functional as F
from torch import Tensor


class Role(IntEnum):
    """What a token is.

    SYSTEM is what comes before the first picture in a row that has one. GENERATED is what the model said itself.
    UNUSED are empty places of a static cache, UNKNOWN are tokens that were given as embeddings or read before the
    roles were followed.
    """

    UNKNOWN = -2
    UNUSED = -1
    PAD = 0
    SYSTEM = 1
    TEXT = 2
    PICTURE = 3
    GENERATED = 4


@dataclass(frozen=True)
class Tokens:
    """Tokens of a sequence, each field [B, S].

    Attributes:
        role: A `Role` each, int8.
        picture: Index of the picture within the row of the batch, int32; -1 for all else.
        tile: Index of the part of its picture, for families that cut pictures into parts; -1 for all else.
        row: Line of the part's grid that a picture token is for; -1 for all else, such as separators of lines.
        column: Column of the part's grid.
    """

    role: Tensor
    picture: Tensor
    tile: Tensor
    row: Tensor
    column: Tensor

    def of(self, *roles: Role) -> Tensor:
        """Which tokens have one of the roles, bool [B, S]."""
        return torch.stack([self.role == int(r) for r in roles]).any(0)

    def grid(self, row: int, picture: int, tile: int = 0) -> tuple[int, int]:
        """Height and width in tokens of (a part of) a picture.

        Raises:
            ValueError: there is none such.
        """
        here = (self.picture[row] == picture) & (self.tile[row] == tile)
        if not bool(here.any()):
            raise ValueError(f"row {row} has no picture {picture} with a part {tile}")
        return int(self.row[row][here].max()) + 1, int(self.column[row][here].max()) + 1

    def slice(self, start: int, length: int) -> Tokens:
        """``length`` tokens from ``start`` on; what lies beyond the end is UNUSED."""
        cut = {}
        for field in fields(self):
            part = getattr(self, field.name)[:, start : start + length]
            cut[field.name] = F.pad(part, (0, length - part.shape[1]), value=-1)
        return Tokens(**cut)

    def append(self, more: Tokens) -> Tokens:
        """These tokens and then more."""
        return Tokens(**{f.name: torch.cat([getattr(self, f.name), getattr(more, f.name)], 1) for f in fields(self)})


@dataclass(frozen=True)
class TokenRoles:
    """Roles of the queries and keys of one call.

    Attributes:
        queries: Tokens that ask, [B, Sq].
        keys: Tokens that are looked at, [B, Sk].
        position: Place of the first query in the whole sequence.
    """

    queries: Tokens
    keys: Tokens
    position: int
