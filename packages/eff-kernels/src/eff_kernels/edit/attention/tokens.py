"""What the tokens of a call are: system text, pictures with their grids, text, generated text."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from enum import IntEnum
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from eff_kernels.edit.attention import pictures


class Role(IntEnum):
    """What a token is.

    SYSTEM is what comes before the first picture of a row; in a row without pictures all of the prompt is TEXT.
    GENERATED is what the model said itself. UNUSED are empty places of a static cache. UNKNOWN are tokens that were
    given as embeddings, or read into a cache before roles were followed.
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
        part: Part of the picture, for families that cut pictures up: 0 is the whole picture, or its first frame.
        row: Line of the part's grid that a token shows; -1 for all else, such as separators of lines.
        column: Column of the part's grid.
    """

    role: Tensor
    picture: Tensor
    part: Tensor
    row: Tensor
    column: Tensor

    @classmethod
    def of_prompt(cls, ids: Tensor, config: Any, arguments: Mapping[str, Any]) -> Tokens:
        """Tokens of a prompt from the beginning on.

        Args:
            ids: int64 [B, S]; -1 is unknown.
            config: Config of the model, which names the tokens that stand for pictures.
            arguments: What the model was called with, see `pictures.places`.
        """
        image = torch.zeros_like(ids, dtype=torch.bool)
        for token in pictures.token_ids(config):
            image |= ids == token
        if not bool(image.any()):
            known = cls.of_role(Role.TEXT, ids)
            return known.with_role(known.role.masked_fill(ids < 0, int(Role.UNKNOWN)))
        picture, part, row, column = pictures.places(ids, config, arguments)
        before = (image.cumsum(1) == 0) & image.any(1, keepdim=True)
        role = torch.full_like(ids, int(Role.TEXT), dtype=torch.int8)
        role = role.masked_fill(before, int(Role.SYSTEM)).masked_fill(image, int(Role.PICTURE))
        return cls(role.masked_fill(ids < 0, int(Role.UNKNOWN)), picture, part, row, column)

    @classmethod
    def of_role(cls, role: Role, like: Tensor) -> Tokens:
        """Tokens of one role that show nothing, as many as there are ids in ``like`` [B, S]."""
        none = torch.full_like(like, -1, dtype=torch.int32)
        return cls(torch.full_like(like, int(role), dtype=torch.int8), none, none, none, none)

    def of(self, *roles: Role) -> Tensor:
        """Which tokens have one of the roles, bool [B, S]."""
        found = self.role == int(roles[0])
        for role in roles[1:]:
            found = found | (self.role == int(role))
        return found

    def grid(self, row: int, picture: int, part: int = 0) -> tuple[int, int]:
        """Height and width in tokens of a part of a picture.

        Raises:
            ValueError: there is no such picture, or its grid is not known.
        """
        here = (self.picture[row] == picture) & (self.part[row] == part)
        height, width = (int(x[row][here].max()) + 1 if bool(here.any()) else 0 for x in (self.row, self.column))
        if not height or not width:
            raise ValueError(f"row {row} has no picture {picture} with a part {part} whose grid is known")
        return height, width

    def slice(self, start: int, length: int) -> Tokens:
        """``length`` tokens from ``start`` on; what lies beyond the end is UNUSED."""

        def cut(x: Tensor) -> Tensor:
            part = x[:, start : start + length]
            return part if part.shape[1] == length else F.pad(part, (0, length - part.shape[1]), value=-1)

        return Tokens(**{f.name: cut(getattr(self, f.name)) for f in fields(self)})

    def append(self, more: Tokens) -> Tokens:
        """These tokens and then more."""
        return Tokens(**{f.name: torch.cat([getattr(self, f.name), getattr(more, f.name)], 1) for f in fields(self)})

    def repeat(self, times: int) -> Tokens:
        """Each row ``times`` times."""
        return Tokens(**{f.name: getattr(self, f.name).repeat_interleave(times, 0) for f in fields(self)})

    def with_role(self, role: Tensor) -> Tokens:
        """The same tokens in other roles."""
        return replace(self, role=role)

    def spoken_at(self, where: Tensor) -> Tokens:
        """The tokens of ``where`` (bool, broadcasts to [B, S]) as the model's own."""
        rest = {f.name: getattr(self, f.name).masked_fill(where, -1) for f in fields(self)}
        return Tokens(**rest).with_role(self.role.masked_fill(where, int(Role.GENERATED)))


@dataclass(frozen=True)
class TokenRoles:
    """Roles of the queries and keys of one call.

    Attributes:
        queries: Tokens that ask, [B, Sq].
        keys: Tokens that are looked at, [B, Sk].
        position: Place of the first query in the whole sequence.
        offset: Place of the first key: above 0 where a layer with a window has let go of the keys before.
        prompt_length: Tokens of the prompt that ``generate`` is working on, padding included; None outside of it.
    """

    queries: Tokens
    keys: Tokens
    position: int
    offset: int = 0
    prompt_length: int | None = None
