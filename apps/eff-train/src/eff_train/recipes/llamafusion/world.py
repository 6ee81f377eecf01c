"""What SmolLM2 reads and draws: whole collages, or one emoji in the middle of a plain ground; points and latents."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.nn import functional

SIDE = 32
FOLD = 4  # a U-Net of 8 x 8 gets squares of so many points, their colours side by side
_DRAWN = 88  # of 128 points, the longer side of an emoji: a size that the judge of collages knows


def points(image: Image.Image) -> Tensor:
    """A picture as [3, 32, 32] from -1 to 1; every point is the mean of what it covers."""
    small = np.asarray(image.resize((SIDE, SIDE), Image.Resampling.BOX), np.float32)
    return torch.from_numpy(small / 127.5 - 1).permute(2, 0, 1).contiguous()


def picture(values: Tensor) -> Image.Image:
    """The inverse of `points`, without making it larger."""
    scaled = (values.clamp(-1, 1).float().cpu() + 1) * 127.5
    return Image.fromarray(scaled.round().byte().permute(1, 2, 0).numpy())


def folded(values: Tensor) -> Tensor:
    """Points [..., 3, 32, 32] as latents [..., 48, 8, 8]: the same numbers in another order."""
    return functional.pixel_unshuffle(values, FOLD)


def unfolded(latents: Tensor) -> Tensor:
    """The inverse of `folded`."""
    return functional.pixel_shuffle(latents, FOLD)


def collage(seed: int) -> tuple[Tensor, str]:
    """A collage of one to three things and its caption."""
    from eff_embedded.diffusion.world import example

    made, caption = example(seed)
    return points(Image.fromarray(made.picture)), caption


def names(count: int) -> tuple[str, ...]:
    """The first things that emojis are drawn of.

    Raises:
        ValueError: there are not so many.
    """
    from eff_embedded.diffusion.world import OBJECTS

    if not 1 <= count <= len(OBJECTS):
        raise ValueError(f"things={count}; use 1 to {len(OBJECTS)}, or 0 for collages of all of them")
    return OBJECTS[:count]


def grounds() -> tuple[str, ...]:
    """Names of the colours that lie behind."""
    from eff_embedded.diffusion.world import GROUNDS

    return tuple(GROUNDS)


@cache
def emoji(name: str, ground: str) -> Tensor:
    """One thing in the middle of a plain ground, [3, 32, 32] from -1 to 1."""
    from eff_embedded.collages import Ground, Layout, Placed, render
    from eff_embedded.collages.sprites import sprite
    from eff_embedded.diffusion.world import GROUNDS

    high, wide = sprite(name, _DRAWN).mask.shape
    place = Placed(name=name, x=(128 - wide) // 2, y=(128 - high) // 2, size=_DRAWN)
    layout = Layout(size=128, ground=Ground(kind="plain", first=GROUNDS[ground]), objects=(place,))
    return points(Image.fromarray(render(layout).picture))


@cache
def _judge() -> Any:
    from eff_embedded.judge import load_judge

    return load_judge()


def found_on(drawn: Tensor) -> Sequence[Sequence[str]]:
    """The things that the judge of collages finds on drawings [n, 3, 32, 32], surest first.

    It was trained on pictures of 128 x 128 points; of the emojis themselves it names each.
    """
    large = functional.interpolate((drawn.float().cpu() + 1) / 2, size=128, mode="bicubic").clamp(0, 1)
    return [reading.names for reading in _judge()(large)]


def caption(name: str, ground: str) -> str:
    """What an emoji's caption says."""
    article = "an" if name[0] in "aeiou" else "a"
    return f"{article} {name} on a {ground} background"


@cache
def pairs(count: int, *, seen: bool) -> tuple[tuple[str, str], ...]:
    """Things and grounds that are trained, or the fifth of them that is kept out: two grounds of each thing."""
    table = [(i + j, name, ground) for i, name in enumerate(names(count)) for j, ground in enumerate(grounds())]
    return tuple((name, ground) for place, name, ground in table if (place % 5 != 0) == seen)


def looks_like(drawn: Tensor, count: int) -> tuple[str, str]:
    """The thing and ground whose picture is nearest to a drawing [3, 32, 32], by squared distance."""
    asked = [(name, ground) for name in names(count) for ground in grounds()]
    every = torch.stack([emoji(*a) for a in asked])
    return asked[int((every - drawn.cpu().float()).square().flatten(1).sum(1).argmin())]
