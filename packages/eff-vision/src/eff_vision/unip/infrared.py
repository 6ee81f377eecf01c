"""Pictures for pre-training: infrared ones, and coloured ones without their colours."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

MEAN, STD = 0.3801, 0.1871
"""Of infrared pictures in [0, 1] (official code)."""


class GreyTriplicate:
    """Grey values in all three channels, normalised if asked: what infrared and coloured pictures are both turned into.

    Args:
        normalize: Subtract `MEAN` and divide by `STD`.
    """

    def __init__(self, *, normalize: bool = False) -> None:
        self.normalize = normalize

    def __call__(self, picture: Tensor) -> Tensor:
        """From [..., 1 or 3, H, W] in [0, 1] to [..., 3, H, W]."""
        channels = picture.size(-3) if picture.ndim >= 3 else 0
        if channels not in (1, 3):
            raise ValueError(f"a picture must be [..., 1 or 3, H, W], got {list(picture.shape)}")
        if channels == 3 and not bool((picture[..., :1, :, :] == picture).all()):
            weights = torch.tensor([0.299, 0.587, 0.114], dtype=picture.dtype, device=picture.device)
            picture = torch.einsum("...chw,c->...hw", picture, weights)[..., None, :, :]
        grey = picture[..., :1, :, :].expand(*picture.shape[:-3], 3, *picture.shape[-2:])
        return (grey - MEAN) / STD if self.normalize else grey


def to_eight_bit(raw: Tensor, low: float = 1.0, high: float = 99.0) -> Tensor:
    """Raw thermal values [..., H, W] of any scale to [0, 1] between two percentiles of each picture.

    Raises:
        ValueError: the percentiles are not ordered, or values are not finite.
    """
    if not 0 <= low < high <= 100:
        raise ValueError(f"percentiles must be ordered within 0 to 100, got {low} and {high}")
    if not bool(raw.isfinite().all()):
        raise ValueError("raw values are not all finite")
    values = raw.double().flatten(-2)
    ends = torch.quantile(values, torch.tensor([low, high], dtype=torch.float64) / 100, dim=-1)
    scaled = (values - ends[0][..., None]) / (ends[1] - ends[0]).clamp_min(1e-12)[..., None]
    return scaled.clamp(0, 1).unflatten(-1, raw.shape[-2:]).float()


class InfraredMix:
    """Draws pictures from several sets in given shares.

    Args:
        sets: Pictures of each set by name, such as ``{"thermal": [...], "colour": [...]}``.
        shares: Share of each set; by the numbers of pictures if left out.
    """

    def __init__(self, sets: Mapping[str, Sequence[Tensor]], shares: Mapping[str, float] | None = None) -> None:
        if not sets or not all(len(s) for s in sets.values()):
            raise ValueError("each set needs at least one picture")
        if shares is not None and (set(shares) != set(sets) or not min(shares.values()) > 0):
            raise ValueError(f"shares must be positive, one for each of {sorted(sets)}, got {dict(shares)}")
        self.sets = dict(sets)
        weights = [float(len(s)) if shares is None else shares[n] for n, s in self.sets.items()]
        self._weights = torch.tensor(weights)
        self._grey = GreyTriplicate()

    def draw(self, generator: torch.Generator) -> Tensor:
        """One picture [3, H, W], grey."""
        which = int(torch.multinomial(self._weights, 1, generator=generator))
        pictures = list(self.sets.values())[which]
        return self._grey(pictures[int(torch.randint(len(pictures), (), generator=generator))])
