"""Losses on two views of each item, and on labels."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def _check_views(z1: Tensor, z2: Tensor) -> None:
    if z1.shape != z2.shape or z1.ndim != 2:
        raise ValueError(f"the two views must be [B, d] of one shape, got {list(z1.shape)} and {list(z2.shape)}")
    if z1.size(0) < 2:
        raise ValueError("a contrastive loss needs a batch of two items or more, got 1")


def spectral_contrastive_loss(z1: Tensor, z2: Tensor) -> Tensor:
    """``-2 E[z1.z2+] + E[(z1.z2-)^2]`` over pairs of one item and of different items (HaoChen and others, 2021)."""
    _check_views(z1, z2)
    gram = z1 @ z2.T
    b = gram.size(0)
    squares = gram.square()
    apart = (squares.sum() - squares.diagonal().sum()) / (b * (b - 1))
    return -2 * gram.diagonal().mean() + apart


def nt_xent(z1: Tensor, z2: Tensor, *, temperature: float = 0.5) -> Tensor:
    """SimCLR's loss: each view finds its partner among the 2B - 1 others by cosine over ``temperature``."""
    _check_views(z1, z2)
    logits = _cosines(torch.cat((z1, z2)), temperature)
    b = z1.size(0)
    partner = torch.arange(2 * b, device=z1.device).roll(b)
    return F.cross_entropy(logits, partner)


def supcon(z1: Tensor, z2: Tensor, labels: Tensor, *, temperature: float = 0.5) -> Tensor:
    """Supervised contrastive loss (Khosla and others, 2020, eq. 2): all views of an item's label are its partners.

    With a label for each item alone it is `nt_xent`.
    """
    _check_views(z1, z2)
    if labels.shape != z1.shape[:1]:
        raise ValueError(f"labels must be [{z1.size(0)}], got {list(labels.shape)}")
    log_shares = _cosines(torch.cat((z1, z2)), temperature).log_softmax(-1)
    both = torch.cat((labels, labels))
    partners = (both[:, None] == both).fill_diagonal_(False)
    # The diagonal is -inf: it is masked before the sum, for 0 * -inf is NaN.
    return -(log_shares.masked_fill(~partners, 0).sum(1) / partners.sum(1)).mean()


def barlow_twins(z1: Tensor, z2: Tensor, *, off_diagonal: float = 5e-3) -> Tensor:
    """Distance of the cross-correlation of both views from the identity (Zbontar and others, 2021)."""
    _check_views(z1, z2)
    a, b = ((z - z.mean(0)) / z.std(0, correction=0).clamp_min(1e-6) for z in (z1, z2))
    correlation = a.T @ b / z1.size(0)
    on = (correlation.diagonal() - 1).square().sum()
    off = correlation.square().sum() - correlation.diagonal().square().sum()
    return on + off_diagonal * off


def _cosines(z: Tensor, temperature: float) -> Tensor:
    if not temperature > 0:
        raise ValueError(f"temperature must be positive, got {temperature}")
    unit = F.normalize(z.float(), dim=-1)
    logits = unit @ unit.T / temperature
    return logits.masked_fill(torch.eye(len(z), dtype=torch.bool, device=z.device), -torch.inf)
