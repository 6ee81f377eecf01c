"""How good drawings and captions of emojis are, and a loss that needs no captions."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Literal

import torch
from torch import Tensor

from eff_train.recipes.llamafusion import world

Pair = tuple[str, str]


def drawings_right(drawings: Tensor, asked: Sequence[Pair], things: int) -> dict[str, float]:
    """Shares of drawings [n, 3, 32, 32] of things on grounds.

    "found": on which the judge of collages finds the thing; "things" and "grounds": whose nearest picture by squared
    distance, of all emojis on all grounds, is of the thing, and on the ground.
    """
    finds = world.found_on(drawings)
    like = [world.looks_like(drawing, things) for drawing in drawings]
    return {
        "found": _share(a[0] in b for a, b in zip(asked, finds, strict=True)),
        "things": _share(a[0] == b[0] for a, b in zip(asked, like, strict=True)),
        "grounds": _share(a[1] == b[1] for a, b in zip(asked, like, strict=True)),
    }


def captions_right(told: Sequence[str], asked: Sequence[Pair]) -> dict[str, float]:
    """Shares of captions with the right thing, "named", and that are right word for word, "captions"."""
    return {
        "named": _share(f" {a[0]} on " in b for a, b in zip(asked, told, strict=True)),
        "captions": _share(world.caption(*a) == b for a, b in zip(asked, told, strict=True)),
    }


def trivial_loss(t: Tensor, things: int, prediction: Literal["noise", "velocity", "sample"]) -> float:
    """Loss at times t of the best affine function of each noised number, which knows no caption.

    A number of variance s leaves s / (abar s + 1 - abar) of its velocity unexplained, abar times that of its noise, and
    1 - abar times that of itself.
    """
    from eff_adapters.llamafusion.schedule import alphas_cumprod

    pictures = torch.stack([world.emoji(*pair) for pair in world.pairs(things, seen=True)])
    spread, left = pictures.var(0, unbiased=False), alphas_cumprod()[t.cpu()].view(-1, 1, 1, 1)
    share = {"noise": left, "velocity": torch.ones(()), "sample": 1 - left}[prediction]
    return float((share * spread / (left * spread + 1 - left)).mean())


def _share(right: Iterable[bool]) -> float:
    found = list(right)
    return sum(found) / len(found)
