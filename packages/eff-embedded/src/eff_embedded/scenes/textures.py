"""What surfaces look like: patterns, noise, photographs and sprites.

The colour of a point depends on the surface alone, never on the camera, so that all views of a scene agree.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, get_args

import numpy as np

from eff_embedded.scenes.geometry import Array, Vec3
from eff_embedded.scenes.images import photograph_pixels, sprite_pixels
from eff_embedded.scenes.noise import value_noise

TextureKind = Literal["plain", "checker", "stripes", "gradient", "noise", "photograph", "sprite"]
Direction = Literal["right", "down", "diagonal"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Texture:
    """The look of a surface.

    Attributes:
        kind: "checker", "stripes" and "noise" blend both colours, "gradient" goes from the first at the top to the
            second at the bottom, "plain" is the first. "photograph" is one of scikit-image's pictures, where a grey one
            blends from the first colour (dark) to the second; "sprite" has the first colour as its ground.
        colours: Two colours, red, green and blue between 0 and 1.
        period: Length of a pattern's period in metres; rounded so that whole periods fit a side or a circumference.
            Pictures are laid in tiles of that size, every second one mirrored; 0 stands for one picture on a side.
        direction: In which stripes alternate.
        image: Name of the photograph or sprite.
        seed: Of the noise.
    """

    kind: TextureKind = "plain"
    colours: tuple[Vec3, Vec3] = ((0.7, 0.7, 0.7), (0.4, 0.4, 0.4))
    period: float = 0.0
    direction: Direction = "right"
    image: str = ""
    seed: int = 0

    def __post_init__(self) -> None:
        for name, choices in (("kind", TextureKind), ("direction", Direction)):
            if getattr(self, name) not in get_args(choices):
                raise ValueError(f"{name}={getattr(self, name)!r}; use one of {get_args(choices)}")
        if self.kind in ("checker", "stripes", "noise") and not self.period > 0:
            raise ValueError(f"period={self.period} of a {self.kind} texture; it is a length in metres, above 0")
        if self.period < 0:
            raise ValueError(f"period={self.period}; a length in metres cannot be negative")
        if self.kind in ("photograph", "sprite") and not self.image:
            raise ValueError(f"a {self.kind} texture needs the name of an image")
        if any(not 0 <= x <= 1 for colour in self.colours for x in colour):
            raise ValueError(f"colours={self.colours}; parts of a colour are between 0 and 1")

    def colour(self, uv: Array, lengths: Array, points: Array, *, closed: bool) -> Array:
        """Colours at points of a surface.

        Args:
            uv: Coordinates between 0 and 1 on the side, [2, N].
            lengths: What these span in metres, [2, N].
            points: In the frame of the solid, in metres, [3, N]; the noise is a function of these.
            closed: Whether the side runs round a solid, so that its left and right border meet.

        Returns:
            [3, N] between 0 and 1.
        """
        first, second = (np.array(c)[:, None] for c in self.colours)
        if self.kind == "plain":
            return np.broadcast_to(first, points.shape)
        if self.kind in ("photograph", "sprite"):
            return self._picture(uv, lengths, first, second, closed)
        return first + (second - first) * self._share(uv, lengths, points, closed)

    def _share(self, uv: Array, lengths: Array, points: Array, closed: bool) -> Array:
        """How much of the second colour there is, [N] between 0 and 1."""
        if self.kind == "gradient":
            return uv[1]
        if self.kind == "noise":
            return value_noise(points / self.period, self.seed)
        right, down = uv * np.maximum(1.0, np.round(lengths / self.period))
        if self.kind == "checker":
            return (np.floor(2 * right) + np.floor(2 * down)) % 2
        along = {"right": right, "down": down, "diagonal": right + down}[self.direction]
        return np.floor(2 * along) % 2

    def _picture(self, uv: Array, lengths: Array, first: Array, second: Array, closed: bool) -> Array:
        pixels = (photograph_pixels if self.kind == "photograph" else sprite_pixels)(self.image)
        tiles = np.maximum(1.0, np.round(lengths / self.period)) if self.period else np.ones_like(uv)
        if closed:  # a picture and its mirror image close without a seam
            tiles = np.stack([2 * np.ceil(tiles[0] / 2), tiles[1]])
        sampled = sample_mirrored(pixels, uv * tiles)
        if sampled.shape[0] == 1:
            return first + (second - first) * sampled
        return sampled if sampled.shape[0] == 3 else sampled[:3] + first * (1.0 - sampled[3])


def sample_mirrored(pixels: Array, uv: Array) -> Array:
    """Bilinear samples of a picture whose every second repetition is mirrored.

    Args:
        pixels: [H, W, channels].
        uv: [2, N]; 1 is the width and the height of the picture.

    Returns:
        [channels, N].
    """
    height, width = pixels.shape[:2]
    size = np.array([[width], [height]])
    folded = 1.0 - np.abs(uv % 2.0 - 1.0)
    at = np.clip(folded * size - 0.5, 0.0, size - 1.0)
    low = np.minimum(at.astype(np.int64), np.maximum(size - 2, 0))
    (x, y), (right, down) = low, (at - low).astype(pixels.dtype)[..., None]
    flat, start = pixels.reshape(height * width, -1), y * width + x
    step, row = int(width > 1), width * int(height > 1)
    upper = flat[start] * (1 - right) + flat[start + step] * right
    lower = flat[start + row] * (1 - right) + flat[start + row + step] * right
    return (upper * (1 - down) + lower * down).T
