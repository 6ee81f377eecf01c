"""Outputs of attention whose map is replaced by a target, each by a formula that needs no N x N map.

Each function gets the chosen heads of a call and returns the rows it changes and their new outputs. Fine-Grained
Perturbation Guidance via Attention Head Selection (arXiv 2506.10978), appendix C, names the targets; the formulas are
ours.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

_BLOCK = 2**22  # logits that are in memory at a time where a formula needs some: 16 MiB in float32
_ALL = slice(None)


class Chosen(NamedTuple):
    """The chosen heads of one call.

    Attributes:
        q: [B, h, N, D], after norms and rotary positions.
        k: [B, h, N, D].
        v: [B, h, N, D].
        scale: Of the logits.
        mask: Added to the logits, broadcasts to [B, h, N, N], or None.
        image: Where the image is in the sequence; None where there is no text beside it.
        text: Where the text is.
    """

    q: Tensor
    k: Tensor
    v: Tensor
    scale: float
    mask: Tensor | None
    image: slice | None
    text: slice | None


Result = tuple[slice, Tensor]


def identity(c: Chosen) -> Result:
    """Each token, text included, keeps its own value: P = I."""
    return _ALL, c.v


def uniform(c: Chosen) -> Result:
    """Each token gets the mean of all values that it sees: P = 1 / N."""
    if c.mask is None:
        return _ALL, c.v.mean(2, keepdim=True).expand_as(c.v)
    seen = torch.zeros_like(c.mask).masked_fill(c.mask == -torch.inf, -torch.inf)
    return _ALL, _attend(c._replace(mask=seen), torch.zeros_like(c.q))


def query_mean(c: Chosen) -> Result:
    """Each token attends by the mean query: smoothed energy guidance at infinite blur."""
    return _mean(c, _ALL)


def query_mean_image(c: Chosen) -> Result:
    """Each image token attends by the mean query of the image."""
    return _mean(c, _streams(c)[0])


def query_mean_text(c: Chosen) -> Result:
    """Each text token attends by the mean query of the text."""
    return _mean(c, _streams(c)[1])


def largest(c: Chosen) -> Result:
    """Each token gets the value of the key it weighs most; of equal ones the first."""
    best = torch.cat([logits.argmax(-1) for _, logits in _logits(c, _ALL, _ALL)], 2)
    return _ALL, c.v.gather(2, best[..., None].expand_as(c.v))


def image_identity(c: Chosen) -> Result:
    """Image tokens see of the image themselves alone, and the text: other logits are -inf (diffusers' PAG of SD3).

    With s = q_i k_i and the log-sum-exp L over text keys: sigmoid(s - L) v_i + (1 - sigmoid(s - L)) times attention
    over the text.
    """
    image, text = _streams(c)
    q, k, v = c.q[:, :, image], c.k[:, :, image], c.v[:, :, image]
    own = (q.to(_precise(q)) * k.to(_precise(k))).sum(-1, keepdim=True) * c.scale
    if c.mask is not None:
        own = own + _of(c.mask, image, image).expand(-1, -1, q.shape[2], q.shape[2]).diagonal(dim1=2, dim2=3)[..., None]
    parts = []
    for at, logits in _logits(c, image, text):
        weights = torch.cat([own[:, :, at], logits], -1).softmax(-1)
        words = c.v[:, :, text].to(weights.dtype)
        parts.append(weights[..., :1] * v[:, :, at].to(weights.dtype) + weights[..., 1:] @ words)
    return image, torch.cat(parts, 2).to(v.dtype)


def image_renorm(c: Chosen) -> Result:
    """Image tokens give to themselves all weight that they give to the image, and keep what they give to the text.

    The mass of the text and its share of the output come from one fused attention each, over values that are 1 or v at
    text keys and 0 at image keys.
    """
    image, text = _streams(c)
    words = torch.zeros_like(c.v)
    words[:, :, text] = 1
    mass = _attend(c._replace(v=words), c.q[:, :, image], image)[..., :1]
    return image, (1 - mass) * c.v[:, :, image] + _zeroed(c, image, image)


def block(rows: str, keys: str, *, renormalise: bool) -> Callable[[Chosen], Result]:
    """One of the four blocks of the map left out: rows and keys are each "image" or "text".

    Args:
        rows: Queries of the block.
        keys: Keys of the block.
        renormalise: Whether logits are -inf, or weights 0, so that rows sum to less than 1.
    """

    def of(c: Chosen) -> Result:
        streams = dict(zip(("image", "text"), _streams(c), strict=True))
        at, hidden = streams[rows], streams[keys]
        if not renormalise:
            return at, _zeroed(c, at, hidden)
        seen = streams["text" if keys == "image" else "image"]
        return at, _attend(c, c.q[:, :, at], at, seen)

    return of


TARGETS: dict[str, Callable[[Chosen], Result]] = {
    "identity": identity,
    "uniform": uniform,
    "query_mean": query_mean,
    "query_mean_image": query_mean_image,
    "query_mean_text": query_mean_text,
    "max": largest,
    "image_identity": image_identity,
    "image_renorm": image_renorm,
} | {
    f"{r[0]}{k[0]}_{end}": block(r, k, renormalise=end == "mask")
    for r in ("image", "text")
    for k in ("image", "text")
    for end in ("zero", "mask")
}


def _streams(c: Chosen) -> tuple[slice, slice]:
    if c.image is None or c.text is None:
        raise ValueError(
            "this target treats image and text tokens apart, and this attention has no text beside the image"
        )
    return c.image, c.text


def _mean(c: Chosen, rows: slice) -> Result:
    q = c.q[:, :, rows]
    mean = q.to(_precise(q)).mean(2, keepdim=True).to(q.dtype)
    # One row serves all, unless rows see different keys.
    if c.mask is None or c.mask.shape[2] == 1:
        return rows, _attend(c, mean, slice(0, 1)).expand(-1, -1, q.shape[2], -1)
    return rows, _attend(c, mean.expand_as(q), rows)


def _zeroed(c: Chosen, rows: slice, keys: slice) -> Tensor:
    values = c.v.clone()
    values[:, :, keys] = 0
    return _attend(c._replace(v=values), c.q[:, :, rows], rows)


def _attend(c: Chosen, q: Tensor, rows: slice = _ALL, keys: slice = _ALL) -> Tensor:
    mask = None if c.mask is None else _of(c.mask, rows, keys).to(q.dtype)
    return F.scaled_dot_product_attention(q, c.k[:, :, keys], c.v[:, :, keys], mask, scale=c.scale)


def _logits(c: Chosen, rows: slice, keys: slice) -> Iterator[tuple[slice, Tensor]]:
    """Blocks of rows of the logits, in float32 or float64, with where they are among ``rows``."""
    q, k = c.q[:, :, rows], c.k[:, :, keys]
    q, k = q.to(_precise(q)), k.to(_precise(k))
    mask = None if c.mask is None else _of(c.mask, rows, keys)
    step = max(1, _BLOCK // (q.shape[0] * q.shape[1] * k.shape[2]))
    for start in range(0, q.shape[2], step):
        at = slice(start, start + step)
        with torch.autocast(q.device.type, enabled=False):
            found = q[:, :, at] @ k.mT * c.scale
        yield at, found if mask is None else found + _of(mask, at, _ALL)


def _of(mask: Tensor, rows: slice, keys: slice) -> Tensor:
    mask = mask if mask.shape[2] == 1 else mask[:, :, rows]
    return mask if mask.shape[3] == 1 else mask[:, :, :, keys]


def _precise(x: Tensor) -> torch.dtype:
    return torch.promote_types(x.dtype, torch.float32)
