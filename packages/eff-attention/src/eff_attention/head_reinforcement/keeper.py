"""What happens before a prompt is read: the pass without pictures that heads are compared with."""

from __future__ import annotations

import contextlib
import contextvars
import warnings
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from eff_kernels.edit import uncompiled
from eff_kernels.edit.attention import Role, TokenRoles
from torch import Tensor, nn

from eff_attention.head_reinforcement.config import VHRConfig
from eff_attention.head_reinforcement.references import References
from eff_attention.head_reinforcement.without_pictures import arguments, both, without_pictures
from eff_attention.passes import Keeper, Pass

_Given = Mapping[tuple[str, int], Mapping[int, Tensor]]
_given: contextvars.ContextVar[_Given | None] = contextvars.ContextVar("eff_vhr_heads", default=None)


@dataclass(frozen=True)
class Measuring:
    """A pass that heads are measured in.

    Attributes:
        pictures: Rows that have a picture, bool [B].
        last: Place of the last token of each row with pictures, int64 [B]; None if those rows are not in the batch.
        outputs: Outputs of heads at the last token without pictures, by layer [B, H, d].
        heads: Chosen heads, by layer, bool [B, H].
    """

    pictures: Tensor
    last: Tensor | None = None
    outputs: dict[int, Tensor] = field(default_factory=dict)
    heads: dict[int, Tensor] = field(default_factory=dict)


@dataclass(frozen=True)
class VHRKeeper(Keeper):
    """The hooks on a decoder.

    Attributes:
        config: Settings.
        references: Texts that were measured before.
    """

    config: VHRConfig = field(default_factory=VHRConfig)
    references: References = field(default_factory=lambda: References(0))

    def begin(self, decoder: Any, args: tuple[Any, ...], kwargs: dict[str, Any], now: Pass) -> Pass:
        """Measure a prompt without its pictures, or take heads that are known already."""
        roles = now.roles
        if roles is None or not now.prompt or self.config.alpha == 1.0:
            return now
        known = (_given.get() or {}).get((self.argument, id(decoder)))
        if known is not None:
            now.notes["heads"] = known
        elif not roles.position:
            self._first(decoder, args, kwargs, now, roles)
        else:
            before = roles.keys.slice(0, roles.position)
            spoken = bool(before.of(Role.GENERATED).any())
            pictures = bool(roles.queries.of(Role.PICTURE).any())
            if (now.states and not spoken) or (pictures and not now.states):
                raise RuntimeError(_PIECES)
        return now

    def _first(self, decoder: Any, args: tuple[Any, ...], kwargs: dict[str, Any], now: Pass, roles: TokenRoles) -> None:
        pictures = roles.queries.of(Role.PICTURE).any(1)
        count = roles.queries.role.shape[1]
        whole = roles.prompt_length is None or count >= roles.prompt_length
        if not bool(pictures.any()):
            if whole:
                warnings.warn("no prompt has a picture; heads stay as they are", stacklevel=2)
            return
        if not whole:
            raise RuntimeError(_PIECES)
        found = uncompiled(self._measure)(decoder, arguments(decoder, args, kwargs), roles, pictures)
        if self.config.reference == "lockstep":
            now.notes["heads"] = found.heads
        else:
            now.notes["reference"] = found

    @torch.no_grad()
    def _measure(self, decoder: Any, given: dict[str, Any], roles: TokenRoles, pictures: Tensor) -> Measuring:
        if self.config.reference == "lockstep":
            found = Measuring(pictures, last_tokens(roles))
            more = both(decoder, given, roles)
        else:
            more = without_pictures(decoder, given, roles)
            key = self.references.key(decoder, more)
            known = self.references.get(key)
            if known is not None:
                return Measuring(pictures, outputs=known)
            found = Measuring(pictures)
            decoder(**more, **{self.argument: found})
            self.references.put(key, found.outputs)
            return found
        decoder(**more, **{self.argument: found})
        return found


def last_tokens(roles: TokenRoles) -> Tensor:
    """Place of the last query of each row that is no padding, int64 [B]."""
    real = ~roles.queries.of(Role.PAD, Role.UNUSED)
    place = torch.arange(real.shape[1], device=real.device)
    return torch.where(real, place, -1).amax(1).clamp(min=0)


@contextlib.contextmanager
def given_heads(keeper: Keeper, decoder: nn.Module, heads: Mapping[int, Tensor]) -> Iterator[None]:
    """Prompts that are read inside of the block get these heads, by layer bool [B, H]."""
    token = _given.set({**(_given.get() or {}), (keeper.argument, id(decoder)): heads})
    try:
        yield
    finally:
        _given.reset(token)


_PIECES = (
    "a prompt came in pieces, or its pictures behind tokens in the cache; heads are chosen at its last token and must "
    "be known before its first. Read it inside of `with handle.generation(inputs)`, which measures the whole prompt"
)
