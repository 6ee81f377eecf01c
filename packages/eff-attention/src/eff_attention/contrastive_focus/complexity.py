"""How busy a picture is, and how spread attention is over it (section 3)."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor


def attention_entropy(maps: Tensor) -> Tensor:
    """Mean over layers of the entropy in nats of the last token's attention to the picture, of maps [T, L, N]."""
    last = maps[-1].double()
    shares = last / last.sum(-1, keepdim=True).clamp_min(1e-300)
    return -(shares * shares.clamp_min(1e-300).log()).sum(-1).mean()


def texture_complexity(picture: Any) -> float:
    """Share of pixels of a PIL picture that are on an edge, after Canny (needs scikit-image)."""
    import numpy as np
    from skimage.feature import canny

    return float(canny(np.asarray(picture.convert("L")) / 255.0).mean())


def colour_complexity(picture: Any, bins: int = 180) -> float:
    """Entropy of the histogram of hues of a PIL picture over its largest value, from 0 to 1."""
    import numpy as np

    hue = np.asarray(picture.convert("HSV"))[..., 0].astype(np.float64) / 256
    counts = torch.from_numpy(np.bincount((hue * bins).astype(int).ravel(), minlength=bins)).double()
    shares = counts / counts.sum()
    return float(-(shares * shares.clamp_min(1e-300).log()).sum() / math.log(bins))
